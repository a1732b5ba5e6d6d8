"""Microseconds a call, from the GPU's own clock; `qjax tune` needs it too, so it is in the
package."""

from qjax_kernels.timing import chain as chain
from qjax_kernels.timing import run_and_time as run_and_time
from qjax_kernels.timing import run_kernels as run_kernels
from qjax_kernels.timing import time_kernels as time_kernels
