"""Two Triton kernels each: tiles of a row, then the row."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.sampling.config import (
    RUN,
    ArgmaxConfig,
    Config,
    argmax_candidates,
    candidates,
)
from qjax_kernels.target import target

TILES_MODULE = "qjax_kernels.sampling.triton_tiles"
DRAW_MODULE = "qjax_kernels.sampling.triton_draw"
MOST_VOCAB = 2**20  # all candidates of a row lie in the registers of a block


@partial(jax.jit, static_argnames=("config", "interpret"))
def argmax(
    logits: jax.Array, *, config: ArgmaxConfig | None = None, interpret: bool = False
) -> jax.Array:
    """See `api.argmax`.

    Raises:
      NotImplementedError: there are no logits; no GPU that Triton compiles for.
    """
    rows, vocab = _size(logits, interpret)
    if config is None:
        config = argmax_candidates(rows, vocab, target().cores)[0]
    part = math.ceil(vocab / config.parts)
    chunk = min(config.warps * 32 * 8, 1 << (vocab - 1).bit_length())
    part = math.ceil(part / chunk) * chunk
    parts = math.ceil(vocab / part)
    maxima, ids = triton_launch.call(
        TILES_MODULE,
        "argmax_part",
        logits,
        outputs=[
            jax.ShapeDtypeStruct((rows, parts), jnp.float32),
            jax.ShapeDtypeStruct((rows, parts), jnp.int32),
        ],
        grid=(rows, parts),
        num_warps=config.warps,
        interpret=interpret,
        VOCAB=vocab,
        PART=part,
        CHUNK=chunk,
    )
    if parts == 1:
        return ids.reshape(rows)
    (token,) = triton_launch.call(
        TILES_MODULE,
        "argmax_whole",
        maxima,
        ids,
        outputs=[jax.ShapeDtypeStruct((rows,), jnp.int32)],
        grid=(rows,),
        num_warps=1,
        interpret=interpret,
        PARTS=parts,
        WIDTH=1 << (parts - 1).bit_length(),
    )
    return token


@partial(jax.jit, static_argnames=("config", "interpret"))
def sample(
    logits: jax.Array,
    uniform: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.sample`.

    Raises:
      NotImplementedError: there are no logits, or more than MOST_VOCAB in a row; no GPU that Triton
        compiles for.
    """
    rows, vocab = _size(logits, interpret)
    if vocab > MOST_VOCAB:
        raise NotImplementedError(f"rows have {vocab} logits; at most {MOST_VOCAB}")
    config = candidates(rows, vocab)[0] if config is None else config
    tiles = math.ceil(vocab / config.tile)
    runs = tiles * config.tile // RUN
    shape = jax.ShapeDtypeStruct
    keys, ids, sums = triton_launch.call(
        TILES_MODULE,
        "tiles",
        logits,
        temperature,
        outputs=[
            shape((rows, tiles, config.keep), jnp.int32),
            shape((rows, tiles, config.keep), jnp.int32),
            shape((rows, runs), jnp.float32),
        ],
        grid=(rows, tiles),
        num_warps=1,
        interpret=interpret,
        VOCAB=vocab,
        TILE_BITS=config.tile.bit_length() - 1,
        TILES=tiles,
        KEEP=config.keep,
        RUN=RUN,
    )
    (token,) = triton_launch.call(
        DRAW_MODULE,
        "draw",
        logits,
        uniform,
        temperature,
        top_k,
        top_p,
        keys,
        ids,
        sums,
        outputs=[shape((rows,), jnp.int32)],
        grid=(rows,),
        num_warps=config.warps,
        interpret=interpret,
        VOCAB=vocab,
        TILES=tiles,
        KEEP=config.keep,
        RUN=RUN,
        RUNS=runs,
        TILE_BITS=config.tile.bit_length() - 1,
        THREADS=config.warps * 32,
        CHUNKS=math.ceil(tiles * config.keep / (config.warps * 32)),
        TILES_WIDTH=1 << (tiles - 1).bit_length(),
        RUNS_WIDTH=1 << (runs - 1).bit_length(),
    )
    return token


def _size(logits: jax.Array, interpret: bool) -> tuple[int, int]:
    if not interpret:
        triton_launch.require_capability()
    if logits.size == 0:
        raise NotImplementedError("there are no logits")
    rows, vocab = logits.shape
    return rows, vocab
