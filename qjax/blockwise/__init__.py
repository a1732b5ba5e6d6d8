"""Quantization block by block: calibrate a decoder layer, quantize it, go on with what it gives."""
