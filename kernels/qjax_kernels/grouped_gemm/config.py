"""How the Triton kernels cut a product into tiles."""

import dataclasses

from qjax_kernels.grouped_gemm.layout import CHUNK

CORES = 132  # of an H200
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of rows x columns, one a block.

    Attributes:
      rows: of a tile, all of one expert; 8 or more, without `swap` 16.
      columns: of a tile: outputs.
      k_bytes: of an output's weights that a step loads (of int4: two columns a byte, 64 or more).
      warps: of a block.
      stages: steps whose loads are in flight or in use.
      swap: the weights are the left operand of the product, in which Hopper's tensor cores want 64
        of a block of 4 warps; rows then waste nothing from 8 on. int4 and converted weights always
        are, so that they go through registers.
      scale_sums: int4: a group's scale multiplies the sums over it, instead of its weights.
      band: tiles of rows that are visited before the next columns, for the L2 cache.
    """

    rows: int
    columns: int
    k_bytes: int = 128
    warps: int = 4
    stages: int = 4
    swap: bool = True
    scale_sums: bool = True
    band: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice depends on.

    Attributes:
      rows, experts, out, features: of the product.
      x_bits, bits: of an activation and of a weight.
      group: columns that share a scale; `features` for one scale an output.
      integer: activations are int8.
      capability: of the GPU, 90 for an H200.
    """

    rows: int
    experts: int
    out: int
    features: int
    x_bits: int
    bits: int
    group: int
    capability: int
    integer: bool = False

    @property
    def filled(self) -> int:
        """Rows of an expert, if all are spread over as many experts as can be."""
        return -(-self.rows // max(min(self.experts, self.rows), 1))


def candidates(problem: Problem) -> list[Config]:
    """At most 6, best guess first, none with more shared memory than a block may have."""
    propose = _few if problem.filled <= 64 else _many
    if problem.capability != 90:
        propose = _elsewhere
    most = SHARED_MEMORY.get(problem.capability, 99 * 1024)
    fitting = []
    for config in propose(problem):
        while shared_memory(config, problem) > most and config.stages > 2:
            config = dataclasses.replace(config, stages=config.stages - 1)
        if shared_memory(config, problem) <= most and config not in fitting:
            fitting.append(config)
    return fitting[:6]


def row_tiles(rows: int, experts: int, tile: int) -> int:
    """The most tiles that rows, and those that belong to no expert, can take."""
    groups = min(experts + 1, rows)
    return groups + (rows - groups) // tile


def k_tile(config: Config, problem: Problem) -> int:
    """Columns of a step."""
    columns = config.k_bytes * 8 // problem.bits
    return max(columns, CHUNK) if problem.bits == 4 else columns


def k_part(config: Config, problem: Problem) -> int:
    """Columns of a step of int4 weights that are multiplied at once: of one group, or CHUNK."""
    columns = k_tile(config, problem)
    while problem.group < problem.features and problem.group % columns and columns > CHUNK:
        columns //= 2
    return columns


def shared_memory(config: Config, problem: Problem) -> int:
    """Bytes, at most: every step's operands as they are loaded."""
    k = k_tile(config, problem)
    return config.stages * k * (config.rows * problem.x_bits + config.columns * problem.bits) // 8


def _few(problem: Problem) -> list[Config]:
    """Weights are read once, and the time is theirs: blocks enough for every multiprocessor, and
    64 KB or more in flight on each."""
    # Groups differ: one with half as many rows again still reads its weights once.
    rows = max(16, 1 << (problem.filled * 3 // 2 - 1).bit_length())
    if problem.bits == 4:
        found = [
            Config(rows=rows, columns=64, k_bytes=128, stages=4),
            Config(rows=rows, columns=64, k_bytes=64, stages=6),
            Config(rows=rows, columns=64, k_bytes=256, stages=3),
            Config(rows=rows, columns=128, k_bytes=128, stages=4, warps=8),
            Config(rows=rows, columns=64, k_bytes=128, stages=8),
        ]
    elif problem.bits < problem.x_bits:
        found = [
            Config(rows=rows, columns=64, k_bytes=128, stages=5),
            Config(rows=rows, columns=128, k_bytes=128, stages=4, warps=8),
            Config(rows=rows, columns=64, k_bytes=64, stages=8),
        ]
    else:
        found = [
            Config(rows=rows, columns=64, k_bytes=256),
            Config(rows=rows, columns=64, k_bytes=256, stages=8),
            Config(rows=rows, columns=128, k_bytes=256, warps=8),
            Config(rows=rows, columns=128, k_bytes=256),
        ]
    active = min(problem.experts, problem.rows)
    if active * -(-problem.out // 64) <= 2 * CORES:
        # So few blocks must have more in flight each.
        found.sort(key=lambda config: -config.stages * config.k_bytes)
    if problem.filled > 4:
        return found
    # The instructions of a single warp, which need no 64 columns: more and smaller blocks.
    small = Config(rows=8, columns=32, k_bytes=64, warps=2, stages=8)
    if problem.bits == 4:
        return [*found, small]
    small = dataclasses.replace(small, k_bytes=256, stages=6)
    narrow = Config(rows=16, columns=16, k_bytes=512, stages=8, swap=False, warps=2)
    return [*found[:4], small, narrow] if problem.bits == problem.x_bits else [*found, small]


def _many(problem: Problem) -> list[Config]:
    """The time is the tensor cores': large tiles, whose operands come from the L2 cache."""
    if problem.bits == 4:
        base = Config(rows=128, columns=128, k_bytes=64, warps=8, scale_sums=False)
        return [
            base,
            dataclasses.replace(base, k_bytes=128, stages=3),
            dataclasses.replace(base, rows=256, stages=3),
            dataclasses.replace(base, stages=3, band=16),
            dataclasses.replace(base, columns=64, warps=4),
            dataclasses.replace(base, rows=64, warps=4),
        ]
    if problem.bits < problem.x_bits:
        return [
            Config(rows=128, columns=128, k_bytes=64, warps=8),
            Config(rows=256, columns=128, k_bytes=64, warps=8, stages=3),
            Config(rows=128, columns=64, k_bytes=128, stages=3),
        ]
    if problem.integer:
        # Triton waits for each int8 product, and another block must fill the gap.
        base = Config(rows=128, columns=128, warps=8, stages=3, swap=False)
        return [
            base,
            dataclasses.replace(base, columns=256, stages=4),
            dataclasses.replace(base, columns=256, warps=16, stages=4),
            dataclasses.replace(base, band=16),
            dataclasses.replace(base, rows=256, stages=4, swap=True),
        ]
    return [
        Config(rows=128, columns=256, warps=8, swap=False),
        Config(rows=128, columns=256, warps=8, stages=3, swap=False, band=16),
        Config(rows=256, columns=128, warps=8),
        Config(rows=128, columns=128, swap=False),
        Config(rows=128, columns=128, k_bytes=256, warps=8, stages=3, swap=False),
        Config(rows=64, columns=256, swap=False),
    ]


def _elsewhere(problem: Problem) -> list[Config]:
    """GPUs whose tensor cores take both operands from registers, which larger tiles exceed."""
    rows = min(64, max(16, 1 << (problem.filled - 1).bit_length()))
    base = Config(rows=rows, columns=64, k_bytes=64 if problem.bits == 4 else 128, stages=3)
    return [base, dataclasses.replace(base, stages=5)]
