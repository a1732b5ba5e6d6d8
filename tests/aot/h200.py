"""Compile for an H200 on a machine without one, and read what the assembler says of each kernel."""

from qjax_kernels.tuning.assembly import Kernel as Kernel
from qjax_kernels.tuning.deviceless import SHARED_MEMORY as SHARED_MEMORY
from qjax_kernels.tuning.deviceless import TARGET as TARGET
from qjax_kernels.tuning.deviceless import Compiled as Compiled
from qjax_kernels.tuning.deviceless import compile_for_h200 as compile_for_h200
from qjax_kernels.tuning.deviceless import mesh as mesh
from qjax_kernels.tuning.deviceless import shape as shape
