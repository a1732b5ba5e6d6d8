"""Tile sizes of the Triton kernels, and which of them to try for a call."""

import dataclasses
import math

# Bytes of shared memory that a block may have, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
SCRATCH = 2048  # bytes of a block beside its tiles: reductions, page numbers
MOST_SPLITS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      rows: of a tile: queries times the heads of a KV head. A power of two, 16 at least.
      keys: of a tile, a power of two, 16 at least.
      warps: of a block.
      stages: tiles of keys and values that are there or under way.
      split: tiles of keys that a block takes, and another kernel adds up; 0: all of them.
    """

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3
    split: int = 0

    def shared(self, head_dim: int, itemsize: int, capability: int) -> int:
        """Bytes of shared memory of a block, at most."""
        width = sum(widths(head_dim, itemsize)) * (2 if itemsize == 1 else 1)
        queries, tile = 2 * self.rows * width, self.keys * width
        loaded = 2 * itemsize * tile
        if capability == 90 and self.rows >= 64 and self.warps % 4 == 0:
            # wgmma reads both operands from shared memory: numbers of 8 bits after conversion.
            rest = self.stages * loaded if itemsize > 1 else (self.stages - 1) * loaded + 2 * tile
        elif capability >= 100 and self.rows >= 64:
            rest = self.stages * loaded + (0 if itemsize > 1 else 2 * tile)
        else:
            rest = (self.stages - 1) * loaded + 2 * self.rows * self.keys
        return max(queries + rest, 4 * self.rows * width) + SCRATCH


def widths(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Powers of two that cover a head, in pairs of features if of 8 bits: the largest in it, and
    one for the rest, or 0."""
    items = head_dim if itemsize > 1 else head_dim // 2
    whole = max(16, 1 << items.bit_length() - 1)
    return whole, 0 if items <= whole else max(16, 1 << (items - whole - 1).bit_length())


def candidates(
    rows: int,
    pairs: int,
    keys: int,
    head_dim: int,
    itemsize: int,
    capability: int,
    cores: int,
    page_size: int = 0,
    plain: bool = True,
) -> list[Config]:
    """At most 6 configurations worth timing, the best guess first.

    Many rows are bound by the tensor cores: large tiles, so that keys are read seldom, on 8 warps,
    of which 4 multiply while the others compute weights. Few rows, as in decoding, are bound by
    memory: small tiles, many blocks, and keys split so that every multiprocessor has some.

    Args:
      rows: queries of a sequence times the heads of a KV head.
      pairs: sequences times KV heads.
      keys: of a sequence that are seen, at most.
      head_dim: features of a head.
      itemsize: bytes of a number in the cache.
      capability: of the GPU, 90 for an H200.
      cores: its multiprocessors.
      page_size: of the cache; 0: it is not paged. A tile within a page has one address.
      plain: neither a window nor a cap nor ALiBi, which take registers.
    """
    limit = SHARED_MEMORY.get(capability, 101376)

    def split(config: Config, blocks: int) -> Config:
        """With about so many blocks, of at least two tiles of keys each."""
        steps = math.ceil(keys / config.keys)
        tiles = pairs * math.ceil(rows / config.rows)
        parts = max(1, min(round(blocks / tiles), steps // 2, MOST_SPLITS))
        return dataclasses.replace(config, split=0 if parts == 1 else math.ceil(steps / parts))

    if rows >= 64:
        found = [split(Config(*sizes), cores) for sizes in _large(head_dim, itemsize, capability)]
        found.sort(
            key=lambda c: (
                c.rows >= 2 * rows,  # half of it would be idle
                page_size % c.keys > 0 or (c.keys > 64 and not plain),
            )
        )
    else:
        least = max(16, 1 << (rows - 1).bit_length())
        # Blocks come and go, which balances sequences of different lengths.
        found = [
            split(Config(least, *sizes), blocks * cores * (4 if pairs >= cores else 1))
            for *sizes, blocks in _small(head_dim)
        ]
    fitting = [c for c in found if c.shared(head_dim, itemsize, capability) <= limit]
    return list(dict.fromkeys(fitting))[:6]


def _large(head_dim: int, itemsize: int, capability: int) -> list[tuple[int, int, int, int]]:
    """(rows, keys, warps, stages), from the best guess on; not all fit everywhere."""
    if head_dim > 128:
        if capability < 90:
            return [(64, 32, 8, 3), (64, 32, 8, 2), (32, 64, 4, 2), (32, 32, 4, 3)]
        found = [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 32, 4, 3), (64, 32, 4, 2)]
        return found if itemsize > 1 else found[1:]  # conversion takes registers
    if capability in (86, 89):
        return [
            (64, 64, 4, 2), (128, 32, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3),
            (128, 64, 8, 2),
        ]  # fmt: skip
    if capability < 90:
        return [
            (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3),
            (128, 32, 8, 2),
        ]  # fmt: skip
    found = [
        (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (128, 128, 8, 2),
        (128, 128, 8, 3),
    ]  # fmt: skip
    # Blackwell's tensor memory does not hold the sums of more than one part of a head beside them.
    small = capability >= 100 and (itemsize == 1 or head_dim not in (64, 128))
    return [sizes for sizes in found if not small or sizes[1] < 128]


def _small(head_dim: int) -> list[tuple[int, int, int, int]]:
    """(keys, warps, stages, blocks for a multiprocessor)."""
    if head_dim > 128:
        return [(32, 4, 3, 4), (32, 4, 2, 8), (32, 4, 3, 1), (64, 4, 2, 4), (16, 2, 4, 8)]
    return [
        (64, 4, 3, 4), (32, 2, 4, 4), (64, 4, 3, 1), (64, 4, 2, 8), (32, 1, 3, 8), (128, 4, 2, 2),
    ]  # fmt: skip
