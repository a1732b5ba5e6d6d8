"""How the Triton kernel is cut into tiles, and which cut is likely to be fast."""

import dataclasses
import math

import jax.numpy as jnp

from qjax_kernels.scaled_gemm.config import BLOCK
from qjax_kernels.triton_gpus import Cost, gpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of outputs x tokens.

    Attributes:
      outs, tokens: of a tile; powers of two.
      step: features that are multiplied in one step.
      warps: of a block.
      stages: of the pipeline of copies into shared memory.
      splits: blocks that share the features of a tile; over 1, a second kernel adds their sums.
      band: tiles of tokens that are visited before the next tile of outputs, for the L2 cache.
    """

    outs: int
    tokens: int
    step: int
    warps: int
    stages: int
    splits: int = 1
    band: int = 8


# outs, tokens, step, warps and stages.
_TILES = [
    (64, 16, 128, 4, 5), (32, 16, 128, 2, 6), (64, 16, 256, 4, 4), (128, 16, 128, 4, 4),
    (64, 32, 128, 4, 4), (128, 32, 128, 4, 4), (32, 32, 128, 2, 5),
    (64, 64, 128, 4, 4), (128, 64, 128, 4, 4), (128, 64, 64, 4, 4), (128, 64, 128, 8, 4),
    (128, 128, 64, 4, 4), (128, 128, 128, 8, 3), (64, 128, 64, 4, 4), (128, 128, 64, 8, 4),
]  # fmt: skip
# Capability -> where tensor cores read both operands from shared memory, registers are left for
# these; but Blackwell's have no product of integers, which is made by those of Ampere.
_WIDE_TILES = {
    90: [(128, 256, 128, 8, 3), (128, 128, 128, 4, 4)],
    100: [(128, 128, 128, 4, 4)],
}
_SPLITS = (1, 2, 3, 4, 6, 8)
_SHORTEST = 4  # steps of a part


def shared_memory(config: Config) -> int:
    """Bytes of a block, or some more: Triton keeps a stage less of what it can."""
    stage = (config.outs + config.tokens) * config.step
    return max(config.stages * stage, config.outs * config.tokens * 4) + 1024


def candidates(
    m: int,
    out: int,
    features: int,
    *,
    dtype: jnp.dtype,
    blocked: bool,
    capability: int,
    cores: int,
) -> list[Config]:
    """At most 6 for x [m, features] and a weight [out, features] of a dtype, best guess first."""
    found = {}
    wide = _WIDE_TILES.get(capability, []) if dtype != jnp.int8 or capability == 90 else []
    for config in _fitting(m, blocked, _TILES + wide, capability):
        for splits in _SPLITS:
            split = dataclasses.replace(config, splits=splits)
            if splits == 1 or math.ceil(features / config.step) >= _SHORTEST * splits:
                cost = _cost(split, m, out, features)
                found[split] = cost.microseconds(capability, cores)
    order = sorted(found, key=lambda config: found[config])
    # Four different tiles come before other splits of one.
    first = {dataclasses.replace(c, splits=1): c for c in reversed(order)}
    best = sorted(first.values(), key=lambda config: found[config])[:4]
    return (best + [c for c in order if c not in best])[:6]


def _fitting(
    m: int, blocked: bool, tiles: list[tuple[int, int, int, int, int]], capability: int
) -> list[Config]:
    """Those that suit the scales, the number of tokens and the GPU."""
    least = max(1 << (m - 1).bit_length(), 16)
    suitable = (64, 128, 256) if least > 64 else (least,)
    result = []
    for outs, tokens, step, warps, stages in tiles:
        config = Config(outs=outs, tokens=tokens, step=step, warps=warps, stages=stages)
        # Scaled blocks take a second set of registers for sums, and some for scales.
        takes = not blocked or (step <= BLOCK and tokens <= 64 and outs * tokens <= 1024 * warps)
        fits = shared_memory(config) <= gpu(capability).shared
        if tokens in suitable and takes and fits:
            result.append(config)
    return result


def _cost(config: Config, m: int, out: int, features: int) -> Cost:
    return Cost(
        m=m,
        out=out,
        features=features,
        outs=config.outs,
        tokens=config.tokens,
        step=config.step,
        splits=config.splits,
        warps=config.warps,
        shared=shared_memory(config),
        weights=out * features,
        x_row=features,
        rate=2.0,
    )
