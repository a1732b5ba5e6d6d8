"""convert(model): the layers of a plain Flax NNX model -> ours, so that it can be quantized."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.embed import Embed
from qjax.nn.general import General

Model = Any


def convert(model: Model, *, skip: Sequence[str] = ()) -> Model:
    """A copy of a Flax NNX model with its Linear, LinearGeneral, Einsum and Embed replaced.

    The copy computes the same function. Its weights are [out, in] and called 'weight', embedding
    tables 'embedding', so `calibrate`, `quantize`, `save` treat it as they treat qjax's models.
    Layers of other types are left as they are; `plan` shows which weights remain.

    Args:
      model: any nnx.Module; it is not changed.
      skip: patterns (re.search on dotted module paths) of layers to leave alone.

    Returns:
      the converted copy.

    Raises:
      NotImplementedError: a layer that cannot be replaced faithfully (a custom dot_general, an
        equation with batch axes), naming its path; skip it or rewrite it.
    """
    patterns = [re.compile(pattern) for pattern in skip]

    def replace(path: tuple[Any, ...], node: Any) -> Any:
        name = ".".join(map(str, path))
        converter = _CONVERTERS.get(type(node))
        if converter is None or any(p.search(name) for p in patterns):
            return node
        return converter(name, node)

    return nnx.recursive_map(replace, nnx.clone(model))


def _refuse(name: str, layer: Any, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name or 'the model'} ({type(layer).__name__}) cannot be converted: {why}. Leave it "
        f"alone with skip=[{name!r}]"
    )


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


def _bias(layer: Any) -> jax.Array | None:
    return None if layer.bias is None else layer.bias.get_value().reshape(-1)


def _linear(name: str, layer: Any) -> General:
    _check_plain(name, layer)
    kernel = layer.kernel.get_value()
    return General(kernel.T, _bias(layer), out_shape=(kernel.shape[1],), dtype=layer.dtype)


def _linear_general(name: str, layer: Any) -> General:
    _check_plain(name, layer)
    if layer.batch_axis:
        raise _refuse(name, layer, f"batch_axis={dict(layer.batch_axis)} makes it many matrices")
    if any(axis >= 0 for axis in layer.axis):
        raise _refuse(name, layer, f"axis={layer.axis} must count from the end (negative)")
    inputs, outputs = math.prod(layer.in_features), math.prod(layer.out_features)
    weight = layer.kernel.get_value().reshape(inputs, outputs).T
    return General(
        weight,
        _bias(layer),
        contract=tuple(layer.axis),
        out_shape=tuple(layer.out_features),
        dtype=layer.dtype,
    )


def _einsum(name: str, layer: Any) -> General:
    """'...D,DNH->...NH' and its like: some trailing axes of x contract, the rest stay in front."""
    _check_plain(name, layer)
    if layer.einsum_str is None:
        raise _refuse(name, layer, "its equation is given only when it is called")
    equation = layer.einsum_str
    operands, result = equation.split("->")
    lhs, rhs = (term.replace("...", "") for term in operands.split(","))
    result = result.replace("...", "")
    contracted = [c for c in lhs if c in rhs]
    free, outputs = [c for c in lhs if c not in rhs], [c for c in rhs if c not in lhs]
    plain = len(set(lhs)) == len(lhs) and len(set(rhs)) == len(rhs) and "..." not in rhs
    if not plain or set(contracted) & set(result) or sorted(result) != sorted(free + outputs):
        raise _refuse(name, layer, f"equation {equation!r} is not one matrix product")
    kernel = layer.kernel.get_value()
    # Columns of the weight run over the contracted axes in the order in which x has them.
    order = [rhs.index(c) for c in outputs + contracted]
    shape = [kernel.shape[rhs.index(c)] for c in outputs]
    weight = kernel.transpose(order).reshape(math.prod(shape), -1)
    ours = free + outputs
    trailing = tuple(ours.index(c) - len(ours) for c in result)
    bias = None
    if layer.bias is not None:
        # Flax's bias broadcasts over the result's axes; ours runs over the flattened outputs.
        bias = jnp.broadcast_to(_bias_in_result(layer, result, rhs, outputs), shape).reshape(-1)
    return General(
        weight,
        bias,
        contract=tuple(lhs.index(c) - len(lhs) for c in contracted),
        out_shape=tuple(shape),
        order=None if trailing == tuple(range(-len(ours), 0)) else trailing,
        dtype=layer.dtype,
    )


def _bias_in_result(layer: Any, result: str, rhs: str, outputs: list[str]) -> jax.Array:
    """The bias with one axis for each output label, in the order of `outputs`.

    Flax reshapes the bias to the result's kernel axes, in the order in which the result has them.
    """
    labels = [c for c in result if c in outputs]
    sizes = [layer.kernel_shape[rhs.index(c)] for c in labels]
    bias = layer.bias.get_value().reshape(sizes)
    return bias.transpose([labels.index(c) for c in outputs])


def _embed(name: str, layer: Any) -> Embed:
    if layer.promote_dtype is not nnx.nn.dtypes.promote_dtype:
        raise _refuse(name, layer, "it has a dtype promotion of its own")
    new = Embed(1, 1, dtype=layer.dtype, rngs=nnx.Rngs(0))
    new.embedding = nnx.Param(layer.embedding.get_value())
    return new


_CONVERTERS: dict[type, Any] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
}
