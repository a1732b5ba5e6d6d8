"""Decoders that run on the kernels: their weights, and their step."""
