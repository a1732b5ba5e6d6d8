"""Measured configurations: `qjax tune` writes a file for each device, and the kernels read it."""
