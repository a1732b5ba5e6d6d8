"""A decoder as data, and the one module that all families build from it.

A family's file says how its config.json becomes a DecoderConfig, and which of its tensors become
which of the weights below; it has no code that runs on the device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax import ops
from qjax.errors import CheckpointError
from qjax.models.rope import RopeConfig, rope_table
from qjax.nn.attention import RopeTable
from qjax.nn.embed import Embed
from qjax.nn.layer import DecoderLayer, LayerConfig
from qjax.nn.linear import Linear
from qjax.nn.norm import NormConfig, make_norm
from qjax.numerics import get_format


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of any family.

    Attributes:
      model_type: Hugging Face's name of the family.
      vocab_size, hidden_size: sizes.
      max_position_embeddings: tokens that a sequence may have.
      layers: one LayerConfig each.
      norm: of what the last layer gives; None: none.
      ropes: the rotary embeddings that layers name by their index.
      tie_word_embeddings: the output head is the embedding table.
      lm_head_bias: whether an output head of its own has a bias.
      embedding_size: features of the embedding table; projected to hidden_size, and back before
        the output head, where they differ (OPT-350M).
      embedding_scale: what its rows are multiplied by (Gemma).
      learned_positions: rows of a table of positions that is added to the embeddings; 0: none.
      position_offset: the row of position 0 in it.
      soft_cap: bounds the logits by tanh; None: not.
      eos_token_id: tokens that end a sequence.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig | None
    ropes: tuple[RopeConfig, ...] = ()
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    embedding_size: int
    embedding_scale: float = 1.0
    learned_positions: int = 0
    position_offset: int = 0
    soft_cap: float | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for layer in set(self.layers):
            a = layer.attention
            if a.heads % a.kv_heads:
                raise CheckpointError(
                    f"{a.heads} heads with {a.kv_heads} key-value heads: the second must divide "
                    "the first"
                )
            if a.rotary_dim % 2 or a.rotary_dim > a.head_dim:
                raise CheckpointError(
                    f"{a.rotary_dim} dims of a head of {a.head_dim} are rotated; that must be an "
                    "even number, and not more than there are"
                )
            few = getattr(layer.mlp, "experts_per_token", 1)
            if few > getattr(layer.mlp, "experts", few):
                raise CheckpointError(f"a token goes through {few} experts, more than there are")
        check_end_tokens(self.eos_token_id, self.vocab_size)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def num_attention_heads(self) -> int:
        return self.layers[0].attention.heads

    @property
    def num_key_value_heads(self) -> int:
        return self.layers[0].attention.kv_heads

    @property
    def head_dim(self) -> int:
        return self.layers[0].attention.head_dim

    def decoder(self) -> Self:
        """What all families are described by: itself."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: each different layer once, and which of them comes where."""
        kinds = list(dict.fromkeys(self.layers))
        return dataclasses.asdict(self) | {
            "layers": [dataclasses.asdict(kind) for kind in kinds],
            "layer_order": [kinds.index(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict` (qjax's own checkpoints)."""
        data = dict(data)
        kinds = [LayerConfig.from_dict(kind) for kind in data.pop("layers")]
        norm = data.pop("norm")
        return cls(
            layers=tuple(kinds[at] for at in data.pop("layer_order")),
            norm=None if norm is None else NormConfig(**norm),
            ropes=tuple(RopeConfig(**rope) for rope in data.pop("ropes")),
            eos_token_id=tuple(data.pop("eos_token_id")),
            **data,
        )


def check_end_tokens(ids: Sequence[Any], vocab_size: int) -> None:
    """Raise CheckpointError unless all are tokens."""
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(f"eos_token_id is {ids!r}; token ids are 0..{vocab_size - 1}")


class Decoder(nnx.Module):
    """A decoder. Activations have the (logical) dtype of the embedding table.

    Attributes:
      embed_tokens: Embed; embed_positions: Embed, or None.
      embed_in, embed_out: Linears between the embedding's features and the layers', or None.
      layers: DecoderLayers.
      norm: of their result, or None.
      lm_head: Linear, or None if it is tied to the embedding.
    """

    def __init__(
        self, cfg: DecoderConfig, *, param_dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs
    ) -> None:
        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, param_dtype=param_dtype, rngs=rngs)

        def embed(rows: int, features: int) -> Embed:
            return Embed(rows, features, param_dtype=param_dtype, rngs=rngs)

        none = nnx.data(None)
        narrow = cfg.embedding_size != cfg.hidden_size
        self.config: Any = cfg
        self.decoder_config = cfg
        self.embed_tokens = embed(cfg.vocab_size, cfg.embedding_size)
        self.embed_positions = (
            embed(cfg.learned_positions, cfg.hidden_size) if cfg.learned_positions else none
        )
        self.embed_in = linear(cfg.embedding_size, cfg.hidden_size) if narrow else none
        self.layers = nnx.List(
            [
                DecoderLayer(cfg.hidden_size, layer, param_dtype=param_dtype, rngs=rngs)
                for layer in cfg.layers
            ]
        )
        self.norm = none if cfg.norm is None else make_norm(cfg.hidden_size, cfg.norm, param_dtype)
        self.embed_out = linear(cfg.hidden_size, cfg.embedding_size) if narrow else none
        self.lm_head = (
            none
            if cfg.tie_word_embeddings
            else linear(cfg.embedding_size, cfg.vocab_size, cfg.lm_head_bias)
        )

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """int32 [batch, tokens] -> float32 logits [batch, tokens, vocab_size]."""
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        hidden, _ = self.hidden(input_ids, positions)
        return self.logits(hidden)

    def init_cache(self, batch: int, length: int) -> list[kv.KVCache]:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        cfg = self.decoder_config
        dtype = jnp.dtype(self.embed_tokens.embedding.get_value().dtype)
        rounded = self.layers[0].self_attn.kv_format
        if rounded is not None:
            dtype = get_format(rounded).dtype
        return kv.init_cache(
            cfg.num_hidden_layers, batch, cfg.num_key_value_heads, length, cfg.head_dim, dtype
        )

    def hidden(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        cache: list[kv.KVCache] | None = None,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, list[kv.KVCache] | None]:
        """The stack without its head.

        Args:
          input_ids: int32 [batch, tokens].
          positions: int32 [batch, tokens], consecutive in each row.
          cache: one entry a layer, read and extended at `positions`; None: the tokens are all
            there is, starting at position 0.
          fresh: a promise that the cache is empty, of which prepared decoders make use.

        Returns:
          normalized hidden states [batch, tokens, features], and the extended cache or None.
        """
        x = self.embed(input_ids, positions)
        length = input_ids.shape[1] if cache is None else cache[0].k.shape[2]
        tables: dict[tuple[int, int], RopeTable] = {}
        new_cache: list[Any] = []
        for index, layer in enumerate(self.layers):
            table = self._rope(layer.config, positions, length, tables)
            x, entry = layer(x, table, positions, None if cache is None else cache[index])
            new_cache.append(entry)
        if self.norm is not None:
            x = self.norm(x)
        if self.embed_out is not None:
            x = self.embed_out(x)
        return x, None if cache is None else new_cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., features] -> float32 [..., vocab_size]."""
        wide = jnp.dtype(jnp.float32)
        if self.lm_head is None:
            y = ops.linear(hidden, self.embed_tokens.embedding.get_value(), out_dtype=wide)
        else:
            y = self.lm_head(hidden, out_dtype=wide)
        cap = self.decoder_config.soft_cap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def embed(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer reads, [batch, tokens, hidden_size]."""
        cfg = self.decoder_config
        x = self.embed_tokens(input_ids)
        if cfg.embedding_scale != 1.0:
            x = x * jnp.asarray(cfg.embedding_scale, x.dtype)
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + cfg.position_offset).astype(x.dtype)
        return x

    def _rope(
        self,
        layer: LayerConfig,
        positions: jax.Array,
        length: int,
        tables: dict[tuple[int, int], RopeTable],
    ) -> RopeTable | None:
        """The table of a layer; each is computed once."""
        rope, dims = layer.attention.rope, layer.attention.rotary_dim
        if rope is None:
            return None
        if (rope, dims) not in tables:
            cfg = self.decoder_config.ropes[rope]
            tables[rope, dims] = rope_table(cfg, dims, positions, length)
        return tables[rope, dims]
