"""The feed-forward part of a decoder layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.linear import Linear


def _in_float32(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: f(x.astype(jnp.float32)).astype(x.dtype)


# Our names are the kernels'.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": _in_float32(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_tanh": _in_float32(lambda x: jax.nn.gelu(x, approximate=True)),
    "quick_gelu": _in_float32(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
}

# Hugging Face's names -> ours.
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Which feed-forward part.

    Attributes:
      features: between the two products.
      activation: a name of ACTIVATIONS.
      gated: the activation multiplies a product of its own; arXiv:2002.05202.
      bias: whether the products have biases.
    """

    features: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


class MLP(nnx.Module):
    """down(f(gate(x)) * up(x)), or, not gated, down(f(up(x))).

    Attributes:
      gate_proj: Linear, or None if not gated.
      up_proj, down_proj: Linear.
    """

    def __init__(
        self, hidden_size: int, cfg: MLPConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=cfg.bias, param_dtype=param_dtype, rngs=rngs)

        self.gate_proj: Any = linear(hidden_size, cfg.features) if cfg.gated else nnx.data(None)
        self.up_proj = linear(hidden_size, cfg.features)
        self.down_proj = linear(cfg.features, hidden_size)
        self.config = cfg

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden_size] -> the same shape and dtype."""
        activation = ACTIVATIONS[self.config.activation]
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(x)))
        return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))
