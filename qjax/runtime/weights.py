"""The weights of a decoder as its kernels read them, as data."""

import dataclasses
from functools import partial
from typing import Any

import jax


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


# How gate and up lie in `LayerWeights.gate_up`.
INTERLEAVED = "interleaved"  # one product, 8 rows of each in turn: its kernel ends with the gate
STACKED = "stacked"  # one product, all of gate and then all of up: the gate is the next kernel
APART = "apart"  # two products


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["attention_norm", "qkv", "o", "mlp_norm", "gate_up", "down"],
    meta_fields=["gated"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One decoder layer: RMSNorm, grouped-query attention, RMSNorm, SwiGLU.

    Attributes:
      attention_norm, mlp_norm: [features].
      qkv: one Projection to all query heads, all key heads, all value heads; or one of each.
      o, down: Projections back to the features.
      gate_up: one Projection or two; `gated` says how they lie.
      gated: INTERLEAVED, STACKED or APART.
    """

    attention_norm: Any
    qkv: tuple[Projection, ...]
    o: Projection
    mlp_norm: Any
    gate_up: tuple[Projection, ...]
    down: Projection
    gated: str
