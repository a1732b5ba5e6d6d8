"""The least time that an H200 allows a call: its bytes over the bandwidth, its sums over the peak.

Bytes are counted once each way, as stored. No kernel is faster, so measured time over this bound is
what is left to win.
"""

import dataclasses
import math

BANDWIDTH = 4.1e12  # bytes/s that a copy reaches on an H200; its data sheet says 4.8
BF16 = 989e12  # dense operations/s on an H200's tensor cores
FP8 = INT8 = 1979e12
L2 = 60e6  # bytes of an H200's cache


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must do at least.

    Attributes:
      bytes: read and written in device memory.
      operations: multiplications and additions.
      peak: operations/s of the unit that does them.
    """

    bytes: float
    operations: float
    peak: float = BF16

    @property
    def us(self) -> float:
        """Microseconds: the larger of the two times."""
        return 1e6 * max(self.bytes / BANDWIDTH, self.operations / self.peak)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Storage of a product x[m, k] @ w[n, k].T with bfloat16 results.

    Attributes:
      x: bits of an activation.
      w: bits of a weight.
      peak: operations/s.
      x_scales: one float32 a row of x.
      w_scales: 'group' (bfloat16, one for each group of an output), 'output' (float32) or None.
    """

    x: int
    w: int
    peak: float
    x_scales: bool = False
    w_scales: str | None = None

    def weight_bytes(self, n: int, k: int, group_size: int | None) -> float:
        """Bytes of one weight and its scales."""
        scales = 0
        if self.w_scales == "group":
            scales = 2 * n * math.ceil(k / (group_size or k))
        elif self.w_scales == "output":
            scales = 4 * n
        return n * k * self.w / 8 + scales

    def work(self, m: int, n: int, k: int, group_size: int | None) -> Work:
        """Of one product."""
        x = m * k * self.x / 8 + (4 * m if self.x_scales else 0)
        y = 2 * m * n
        return Work(x + y + self.weight_bytes(n, k, group_size), 2.0 * m * n * k, self.peak)


# The products that are measured, by op.
LINEAR = {
    "bf16": Linear(x=16, w=16, peak=BF16),
    "w4a16": Linear(x=16, w=4, peak=BF16, w_scales="group"),
    "w8a16": Linear(x=16, w=8, peak=BF16, w_scales="output"),
    "fp8": Linear(x=8, w=8, peak=FP8, x_scales=True, w_scales="output"),
    "fp8_tensor": Linear(x=8, w=8, peak=FP8),
    "int8": Linear(x=8, w=8, peak=INT8, x_scales=True, w_scales="output"),
    "w4a8": Linear(x=8, w=4, peak=FP8, x_scales=True, w_scales="group"),
}


def copies(bytes_each: float) -> int:
    """How many weights to rotate so that none is still in the cache when its turn comes again.

    Twice the cache, at least two of them; no more than 16 (weights under 8 MB), since each copy is
    one more call in the program that is timed.
    """
    return min(16, max(2, math.ceil(2 * L2 / bytes_each)))
