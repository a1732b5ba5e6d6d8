"""convert(model): the layers of a plain Flax NNX model -> ours, so that it can be quantized."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.config import compile_pattern
from qjax.errors import ConfigError
from qjax.nn.embed import Embed
from qjax.nn.general import General

Model = Any


def convert(model: Model, *, skip: Sequence[str] = ()) -> Model:
    """A copy of a Flax NNX model with its Linear, LinearGeneral, Einsum and Embed replaced.

    The copy computes the same function. Its weights are [out, in] and called 'weight', embedding
    tables 'embedding', so `calibrate`, `quantize`, `save` treat it as they treat qjax's models.
    A layer used in two places stays one layer, and layers stacked by nnx.vmap stay stacked, in
    front: [layers, out, in]. Layers of other types, subclasses too, are left as they are; `plan`
    shows which weights remain.

    Args:
      model: any nnx.Module; it is not changed.
      skip: patterns (re.search on dotted module paths) of layers to leave alone.

    Returns:
      the converted copy.

    Raises:
      NotImplementedError: a layer that cannot be replaced faithfully (a custom dot_general, an
        equation with batch axes), naming its path; skip it or rewrite it.
      ConfigError: a skip pattern that matches no such layer.
    """
    if isinstance(skip, str):
        raise ConfigError(f"skip must be a list of patterns, not the string {skip!r}")
    patterns = [compile_pattern(pattern) for pattern in skip]
    found: list[str] = []

    def replace(path: tuple[Any, ...], node: Any) -> Any:
        converter = _CONVERTERS.get(type(node))
        if converter is None:
            return node
        name = ".".join(map(str, path))
        found.append(name)
        if any(pattern.search(name) for pattern in patterns):
            return node
        return converter(name, node)

    converted = nnx.recursive_map(replace, nnx.clone(model))
    for pattern in patterns:
        if not any(pattern.search(name) for name in found):
            raise ConfigError(
                f"skip {pattern.pattern!r} matches no layer; there are: {', '.join(found)}"
            )
    return converted


def _refuse(name: str, layer: Any, why: str) -> NotImplementedError:
    what = f"{name or 'the model'} ({type(layer).__name__}) cannot be converted: {why}"
    return NotImplementedError(f"{what}. Leave it alone with skip=[{name!r}]" if name else what)


def _check_plain(name: str, layer: Any) -> None:
    """Raise if the layer computes anything but the plain product."""
    custom = (
        getattr(layer, "dot_general", None) not in (None, jax.lax.dot_general)
        or getattr(layer, "dot_general_cls", None) is not None
        or getattr(layer, "einsum_op", jnp.einsum) is not jnp.einsum
    )
    if custom or layer.promote_dtype is not nnx.nn.dtypes.promote_dtype:
        raise _refuse(name, layer, "it has a product or dtype promotion of its own")
    if layer.precision is not None or layer.preferred_element_type is not None:
        raise _refuse(name, layer, "it sets precision or preferred_element_type")


def _linear(name: str, layer: Any) -> General:
    _check_plain(name, layer)
    kernel, shape = layer.kernel.get_value(), (layer.in_features, layer.out_features)
    return _general(name, layer, kernel, shape, contract=(-1,))


def _linear_general(name: str, layer: Any) -> General:
    _check_plain(name, layer)
    if layer.batch_axis:
        raise _refuse(name, layer, f"batch_axis={dict(layer.batch_axis)} makes it many matrices")
    kernel, shape = layer.kernel.get_value(), (*layer.in_features, *layer.out_features)
    return _general(name, layer, kernel, shape, contract=layer.axis)


def _einsum(name: str, layer: Any) -> General:
    """'...D,DNH->...NH' and its like: x and the kernel share the axes that contract, no others."""
    _check_plain(name, layer)
    if layer.einsum_str is None:
        raise _refuse(name, layer, "its equation is given only when it is called")
    # '...' is one label among the others.
    x, rhs, result = (re.findall(r"\.{3}|\w", s) for s in re.split(",|->", layer.einsum_str))
    contracted, free = [c for c in x if c in rhs], [c for c in x if c not in rhs]
    outputs = [c for c in result if c in rhs]
    one_product = sorted(rhs) == sorted(contracted + outputs) and "..." not in rhs
    if not one_product or sorted(result) != sorted(free + outputs):
        raise _refuse(name, layer, f"equation {layer.einsum_str!r} is not one matrix product")
    sizes = dict(zip(rhs, layer.kernel_shape, strict=True))
    order = "".join(contracted + outputs)
    before = x[: x.index("...")] if "..." in x else x
    return _general(
        name,
        layer,
        jnp.einsum(f"...{''.join(rhs)}->...{order}", layer.kernel.get_value()),
        tuple(sizes[c] for c in order),
        contract=tuple(x.index(c) if c in before else x.index(c) - len(x) for c in contracted),
        permute=None
        if result == free + outputs
        else f"{''.join(free + outputs)}->{''.join(result)}",
    )


def _general(
    name: str,
    layer: Any,
    kernel: jax.Array,
    shape: tuple[int, ...],
    *,
    contract: tuple[int, ...],
    permute: str | None = None,
) -> General:
    """The layer as a General.

    Args:
      kernel: [*stack, *inputs, *outputs], stack being the axes that nnx.vmap put in front.
      shape: (*inputs, *outputs), as the layer was made.
      contract: one axis of x for each of the inputs.
    """
    stack = kernel.shape[: kernel.ndim - len(shape)]
    if kernel.shape != (*stack, *shape):
        raise _refuse(name, layer, f"its kernel is {kernel.shape}, but it was made as {shape}")
    out_shape = shape[len(contract) :]
    inputs, outputs = math.prod(shape[: len(contract)]), math.prod(out_shape)
    weight = kernel.reshape(*stack, inputs, outputs).swapaxes(-1, -2)
    bias = None if layer.bias is None else layer.bias.get_value().reshape(*stack, outputs)
    return General(
        weight, bias, contract=contract, out_shape=out_shape, permute=permute, dtype=layer.dtype
    )


def _embed(name: str, layer: Any) -> Embed:
    if layer.promote_dtype is not nnx.nn.dtypes.promote_dtype:
        raise _refuse(name, layer, "it has a dtype promotion of its own")
    if layer.num_embeddings == 1:
        raise _refuse(name, layer, "Flax looks up its only row for every id, even one out of range")
    new = Embed(1, 1, dtype=layer.dtype, rngs=nnx.Rngs(0))
    new.embedding = layer.embedding
    return new


_CONVERTERS: dict[type, Any] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
}
