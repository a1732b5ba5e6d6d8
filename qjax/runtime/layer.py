"""One decoder layer with prepared weights: at a decode step, six to ten kernels.

[residual sum, norm, quantization] -> product with q, k and v -> [rotation, keys and values into
their pages] -> attention -> product with o -> [residual sum, norm, quantization] -> product with
gate and up [, SwiGLU, quantization] -> product with down. Around weight-only products of few tokens
the norms are parts of the products. Each is called by its op's name: where a kernel does not run,
as on a CPU, its reference does.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax

from qjax import ops
from qjax.runtime.fuse import row_output
from qjax.runtime.products import (
    Rows,
    added,
    gate,
    normed,
    project,
    quantized,
    side_by_side,
    splits,
)
from qjax.runtime.weights import LayerWeights, Projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Static facts of a layer's call.

    Attributes:
      batch, tokens: of the input.
      heads, kv_heads, head_dim: of attention.
      eps: of the norms.
      fresh: the tokens are all there is: nothing that the cache held before is read.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    fresh: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cos", "sin", "context", "lengths", "page", "slot", "block_table"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Where the tokens stand; the same for all layers.

    Attributes:
      cos, sin: float32 [batch * tokens, head_dim/2].
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


@partial(jax.jit, static_argnames="shape")
def decoder_layer(
    x: jax.Array | ops.Summed,
    residual: jax.Array | None,
    weights: LayerWeights,
    pages: Pages,
    where: Where,
    gain: jax.Array | None,
    shape: Shape,
) -> tuple[jax.Array | ops.Summed, jax.Array, jax.Array, jax.Array]:
    """One layer. Jitted: layers of equal shapes are traced once.

    Args:
      x: [batch * tokens, features]: what the layer before adds to the residual; or their sum.
      residual: of the same shape; None in the first layer, whose residual is x.
      gain: of the norm behind this layer, where it `splits`; else None.

    Returns:
      what this layer adds to the residual, or with a gain their sum; the residual; and the layer's
      pages of keys and of values.
    """
    dtype = x.total.dtype if isinstance(x, ops.Summed) else x.dtype
    rows, residual = normed(x, residual, weights.attention_norm, weights.qkv, shape.eps)
    qkv = side_by_side([project(rows, part, dtype) for part in weights.qkv])
    mixed, k_pages, v_pages = attend(qkv, weights.o, pages, where, shape)
    split = splits(shape.batch * shape.tokens, weights.o, weights.gate_up)
    norm = weights.mlp_norm if split else None
    y = added(mixed, weights.o, residual, norm)
    rows, residual = normed(y, residual, weights.mlp_norm, weights.gate_up, shape.eps)
    y = added(gate(rows, weights, dtype), weights.down, residual, gain)
    return y, residual, k_pages, v_pages


def attend(
    qkv: jax.Array, part: Projection, pages: Pages, where: Where, shape: Shape
) -> tuple[Rows, jax.Array, jax.Array]:
    """Rotation, the cache, and attention: [batch * tokens, heads * head_dim] as the product with
    `part` takes it, and the pages."""
    scales: dict[str, Any] = {"k_scale": pages.k_scale, "v_scale": pages.v_scale}
    step = shape.tokens == 1 and where.block_table is not None
    new = ops.rope_cache(
        qkv,
        where.cos,
        where.sin,
        pages.k,
        pages.v,
        where.page,
        where.slot,
        with_kv=shape.fresh and not step,
        **scales,
    )
    cache = (new.k_pages, new.v_pages, where.block_table)
    out_dtype, static = row_output([part]) or (None, None)
    if step:
        how = scales if static is None else scales | {"out_dtype": out_dtype, "out_scale": static}
        y = ops.decode_attention(new.q, *cache, where.lengths, **how)
    else:
        q, k, v = (
            None if x is None else x.reshape(shape.batch, shape.tokens, -1, shape.head_dim)
            for x in (new.q, new.k, new.v)
        )
        assert q is not None
        if k is not None and v is not None:
            y = ops.prefill_attention(q, k, v)
        else:
            new_tokens = where.lengths - where.context
            y = ops.paged_prefill_attention(q, *cache, where.context, new_tokens, **scales)
    y = y.reshape(shape.batch * shape.tokens, -1)
    rows = Rows(y, static) if step and static is not None else quantized(y, part)
    return rows, new.k_pages, new.v_pages
