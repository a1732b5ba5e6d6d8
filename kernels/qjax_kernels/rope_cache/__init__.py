"""Rotary position embedding of queries and keys, and keys and values into the paged cache."""
