"""Low-precision products on plain arrays. Imports nothing from qjax."""

from qjax_kernels.scaled_gemm.api import scaled_gemm as scaled_gemm
from qjax_kernels.weight_only_gemm.api import weight_only_gemm as weight_only_gemm
