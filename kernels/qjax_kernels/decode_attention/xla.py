"""The reference: a few hundred tokens at a time with an online softmax, all in float32.

Takes every valid call. Memory and copies are linear in a block, not in the cache: only the rows of
the block are gathered, and no transposed copy of the cache is made. Rows that are not seen are
replaced before use, for they may hold anything. arXiv:2205.14135, algorithm 1.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.row_quant import quantize_rows

BLOCK = 256  # tokens
LOWEST = -1e30  # of a running maximum: finite, so that differences are numbers


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "out_dtype"))
def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_table: jax.Array | None,
    lengths: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    out_scale: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """See `api.decode_attention`."""
    batch, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    if block_table is None:
        block_table = jnp.arange(batch, dtype=jnp.int32)[:, None]
    groups = (batch, kv_heads, heads // kv_heads)
    rows = q.astype(jnp.float32).reshape(*groups, head_dim)
    slopes = None if alibi_slopes is None else alibi_slopes.reshape(1, *groups[1:], 1)
    key_factor = scale if k_scale is None else scale * k_scale.reshape(-1, 1, 1)
    begin = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        positions = index * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        seen = (positions < lengths[:, None]) & (positions >= begin[:, None])
        # Entries and rows that are not seen may be anything: the first ones take their place.
        columns = jnp.minimum(positions // page_size, block_table.shape[1] - 1)
        pages = jnp.where(seen, block_table[:, columns], 0)
        slots = jnp.where(seen, positions % page_size, 0)
        keys, values = (
            jnp.where(
                seen[:, :, None, None], cache[pages, :, slots].astype(jnp.float32), 0
            )  # [batch, tokens, kv_heads, head_dim]
            for cache in (k_pages, v_pages)
        )
        highest = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bkgd,btkd->bkgt", rows, keys, precision=highest) * key_factor
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if slopes is not None:
            distances = positions[None, :] - (lengths[:, None] - 1)
            scores = scores + slopes * distances[:, None, None, :].astype(jnp.float32)
        scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        added = jnp.einsum("bkgt,btkd->bkgd", weights, values, precision=highest)
        total = total * shrink + jnp.sum(weights, axis=-1)
        return new_top, total, mixed * shrink[..., None] + added

    carry = (jnp.full(groups, LOWEST), jnp.zeros(groups), jnp.zeros((*groups, head_dim)))
    first, last = jnp.min(begin) // BLOCK, (jnp.max(lengths) + BLOCK - 1) // BLOCK
    _, total, mixed = jax.lax.fori_loop(first, last, step, carry)
    factor = jnp.where(total > 0, 1 / total, 0)
    if v_scale is not None:
        factor = factor * v_scale.reshape(-1, 1)
    y = (mixed * factor[..., None]).astype(q.dtype).reshape(q.shape)
    if out_scale is None:
        return y
    wide, dtype = y.astype(jnp.float32), jnp.dtype(out_dtype)
    return quantize_rows(wide, dtype, out_scale, group_sums=False)[0]
