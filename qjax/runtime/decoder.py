"""A decoder of prepared weights: at a decode step, a layer is eight to ten kernels.

[residual sum, norm, quantization] -> product with q, k and v -> [rotation, keys and values into
their pages] -> attention -> product with o -> [residual sum, norm, quantization] -> product with
gate and up [, SwiGLU, quantization] -> product with down. Each is called by its op's name: where a
kernel does not run, as on a CPU, its reference does.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax import ops
from qjax.models.rope import rope_table
from qjax.nn.embed import Embed
from qjax.nn.norm import RMSNorm
from qjax.qarray import QArray
from qjax.runtime.fuse import row_output
from qjax.runtime.weights import INTERLEAVED, LayerWeights, Projection


class Rows(NamedTuple):
    """Activations [tokens, features] on their way into a product.

    Attributes:
      values: as they are, or quantized.
      scale: of quantized ones, float32 [] or [tokens, 1]; else None.
    """

    values: jax.Array
    scale: jax.Array | None = None


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


class Decoder(nnx.Module):
    """Embedding, layers, norm and head; what `qjax.decode` asks of a model.

    Attributes:
      config: sizes, a LlamaConfig.
      embed_tokens, norm: as in the model it was prepared from.
      layers: Params of LayerWeights.
      head: Param of a Projection; None: the embedding's table.
      cache_dtype: name of the dtype of keys and values in the cache; None: that of activations.
      cache_scales: Param of a list of (k_scale, v_scale), one a layer, for a cache in 8 bits; None.
    """

    def __init__(
        self,
        config: Any,
        *,
        embed_tokens: Embed,
        layers: list[LayerWeights],
        norm: RMSNorm,
        head: Projection | None,
        cache_dtype: str | None = None,
        cache_scales: list[tuple[jax.Array, jax.Array]] | None = None,
    ) -> None:
        self.config = config
        self.embed_tokens = embed_tokens
        self.layers = nnx.List([nnx.Param(layer) for layer in layers])
        self.norm = norm
        self.head = nnx.data(None) if head is None else nnx.Param(head)
        self.cache_dtype = cache_dtype
        self.cache_scales = nnx.data(None) if cache_scales is None else nnx.Param(cache_scales)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """int32 [batch, tokens] -> float32 logits [batch, tokens, vocab_size]."""
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        hidden, _ = self.hidden(input_ids, positions)
        return self.logits(hidden)

    def init_cache(self, batch: int, length: int) -> kv.PagedCache:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        cfg = self.config
        own = jnp.dtype(self.embed_tokens.embedding.get_value().dtype)
        return kv.init_pages(
            cfg.num_hidden_layers,
            batch,
            cfg.num_key_value_heads,
            length,
            cfg.head_dim,
            own if self.cache_dtype is None else jnp.dtype(self.cache_dtype),
            scales=None if self.cache_scales is None else self.cache_scales.get_value(),
        )

    def hidden(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        cache: kv.PagedCache | None = None,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, kv.PagedCache | None]:
        """The stack without its head.

        Args:
          input_ids: int32 [batch, tokens].
          positions: int32 [batch, tokens], consecutive in each row.
          cache: read and extended at `positions`; None: the tokens are all there is, starting at
            position 0.
          fresh: positions start at 0: of the cache nothing needs to be read.

        Returns:
          normalized hidden states [batch, tokens, hidden_size], and the extended cache or None.
        """
        cfg = self.config
        batch, tokens = input_ids.shape
        shape = Shape(
            batch=batch,
            tokens=tokens,
            heads=cfg.num_attention_heads,
            kv_heads=cfg.num_key_value_heads,
            head_dim=cfg.head_dim,
            eps=cfg.rms_norm_eps,
            fresh=fresh or cache is None,
        )
        x = self.embed_tokens(input_ids).reshape(batch * tokens, -1)
        where = self._where(positions, cache)
        residual, pages = None, []
        for index, layer in enumerate(self.layers):
            mine = _nowhere(shape, x.dtype) if cache is None else _pages(cache, index)
            x, residual, *new = decoder_layer(x, residual, layer.get_value(), mine, where, shape)
            pages.append(new)
        last = ops.norm_quant(x, self.norm.scale.get_value(), residual=residual, eps=self.norm.eps)
        if cache is not None:
            k, v = ([new[i] for new in pages] for i in range(2))
            cache = dataclasses.replace(cache, k_pages=k, v_pages=v)
        return last.values.reshape(batch, tokens, -1), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., hidden_size] -> float32 [..., vocab_size]."""
        wide = jnp.dtype(jnp.float32)
        if self.head is None:
            return ops.linear(hidden, self.embed_tokens.embedding.get_value(), out_dtype=wide)
        return project(Rows(hidden), self.head.get_value(), wide)

    def _where(self, positions: jax.Array, cache: kv.PagedCache | None) -> Where:
        cos, sin = rope_table(self.config.rope, self.config.head_dim, positions)
        if cache is None:
            page = jnp.full((positions.size,), -1, jnp.int32)
            slot = jnp.zeros_like(page)
        else:
            page, slot = kv.places(cache, positions)
        return Where(
            cos=cos.reshape(positions.size, -1),
            sin=sin.reshape(positions.size, -1),
            context=positions[:, 0],
            lengths=positions[:, -1] + 1,
            page=page,
            slot=slot,
            block_table=None if cache is None else cache.block_table,
        )


