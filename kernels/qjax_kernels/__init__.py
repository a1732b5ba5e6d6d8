"""Low-precision products on plain arrays; one folder an op. Imports nothing from qjax."""
