"""Tile sizes of the Hopper kernels, and which of them to try for a shape."""

import dataclasses
import math

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
      least: steps that a worker of the persistent kernel takes at least, so that short sequences
        are not cut up.
    """

    tokens: int = 64
    stages: int = 3
    warpgroups: int = 1
    cluster: int = 1
    persistent: int = 0
    least: int = 2

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
        # Queries twice, weights, slopes, reductions; keys, values; what is merged.
        buffers = [2 * columns * head_dim] * 2 + [2 * columns * self.tokens, 4 * columns, 2048]
        buffers += [self.stages * self.tokens * itemsize * width for width in (head_dim, values)]
        if self.persistent == 0 and self.cluster * self.warpgroups > 1:
            buffers += [4 * columns * features, 4 * columns, 4 * columns]
        return COMMON + sum(math.ceil(self.warpgroups * n / 1024) * 1024 for n in buffers)


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

    What decides is memory: a multiprocessor's shared memory should be full of loads under way, and
    every multiprocessor should have a share. Two warpgroups or more on one hide each other's
    latencies; a cache of 8 bits, which comes twice as fast, wants more. A short cache is bound by
    latencies and launches: then one kernel is best.

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
    columns, pairs, steps = math.ceil(group / 8) * 8, batch * kv_heads, page_size * pages / 64

    def filled(blocks: int, **fields: int) -> Config | None:
        """With as many stages as fit if a multiprocessor has so many blocks; None: fewer than 2."""
        room = min(SHARED_MEMORY // blocks - RESERVED, SHARED_A_BLOCK)
        needed = math.ceil(steps * 64 / fields.get("tokens", 64))
        for stages in range(min(MOST_STAGES, max(2, needed)), 1, -1):
            config = Config(stages=stages, **fields)
            if config.shared(head_dim, columns, dtype) <= room:
                return config
        return None

    narrow = np.dtype(dtype).itemsize == 1
    # What registers hold: accumulators of scores, their sum, the mix and what is added to it.
    accumulators = columns * (64 + math.ceil(head_dim / 64) * 64) / 64
    most = 4 if accumulators <= 24 else 3 if accumulators <= 48 else 2
    counts = [n for n in ((4, 3, 2, 1) if narrow else (2, 3, 1)) if n <= most]
    each = [filled(blocks) for blocks in counts]
    balanced, large = [], []
    if accumulators <= 80:
        balanced = [filled(blocks, persistent=blocks) for blocks in counts]
        large = [filled(2, tokens=128), filled(2, tokens=128, persistent=2)]
    # So many blocks for each pair that every multiprocessor has one or two.
    cluster = 2 ** max(0, min(3, round(math.log2(cores / pairs)), math.floor(math.log2(steps))))
    shared = [filled(1, cluster=cluster, warpgroups=2), filled(2, cluster=min(8, 2 * cluster))]
    # One launch is best where the pairs fill all places of the last round too, or where there are
    # so many rounds that blocks which come and go balance each other.
    rounds = pairs / (cores * counts[0])
    if pairs >= 4 * cores or rounds >= 0.8 * math.ceil(rounds):
        order = [*each[:1], *balanced[:1], *each[1:2], *balanced[1:2], *large]
    elif cluster == 1:
        order = [*balanced[:1], *each[:1], *balanced[1:2], *large[1:], *each[1:2], *large[:1]]
    elif steps <= 64:
        order = [*shared, *each[:1], *balanced[:1], *balanced[-1:]]
    else:
        order = [*balanced[:1], *shared, *balanced[-1:], *balanced[1:2], *large[1:]]
    found = [config for config in dict.fromkeys(order) if config is not None]
    if len(found) < 3:
        found += [config for config in (*balanced, *each) if config and config not in found]
    return [config for config in found if config.fits(page_size, pages)][:6]
