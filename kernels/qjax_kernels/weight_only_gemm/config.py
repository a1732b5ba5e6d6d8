"""How a product is cut into tiles, and what to try first for which shape."""

import dataclasses
from typing import Literal

from qjax_kernels.weight_only_gemm.layout import BITS, Prepared

SHARED_MEMORY = 232448  # bytes a block may have on Hopper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of the Hopper kernels.

    Attributes:
      kernel: 'stream' for few tokens: each block has 64 rows of the weight, its warpgroups share
        the columns; bound by memory. 'tiled' for many: the warpgroups have 64 rows each and pass
        all columns; bound by the tensor cores.
      tokens: of a tile; a multiple of 8, at most 256. Rows of a tile that are not there cost more
        than rows that are: 40 tokens took 26 us in a tile of 64 and 16 in one of 40.
      warpgroups: that compute.
      tiles: of 64 columns that a warpgroup takes at a time.
      stages: of `tiles` that are under way at a time.
      cluster: stream: blocks that share the columns of 64 rows; tiled: blocks that share tokens.
      width: tiled: rows of tiles that are visited together, for the L2 cache.
      parts: tiled: of a step, each converted while the one before is multiplied; divides tiles.
    """

    kernel: Literal["stream", "tiled"]
    tokens: int
    warpgroups: int
    tiles: int
    stages: int
    cluster: int = 1
    width: int = 8
    parts: int = 1


def candidates(tokens: int, weight: Prepared, *, cores: int = 132) -> list[Config]:
    """Configurations worth a try for x [tokens, in], best guess first, at most 6.

    Args:
      tokens: rows of x.
      weight: only its shapes are read.
      cores: multiprocessors.
    """
    stream, tiled = stream_candidates(tokens, weight, cores), _tiled(tokens, weight)
    if tokens <= 64:
        return (stream + tiled)[:6]
    if tokens > 128:
        return tiled[:6]
    # A tiled kernel's blocks have 128 rows: few of them leave most multiprocessors idle.
    few = -(-weight.out_features // 128) <= cores // 4
    return ([*stream[:1], *tiled] if few else [*tiled[:5], *stream[:1]])[:6]


def fp8_candidates(tokens: int, weight: Prepared, *, cores: int = 132) -> list[Config]:
    """`candidates` for activations in fp8 and weights prepared for them."""
    stream = [c for c in stream_candidates(tokens, weight, cores) if c.tiles % 2 == 0]
    tiled = [
        Config(kernel="tiled", tokens=tokens, warpgroups=2, tiles=t, stages=s, cluster=cluster)
        for tokens, t, s, cluster in ((128, 6, 2, 2), (128, 4, 3, 1), (128, 2, 6, 1), (64, 2, 8, 1))
    ]
    tiled = [c for c in tiled if tiled_fits(c, weight, 8)]
    return (stream + tiled)[:6] if tokens <= 64 else tiled


def stream_candidates(tokens: int, weight: Prepared, cores: int) -> list[Config]:
    """`candidates` of one kernel, at most 4."""
    tile = min(64, max(8, -(-tokens // 8) * 8))
    blocks = -(-weight.out_features // 64) * -(-tokens // tile)
    columns = -(-weight.in_features // 64)
    found = []
    for warpgroups, tiles, stages, cluster in _shapes(
        blocks, columns, BITS[weight.format], tile, cores
    ):
        config = Config(
            kernel="stream", tokens=tile, warpgroups=warpgroups,
            tiles=tiles, stages=stages, cluster=cluster,
        )  # fmt: skip
        if columns >= warpgroups * tiles * cluster and stream_fits(config, weight):
            found.append(config)
    return found[:4] if found else [_smallest(tile)]


def _shapes(
    blocks: int, columns: int, bits: int, tile: int, cores: int
) -> list[tuple[int, int, int, int]]:
    """(warpgroups, tiles, stages, cluster) of a stream, best first.

    Args:
      blocks: of 64 rows and the tokens of a tile.
      columns: of the weight, in tiles of 64.
      tile: tokens.
    """
    if blocks >= 2 * cores:
        # Many small blocks: the beginning of one hides the end of another.
        if tile > 48:
            wide = [(2, 2, 2, 1), (1, 4, 2, 1), (1, 2, 4, 1)]
            return wide if bits == 4 else [(1, 2, 3, 1), *wide]
        if bits == 8:
            return [(1, 2, 2, 1), (1, 4, 2, 2), (1, 2, 3, 1), (1, 2, 4, 2)]
        if tile > 16:
            return [(1, 4, 2, 1), (1, 2, 2, 1), (2, 2, 2, 1), (1, 2, 3, 1)]
        return [(1, 4, 2, 2), (1, 2, 3, 2), (1, 4, 2, 1), (1, 4, 3, 1), (2, 2, 2, 1)]
    # Two blocks fit on a multiprocessor; fewer than one each leaves memory idle.
    clusters = [c for c in (1, 2, 4, 8) if c == 1 or blocks * c <= 2 * cores]
    best = next((c for c in clusters if blocks * c >= 0.7 * cores), clusters[-1])
    # Four warpgroups hide each other's conversions, as long as their sums leave room for stages.
    shapes = [(4, 4, 2), (2, 8, 2), (2, 4, 4), (2, 2, 3), (2, 2, 2)]
    if bits == 8:
        shapes = [(4, 2, 2), (2, 4, 2), (2, 2, 3), (2, 2, 2)]
        shapes = shapes if best == 1 else [shapes[1], shapes[0], *shapes[2:]]
    elif tile > 16:
        shapes = [(4, 4, 2), (4, 2, 2), (2, 4, 2), (2, 2, 2)]
        shapes = shapes if tile <= 24 else shapes[1:]
        if tile > 48:
            shapes = [(3, 2, 2), (2, 2, 3), (2, 2, 2), (2, 4, 2)]
        if blocks > cores:  # more than one on a multiprocessor
            shapes = [(2, 2, 2), (2, 4, 2), *shapes[:2]]
    elif columns < 64 * best:  # too few steps for so many stages
        shapes = shapes if best == 1 else shapes[1:]
    ordered = dict.fromkeys([best, *reversed(clusters)])
    return [(*shape, cluster) for cluster in ordered for shape in shapes]


def _smallest(tile: int) -> Config:
    return Config(kernel="stream", tokens=tile, warpgroups=1, tiles=4, stages=2)


def stream_fits(config: Config, weight: Prepared) -> bool:
    """Whether a stream has the memory, and each warpgroup begins with a group of its own."""
    width, group = config.tiles * 64, weight.group_size
    begins = weight.groups == 1 or width % group == 0
    begins = begins or stream_steps(config, weight) * width % group == 0
    return begins and stream_shared_memory(config, weight) <= SHARED_MEMORY


def _tiled(tokens: int, weight: Prepared) -> list[Config]:
    def tiled(tokens: int, stages: int, cluster: int = 1, parts: int = 2) -> Config:
        return Config(
            kernel="tiled", tokens=tokens, warpgroups=2, tiles=2,
            stages=stages, cluster=cluster, parts=parts,
        )  # fmt: skip

    wide, square = [tiled(256, 2, 2), tiled(256, 2)], [tiled(128, 4), tiled(128, 4, 2)]
    order = [*square, tiled(64, 6), *wide] if tokens <= 512 else [*wide, *square]
    return [c for c in order if tiled_fits(c, weight)]


def tiled_fits(config: Config, weight: Prepared, bits: int = 16) -> bool:
    """Whether a tile has the memory, and each step begins with a group or within one."""
    width, group = config.tiles * 64, weight.group_size
    begins = weight.groups == 1 or width % group == 0 or group % width == 0
    return begins and tiled_shared_memory(config, weight, bits) <= SHARED_MEMORY


def stream_shared_memory(config: Config, weight: Prepared) -> int:
    """Bytes, as `stream` allocates them."""
    stage = config.tiles * (64 * 64 * BITS[weight.format] // 8 + config.tokens * 64 * 2)
    groups = _groups_per_warpgroup(config, weight) if weight.groups > 1 else 0
    per_group = 64 * weight.scale.dtype.itemsize
    if weight.zero_point is not None:
        groups = _groups_per_warpgroup(config, weight)
        per_group += 64 * 2
    sums = 64 * config.tokens * 4
    of_warpgroups = config.warpgroups * (config.stages * stage + groups * per_group + sums)
    return of_warpgroups + sums + epilogue_shared_memory(config.tokens, 1, itemsize=4)


def tiled_shared_memory(config: Config, weight: Prepared, bits: int = 16) -> int:
    """Bytes, as `walk` allocates them, for activations of some bits."""
    words = config.warpgroups * 64 * 64 * BITS[weight.format] // 8
    stage = config.tiles * (words + config.tokens * 8 * bits)
    if weight.groups > 1:
        groups = max(1, config.tiles * 64 // weight.group_size)
        numbers = weight.scale.dtype.itemsize + 2 * (weight.zero_point is not None)
        stage += config.warpgroups * groups * 64 * numbers
    return config.stages * stage + epilogue_shared_memory(config.tokens, config.warpgroups)


def epilogue_shared_memory(tokens: int, warpgroups: int, itemsize: int = 2) -> int:
    """Bytes that `epilogue.scratch` takes, and the barriers."""
    piece = piece_of(tokens)
    slots = min(2, tokens // piece)
    return warpgroups * (slots * piece * 64 * itemsize + tokens * 4) + 2048


def stream_steps(config: Config, weight: Prepared) -> int:
    """Stages' worth of columns that each warpgroup of a stream takes."""
    return -(-weight.in_features // (64 * config.tiles * config.warpgroups * config.cluster))


def _groups_per_warpgroup(config: Config, weight: Prepared) -> int:
    columns = stream_steps(config, weight) * config.tiles * 64
    return -(-columns // weight.group_size)


def piece_of(tokens: int) -> int:
    """Tokens of a tile that leave at a time."""
    return next(piece for piece in (32, 16, 8) if tokens % piece == 0)
