"""A decoder of prepared weights, which `prepare` makes and `generate` runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax import ops
from qjax.models.decoder import DecoderConfig
from qjax.models.rope import rope_table
from qjax.nn.embed import Embed
from qjax.runtime.attention import Pages, Shape, Where
from qjax.runtime.layer import decoder_layer, norm_behind
from qjax.runtime.products import Rows, normed, project
from qjax.runtime.weights import LayerWeights, Norm, Projection


class Decoder(nnx.Module):
    """Embedding, layers, norm and head; what `qjax.decode` asks of a model.

    Attributes:
      config: of the model it was prepared from.
      decoder_config: DecoderConfig of the same.
      embed_tokens, embed_positions: as in that model.
      embed_in, embed_out: Params of Projections between the embedding's features and the layers';
        None: they are the same.
      layers: Params of LayerWeights.
      norm: Param of a Norm; None: none.
      head: Param of a Projection; None: the embedding's table.
      cache_dtype: name of the dtype of keys and values in the cache; None: that of activations.
      cache_scales: Param of a list of (k_scale, v_scale), one a layer, for a cache in 8 bits; None.
    """

    def __init__(
        self,
        config: Any,
        decoder_config: DecoderConfig,
        *,
        embed_tokens: Embed,
        embed_positions: Embed | None = None,
        embed_in: Projection | None = None,
        layers: list[LayerWeights],
        norm: Norm | None,
        embed_out: Projection | None = None,
        head: Projection | None,
        cache_dtype: str | None = None,
        cache_scales: list[tuple[jax.Array, jax.Array]] | None = None,
    ) -> None:
        def param(value: Any) -> Any:
            return nnx.data(None) if value is None else nnx.Param(value)

        self.config = config
        self.decoder_config = decoder_config
        self.embed_tokens = embed_tokens
        self.embed_positions = nnx.data(None) if embed_positions is None else embed_positions
        self.embed_in = param(embed_in)
        self.layers = nnx.List([nnx.Param(layer) for layer in layers])
        self.norm = param(norm)
        self.embed_out = param(embed_out)
        self.head = param(head)
        self.cache_dtype = cache_dtype
        self.cache_scales = param(cache_scales)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """int32 [batch, tokens] -> float32 logits [batch, tokens, vocab_size]."""
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        hidden, _ = self.hidden(input_ids, positions)
        return self.logits(hidden)

    def init_cache(self, batch: int, length: int) -> kv.PagedCache:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        cfg = self.decoder_config
        own = jnp.dtype(self.embed_tokens.embedding.get_value().dtype)
        pages = kv.init_pages(
            cfg.num_hidden_layers,
            batch,
            cfg.num_key_value_heads,
            length,
            cfg.head_dim,
            own if self.cache_dtype is None else jnp.dtype(self.cache_dtype),
            scales=None if self.cache_scales is None else self.cache_scales.get_value(),
        )
        # Only frequencies that depend on the longest sequence need to know it.
        depends = any(rope.type == "longrope" for rope in cfg.ropes)
        return dataclasses.replace(pages, length=length) if depends else pages

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
          normalized hidden states [batch, tokens, features], and the extended cache or None.
        """
        batch, tokens = input_ids.shape
        shape = Shape(batch=batch, tokens=tokens, fresh=fresh or cache is None)
        x: Any = self._embed(input_ids, positions).reshape(batch * tokens, -1)
        where = self._where(positions, cache)
        dtype = x.dtype
        residual: jax.Array | None = None
        pages = []
        for index, layer in enumerate(self.layers):
            weights = layer.get_value()
            mine = self._nowhere(dtype) if cache is None else _pages(cache, index)
            here, behind = where[_angles_of(weights)], self._norm_behind(index, batch * tokens)
            x, residual, new = decoder_layer(x, residual, weights, mine, here, behind, shape)
            pages.append(new)
        if self.norm is not None:
            x = normed(x, residual, self.norm.get_value(), ())[0].values
        elif residual is not None:
            x = x + residual
        if self.embed_out is not None:
            x = project(Rows(x), self.embed_out.get_value(), dtype)
        if cache is not None:
            k, v = ([new[i] for new in pages] for i in range(2))
            cache = dataclasses.replace(cache, k_pages=k, v_pages=v)
        return x.reshape(batch, tokens, -1), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., features] -> float32 [..., vocab_size]."""
        wide = jnp.dtype(jnp.float32)
        if self.head is None:
            y = ops.linear(hidden, self.embed_tokens.embedding.get_value(), out_dtype=wide)
        else:
            y = project(Rows(hidden), self.head.get_value(), wide)
        cap = self.decoder_config.soft_cap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def _embed(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        cfg = self.decoder_config
        x = self.embed_tokens(input_ids)
        if cfg.embedding_scale != 1.0:
            x = x * jnp.asarray(cfg.embedding_scale, x.dtype)
        if self.embed_in is not None:
            x = project(Rows(x), self.embed_in.get_value(), x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + cfg.position_offset).astype(x.dtype)
        return x

    def _norm_behind(self, index: int, tokens: int) -> Norm | None:
        """Of a layer, if its last product can do a part of it."""
        if index + 1 == len(self.layers):
            return None
        layer, following = (self.layers[i].get_value() for i in (index, index + 1))
        return norm_behind(tokens, layer, following)

    def _where(
        self, positions: jax.Array, cache: kv.PagedCache | None
    ) -> dict[tuple[int | None, int], Where]:
        """Each table of angles that layers use -> where the tokens stand, with it."""
        if cache is None:
            page = jnp.full((positions.size,), -1, jnp.int32)
            slot = jnp.zeros_like(page)
        else:
            page, slot = kv.places(cache, positions)
        length = positions.shape[1] if cache is None else cache.length
        found = {}
        for rope, dims in {_angles_of(layer.get_value()) for layer in self.layers}:
            if rope is None:
                cos = sin = jnp.zeros((positions.size, 0), jnp.float32)
            else:
                cos, sin = rope_table(self.decoder_config.ropes[rope], dims, positions, length)
            found[rope, dims] = Where(
                cos=cos.reshape(positions.size, -1),
                sin=sin.reshape(positions.size, -1),
                context=positions[:, 0],
                lengths=positions[:, -1] + 1,
                page=page,
                slot=slot,
                block_table=None if cache is None else cache.block_table,
            )
        return found

    def _nowhere(self, dtype: jnp.dtype) -> Pages:
        """A page for tokens that are not kept."""
        cfg = self.decoder_config
        empty = jnp.zeros((1, cfg.num_key_value_heads, 8, cfg.head_dim), dtype)
        return Pages(empty, empty, None, None)


def _angles_of(weights: LayerWeights) -> tuple[int | None, int]:
    """Which table rotates a layer's queries and keys: (index of the rope or None, rotated dims)."""
    attention = weights.config.attention
    return (None, 0) if attention.rope is None else (attention.rope, attention.rotary_dim)


def _pages(cache: kv.PagedCache, index: int) -> Pages:
    return Pages(
        cache.k_pages[index], cache.v_pages[index], cache.k_scale[index], cache.v_scale[index]
    )
