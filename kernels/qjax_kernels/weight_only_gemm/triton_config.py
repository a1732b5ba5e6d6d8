"""How the portable kernel is cut into tiles, and which cut is likely to be fast."""

import dataclasses
import math

from qjax_kernels.triton_gpus import Cost, gpu
from qjax_kernels.weight_only_gemm.portable import BYTES, WIDTHS, Packed

ROWS = 2**30  # features of a group that is a whole row: a multiple of every step
FEW = 64  # tokens of a tile up to which each warp converts the weights that it multiplies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of outputs x tokens.

    Attributes:
      outs, tokens: of a tile; powers of two.
      chunks: of 32 bytes of each output that are multiplied in one step.
      warps: of a block.
      stages: of the pipeline of copies into shared memory.
      splits: blocks that share the features of a tile; over 1, a second kernel adds their sums.
      band: tiles of tokens that are visited before the next tile of outputs, for the L2 cache.
    """

    outs: int
    tokens: int
    chunks: int
    warps: int
    stages: int
    splits: int = 1
    band: int = 8


# Capability -> outs, tokens, chunks (for 4 bits), warps and stages of tiles that it and later ones
# have the registers for.
_TILES = {
    80: [
        (64, 8, 2, 4, 6), (64, 8, 2, 2, 6), (32, 8, 2, 2, 7), (128, 8, 2, 4, 5),
        (64, 16, 2, 2, 5), (128, 16, 2, 4, 4), (32, 16, 2, 2, 6),
        (64, 32, 2, 4, 4), (128, 32, 2, 4, 4), (64, 32, 2, 2, 4),
        (64, 64, 2, 4, 4), (128, 64, 2, 8, 4), (128, 64, 1, 8, 4),
        (128, 128, 1, 8, 4), (128, 128, 1, 8, 3), (64, 128, 1, 4, 4),
    ],
    86: [(64, 16, 2, 4, 5)],
    90: [(128, 256, 1, 8, 3), (256, 128, 1, 8, 3)],
}  # fmt: skip
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_SHORTEST = 4  # steps of a part


def group_of(weight: Packed) -> int:
    """Features that share a scale and a zero point, ROWS if all of them do."""
    return ROWS if weight.groups == 1 else weight.group_size


def paired(weight: Packed) -> bool:
    """Whether the two nibbles of a byte belong to different groups."""
    return weight.format == "int4" and group_of(weight) == 32


def shared_memory(config: Config, weight: Packed, capability: int) -> int:
    """Bytes of a block, or some more: Triton keeps a stage less of what it can."""
    step = _step(config, weight)
    stage = config.outs * config.chunks * BYTES + config.tokens * step * 2
    stage += 8 * config.outs if weight.table is not None else 0
    # Weights go from one warp to others, or to tensor cores that take no registers.
    exchange = config.outs * step * 2 if config.tokens > FEW or capability >= 100 else 0
    store = config.outs * config.tokens * 4
    return max(config.stages * stage + exchange, store) + 1024


def candidates(m: int, weight: Packed, *, capability: int, cores: int) -> list[Config]:
    """At most 6 for m tokens, best guess first."""
    found = {}
    for config in _fitting(m, weight, capability):
        for splits in _SPLITS:
            split = dataclasses.replace(config, splits=splits)
            steps = math.ceil(weight.in_features / _step(config, weight))
            if splits == 1 or steps >= _SHORTEST * splits:
                found[split] = _cost(split, m, weight, capability).microseconds(capability, cores)
    order = sorted(found, key=lambda config: found[config])
    # Four different tiles come before other splits of one.
    first = {dataclasses.replace(c, splits=1): c for c in reversed(order)}
    best = sorted(first.values(), key=lambda config: found[config])[:4]
    return (best + [c for c in order if c not in best])[:6]


def _fitting(m: int, weight: Packed, capability: int) -> list[Config]:
    """Tiles that suit the groups, the number of tokens and the GPU."""
    least = max(1 << (m - 1).bit_length(), 8)
    suitable = (64, 128, 256) if least > FEW else (least,)
    result = []
    for sizes in (s for minimum, tiles in _TILES.items() if capability >= minimum for s in tiles):
        outs, tokens, chunks, warps, stages = sizes
        chunks = chunks * 64 // WIDTHS[weight.format]
        while chunks > 1 and group_of(weight) % (chunks * WIDTHS[weight.format]):
            chunks //= 2
        config = Config(outs=outs, tokens=tokens, chunks=chunks, warps=warps, stages=stages)
        fits = shared_memory(config, weight, capability) <= gpu(capability).shared
        if tokens in suitable and fits and config not in result:
            result.append(config)
    return result


def _cost(config: Config, m: int, weight: Packed, capability: int) -> Cost:
    return Cost(
        m=m,
        out=weight.out_features,
        features=weight.in_features,
        outs=config.outs,
        tokens=config.tokens,
        step=_step(config, weight),
        splits=config.splits,
        warps=config.warps,
        shared=shared_memory(config, weight, capability),
        weights=weight.words.size,
        x_row=2 * weight.in_features,
        convert=True,
    )


def _step(config: Config, weight: Packed) -> int:
    return config.chunks * WIDTHS[weight.format]
