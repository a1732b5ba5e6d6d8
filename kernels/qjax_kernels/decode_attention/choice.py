"""How the work is cut: as measured at the nearest size, or the first guess."""

import math

import numpy as np

from qjax_kernels.decode_attention.config import (
    RESERVED,
    SHARED_A_BLOCK,
    SHARED_MEMORY,
    Config,
    candidates,
)
from qjax_kernels.tuned import lookup

MOST_ACCUMULATORS = 80  # registers of a thread, where it has others to hold


def choose(
    batch: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    pages: int,
    dtype: np.dtype,
    cores: int,
) -> Config:
    """The configuration for a call; arguments as of `candidates`."""
    found = lookup.nearest(
        "decode_attention",
        table_format(dtype, head_dim),
        group,
        max(batch, 1),
        kv_heads * head_dim,
        max(page_size * pages, 1),
    )
    for entry in found:
        if entry.implementation == "mosaic":
            config = Config(**entry.config)
            if valid(config, group, head_dim, page_size, pages, dtype):
                return config
    guesses = candidates(batch, kv_heads, group, head_dim, page_size, pages, dtype, cores)
    return guesses[0] if guesses else Config()


def table_format(dtype: np.dtype, head_dim: int) -> str:
    """As tuned tables name it: 'bfloat16x128'."""
    return f"{np.dtype(dtype).name}x{head_dim}"


def valid(
    config: Config, group: int, head_dim: int, page_size: int, pages: int, dtype: np.dtype
) -> bool:
    """Whether a configuration takes a call: its memory, its registers, its pages."""
    columns, features = math.ceil(group / 8) * 8, math.ceil(head_dim / 64) * 64
    # All blocks of the persistent kernel are on their multiprocessors at once.
    room = min(SHARED_MEMORY // max(config.persistent, 1) - RESERVED, SHARED_A_BLOCK)
    wide = config.persistent > 0 or config.tokens > 64
    if wide and columns * (64 + features) / 64 > MOST_ACCUMULATORS:
        return False
    return config.fits(page_size, pages) and config.shared(head_dim, columns, dtype) <= room
