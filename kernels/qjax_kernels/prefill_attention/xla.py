"""The reference: blocks of queries, and for each the keys that it sees by an online softmax.

Takes every valid call, in float32. Memory is linear in a block, and in the result: only the rows of
a block are gathered. What is not seen is replaced before use, for it may hold anything.
arXiv:2205.14135, algorithm 1.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

QUERIES = 128  # of a block
KEYS = 256
LOWEST = -1e30  # of a running maximum: finite, so that differences are numbers

# Positions [batch, KEYS] and whether they are seen -> keys and values [batch, KEYS, kv_heads, dim].
Read = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """See `api.prefill_attention`."""
    batch, tokens = q.shape[:2]
    if lengths is None:
        lengths = jnp.full((batch,), tokens, jnp.int32)
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def read(positions: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = jnp.where(seen, positions, 0)
        return k[sequence, at], v[sequence, at]

    start = jnp.zeros_like(lengths)
    return _attend(q, read, start, lengths, alibi_slopes, jnp.float32(scale), window, soft_cap)


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_table: jax.Array | None,
    context: jax.Array,
    lengths: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """See `api.paged_prefill_attention`."""
    batch, _, heads, head_dim = q.shape
    page_size = k_pages.shape[2]
    if block_table is None:
        block_table = jnp.arange(batch, dtype=jnp.int32)[:, None]
    pages_of = block_table

    def read(positions: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = jnp.minimum(positions // page_size, pages_of.shape[1] - 1)
        pages = jnp.where(seen, jnp.take_along_axis(pages_of, columns, axis=1), 0)
        slots = jnp.where(seen, positions % page_size, 0)
        return k_pages[pages, :, slots], v_pages[pages, :, slots]

    factor = jnp.float32(scale) if k_scale is None else scale * k_scale.reshape(-1, 1, 1, 1)
    y = _attend(q, read, context, lengths, alibi_slopes, factor, window, soft_cap, v_scale)
    return y.reshape(batch, -1, heads, head_dim)


def _attend(
    q: jax.Array,
    read: Read,
    start: jax.Array,
    count: jax.Array,
    slopes: jax.Array | None,
    factor: jax.Array,
    window: int | None,
    soft_cap: float | None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Query i < count[b] stands at start[b] + i; factor broadcasts to [kv_heads, group, query,
    key]."""
    batch, tokens, heads, head_dim = q.shape
    keys, _ = jax.eval_shape(
        read,
        jax.ShapeDtypeStruct((batch, KEYS), jnp.int32),
        jax.ShapeDtypeStruct((batch, KEYS), jnp.bool),
    )
    kv_heads, precision = keys.shape[2], jax.lax.Precision.HIGHEST
    queries = min(QUERIES, tokens)
    blocks = -(-tokens // queries)
    shape = (batch, kv_heads, heads // kv_heads, queries)
    if slopes is not None:
        slopes = slopes.reshape(*shape[1:3], 1, 1)

    def one_block(index: jax.Array, rows: jax.Array) -> jax.Array:
        """Rows: [batch, query, head, dim]."""
        rows = rows.astype(jnp.float32).reshape(batch, queries, *shape[1:3], head_dim)
        i = index * queries + jnp.arange(queries, dtype=jnp.int32)
        real = i < count[:, None]
        position = start[:, None] + i  # [batch, query]
        end = start + jnp.minimum(count, (index + 1) * queries)  # of what one of them sees
        end = jnp.where(count > index * queries, end, 0)
        begin = jnp.zeros_like(end)
        if window is not None:
            begin = jnp.minimum(jnp.maximum(start + index * queries + 1 - window, 0), end)

        def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, mixed = carry
            t = jnp.broadcast_to(index * KEYS + jnp.arange(KEYS, dtype=jnp.int32), (batch, KEYS))
            used = (t >= begin[:, None]) & (t < end[:, None])
            k, v = (
                jnp.where(used[:, :, None, None], x.astype(jnp.float32), 0) for x in read(t, used)
            )
            scores = jnp.einsum("bikgd,btkd->bkgit", rows, k, precision=precision) * factor
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            distance = t[:, None, :] - position[:, :, None]
            if slopes is not None:
                scores = scores + slopes * distance[:, None, None].astype(jnp.float32)
            seen = used[:, None, :] & (distance <= 0)
            if window is not None:
                seen &= distance > -window
            scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            added = jnp.einsum("bkgit,btkd->bkgid", weights, v, precision=precision)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new_top, total, mixed * shrink[..., None] + added

        carry = (jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
        first, last = jnp.min(begin) // KEYS, (jnp.max(end) + KEYS - 1) // KEYS
        _, total, mixed = jax.lax.fori_loop(first, last, step, carry)
        inverse = 1 / total if v_scale is None else v_scale.reshape(-1, 1, 1) / total
        # A query that is not real may be anything, NaN too.
        real = ((total != 0) & real[:, None, None])[..., None]
        mixed = jnp.where(real, mixed * inverse[..., None], 0)
        return jnp.moveaxis(mixed, 3, 1).reshape(batch, queries, heads, head_dim).astype(q.dtype)

    padded = jnp.pad(q, ((0, 0), (0, blocks * queries - tokens), (0, 0), (0, 0)))
    rows = jnp.moveaxis(padded.reshape(batch, blocks, queries, heads, head_dim), 1, 0)
    y = jax.lax.map(lambda block: one_block(*block), (jnp.arange(blocks, dtype=jnp.int32), rows))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, head_dim)[:, :tokens]
