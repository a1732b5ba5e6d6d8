"""Products of float activations with quantized weights."""
