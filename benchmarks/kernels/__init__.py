"""Kernels: what the bound is, what qjax takes, what the peers take. See ../README.md."""
