"""The least time that an H200 allows a call; `qjax tune` needs it too, so it is in the package."""

from qjax_kernels.bound import BANDWIDTH as BANDWIDTH
from qjax_kernels.bound import BF16 as BF16
from qjax_kernels.bound import FP8 as FP8
from qjax_kernels.bound import INT8 as INT8
from qjax_kernels.bound import L2 as L2
from qjax_kernels.bound import LINEAR as LINEAR
from qjax_kernels.bound import Linear as Linear
from qjax_kernels.bound import Work as Work
from qjax_kernels.bound import copies as copies
