"""Causal grouped-query attention over contiguous keys and values."""
