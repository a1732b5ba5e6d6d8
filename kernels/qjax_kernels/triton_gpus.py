"""What a product in Triton is likely to cost on each kind of GPU: for choosing among tiles only."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What one does, roughly.

    Attributes:
      shared: bytes of shared memory that a block may have.
      memory, cache: TB/s of memory and of the L2 cache.
      flops: dense TFLOP/s in bfloat16.
    """

    shared: int
    memory: float
    cache: float
    flops: float


GPUS = {
    80: Gpu(166912, 1.5, 4.0, 280),
    86: Gpu(101376, 0.5, 1.5, 70),
    89: Gpu(101376, 0.6, 2.0, 140),
    90: Gpu(232448, 4.0, 5.5, 700),
    100: Gpu(232448, 6.5, 10.0, 1500),
}
# Microseconds: adding up the parts of a sum; one step of a block that is alone; for all blocks of a
# multiprocessor to convert a million weights.
_PARTS, _STEP, _CONVERT = 2.5, 0.3, 20.0


def gpu(capability: int) -> Gpu:
    """Of a compute capability, 90 for 9.0; of the nearest one below where it is not listed."""
    if capability >= 120:  # RTX 50 and its kin
        return GPUS[89]
    return GPUS[max(number for number in GPUS if number <= capability)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """A product [out, in] x [m, in] cut into tiles of outs x tokens.

    Attributes:
      m, out, features: of the product.
      outs, tokens: of a tile.
      step: features of a step.
      splits: parts of the features.
      warps, shared: of a block, threads / 32 and bytes.
      weights, x_row: bytes of all weights and of a row of x.
      rate: of the tensor cores, over that of bfloat16.
      convert: whether weights are converted to another type.
    """

    m: int
    out: int
    features: int
    outs: int
    tokens: int
    step: int
    splits: int
    warps: int
    shared: int
    weights: int
    x_row: int
    rate: float = 1.0
    convert: bool = False

    def microseconds(self, capability: int, cores: int) -> float:
        """What takes longest of loading, converting and multiplying, given how evenly blocks
        divide among multiprocessors, and of the steps of a block, one after the other."""
        device = gpu(capability)
        down, across = math.ceil(self.out / self.outs), math.ceil(self.m / self.tokens)
        blocks = down * across * self.splits
        fit = max(min(device.shared // self.shared, 16 // self.warps, 8), 1)
        uneven = math.ceil(blocks / cores) * cores / blocks
        if blocks > 2 * fit * cores:  # they are handed out one by one
            uneven = 1 + 0.25 * (uneven - 1)

        # 1e6 bytes or operations in a microsecond are 1 T a second.
        tile = 2 * self.outs * self.tokens
        flops = device.flops * self.rate
        longest = max(
            self.weights / device.memory,
            (across * self.weights + down * self.m * self.x_row) / device.cache,
            _CONVERT * across * self.out * self.features / cores if self.convert else 0,
            down * across * tile * self.features / flops,
        )
        steps = math.ceil(math.ceil(self.features / self.step) / self.splits)
        turn = steps * (_STEP + 1e-6 * tile * self.step / (flops / cores))
        alone = math.ceil(blocks / (cores * fit)) * turn
        parts = 0.0
        if self.splits > 1:
            parts = _PARTS + 8e-6 * self.splits * self.m * self.out / device.memory
        return max(1e-6 * uneven * longest, alone) + parts
