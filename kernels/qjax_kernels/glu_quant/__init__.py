"""Gated linear units and quantization of their result."""
