"""Attention of many queries: of whole prompts, and of chunks over pages of an earlier cache."""