def _pages(cache: kv.PagedCache, index: int) -> Pages:
    return Pages(
        cache.k_pages[index], cache.v_pages[index], cache.k_scale[index], cache.v_scale[index]
    )


def _nowhere(shape: Shape, dtype: jnp.dtype) -> Pages:
    """A page for tokens that are not kept."""
    empty = jnp.zeros((1, shape.kv_heads, 8, shape.head_dim), dtype)
    return Pages(empty, empty, None, None)


@partial(jax.jit, static_argnames="shape")
def decoder_layer(
    x: jax.Array,
    residual: jax.Array | None,
    weights: LayerWeights,
    pages: Pages,
    where: Where,
    shape: Shape,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One layer. Jitted: layers of equal shapes are traced once.

    Args:
      x: [batch * tokens, features]: what the layer before adds to the residual.
      residual: of the same shape; None in the first layer, whose residual is x.

    Returns:
      what this layer adds to the residual, the residual, and its pages of keys and of values.
    """
    dtype = x.dtype
    rows, residual = normed(x, residual, weights.attention_norm, weights.qkv, shape.eps)
    qkv = side_by_side([project(rows, part, dtype) for part in weights.qkv])
    mixed, k_pages, v_pages = attend(qkv, pages, where, shape)
    y = project(quantized(mixed, weights.o), weights.o, dtype)
    rows, residual = normed(y, residual, weights.mlp_norm, weights.gate_up, shape.eps)
    y = project(gate(rows, weights, dtype), weights.down, dtype)
    return y, residual, k_pages, v_pages


def normed(
    x: jax.Array,
    residual: jax.Array | None,
    scale: jax.Array,
    parts: tuple[Projection, ...],
    eps: float,
) -> tuple[Rows, jax.Array]:
    """RMSNorm of x + residual, as the product behind it takes it; and that sum."""
    dtype, static = row_output(parts) or (None, None)
    norm = ops.norm_quant(x, scale, residual=residual, eps=eps, out_dtype=dtype, scale=static)
    return Rows(norm.values, norm.scale), x if norm.residual is None else norm.residual


def quantized(x: jax.Array, part: Projection) -> Rows:
    """Rows as the product takes them, where what made them could not write them so."""
    output = row_output([part])
    if output is None:
        return Rows(x)
    return Rows(*ops.quantize_rows(x, out_dtype=output[0], scale=output[1]))


def project(rows: Rows, part: Projection, dtype: jnp.dtype) -> jax.Array:
    """[..., in] -> [..., out] of `dtype`."""
    if isinstance(part.weight, ops.Prepared):
        return ops.prepared_gemm(rows.values, part.weight, part.bias, out_dtype=dtype)
    if rows.scale is None:
        return ops.linear(rows.values, part.weight, part.bias, out_dtype=dtype)
    return ops.scaled_gemm(
        rows.values,
        rows.scale,
        part.weight.values,
        part.weight.scale,
        bias=part.bias,
        out_dtype=dtype,
    )


def side_by_side(parts: list[jax.Array]) -> jax.Array:
    """[..., features] of each part -> [..., all features]; nothing to do for one."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def attend(
    qkv: jax.Array, pages: Pages, where: Where, shape: Shape
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotation, the cache, and attention: [batch * tokens, heads * head_dim], and the pages."""
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
    if step:
        y = ops.decode_attention(new.q, *cache, where.lengths, **scales)
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
    return y.reshape(shape.batch * shape.tokens, -1), new.k_pages, new.v_pages


def gate(rows: Rows, weights: LayerWeights, dtype: jnp.dtype) -> Rows:
    """silu(gate) * up, as the product with down takes it."""
    out_dtype, static = row_output([weights.down]) or (dtype, None)
    if weights.gated != INTERLEAVED:
        both = side_by_side([project(rows, part, dtype) for part in weights.gate_up])
        glu = ops.glu_quant(both, out_dtype=out_dtype, scale=static)
        return Rows(glu.values, glu.scale)
    (part,) = weights.gate_up
    weight = part.weight
    if isinstance(weight, ops.Prepared):
        return Rows(
            ops.prepared_gemm(rows.values, weight, part.bias, out_dtype=dtype, activation="silu")
        )
    if isinstance(weight, QArray):
        x, x_scale = rows
        if x_scale is None and weight.input is not None:
            x, x_scale = ops.quantize_activations(x, weight.input)
        operands: dict[str, Any] = {"x_scale": x_scale, "scale": weight.scale}
        weight = weight.values
    else:
        x, operands = rows.values, {}
    values = ops.gemm_swiglu(x, weight, out_dtype=out_dtype, out_scale=static, **operands)
    return Rows(values, static)
