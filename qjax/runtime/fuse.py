"""Canonical weights -> the weights that kernels read: fused where that changes no number."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.numerics import get_format
from qjax.qarray import InputSpec, QArray, is_qarray
from qjax.runtime.weights import Projection

Join = Callable[..., jax.Array]  # arrays [out, ...] -> one array


def stack(*arrays: jax.Array) -> jax.Array:
    """All rows of the first, then all rows of the next."""
    return jnp.concatenate(arrays)


def differences(parts: Sequence[Projection]) -> str | None:
    """Why weights that multiply one input cannot be one weight; None: they can.

    They can where the numbers stay what they are: the same format, blocks along `in`, and the same
    treatment of the input. Static input scales are compared as numbers; those of abstract arrays
    have none and are taken to be equal.
    """
    weights = [part.weight for part in parts]
    if len({part.bias is None for part in parts}) > 1:
        return "only some have a bias"
    if not all(map(is_qarray, weights)):
        if any(map(is_qarray, weights)):
            return "only some are quantized"
        return None if len({w.dtype for w in weights}) == 1 else "their dtypes differ"
    first = weights[0]
    for q in weights:
        if q.axis != -1 or q.global_scale is not None:
            return "they are stored [in, out], or have a second level of scales"
        if q.input is not None and _transforms(q.input):
            return "their inputs are rescaled or permuted"
    for what, key in (
        ("formats", lambda q: q.format),
        ("group sizes", lambda q: q.block[1]),
        ("types of scales", lambda q: q.scale.dtype),
        ("zero points", lambda q: q.zero_point is None),
        ("input formats", lambda q: None if q.input is None else q.input.format),
        ("input granularities", lambda q: None if q.input is None else q.input.granularity),
        ("kinds of input scales", lambda q: q.input is None or q.input.scale is None),
    ):
        if len({key(q) for q in weights}) > 1:
            return f"their {what} differ"
    if first.input is not None and first.input.scale is not None:
        scales = [q.input.scale for q in weights]
        if all(isinstance(s, jax.Array) and s.is_fully_addressable for s in scales):
            values = {float(s) for s in scales}
            if len(values) > 1:
                return f"their static input scales differ: {', '.join(map(str, sorted(values)))}"
    return None


def _transforms(spec: InputSpec) -> bool:
    return spec.pre_scale is not None or spec.perm is not None


def fuse(parts: Sequence[Projection], join: Join) -> Projection:
    """One Projection whose rows are those of `parts`, in the order that `join` gives rows.

    A scale for several rows becomes one for each of them, which is exact.

    Args:
      parts: of which `differences` says None.
      join: `stack` or `ops.interleave`.
    """
    biases = [part.bias for part in parts]
    return Projection(
        weight=_fused_weight([part.weight for part in parts], join),
        bias=None if biases[0] is None else join(*biases),
    )


def _fused_weight(weights: Sequence[Any], join: Join) -> jax.Array | QArray:
    first = weights[0]
    if not isinstance(first, QArray):
        return join(*weights)
    values = [q.values for q in weights]
    if first.format == "int4":
        # XLA moves the rows of bytes; GPUs have no copies of four bits.
        joined = join(*(v.astype(jnp.int8) for v in values)).astype(jnp.int4)
    else:
        joined = join(*values)
    return dataclasses.replace(
        first,
        values=joined,
        scale=join(*(_for_each_row(q.scale, q) for q in weights)),
        zero_point=None
        if first.zero_point is None
        else join(*(_for_each_row(q.zero_point, q) for q in weights)),
        block=(1, first.block[1]),
    )


def _for_each_row(x: jax.Array, q: QArray) -> jax.Array:
    """[out / rows of a block, groups] -> [out, groups]."""
    return jnp.repeat(x, q.shape[0] // x.shape[0], axis=0)


def operand(weight: Any) -> str | None:
    """The dtype that a product with a repacked weight multiplies; None: it is not repacked.

    Weight-only weights are, and those whose activations have another format. Plain weights, and
    quantized ones that meet activations of their own format, are read as they are.
    """
    if not isinstance(weight, QArray):
        return None
    act = None if weight.input is None else weight.input.format
    if act is None:
        return "float16"  # or bfloat16
    return None if act == weight.format else get_format(act).dtype.name


def refusal(part: Projection) -> str | None:
    """Why no kernel reads a weight, repacked; None: one does, or it is not one to be repacked.

    Raises nothing, and runs nothing: it is a matter of shapes and formats.
    """
    q = part.weight
    if operand(q) is None:
        return None
    if q.axis != -1:
        return "it is stored [in, out]"
    if q.input is not None and _transforms(q.input):
        return "its input is rescaled or permuted"
    try:
        jax.eval_shape(repack, part)
    except NotImplementedError as reason:
        return str(reason)
    return None


def repack(part: Projection) -> Projection:
    """A Projection with an `operand`, as the kernels read it.

    Raises:
      NotImplementedError: they do not.
    """
    q = part.weight
    kind = operand(q)
    assert kind is not None
    weight = ops.prepare_weight(
        q.values, q.scale, q.zero_point, factor=q.global_scale, operand=kind
    )
    return Projection(weight=weight, bias=part.bias, input=None if kind == "float16" else q.input)


def row_output(parts: Sequence[Projection]) -> tuple[jnp.dtype, Any] | None:
    """What a row kernel before `parts` may write for them: (dtype, static scale or None).

    None: numbers as they are, either because that is what the product takes, or because it
    quantizes them itself.
    """
    part = parts[0]
    q, spec = part.weight, part.input
    if len(parts) > 1:
        return None
    if isinstance(q, QArray):
        # Where formats differ and no kernel takes the weight, the product begins with floats.
        spec = q.input if q.axis == -1 and operand(q) is None else None
    if spec is None or spec.format not in ("int8", "fp8_e4m3") or _transforms(spec):
        return None
    if spec.scale is None and spec.granularity != "per_token":
        return None
    return get_format(spec.format).dtype, spec.scale
