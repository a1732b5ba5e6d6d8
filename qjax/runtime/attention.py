"""Attention of a prepared layer: rotation, the pages of the cache, and what they are read for."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.nn.attention import AttentionConfig
from qjax.runtime.dense import row_output
from qjax.runtime.products import Rows, quantized
from qjax.runtime.weights import LayerWeights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Static facts of a layer's call.

    Attributes:
      batch, tokens: of the input.
      fresh: the tokens are all there is: nothing that the cache held before is read.
    """

    batch: int
    tokens: int
    fresh: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cos", "sin", "context", "lengths", "page", "slot", "block_table"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Where the tokens stand; but for the angles the same for all layers.

    Attributes:
      cos, sin: float32 [batch * tokens, rotated dims / 2].
      context, lengths: int32 [batch], tokens before these, and up to the last of them.
      page, slot: int32 [batch * tokens], where keys and values go; page -1: nowhere.
      block_table: int32 [batch, pages]; None without a cache.
    """

    cos: jax.Array
    sin: jax.Array
    context: jax.Array
    lengths: jax.Array
    page: jax.Array
    slot: jax.Array
    block_table: jax.Array | None


class Pages(NamedTuple):
    """One layer's part of a PagedCache."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None


Written = tuple[jax.Array, jax.Array]  # pages of keys and of values


def attend(
    qkv: jax.Array, weights: LayerWeights, pages: Pages, where: Where, shape: Shape
) -> tuple[Rows, Written]:
    """Norms of heads, rotation, the cache, and attention.

    Args:
      qkv: [batch * tokens, features]: all queries, keys and values of a token, then anything.

    Returns:
      [batch * tokens, heads * head_dim] as the product with o takes it, and the pages.
    """
    cfg = weights.config.attention
    scales: dict[str, Any] = {"k_scale": pages.k_scale, "v_scale": pages.v_scale}
    step = shape.tokens == 1 and where.block_table is not None
    new = ops.rope_cache(
        _bounded(qkv, cfg),
        where.cos,
        where.sin,
        pages.k,
        pages.v,
        where.page,
        where.slot,
        heads=cfg.heads,
        interleaved=cfg.interleaved,
        with_kv=shape.fresh and not step,
        **scales,
        **_head_norms(weights),
    )
    keys, values, table = new.k_pages, new.v_pages, where.block_table
    how = _scores(cfg)
    out_dtype, static = row_output([weights.o]) or (None, None)
    if step:
        if static is not None:
            how |= {"out_dtype": out_dtype, "out_scale": static}
        y = ops.decode_attention(new.q, keys, values, table, where.lengths, **scales, **how)
    else:
        q, k, v = (
            None if x is None else x.reshape(shape.batch, shape.tokens, -1, cfg.head_dim)
            for x in (new.q, new.k, new.v)
        )
        assert q is not None
        if k is not None and v is not None:
            y = ops.prefill_attention(q, k, v, **how)
        else:
            new_tokens = where.lengths - where.context
            new_tokens, how = where.lengths - where.context, scales | how
            y = ops.paged_prefill_attention(
                q, keys, values, table, where.context, new_tokens, **how
            )
    y = y.reshape(shape.batch * shape.tokens, -1)
    rows = Rows(y, static) if step and static is not None else quantized(y, [weights.o])
    return rows, (new.k_pages, new.v_pages)


def _scores(cfg: AttentionConfig) -> dict[str, Any]:
    """What attention does to scores, as arguments of the kernels; nothing that it does not do."""
    slopes = cfg.alibi_slopes
    how: dict[str, Any] = {
        "alibi_slopes": None if slopes is None else jnp.asarray(slopes, jnp.float32),
        "scale": cfg.scale,
        "window": cfg.window,
        "soft_cap": cfg.soft_cap,
    }
    return {name: value for name, value in how.items() if value is not None}


def _bounded(qkv: jax.Array, cfg: AttentionConfig) -> jax.Array:
    """Queries, keys and values, clipped by XLA; see `report.between_kernels`."""
    return qkv if cfg.clip_qkv is None else jnp.clip(qkv, -cfg.clip_qkv, cfg.clip_qkv)


def _head_norms(weights: LayerWeights) -> dict[str, Any]:
    """The norms of the heads of queries and keys, as arguments of `rope_cache`."""
    q, k = weights.q_norm, weights.k_norm
    if q is None or k is None:
        return {}
    return {"q_norm": q.scale, "k_norm": k.scale, "eps": q.eps, "weight_offset": q.offset}
