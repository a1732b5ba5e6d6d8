"""The product of activations and weights of 16 bits."""
