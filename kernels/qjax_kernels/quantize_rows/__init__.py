"""Rows in int8 or fp8, with a scale for each."""
