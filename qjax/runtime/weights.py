"""The weights of a decoder as its kernels read them, as data."""

import dataclasses
from functools import partial
from typing import Any

import jax

from qjax.nn.layer import LayerConfig


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias", "input"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """y = x @ weight.T + bias.

    Attributes:
      weight: [out, in]: an array, a QArray, or an `ops.Prepared`.
      bias: [out], or None.
      input: InputSpec, how activations are quantized for a Prepared; None: they are not. A QArray
        has its own.
    """

    weight: Any
    bias: Any = None
    input: Any = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "bias"],
    meta_fields=["kind", "eps", "offset"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """A norm, see `ops.norm_quant`.

    Attributes:
      scale: [features], or None for ones.
      bias: [features], or None.
      kind: 'rms' or 'layer'.
      eps: added to the mean square.
      offset: added to the scale; 1 in Gemma.
    """

    scale: Any
    bias: Any = None
    kind: str
    eps: float
    offset: float = 0.0


# How what attention and the MLP read together lies in `LayerWeights`, and gate and up in `gate_up`.
INTERLEAVED = "interleaved"  # one product, 8 rows of each in turn: its kernel ends with the gate
STACKED = "stacked"  # one product, all of gate and then all of up: the gate is the next kernel
APART = "apart"  # two products
PLAIN = "plain"  # there is no gate: up alone
JOINED = "joined"  # as STACKED or PLAIN, in the one product with q, k and v


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "attention_norm",
        "qkv",
        "q_norm",
        "k_norm",
        "o",
        "attention_output_norm",
        "mlp_norm",
        "router",
        "gate_up",
        "down",
        "mlp_output_norm",
    ],
    meta_fields=["config", "gated"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One decoder layer, of any family: `config` says what is done with the weights.

    Attributes:
      config: LayerConfig.
      attention_norm, mlp_norm: Norms; mlp_norm is None if the layer is SHARED.
      attention_output_norm, mlp_output_norm: Norms of a SANDWICH; else None.
      q_norm, k_norm: Norms of the dims of each head, or None.
      qkv: one Projection to all query heads, all key heads, all value heads, and behind them gate
        and up if they are JOINED; or one of each.
      o, down: Projections back to the features.
      router: Projection to the scores of experts, or None. With one, the weights of gate_up and
        down are those of all experts, [experts, out, in]: arrays, QArrays, or
        `ops.PreparedExperts`.
      gate_up: one Projection or two, or none; `gated` says how they lie.
      gated: INTERLEAVED, STACKED, APART, PLAIN or JOINED.
    """

    config: LayerConfig
    attention_norm: Norm
    qkv: tuple[Projection, ...]
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    o: Projection
    attention_output_norm: Norm | None = None
    mlp_norm: Norm | None
    router: Projection | None = None
    gate_up: tuple[Projection, ...]
    down: Projection
    mlp_output_norm: Norm | None = None
    gated: str

    @property
    def behind_mlp_norm(self) -> tuple[Projection, ...]:
        """The products that take what the norm writes; none where a router reads it first."""
        return () if self.router is not None else self.gate_up
