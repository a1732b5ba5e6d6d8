"""The next token from logits: the largest, or drawn."""
