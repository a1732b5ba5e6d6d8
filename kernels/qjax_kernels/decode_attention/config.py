"""Tile sizes of the Hopper kernels, and which of them to try for a shape."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

SHARED_MEMORY = 233472  # bytes of a multiprocessor
SHARED_A_BLOCK = 232448  # bytes that a block may have
RESERVED = 1024  # bytes of each block that are the system's
COMMON = 1024  # bytes of a block beside its buffers: barriers
MOST_STAGES = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      tokens: of the cache, a step: 64 or 128.
      stages: steps that are loaded ahead.
      warpgroups: of a block. Each has stages of its own.
      cluster: blocks that share a sequence and KV head, at most 8; not with `persistent`.
      persistent: blocks for each multiprocessor, which share all work; 0: a cluster of blocks for
        each sequence and KV head.
      push: warpgroups send what they found to those that add it up; else one of them fetches it.
      least: steps that a worker of the persistent kernel takes at least, so that short sequences
        are not cut up.
    """

    tokens: int = 64
    stages: int = 3
    warpgroups: int = 1
    cluster: int = 1
    persistent: int = 0
    least: int = 2
    push: bool = True

    def fits(self, page_size: int, pages: int) -> bool:
        """Whether a step is a part of a page, or whole pages, or there is but one page; and a page
        whole tiles of 8 rows."""
        nested = page_size % self.tokens == 0 or self.tokens % page_size == 0
        return page_size % 8 == 0 and (pages == 1 or nested)

    def shared(self, head_dim: int, columns: int, dtype: np.dtype) -> int:
        """Bytes of shared memory that a block takes at most."""
        itemsize = np.dtype(dtype).itemsize
        features = math.ceil(head_dim / 64) * 64
        values = head_dim if itemsize == 1 else features
        # Queries twice, weights, slopes, reductions; keys, values.
        buffers = [2 * columns * head_dim] * 2 + [2 * columns * self.tokens, 4 * max(32, columns)]
        buffers.append(4 * scratch_floats(columns))
        buffers += [self.stages * self.tokens * itemsize * width for width in (head_dim, values)]
        buffers = [self.warpgroups * n for n in buffers]
        members = self.cluster * self.warpgroups
        if self.persistent == 0 and members > 1 and self.push:
            strips = math.ceil(head_dim // 16 * columns // 8 / self.cluster)
            buffers += [512 * strips * members, 8 * columns * members, 16]
        elif self.persistent == 0 and members > 1:
            buffers += [self.warpgroups * 4 * columns * n for n in (features, 1, 1)]
        return COMMON + sum(math.ceil(n / 1024) * 1024 for n in buffers)


def scratch_floats(columns: int) -> int:
    """Floats in which the warps of a warpgroup exchange what they reduced: for each 8 columns 2 of
    each of its threads, for at most 16 columns at a time."""
    return 256 * min(2, columns // 8)


def candidates(
    batch: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    pages: int,
    dtype: np.dtype,
    cores: int,
) -> list[Config]:
    """At most 6 configurations worth timing, the best guess first.

    What decides is memory: enough loads must be under way from when the kernel starts until it
    ends, and the end should come for all at once. A warpgroup alone on a multiprocessor takes 45
    GB/s of a 16-bit cache and 14 of one of 8 bits, which it has to convert (H200); several on one
    hide each other's latencies, up to 100 and 31 GB/s. So 64 multiprocessors are enough for 16
    bits, and 8 bits want all of them. All blocks should have a place from the start.

    Args:
      batch: sequences.
      kv_heads: of a sequence.
      group: query heads of a KV head.
      head_dim: features of a head.
      page_size: tokens of a page.
      pages: of a sequence, at most. Lengths are not known here.
      dtype: of the cache.
      cores: multiprocessors.
    """
    columns, pairs = math.ceil(group / 8) * 8, max(1, batch * kv_heads)
    steps = max(1, math.ceil(page_size * pages / 64))

    def filled(blocks: int, **fields: Any) -> Config | None:
        """With as many stages as fit if a multiprocessor has so many blocks; None: too few."""
        room = min(SHARED_MEMORY // blocks - RESERVED, SHARED_A_BLOCK)
        members = fields.get("cluster", 1) * fields.get("warpgroups", 1)
        needed = math.ceil(steps * 64 / fields.get("tokens", 64))
        needed = max(2, needed) if fields.get("persistent") else math.ceil(needed / members)
        for stages in range(min(MOST_STAGES, needed), min(2, needed) - 1, -1):
            config = Config(stages=stages, **fields)
            if config.shared(head_dim, columns, dtype) <= room:
                return config
        return None

    narrow = np.dtype(dtype).itemsize == 1
    # What registers hold: accumulators of scores, their sum, the mix and what is added to it.
    accumulators = columns * (64 + math.ceil(head_dim / 64) * 64) / 64
    most = 4 if accumulators <= 24 else 3 if accumulators <= 48 else 2
    # Warpgroups for a multiprocessor, the best number first.
    counts = [n for n in ((4, 3, 2, 1) if narrow else (2, 3, 1)) if n <= most]
    each = [filled(blocks) for blocks in counts]
    balanced, large = [], []
    if accumulators <= 80:
        balanced = [filled(blocks, persistent=blocks) for blocks in counts]
        large = [filled(2, tokens=128), filled(2, tokens=128, persistent=2)]
    if pairs > cores:  # enough for all without sharing
        # So many at a time that there is one round, or blocks that come and go.
        together = min(math.ceil(pairs / cores), counts[0])
        inside = [filled(together, warpgroups=n) for n in (counts[0] // together,)]
        order = [*inside, *each[:2], *large[:1], *balanced[:1], *each[2:], *balanced[1:]]
    else:
        order = _shared(filled, pairs, steps, most, narrow=narrow, cores=cores)
        few = narrow and pairs * 8 < cores
        later = [*balanced[:1], *each[:1], *balanced[1:2], *large[1:]]
        # Few blocks of an 8-bit cache convert too slowly to keep up with the memory.
        long = few and steps > 128
        order = [*large[1:], *balanced[:1], *order, *balanced[1:]] if long else [*order, *later]
    found = [config for config in dict.fromkeys(order) if config is not None]
    return [config for config in found if config.fits(page_size, pages)][:6]


def _shared(
    filled: Callable[..., Config | None],
    pairs: int,
    steps: int,
    most: int,
    *,
    narrow: bool,
    cores: int,
) -> list[Config | None]:
    """Blocks, or clusters of them, that share a sequence and KV head.

    Clusters of 2 are as good as single blocks. Larger ones do not fit everywhere on the chip: one
    block a multiprocessor they take half of it at most, or else blocks must be small enough for
    two on one.
    """
    half = 64 * cores // 132
    alone = next(n for n in (8, 4, 2, 1) if pairs * n <= (half if n > 2 else cores))
    double = next((n for n in (8, 4, 2) if pairs * n <= 2 * (half if n > 2 else cores)), 1)
    # Enough warpgroups for one step each, if steps are that few; else as many as hide latencies.
    usual = min(4 if narrow else 2, most)
    wanted = math.ceil(steps / alone)
    first = min(max(wanted, 1), most) if wanted <= most else usual
    widths = dict.fromkeys([first, usual, min(3, most), min(2, most), 1])
    found = [filled(1, cluster=alone, warpgroups=n) for n in widths]
    pairwise = filled(2, cluster=double, warpgroups=min(2, most) if narrow else 1)
    if narrow and double > alone and steps > 32:
        return [pairwise, *found]
    return [*found[:2], pairwise, *found[2:]]
