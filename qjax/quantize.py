"""quantize(params, cfg): a pytree of weights -> the same tree with QArrays for the chosen ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.algorithms.rtn import rtn
from qjax.assign import Assignment, assign
from qjax.config import QuantConfig
from qjax.errors import ConfigError, DataError
from qjax.qarray import QArray, dequantize, is_qarray
from qjax.tree import map_named, named_leaves

Stats = dict[str, dict[str, jax.Array]]


def quantize(
    params: Any,
    cfg: QuantConfig,
    stats: Stats | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Replace the weights that `cfg` chooses by QArrays. Pure; params is not changed.

    Works on any pytree of arrays (NNX state, nested dict, dataclass), under `jax.jit`, and on
    abstract trees: `jax.eval_shape(lambda p: quantize(p, cfg), params)` is the tree a quantized
    checkpoint restores into.

    Args:
      params: weights, [..., out, in] unless a rule says contract_axis=-2.
      cfg: a `preset(...)` or your own rules.
      stats: what `calibrate` returned; needed by rules with static activation scales.
      progress: called as progress(done, total) after each weight.

    Returns:
      the tree of params, chosen leaves replaced; all others are the same objects.

    Raises:
      ConfigError: the recipe does not fit the tree (see `plan`), or runs block by block.
      DataError: statistics are missing, or a weight holds NaN or infinity. Under jit the second
        is not checked: there only structure is known.

    >>> from qjax.presets import preset
    >>> q = quantize({"weight": jnp.ones((4, 8))}, preset("int8_wo"))
    >>> q["weight"].format, q["weight"].scale.shape
    ('int8', (4, 1))
    """
    require_plain(cfg)
    assigned = assign(params, cfg)
    leaves = dict(named_leaves(params))
    features = {name: leaves[name].shape[how.axis] for name, how in assigned.items()}
    check_finite({name: leaves[name] for name in assigned})
    require_stats(assigned, features, stats)
    done = 0

    def convert(name: str, leaf: Any) -> Any:
        nonlocal done
        if name not in assigned:
            return leaf
        amax = stats[name]["amax"] if stats is not None and name in stats else None
        result = quantize_leaf(leaf, assigned[name], amax)
        done += 1
        if progress is not None:
            progress(done, len(assigned))
        return result

    return map_named(convert, params)


@partial(jax.jit, static_argnames="how")
def quantize_leaf(weight: jax.Array, how: Assignment, input_amax: jax.Array | None) -> QArray:
    """One weight in the format of its assignment, rounded to nearest whatever its method.

    Jitted: equal shapes compile once.
    """
    return rtn(weight, how.rule, how.axis, input_amax)


def require_plain(cfg: QuantConfig) -> None:
    """Raise ConfigError if a recipe runs block by block, which takes a model and not a tree."""
    if cfg.needs_blocks:
        raise ConfigError(
            f"the recipe {cfg.name!r} calibrates block by block, which takes a model: call "
            "qjax.quantize_model(lm, cfg, data), or qjax quantize on the command line"
        )


def dequantize_tree(params: Any) -> Any:
    """The tree with every QArray replaced by the plain array it stands for."""
    return jax.tree.map(lambda x: dequantize(x) if is_qarray(x) else x, params, is_leaf=is_qarray)


def require_stats(
    assigned: dict[str, Assignment], features: dict[str, int], stats: Stats | None
) -> None:
    """Raise DataError if `stats` lacks what the assigned rules need.

    Args:
      features: leaf name -> inputs of the weight.
    """
    needing = [name for name, how in assigned.items() if how.rule.needs_stats]
    missing = [name for name in needing if stats is None or "amax" not in stats.get(name, {})]
    if missing:
        have = "none were given" if stats is None else f"stats has {len(stats)} other layers"
        raise DataError(
            f"{missing[0]} (and {len(missing) - 1} more) gets a static activation scale from "
            f"calibration statistics, but {have}: call stats = qjax.calibrate(model, batches) and "
            "quantize(params, cfg, stats)"
        )
    for name in needing:
        amax = (stats or {})[name]["amax"]
        if amax.shape != (features[name],):
            raise DataError(
                f"the statistics of {name} are of another model: amax has shape {amax.shape}, the "
                f"weight has {features[name]} inputs; calibrate this model"
            )
        if _is_concrete(amax) and not np.asarray(amax).any():
            raise DataError(
                f"no calibration batch reached {name}: its largest activation is 0; calibrate with "
                "batches that use the whole model, or give it act_scale='dynamic'"
            )
        if _is_concrete(amax) and not np.isfinite(np.asarray(amax)).all():
            raise DataError(
                f"the activations that reach {name} were NaN or infinite during calibration; "
                "check the model in float32 and the calibration batches"
            )


def check_finite(leaves: Any) -> None:
    """Raise DataError naming the first concrete leaf that holds NaN or infinity."""
    for name, leaf in named_leaves(leaves):
        if is_qarray(leaf) or not _is_concrete(leaf) or leaf.size == 0:
            continue
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _all_finite(leaf):
            raise DataError(
                f"weight {name} {tuple(leaf.shape)} holds NaN or infinity; repair the checkpoint "
                "before quantizing it"
            )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _is_concrete(x: Any) -> bool:
    return isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    )
