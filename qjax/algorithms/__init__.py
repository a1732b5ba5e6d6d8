"""The methods that choose quantized numbers: arrays in, arrays out, one method a file."""
