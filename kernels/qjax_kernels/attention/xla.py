"""The reference: XLA products with float32 sums, softmax in float32.

GPUs compute it at once. CPUs compute it a block of queries and a block of keys at a time with an
online softmax (arXiv:2205.14135, algorithm 1), for memory linear in the length, and for one more
reason: every block has the same shape, so a row of the result has the same bits whether its query
came alone, as in a decode step, or among others, as in a full pass. XLA's CPU chooses the order of
a sum by the shape of the whole product.
"""

import jax
import jax.numpy as jnp

BLOCK_QUERIES = 16
BLOCK_KEYS = 64


def attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """See `qjax.ops.attention`."""
    return jax.lax.platform_dependent(q, k, v, positions, cpu=_blockwise, default=at_once)


def at_once(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """As GPUs compute it; XLA's CPU has no batched bfloat16 product with float32 sums."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, length = k.shape[1:3]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "btkgd,bksd->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    visible = jnp.arange(length)[None, None, :] <= positions[:, :, None]
    scores = jnp.where(visible[:, None, None], scores / head_dim**0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum(
        "bkgts,bksd->btkgd", weights, v, precision=precision, preferred_element_type=jnp.float32
    )
    return mixed.astype(q.dtype).reshape(batch, tokens, heads, head_dim)


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    batch, tokens, heads, head_dim = q.shape
    kv_heads, dtype = k.shape[1], q.dtype
    # Padded queries see key 0; what they give is cut off. Padded keys lie behind every position.
    q = _blocks(q.astype(jnp.float32) / head_dim**0.5, 1, BLOCK_QUERIES)
    k, v = (_blocks(x, 2, BLOCK_KEYS) for x in (k, v))
    starts = jnp.arange(k.shape[0]) * BLOCK_KEYS

    def one_block(queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, seen = queries
        rows = rows.reshape(batch, BLOCK_QUERIES, kv_heads, heads // kv_heads, head_dim)

        def step(carry: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> tuple:
            top, total, mixed = carry
            k, v, start = keys
            scores = jnp.einsum("btkgd,bksd->bkgts", rows, k.astype(jnp.float32))
            visible = start + jnp.arange(BLOCK_KEYS) <= seen[:, :, None]
            scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
            # Finite from the first block on: every query sees key 0.
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            added = jnp.einsum("bkgts,bksd->bkgtd", weights, v.astype(jnp.float32))
            total = total * shrink + jnp.sum(weights, axis=-1)
            return (new_top, total, mixed * shrink[..., None] + added), None

        rows_shape = (batch, kv_heads, heads // kv_heads, BLOCK_QUERIES)
        empty = (
            jnp.full(rows_shape, -jnp.inf),
            jnp.zeros(rows_shape),
            jnp.zeros((*rows_shape, head_dim)),
        )
        (_, total, mixed), _ = jax.lax.scan(step, empty, (k, v, starts))
        mixed = jnp.moveaxis(mixed / total[..., None], 3, 1)
        return mixed.reshape(batch, BLOCK_QUERIES, heads, head_dim)

    mixed = jax.lax.map(one_block, (q, _blocks(positions, 1, BLOCK_QUERIES)))
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(batch, -1, heads, head_dim)
    return mixed[:, :tokens].astype(dtype)


def _blocks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cut `axis` into blocks of `size`, the last one padded with zeros: [blocks, *shape]."""
    blocks = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, blocks * size - x.shape[axis])
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
