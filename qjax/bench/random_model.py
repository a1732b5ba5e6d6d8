"""A model with random weights, made on the device in the format of a recipe.

Speed depends on the format, not on the algorithm that chose the numbers: weights are rounded to
nearest. Only one weight at a time exists before its quantization.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.assign import assign
from qjax.config import QuantConfig, Rule
from qjax.lm import LanguageModel
from qjax.models.registry import abstract_model
from qjax.presets import PRESETS, preset
from qjax.quantize import quantize_leaf
from qjax.tree import map_named

_AMAX = 4.0  # of the activations, for static scales
_KEY = 0


def recipe(name: str, lm_head: str | None = None) -> QuantConfig | None:
    """The recipe of a preset, 'bf16' for none, with another one for the output head.

    Args:
      name: 'bf16', or a preset.
      lm_head: the same for the output head, which presets leave alone; or None.
    """
    cfg = None if name == "bf16" else preset(name)
    if lm_head is None:
        return cfg
    head = dataclasses.replace(preset(lm_head).rules[0], path="lm_head")
    rules: Sequence[Rule] = () if cfg is None else cfg.rules
    return QuantConfig(name=f"{name}.{lm_head}_lm_head", rules=(head, *rules))


def random_model(
    config: Any, cfg: QuantConfig | None, *, dtype: Any = jnp.bfloat16
) -> LanguageModel:
    """A LanguageModel without a tokenizer.

    Weights are normal, of a size that keeps activations near 1; rows differ by a factor of up to
    4, so that scales do. Norms are 1, biases 0.

    Args:
      config: sizes, of the class that its model_type has.
      cfg: what to quantize; None: nothing.
      dtype: of plain weights and of the activations.
    """
    graphdef, abstract = abstract_model(config.model_type, config, jnp.dtype(dtype))
    assigned = {} if cfg is None else assign(abstract, cfg)
    names: list[str] = []

    def make(name: str, leaf: Any) -> Any:
        names.append(name)
        weight = random_leaf(name, leaf.shape, dtype, len(names))
        if name not in assigned:
            return weight
        how = assigned[name]
        amax = jnp.full(leaf.shape[how.axis], _AMAX) if how.rule.needs_stats else None
        return quantize_leaf(weight, how, amax)

    state = map_named(make, abstract)
    return LanguageModel(
        nnx.merge(graphdef, state), config, model_type=config.model_type, quantization=cfg
    )


def random_leaf(name: str, shape: tuple[int, ...], dtype: Any, index: int) -> jax.Array:
    """A weight of a random model, or its norm of ones, or its bias of zeros.

    Args:
      index: of the leaf in its model; leaves of different ones differ.
    """
    if len(shape) < 2:
        return jnp.full(shape, 0 if name.endswith("bias") else 1, dtype)
    return _random(jax.random.fold_in(jax.random.key(_KEY), index), shape, dtype)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    values, rows = jax.random.split(key)
    size = jnp.exp2(jax.random.uniform(rows, (*shape[:-1], 1), minval=-1.0))
    return (jax.random.normal(values, shape) * size * shape[-1] ** -0.5).astype(dtype)


def presets() -> tuple[str, ...]:
    """What `recipe` takes."""
    return ("bf16", *PRESETS)
