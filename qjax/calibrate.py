"""Calibration: run a model over data and record what reaches its linear layers."""

from collections.abc import Callable, Collection, Iterable, Sized
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import DataError
from qjax.nn.linear import Linear
from qjax.quantize import Stats
from qjax.tree import natural_order, path_name


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """Statistics of the activations that reach each linear layer.

    A pure function: the model is not changed, and what runs is one jitted step over a copy of it,
    in evaluation mode, whose layers observe. For a LanguageModel, pass its `.model`.

    Args:
      model: any NNX module made of qjax.nn layers (see `qjax.nn.convert`).
      batches: what the model is called with, one argument or a tuple of arguments each.
      progress: called as progress(done, total) after each batch, if batches has a length.

    Returns:
      name of each weight -> {'amax': float32 [in]}, the largest magnitude of each input feature
      over all batches.

    Raises:
      DataError: no batches, no layers to observe, or activations that are NaN or infinite,
        naming the first layer they reach (in
        natural order of names).
    """
    observer = nnx.clone(model)
    observer.eval()  # dropout off, running statistics: what the model does when it serves
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(observer)
        if isinstance(module, Linear)
    }
    if not layers:
        raise DataError(
            f"{type(model).__name__} has no qjax.nn layers to observe; convert it first with "
            "qjax.nn.convert(model)"
        )
    for layer in layers.values():
        layer.observe = True
    graphdef, state = nnx.split(observer)
    observe = jax.jit(lambda state, args: _observe(graphdef, state, args, layers.keys()))
    total = len(batches) if isinstance(batches, Sized) else None
    stats: Stats = {}
    for done, batch in enumerate(batches, 1):
        new = observe(state, batch if isinstance(batch, tuple) else (batch,))
        for name, entry in new.items():  # a batch need not reach every layer
            stats[name] = _merge(stats[name], entry) if name in stats else entry
        if progress is not None and total is not None:
            progress(done, total)
    if not stats:
        raise DataError("calibration got no batches; pass at least one")
    stats = {name: stats[name] for name in sorted(stats, key=natural_order)}
    for name, entry in stats.items():
        if not bool(jnp.isfinite(entry["amax"]).all()):
            raise DataError(
                f"the activations that reach {name} are NaN or infinite; check the model in "
                "float32 and the calibration batches"
            )
    return stats


def _observe(
    graphdef: nnx.GraphDef, state: Any, args: tuple[Any, ...], layers: Collection[str]
) -> Stats:
    model = nnx.merge(graphdef, state)
    _, sown = nnx.capture(model, nnx.Intermediate)(*args)
    stats: Stats = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(sown, is_leaf=lambda x: isinstance(x, tuple))
    for path, values in flat:
        # What the model sows for itself is left out.
        layer, _, what = path_name(path).rpartition(".")
        if what == "amax" and layer in layers:
            # A layer called twice sows twice.
            calls = values if isinstance(values, tuple) else (values,)
            weight = f"{layer}.weight" if layer else "weight"
            stats[weight] = {"amax": jnp.max(jnp.stack(calls), axis=0)}
    return stats


@jax.jit
def _merge(old: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"amax": jnp.maximum(old["amax"], new["amax"])}
