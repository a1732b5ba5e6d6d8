"""Attention of the canonical models: XLA products with float32 sums, softmax in float32.

GPUs compute it at once. CPUs compute it a block of queries and a block of keys at a time with an
online softmax (arXiv:2205.14135, algorithm 1), for memory linear in the length, and for one more
reason: every block has the same shape, so a row of the result has the same bits whether its query
came alone, as in a decode step, or among others, as in a full pass. XLA's CPU chooses the order of
a sum by the shape of the whole product.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

BLOCK_QUERIES = 16
BLOCK_KEYS = 64
LOWEST = -1e30  # of a running maximum: finite, so that differences are numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What is done to scores, and which keys are seen.

    Attributes:
      divisor: of the products of queries and keys.
      window: positions that a query sees, the last ones; None: all.
      soft_cap: scores are soft_cap * tanh(scores / soft_cap); None: they are as they are.
    """

    divisor: float
    window: int | None
    soft_cap: float | None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    alibi_slopes: jax.Array | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See `qjax.ops.attention`."""
    divisor = q.shape[-1] ** 0.5 if scale is None else 1 / scale
    form = Form(divisor=divisor, window=window, soft_cap=soft_cap)
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        positions,
        alibi_slopes,
        cpu=partial(_blockwise, form=form),
        default=partial(at_once, form=form),
    )


def _masked(
    scores: jax.Array, keys: jax.Array, seen: jax.Array, slopes: jax.Array | None, form: Form
) -> jax.Array:
    """Scores as the softmax takes them.

    Args:
      scores: float32 [batch, kv_heads, group, queries, keys], divided by form.divisor.
      keys: int32 [keys], their positions.
      seen: int32 [batch, queries], the positions of the queries.
      slopes: float32 [heads], or None.
    """
    if form.soft_cap is not None:
        scores = form.soft_cap * jnp.tanh(scores / form.soft_cap)
    distance = keys - seen[:, :, None]
    visible = distance <= 0
    if slopes is not None:
        slopes = slopes.reshape(*scores.shape[1:3], 1, 1)
        scores = scores + slopes * distance[:, None, None].astype(jnp.float32)
    if form.window is not None:
        visible &= distance > -form.window
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def at_once(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    slopes: jax.Array | None,
    *,
    form: Form,
) -> jax.Array:
    """As GPUs compute it; XLA's CPU has no batched bfloat16 product with float32 sums."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, length = k.shape[1:3]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "btkgd,bksd->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = _masked(scores / form.divisor, jnp.arange(length), positions, slopes, form)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum(
        "bkgts,bksd->btkgd", weights, v, precision=precision, preferred_element_type=jnp.float32
    )
    return mixed.astype(q.dtype).reshape(batch, tokens, heads, head_dim)


def _blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    slopes: jax.Array | None,
    *,
    form: Form,
) -> jax.Array:
    batch, tokens, heads, head_dim = q.shape
    kv_heads, dtype = k.shape[1], q.dtype
    # Padded queries see key 0; what they give is cut off. Padded keys lie behind every position.
    q = _blocks(q.astype(jnp.float32) / form.divisor, 1, BLOCK_QUERIES)
    k, v = (_blocks(x, 2, BLOCK_KEYS) for x in (k, v))
    starts = jnp.arange(k.shape[0]) * BLOCK_KEYS

    def one_block(queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, seen = queries
        rows = rows.reshape(batch, BLOCK_QUERIES, kv_heads, heads // kv_heads, head_dim)

        def step(carry: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> tuple:
            top, total, mixed = carry
            k, v, start = keys
            scores = jnp.einsum("btkgd,bksd->bkgts", rows, k.astype(jnp.float32))
            scores = _masked(scores, start + jnp.arange(BLOCK_KEYS), seen, slopes, form)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            added = jnp.einsum("bkgts,bksd->bkgtd", weights, v.astype(jnp.float32))
            total = total * shrink + jnp.sum(weights, axis=-1)
            return (new_top, total, mixed * shrink[..., None] + added), None

        rows_shape = (batch, kv_heads, heads // kv_heads, BLOCK_QUERIES)
        empty = (
            jnp.full(rows_shape, LOWEST),
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
