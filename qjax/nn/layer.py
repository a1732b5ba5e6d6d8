"""A decoder layer: attention and a feed-forward part, as data and as a module."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax.nn.attention import Attention, AttentionConfig, RopeTable
from qjax.nn.mlp import MLP, MLPConfig
from qjax.nn.moe import MoE, MoEConfig
from qjax.nn.norm import NormConfig, make_norm

# How the parts of a layer are put together; a and f are attention and the feed-forward part, n
# and m the norms input_layernorm and post_attention_layernorm.
SERIAL = "serial"  # x += a(n(x)), then x += f(m(x)): most
PARALLEL = "parallel"  # x += a(n(x)) + f(m(x)): Falcon-40B
SHARED = "shared"  # x += a(n(x)) + f(n(x)); there is no m: GPT-J, Falcon-7B
POST = "post"  # x = n(x + a(x)), then x = m(x + f(x)): OPT-350M
SANDWICH = "sandwich"  # as serial, but what a and f give is normalized as well: Gemma 2
ARRANGEMENTS = (SERIAL, PARALLEL, SHARED, POST, SANDWICH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Which decoder layer. Equal layers have equal configs, and they are hashable.

    Attributes:
      attention: AttentionConfig.
      mlp: MLPConfig, or MoEConfig.
      norm: of all norms in the layer that are as wide as its input.
      arrangement: one of ARRANGEMENTS.
    """

    attention: AttentionConfig
    mlp: MLPConfig | MoEConfig
    norm: NormConfig
    arrangement: str = SERIAL

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, lists for tuples allowed."""
        attention, mlp = dict(data["attention"]), data["mlp"]
        if attention["qk_norm"] is not None:
            attention["qk_norm"] = NormConfig(**attention["qk_norm"])
        if attention["alibi_slopes"] is not None:
            attention["alibi_slopes"] = tuple(attention["alibi_slopes"])
        return cls(
            attention=AttentionConfig(**attention),
            mlp=MoEConfig(**mlp) if "experts" in mlp else MLPConfig(**mlp),
            norm=NormConfig(**data["norm"]),
            arrangement=data["arrangement"],
        )


class DecoderLayer(nnx.Module):
    """A layer of a decoder. Its parts have the names of Llama's, whatever the family.

    Attributes:
      input_layernorm: what attention reads is normalized by it (or, POST, what it adds to).
      self_attn: Attention.
      post_attention_layernorm: the same for the feed-forward part; None if it is SHARED.
      mlp: MLP or MoE.
      attention_output_norm, mlp_output_norm: of a SANDWICH; else None.
    """

    def __init__(
        self, hidden_size: int, cfg: LayerConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        def norm(exists: bool = True) -> Any:
            return make_norm(hidden_size, cfg.norm, param_dtype) if exists else nnx.data(None)

        self.input_layernorm = norm()
        self.self_attn = Attention(hidden_size, cfg.attention, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = norm(cfg.arrangement != SHARED)
        self.mlp: Any
        if isinstance(cfg.mlp, MoEConfig):
            self.mlp = MoE(hidden_size, cfg.mlp, param_dtype=param_dtype, rngs=rngs)
        else:
            self.mlp = MLP(hidden_size, cfg.mlp, param_dtype=param_dtype, rngs=rngs)
        self.attention_output_norm = norm(cfg.arrangement == SANDWICH)
        self.mlp_output_norm = norm(cfg.arrangement == SANDWICH)
        self.config = cfg

    def __call__(
        self,
        x: jax.Array,
        rope: RopeTable | None,
        positions: jax.Array,
        cache: kv.KVCache | None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        """[batch, tokens, hidden_size] -> the same; arguments as those of `Attention`."""
        kind = self.config.arrangement
        read = x if kind == POST else self.input_layernorm(x)
        mixed, cache = self.self_attn(read, rope, positions, cache)
        if kind in (PARALLEL, SHARED):
            if kind == PARALLEL:
                read = self.post_attention_layernorm(x)
            return x + mixed + self.mlp(read), cache
        if kind == POST:
            x = self.input_layernorm(x + mixed)
            return self.post_attention_layernorm(x + self.mlp(x)), cache
        if kind == SANDWICH:
            mixed = self.attention_output_norm(mixed)
        x = x + mixed
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (self.mlp_output_norm(y) if kind == SANDWICH else y), cache
