"""Products of two quantized operands."""
