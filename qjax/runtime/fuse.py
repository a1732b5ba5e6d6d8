"""Weights that multiply one input, as one weight: where that changes no number."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.numerics import get_format
from qjax.qarray import InputSpec, QArray, is_qarray, per_row
from qjax.runtime.weights import Projection

Join = Callable[..., jax.Array]  # arrays [out], or [..., out, in] -> one array


def stack(*arrays: jax.Array) -> jax.Array:
    """All rows of the first, then all rows of the next."""
    return jnp.concatenate(arrays, axis=0 if arrays[0].ndim == 1 else -2)


def differences(parts: Sequence[Projection]) -> str | None:
    """Why weights that multiply one input cannot be one weight; None: they can.

    They can where the numbers stay what they are: the same format, blocks along `in`, and the same
    treatment of the input. Where only some have a bias, that of the others is 0. Static input
    scales are compared as numbers; those of abstract arrays have none and are taken to be equal.
    """
    weights = [part.weight for part in parts]
    if not all(map(is_qarray, weights)):
        if any(map(is_qarray, weights)):
            return "only some are quantized"
        return None if len({w.dtype for w in weights}) == 1 else "their dtypes differ"
    for q in weights:
        if q.axis != -1:
            return "they are stored [in, out]"
        if q.block[0] > 1:
            return "their scales are for blocks of several rows"
        if q.input is not None and transforms(q.input):
            return "their inputs are rescaled or permuted"
    for what, key in (
        ("formats", lambda q: q.format),
        ("group sizes", lambda q: q.block[1]),
        ("types of scales", lambda q: q.scale.dtype),
        ("zero points", lambda q: q.zero_point is None),
        ("levels of scales", lambda q: q.global_scale is None),
        ("input formats", lambda q: None if q.input is None else q.input.format),
        ("input granularities", lambda q: None if q.input is None else q.input.granularity),
        ("input groups", lambda q: None if q.input is None else q.input.group_size),
        ("kinds of input scales", lambda q: q.input is None or q.input.scale is None),
    ):
        if len({key(q) for q in weights}) > 1:
            return f"their {what} differ"
    if len(_numbers([q.global_scale for q in weights])) > 1:
        return "their global scales differ"
    values = _numbers([None if q.input is None else q.input.scale for q in weights])
    if len(values) > 1:
        return f"their static input scales differ: {', '.join(map(str, sorted(values)))}"
    return None


def _numbers(scales: Sequence[Any]) -> set[Any]:
    """Of scalars, or a scalar for each expert; none if one is absent or abstract."""
    known = [s for s in scales if isinstance(s, jax.Array) and s.is_fully_addressable]
    if len(known) < len(scales):
        return set()
    return {float(s) if s.ndim == 0 else tuple(s.tolist()) for s in known}


def transforms(spec: InputSpec) -> bool:
    """Whether it does more to an input than to round it."""
    return spec.pre_scale is not None or spec.perm is not None


def fuse(parts: Sequence[Projection], join: Join) -> Projection:
    """One Projection whose rows are those of `parts`, in the order that `join` gives rows.

    A scale for several rows becomes one for each of them, which is exact.

    Args:
      parts: of which `differences` says None.
      join: `stack` or `ops.interleave`.
    """
    return Projection(
        weight=_fused_weight([part.weight for part in parts], join),
        bias=_fused_bias(parts, join),
    )


def _fused_bias(parts: Sequence[Projection], join: Join) -> jax.Array | None:
    dtypes = [part.bias.dtype for part in parts if part.bias is not None]
    if not dtypes:
        return None
    return join(
        *(
            jnp.zeros(part.weight.shape[0], dtypes[0]) if part.bias is None else part.bias
            for part in parts
        )
    )


def _fused_weight(weights: Sequence[Any], join: Join) -> jax.Array | QArray:
    first = weights[0]
    if not isinstance(first, QArray):
        return join(*weights)
    values = [q.values for q in weights]
    # XLA moves the rows of bytes; GPUs have no copies of two or four bits.
    narrow = first.values.dtype in (jnp.int2, jnp.int4, jnp.float4_e2m1fn)
    byte = jnp.int8 if get_format(first.format).is_integer else jnp.float8_e4m3fn
    if narrow:
        values = [v.astype(byte) for v in values]  # exact, e2m1 in e4m3 too
    return dataclasses.replace(
        first,
        values=join(*values).astype(first.values.dtype),
        scale=join(*(per_row(q.scale, q) for q in weights)),
        zero_point=None
        if first.zero_point is None
        else join(*(per_row(q.zero_point.astype(jnp.int8), q) for q in weights)).astype(
            first.zero_point.dtype
        ),
        block=(1, first.block[1]),
    )
