"""A mixture of experts: each token goes through a few of many feed-forward parts."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.linear import GroupedLinear, Linear
from qjax.nn.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Which mixture of experts.

    Attributes:
      experts: how many there are.
      experts_per_token: how many a token goes through: those that the router likes most.
      features: of an expert, between its products, of which the first is gated.
      activation: a name of ACTIVATIONS.
      normalize: the router's weights of a token's experts are scaled to add up to 1.
    """

    experts: int
    experts_per_token: int
    features: int
    activation: str = "silu"
    normalize: bool = True


class Experts(nnx.Module):
    """The weights of all experts: gate_proj, up_proj and down_proj, each [experts, out, in]."""

    def __init__(
        self, hidden_size: int, cfg: MoEConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        def linear(inputs: int, outputs: int) -> GroupedLinear:
            return GroupedLinear(cfg.experts, inputs, outputs, param_dtype=param_dtype, rngs=rngs)

        self.gate_proj = linear(hidden_size, cfg.features)
        self.up_proj = linear(hidden_size, cfg.features)
        self.down_proj = linear(cfg.features, hidden_size)


class MoE(nnx.Module):
    """sum over a token's experts of router weight * expert(x); arXiv:1701.06538, 2401.04088.

    Attributes:
      router: Linear [experts, hidden_size]. A rule reaches it only by spelling 'router'.
      experts: Experts.
    """

    def __init__(
        self, hidden_size: int, cfg: MoEConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.router = Linear(hidden_size, cfg.experts, param_dtype=param_dtype, rngs=rngs)
        self.experts = Experts(hidden_size, cfg, param_dtype=param_dtype, rngs=rngs)
        self.config = cfg

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden_size] -> the same shape and dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(tokens)
        each = self.config.experts_per_token
        # Rows are (token, choice); sorted by expert, and put back in their order at the end.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        group_sizes = jnp.bincount(chosen.reshape(-1), length=self.config.experts)
        group_sizes = group_sizes.astype(jnp.int32)
        row_ids = (order // each).astype(jnp.int32)
        activation = ACTIVATIONS[self.config.activation]
        gate = self.experts.gate_proj(tokens, group_sizes, row_ids=row_ids)
        up = self.experts.up_proj(tokens, group_sizes, row_ids=row_ids)
        rows = self.experts.down_proj(
            activation(gate) * up, group_sizes, row_scale=weights.reshape(-1)[order]
        )
        rows = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
        rows = rows.reshape(len(tokens), each, -1).astype(jnp.float32)
        total = rows[:, 0]
        for i in range(1, each):
            total = total + rows[:, i]
        return total.astype(x.dtype).reshape(x.shape)

    def route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [tokens, hidden_size] -> int32 experts and float32 weights, [tokens, each]."""
        return choose(self.router(tokens, out_dtype=jnp.dtype(jnp.float32)), self.config)


def choose(scores: jax.Array, cfg: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """A router's scores, float32 [tokens, experts] -> int32 experts and their float32 weights,
    [tokens, experts_per_token]."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), cfg.experts_per_token)
    if cfg.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights
