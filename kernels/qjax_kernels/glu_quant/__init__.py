"""Activations, gated or not, and quantization of their result."""
