"""A decoder of prepared weights, which `prepare` makes and `generate` runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax import ops
from qjax.models.rope import rope_table
from qjax.nn.embed import Embed
from qjax.nn.norm import RMSNorm
from qjax.runtime.layer import Pages, Shape, Where, decoder_layer
from qjax.runtime.products import Rows, project, splits
from qjax.runtime.weights import LayerWeights, Projection


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
        dtype, residual, pages = x.dtype, None, []
        for index, layer in enumerate(self.layers):
            mine = _nowhere(shape, dtype) if cache is None else _pages(cache, index)
            args = x, residual, layer.get_value(), mine, where, self._gain(index, batch * tokens)
            x, residual, *new = decoder_layer(*args, shape)
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

    def _gain(self, index: int, tokens: int) -> jax.Array | None:
        """Of the norm behind a layer, if the layer's last product can do its part of it."""
        if index + 1 == len(self.layers):
            return None
        layer, following = (self.layers[i].get_value() for i in (index, index + 1))
        return following.attention_norm if splits(tokens, layer.down, following.qkv) else None

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
