"""Attention of one new token of each sequence over a paged cache of keys and values."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from qjax_kernels.decode_attention import mosaic, triton, xla
from qjax_kernels.dispatch import dispatch
from qjax_kernels.row_quant import RANGES

IMPLEMENTATIONS = {
    "mosaic": mosaic.decode_attention,
    "triton": triton.decode_attention,
    "xla": xla.decode_attention,
}


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_table: jax.Array | None,
    lengths: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    out_scale: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(cap(scale * q k.T) + bias) v for one query a sequence.

    With n = lengths[b], position t < n of sequence b in row t % page_size of page
    block_table[b, t // page_size], KV head g = h // (heads / kv_heads), and K, V what the pages
    hold times k_scale[g], v_scale[g]:

        s[t] = cap(scale * sum_d q[b, h, d] K[t, d]) + alibi_slopes[h] * (t - (n - 1))
        y[b, h] = sum_t softmax(s)[t] V[t],  over t with n - window <= t < n
        cap(x) = soft_cap * tanh(x / soft_cap)

    With an out_scale the result is round(y / out_scale), half to even, clipped to the range of
    out_dtype, of y as it would be returned otherwise: what `quantize_rows` makes of that.

    The query is the token at position n - 1, whose key and value are in the cache already. Sums
    are float32; softmax weights are rounded to the type that is multiplied: that of the cache, or
    float16 for an 8-bit one, to which queries are then rounded as well.

    Rows at n and behind may hold anything, NaN too, and so may entries of the table that no
    position before n needs, or none within the window.

    A cache that is not paged, [batch, kv_heads, length, head_dim], is one with pages of `length`
    tokens: give it with block_table None; nothing is copied.

    Args:
      q: [batch, heads, head_dim], bfloat16, float16 or float32.
      k_pages, v_pages: [pages, kv_heads, page_size, head_dim] of one dtype: a float dtype,
        float8_e4m3fn or int8. A head's part of a page is contiguous, keys and values alike.
      block_table: int32 [batch, pages of a sequence, at most]; None: page b is sequence b.
      lengths: int32 [batch], tokens in the cache; 0 for an empty slot, whose result is 0.
      k_scale, v_scale: float32 [] or [kv_heads]; None: 1.
      alibi_slopes: float32 [heads]; None: no bias.
      scale: None: head_dim ** -0.5.
      window: positions that are seen, the last ones; None: all.
      soft_cap: None: no cap.
      out_scale: float32 [] or [1, 1], known beforehand; None: the result is in the dtype of q.
      out_dtype: of the result with an out_scale: int8 or float8_e4m3fn; else None or that of q.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call. 'mosaic' takes
        pages of 8, 16, 32 or a multiple of 64 tokens, of which 64 or more are faster; a cache that
        is not paged may have any length that is a multiple of 8. 'triton' takes all pages, on GPUs
        from compute capability 8.0 on.

    Returns:
      [batch, heads, head_dim] in the dtype of q, or in out_dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    _check(q, k_pages, v_pages, block_table, lengths)
    heads, kv_heads = q.shape[1], k_pages.shape[1]
    for name, x, shapes in (
        ("k_scale", k_scale, ((), (kv_heads,))),
        ("v_scale", v_scale, ((), (kv_heads,))),
        ("alibi_slopes", alibi_slopes, ((heads,),)),
    ):
        if x is not None and (x.shape not in shapes or x.dtype != jnp.float32):
            allowed = " or ".join(map(str, shapes))
            raise ValueError(f"{name} is {x.dtype}{x.shape}; it must be float32{allowed}")
    out_dtype = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    if out_scale is None and out_dtype != q.dtype:
        raise ValueError(f"a result of {out_dtype.name} for q of {q.dtype} needs an out_scale")
    if out_scale is not None and (
        out_dtype not in RANGES or out_scale.dtype != jnp.float32 or out_scale.size != 1
    ):
        raise ValueError(
            f"out_scale {out_scale.dtype}{out_scale.shape} must be float32 [] or [1, 1], and "
            f"out_dtype int8 or float8_e4m3fn, not {out_dtype.name}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive")
    return dispatch(
        "decode_attention",
        cast(Any, IMPLEMENTATIONS),
        implementation,
        q,
        k_pages,
        v_pages,
        block_table,
        lengths,
        # A number is one for all heads: of shape [1], which costs nothing.
        *(x if x is None else x.reshape(-1) for x in (k_scale, v_scale)),
        alibi_slopes,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        soft_cap=None if soft_cap is None else float(soft_cap),
        out_scale=None if out_scale is None else out_scale.reshape(1),
        out_dtype=out_dtype,
    )


def _check(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_table: jax.Array | None,
    lengths: jax.Array,
) -> None:
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize < 2:
        raise ValueError(f"q is {q.dtype}{q.shape}; it must be floats [batch, heads, head_dim]")
    batch, heads, head_dim = q.shape
    if (k_pages.shape, k_pages.dtype) != (v_pages.shape, v_pages.dtype):
        raise ValueError(
            f"k_pages {k_pages.dtype}{k_pages.shape} and v_pages {v_pages.dtype}{v_pages.shape} "
            "must be alike"
        )
    if k_pages.ndim != 4 or k_pages.shape[3] != head_dim or heads % k_pages.shape[1]:
        raise ValueError(
            f"the cache is {k_pages.shape}; for q {q.shape} it must be [pages, kv_heads, "
            f"page_size, {head_dim}], with a number of KV heads that divides {heads}"
        )
    if block_table is None:
        if k_pages.shape[0] != batch:
            raise ValueError(
                f"the cache is {k_pages.shape}; without a block table its first axis must be "
                f"{batch}, the sequences"
            )
    elif block_table.shape[:-1] != (batch,) or block_table.dtype != jnp.int32:
        raise ValueError(
            f"block_table is {block_table.dtype}{block_table.shape}; it must be int32[{batch}, ...]"
        )
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        raise ValueError(f"lengths is {lengths.dtype}{lengths.shape}; it must be int32[{batch}]")
