"""Attention of many queries: whole prompts, and chunks of them over pages of an earlier cache."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.prefill_attention import cudnn, triton, xla

IMPLEMENTATIONS = {
    "cudnn": cudnn.prefill_attention,
    "triton": triton.prefill_attention,
    "xla": xla.prefill_attention,
}
SLOWER = "Triton is faster where the lengths of prompts differ"
PAGED_IMPLEMENTATIONS = {
    "triton": triton.paged_prefill_attention,
    "xla": xla.paged_prefill_attention,
}


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None = None,
    *,
    alibi_slopes: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of prompts to themselves.

    With KV head g = h // (heads / kv_heads):

        s[i, t] = cap(scale * sum_d q[b, i, h, d] k[b, t, g, d]) + alibi_slopes[h] * (t - i)
        y[b, i, h] = sum_t softmax(s[i])[t] v[b, t, g],  over t with i - window < t <= i
        cap(x) = soft_cap * tanh(x / soft_cap)

    Sums are float32; softmax weights are rounded to the type that is multiplied, that of k.

    Args:
      q: [batch, tokens, heads, head_dim], bfloat16, float16 or float32.
      k, v: [batch, tokens, kv_heads, head_dim], of one float dtype.
      lengths: int32 [batch], at most tokens; results of tokens behind it are 0. Keys and values
        there are finite, or else what cuDNN returns is not. None: tokens, for all.
      alibi_slopes: float32 [heads]; None: no bias.
      scale: None: head_dim ** -0.5.
      window: positions that a query sees, the last ones; None: all.
      soft_cap: None: no cap.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call, but not cuDNN
        if there are lengths, which it is slower with than Triton.

    Returns:
      [batch, tokens, heads, head_dim] in the dtype of q.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    _check_q(q, alibi_slopes, window, soft_cap)
    batch, tokens, heads, head_dim = q.shape
    if (k.shape, k.dtype) != (v.shape, v.dtype) or not _floating(k):
        raise ValueError(f"k {k.dtype}{k.shape} and v {v.dtype}{v.shape} must be alike, and floats")
    expected = (batch, tokens, *k.shape[2:3], head_dim)
    if k.ndim != 4 or k.shape != expected or heads % k.shape[2]:
        raise ValueError(
            f"k is {k.shape}; for q {q.shape} it must be [{batch}, {tokens}, kv_heads, {head_dim}],"
            f" with a number of KV heads that divides {heads}"
        )
    _check_sizes(batch, lengths=lengths)
    return dispatch(
        "prefill_attention",
        cast(Any, IMPLEMENTATIONS),
        implementation,
        q,
        k,
        v,
        lengths,
        alibi_slopes,
        scale=head_dim**-0.5 if scale is None else float(scale),
        window=window,
        soft_cap=None if soft_cap is None else float(soft_cap),
        passed_over=None if lengths is None else {"cudnn": SLOWER},
    )


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_table: jax.Array | None,
    context: jax.Array,
    lengths: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of a chunk of each sequence to its cache, the chunk itself included.

    Query i < lengths[b] of sequence b stands at position p = context[b] + i, and the keys and
    values up to context[b] + lengths[b] are in the cache already, position t in row t % page_size
    of page block_table[b, t // page_size]. With K, V what the pages hold times k_scale[g],
    v_scale[g] of KV head g = h // (heads / kv_heads):

        s[i, t] = cap(scale * sum_d q[b, i, h, d] K[t, d]) + alibi_slopes[h] * (t - p)
        y[b, i, h] = sum_t softmax(s[i])[t] V[t],  over t with p - window < t <= p
        cap(x) = soft_cap * tanh(x / soft_cap)

    Sums are float32; softmax weights are rounded to the type that is multiplied: that of the cache,
    or float16 for an 8-bit one, to which queries are then rounded as well.

    Rows that no query sees may hold anything, NaN too, and so may entries of the table that no
    position needs that is seen.

    A cache that is not paged, [batch, kv_heads, length, head_dim], is one with pages of `length`
    tokens: give it with block_table None; nothing is copied.

    Args:
      q: [batch, tokens, heads, head_dim], bfloat16, float16 or float32.
      k_pages, v_pages: [pages, kv_heads, page_size, head_dim] of one dtype: a float dtype,
        float8_e4m3fn or int8.
      block_table: int32 [batch, pages of a sequence, at most]; None: page b is sequence b.
      context: int32 [batch], tokens before the chunk.
      lengths: int32 [batch], tokens of the chunk, from 0 to `tokens`; results behind are 0.
      k_scale, v_scale: float32 [] or [kv_heads], positive; None: 1.
      alibi_slopes: float32 [heads]; None: no bias.
      scale: None: head_dim ** -0.5.
      window: positions that a query sees, the last ones; None: all.
      soft_cap: None: no cap.
      implementation: a name of PAGED_IMPLEMENTATIONS; None: the first that takes the call. 'triton'
        is fastest with pages of 64 tokens or multiples of 128.

    Returns:
      [batch, tokens, heads, head_dim] in the dtype of q.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    _check_q(q, alibi_slopes, window, soft_cap)
    _check_cache(q, k_pages, v_pages, block_table)
    _check_sizes(q.shape[0], context=context, lengths=lengths)
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and (x.shape not in ((), k_pages.shape[1:2]) or x.dtype != jnp.float32):
            raise ValueError(
                f"{name} is {x.dtype}{x.shape}; it must be float32() or {k_pages.shape[1:2]}"
            )
    return dispatch(
        "paged_prefill_attention",
        cast(Any, PAGED_IMPLEMENTATIONS),
        implementation,
        q,
        k_pages,
        v_pages,
        block_table,
        context,
        lengths,
        # A number is one for all heads: of shape [1], which costs nothing.
        *(x if x is None else x.reshape(-1) for x in (k_scale, v_scale)),
        alibi_slopes,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        soft_cap=None if soft_cap is None else float(soft_cap),
    )


def _floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 2


def _check_q(
    q: jax.Array, alibi_slopes: jax.Array | None, window: int | None, soft_cap: float | None
) -> None:
    if q.ndim != 4 or not _floating(q):
        raise ValueError(
            f"q is {q.dtype}{q.shape}; it must be floats [batch, tokens, heads, head_dim]"
        )
    x, heads = alibi_slopes, q.shape[2]
    if x is not None and (x.shape != (heads,) or x.dtype != jnp.float32):
        raise ValueError(f"alibi_slopes is {x.dtype}{x.shape}; it must be float32({heads},)")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive")


def _check_sizes(batch: int, **sizes: jax.Array | None) -> None:
    for name, x in sizes.items():
        if x is not None and (x.shape != (batch,) or x.dtype != jnp.int32):
            raise ValueError(f"{name} is {x.dtype}{x.shape}; it must be int32[{batch}]")


def _check_cache(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, block_table: jax.Array | None
) -> None:
    batch, _, heads, head_dim = q.shape
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
