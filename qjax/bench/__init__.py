"""Speed of generation, with random weights in the shapes of known models."""
