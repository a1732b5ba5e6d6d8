"""Residual sum, norm and quantization of its result."""
