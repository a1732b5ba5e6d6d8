"""Attention by the Triton kernels: of chunks of queries or decode steps, over arrays or pages."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.prefill_attention.config import Config, widths

MODULE = "qjax_kernels.prefill_attention.triton_kernel"
MERGE_MODULE = "qjax_kernels.prefill_attention.triton_merge"
CACHES = ("bfloat16", "float16", "float8_e4m3fn", "int8")
SECTION_BYTES = 16 << 20  # of keys and values that stay in the L2 cache while they are needed
FP8_CONVERSION = 89  # the first compute capability that has one


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_table: jax.Array | None,
    context: jax.Array | None,
    lengths: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: Config,
    decode: bool = False,
    by_page: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scores) v, [batch, tokens, heads, head_dim] like q. See `api` of both ops.

    Args:
      lengths: queries of each sequence; of a decode step: keys, of which the last is the query's.
      decode: a decode step.
      by_page: k, v are [pages, kv_heads, page_size, head_dim], else [batch, length, kv_heads,
        head_dim].
    """
    batch, tokens, heads, head_dim = q.shape
    page_size = k.shape[2] if by_page else 0
    kv_heads = k.shape[1] if by_page else k.shape[2]
    pages = 0 if block_table is None else block_table.shape[1]
    length = max(pages, 1) * page_size if by_page else k.shape[1]
    steps = math.ceil(most_seen(length, window, config.rows, heads // kv_heads) / config.keys) + 1
    steps = min(steps, math.ceil(length / config.keys))
    split = config.split or steps
    splits = math.ceil(steps / split)
    rows, one = batch * tokens * heads, splits == 1
    section = SECTION_BYTES // (2 * length * head_dim * k.dtype.itemsize)

    width, width2 = widths(head_dim, k.dtype.itemsize)
    constants: dict[str, Any] = {
        "TOKENS": tokens,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "WINDOW": window or 0,
        "HAS_CONTEXT": context is not None,
        "LENGTHS": "none" if lengths is None else "keys" if decode else "queries",
        "ROWS": config.rows,
        "KEYS": config.keys,
        "SPLIT": split,
        "SPLITS": splits,
    }
    form, k, v = _words(k, v, interpret)
    shape = jax.ShapeDtypeStruct
    y, part, weight = triton_launch.call(
        MODULE,
        "attend",
        *(q, k, v),
        *_or(q, block_table, context, lengths, k_scale, v_scale, alibi_slopes),
        outputs=[
            shape(q.shape if one else (1,), q.dtype),
            shape((1,) if one else (rows * splits, head_dim), jnp.float32),
            shape((1,) if one else (rows * splits,), jnp.float32),
        ],
        grid=(batch * kv_heads * math.ceil(tokens * heads // kv_heads / config.rows), splits),
        num_warps=config.warps,
        # Entries of the table are loaded as many steps before the keys as these before their use.
        num_stages=config.stages if pages == 0 else 2 * config.stages - 1,
        interpret=interpret,
        BATCH=batch,
        WIDTH=width,
        WIDTH2=width2,
        LENGTH=length,
        PAGE_SIZE=page_size,
        PAGES=pages,
        SCALE=scale,
        CAP=soft_cap or 0.0,
        K_SCALES=0 if k_scale is None else k_scale.size,
        V_SCALES=0 if v_scale is None else v_scale.size,
        HAS_SLOPES=alibi_slopes is not None,
        FORMAT=form,
        SECTION=min(max(section, 1), batch * kv_heads),
        **constants,
    )
    if one:
        return y
    (y,) = triton_launch.call(
        MERGE_MODULE,
        "merge",
        *(part, weight),
        *_or(q, context, lengths),
        outputs=[shape(q.shape, q.dtype)],
        grid=(rows,),
        num_warps=4,
        interpret=interpret,
        WIDTH=1 << (head_dim - 1).bit_length(),
        SPLITS_WIDTH=1 << (splits - 1).bit_length(),
        AT_ONCE=min(1 << (splits - 1).bit_length(), 16),
        **constants,
    )
    return y


def most_seen(length: int, window: int | None, rows: int, group: int) -> int:
    """Keys between the first and the last that a tile's queries see, at most."""
    return length if window is None else min(length, window + rows // group + 1)


def refuse(q: jax.Array, k: jax.Array, scale: float) -> None:
    """What the kernels do not take.

    Raises:
      NotImplementedError: naming it.
    """
    if k.dtype not in CACHES:
        raise NotImplementedError(f"keys are {k.dtype}; it multiplies {', '.join(CACHES)}")
    if k.dtype.itemsize == 1 and k.shape[-1] % 2:
        raise NotImplementedError(f"head_dim is {k.shape[-1]}; an 8-bit cache is read in pairs")
    if not scale > 0:
        raise NotImplementedError(f"the scale is {scale}; it must be positive")
    if q.size == 0 or k.size == 0:
        raise NotImplementedError("there are no queries, or no keys")


def _words(k: jax.Array, v: jax.Array, interpret: bool) -> tuple[str, jax.Array, jax.Array]:
    """What `triton_words` calls the format, and the caches; fp8 as int8, which every GPU knows."""
    if k.dtype == jnp.int8:
        return "int8", k, v
    if k.dtype != jnp.float8_e4m3fn:
        return "float", k, v
    k, v = (jax.lax.bitcast_convert_type(x, jnp.int8) for x in (k, v))
    converted = not interpret and triton_launch.capability() >= FP8_CONVERSION
    return "e4m3 converted" if converted else "e4m3", k, v


def _or(unused: jax.Array, *arrays: jax.Array | None) -> list[jax.Array]:
    """Another array in place of those that are not there."""
    return [unused if x is None else x for x in arrays]
