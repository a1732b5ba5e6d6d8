"""Llama (model_type 'llama'): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

arXiv:2302.13971, 2307.09288, 2407.21783. The modules and weights keep Hugging Face's names.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax import ops
from qjax.errors import CheckpointError
from qjax.models.rope import RopeConfig, rope_table
from qjax.nn.embed import Embed
from qjax.nn.linear import Linear
from qjax.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes of a Llama model; field names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_id: tuple[int, ...] = ()
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and value > 0):
                raise CheckpointError(f"{field.name} is {value!r}; it must be a positive integer")
            if field.type is bool and type(value) is not bool:
                raise CheckpointError(f"{field.name} is {value!r}; it must be true or false")
        if not (isinstance(self.rms_norm_eps, float) and 0 < self.rms_norm_eps < 1):
            raise CheckpointError(f"rms_norm_eps is {self.rms_norm_eps!r}; it must be in (0, 1)")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise CheckpointError(
                f"{self.num_attention_heads} heads of {self.head_dim} with "
                f"{self.num_key_value_heads} key-value heads: the last must divide the first, and "
                "the size of a head must be even"
            )
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in self.eos_token_id):
            raise CheckpointError(
                f"eos_token_id is {self.eos_token_id!r}; token ids are 0..{self.vocab_size - 1}"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """From the contents of a config.json.

        Raises:
          CheckpointError: a key is missing, or asks for what this model does not compute.
        """
        if config.get("hidden_act", "silu") != "silu":
            raise CheckpointError(
                f"hidden_act is {config['hidden_act']!r}; llama models here use 'silu'"
            )
        try:
            heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                max_position_embeddings=config["max_position_embeddings"],
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                attention_bias=config.get("attention_bias", False),
                mlp_bias=config.get("mlp_bias", False),
                eos_token_id=_as_tuple(config.get("eos_token_id")),
                rope=RopeConfig.from_hf(config),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json of a llama model lacks the key {error}") from error
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"config.json of a llama model is malformed: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict` (qjax's own checkpoints)."""
        rope = RopeConfig(**data["rope"])
        return cls(**data | {"rope": rope, "eos_token_id": _as_tuple(data["eos_token_id"])})


def _as_tuple(ids: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, cfg: LlamaConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(
                inputs, outputs, use_bias=cfg.attention_bias, param_dtype=param_dtype, rngs=rngs
            )

        q_features = cfg.num_attention_heads * cfg.head_dim
        kv_features = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = linear(cfg.hidden_size, q_features)
        self.k_proj = linear(cfg.hidden_size, kv_features)
        self.v_proj = linear(cfg.hidden_size, kv_features)
        self.o_proj = linear(q_features, cfg.hidden_size)
        self.head_dim = cfg.head_dim

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        cache: kv.KVCache | None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        q, k, v = (
            proj(x).reshape(*x.shape[:2], -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = ops.apply_rope(q, *rope), ops.apply_rope(k, *rope)
        if cache is None:
            keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            cache = kv.write(cache, k, v, positions[:, 0])
            keys, values = cache.k, cache.v
        mixed = ops.attention(q, keys, values, positions)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); arXiv:2002.05202."""

    def __init__(self, cfg: LlamaConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(
                inputs, outputs, use_bias=cfg.mlp_bias, param_dtype=param_dtype, rngs=rngs
            )

        self.gate_proj = linear(cfg.hidden_size, cfg.intermediate_size)
        self.up_proj = linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = linear(cfg.intermediate_size, cfg.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: LlamaConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, param_dtype=param_dtype)

        self.input_layernorm = norm()
        self.self_attn = Attention(cfg, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(cfg, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        cache: kv.KVCache | None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        mixed, cache = self.self_attn(self.input_layernorm(x), rope, positions, cache)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """A Llama decoder. Activations have the (logical) dtype of the embedding table."""

    def __init__(
        self, cfg: LlamaConfig, *, param_dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs
    ) -> None:
        self.config = cfg
        self.embed_tokens = Embed(
            cfg.vocab_size, cfg.hidden_size, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nnx.List(
            [
                DecoderLayer(cfg, param_dtype=param_dtype, rngs=rngs)
                for _ in range(cfg.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, param_dtype=param_dtype)
        self.lm_head = (
            nnx.data(None)
            if cfg.tie_word_embeddings
            else Linear(cfg.hidden_size, cfg.vocab_size, param_dtype=param_dtype, rngs=rngs)
        )

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """int32 [batch, tokens] -> float32 logits [batch, tokens, vocab_size]."""
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        hidden, _ = self.hidden(input_ids, positions)
        return self.logits(hidden)

    def init_cache(self, batch: int, length: int) -> list[kv.KVCache]:
        """An empty cache for `batch` sequences of up to `length` tokens."""
        cfg = self.config
        dtype = jnp.dtype(self.embed_tokens.embedding.get_value().dtype)
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
          normalized hidden states [batch, tokens, hidden_size], and the extended cache or None.
        """
        x = self.embed_tokens(input_ids)
        rope = rope_table(self.config.rope, self.config.head_dim, positions)
        new_cache: list[Any] = []
        for index, layer in enumerate(self.layers):
            x, entry = layer(x, rope, positions, None if cache is None else cache[index])
            new_cache.append(entry)
        return self.norm(x), None if cache is None else new_cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., hidden_size] -> float32 [..., vocab_size]."""
        if self.lm_head is None:
            table = self.embed_tokens.embedding.get_value()
            return ops.linear(hidden, table, out_dtype=jnp.dtype(jnp.float32))
        return self.lm_head(hidden, out_dtype=jnp.dtype(jnp.float32))


# Hugging Face parameter name -> ours: what follows 'model.', with norms and the embedding renamed.
HF_NAMES: tuple[tuple[str, str], ...] = (
    (r"model\.embed_tokens\.weight", "embed_tokens.embedding"),
    (r"model\.norm\.weight", "norm.scale"),
    (r"model\.layers\.(\d+)\.(\w*layernorm)\.weight", r"layers.\1.\2.scale"),
    (r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.(weight|bias)", r"layers.\1.\2.\3.\4"),
    (r"lm_head\.weight", "lm_head.weight"),
)
