"""How products read one weight [out, in]: as it lies, or repacked; and what of the input."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.numerics import get_format
from qjax.qarray import QArray
from qjax.runtime.fuse import transforms
from qjax.runtime.weights import Projection


def operand(weight: Any) -> str | None:
    """The dtype that a product with a repacked weight multiplies; None: it is not repacked.

    Weight-only weights are, and those whose activations have another format. Plain weights, and
    quantized ones that meet activations of their own format, are read as they are. Activations with
    scales that no tensor core adds up are rounded, and multiplied in 16 bits.
    """
    if not isinstance(weight, QArray):
        return None
    spec = weight.input
    if spec is None or spec.format is None:
        return "float16"  # or bfloat16
    if ops.numbers_meet(weight):
        return None
    return "float16" if spec.granularity == "per_group" else get_format(spec.format).dtype.name


def is_packed(weight: Any) -> bool:
    """Whether the kernels want a weight repacked."""
    return operand(weight) is not None


def by_groups(weight: Any) -> str | None:
    """What XLA does to the input of a product whose activations have scales of groups, and why."""
    spec = weight.input if isinstance(weight, QArray) else None
    if spec is None or spec.granularity != "per_group":
        return None
    groups = f"{spec.format} in groups of {spec.group_size}"
    if ops.numbers_meet(weight):
        return f"no kernel rounds its input to {groups}"
    return (
        f"Hopper's tensor cores do not multiply {groups}: the input is rounded to that, and "
        "multiplied in its own type"
    )


def refusal(part: Projection) -> str | None:
    """Why no kernel reads a weight, repacked; None: one does, or it is not one to be repacked.

    Raises nothing, and runs nothing: it is a matter of shapes and formats.
    """
    q = part.weight
    if operand(q) is None:
        return None
    if q.axis != -1:
        return "it is stored [in, out]"
    if q.input is not None and transforms(q.input):
        return "its input is rescaled or permuted"
    try:
        jax.eval_shape(pack, part)
    except NotImplementedError as reason:
        return str(reason)
    return None


def pack(part: Projection) -> Projection:
    """A Projection that `is_packed`, as the kernels read it.

    Raises:
      NotImplementedError: they do not.
    """
    q = part.weight
    kind = operand(q)
    assert kind is not None
    spec = None if q.input is None or q.input.format is None else q.input
    return Projection(weight=ops.prepare_weight(q, kind), bias=part.bias, input=spec)


def row_output(parts: Sequence[Projection]) -> tuple[jnp.dtype, Any] | None:
    """What a row kernel before `parts` may write for them: (dtype, static scale or None).

    None: numbers as they are, either because that is what the product takes, or because it
    quantizes them itself.
    """
    if len(parts) != 1:
        return None
    (part,) = parts
    q, spec = part.weight, part.input
    if isinstance(q, QArray):
        # Where formats differ and no kernel takes the weight, the product begins with floats.
        spec = q.input if q.axis == -1 and ops.numbers_meet(q) else None
    if spec is None or spec.format not in ("int8", "fp8_e4m3") or transforms(spec):
        return None
    if spec.scale is None and spec.granularity != "per_token":
        return None
    return get_format(spec.format).dtype, spec.scale
