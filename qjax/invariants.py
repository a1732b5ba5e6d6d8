"""What a QArray has to be, checked where one is built: see `qarray.QArray`."""

from typing import Any

import jax.numpy as jnp

from qjax import numerics
from qjax.blocks import scale_shape
from qjax.errors import ConfigError, DataError, one_of

ACT_GRANULARITIES = ("per_tensor", "per_token", "per_group")


def validate(q: Any, name: str = "QArray") -> None:
    """Raise DataError if a QArray breaks an invariant of its class; concrete or abstract arrays.

    Args:
      name: what the message calls q, usually its path.
    """
    try:
        fmt = numerics.get_format(q.format)
        expected = scale_shape(q.shape, q.block)
    except ConfigError as error:
        raise DataError(f"{name}: {error}") from error
    if q.axis not in (-1, -2):
        raise DataError(f"{name}: axis is {q.axis}; it must be -1 or -2")
    if q.values.dtype != fmt.dtype:
        raise DataError(f"{name}: values are {q.values.dtype}, but {q.format} needs {fmt.dtype}")
    for field, kind in (("scale", jnp.floating), ("zero_point", jnp.integer)):
        array = getattr(q, field)
        if array is None:
            continue
        if array.shape != expected:
            raise DataError(
                f"{name}: {field} has shape {array.shape}; values {q.shape} in blocks of "
                f"{q.block} need {expected}"
            )
        if not jnp.issubdtype(array.dtype, kind):
            raise DataError(f"{name}: {field} is {array.dtype}, not {kind.__name__}")
    if q.global_scale is not None and q.global_scale.shape != q.shape[:-2]:
        raise DataError(
            f"{name}: global_scale has shape {q.global_scale.shape}, not {q.shape[:-2]}"
        )
    if q.input is not None:
        if q.input.format is not None:
            _validate_input_format(q, q.input, name)
        features = q.shape[q.axis]
        for field in ("pre_scale", "perm"):
            array = getattr(q.input, field)
            if array is not None and array.shape != (features,):
                raise DataError(f"{name}: {field} has shape {array.shape}, not ({features},)")


def _validate_input_format(q: Any, spec: Any, name: str) -> None:
    """Products of two quantized operands take no zero points, and few take groups."""
    groups = numerics.PRODUCTS.get((q.format, str(spec.format)))
    if groups is None:
        raise DataError(
            f"{name}: activations in {spec.format!r} meet a weight in {q.format!r}; no product "
            f"takes these, but {numerics.known_products()}"
        )
    one_of("act_granularity", spec.granularity, ACT_GRANULARITIES, DataError)
    if (spec.granularity == "per_group") != (spec.group_size > 0):
        raise DataError(
            f"{name}: activations {spec.granularity} with group_size {spec.group_size}; "
            "'per_group' needs a positive one, the others -1"
        )
    try:
        check_scale_dtype(spec.scale_dtype, spec.scale_rule, numerics.get_format(str(spec.format)))
    except ConfigError as error:
        raise DataError(f"{name}: activations: {error}") from error
    per_channel = (1, -1) if q.axis == -1 else (-1, 1)
    if not groups and spec.group_size == -1:
        meet = q.block in (per_channel, (-1, -1))
    else:
        meet = groups or q.group_size == spec.group_size
    if not meet or q.zero_point is not None:
        alike = "one scale a channel or a matrix"
        if spec.group_size != -1:
            alike = f"groups of {spec.group_size}"
        raise DataError(
            f"{name}: activations in {spec.format!r} need a symmetric {q.format} weight"
            f"{'' if groups else f' with {alike}'}, not blocks of {q.block} "
            f"with zero_point {q.zero_point is not None}"
        )


def check_scale_dtype(
    scale_dtype: str, rule: str, fmt: numerics.Format, symmetric: bool = True
) -> None:
    """Raise ConfigError if scales by `rule` are not stored so, or not with this format."""
    one_of("scale_dtype", scale_dtype, numerics.SCALE_DTYPES)
    numerics.check_scale_rule(rule, fmt)
    powers = scale_dtype == numerics.POWERS_OF_TWO
    if powers != (rule in numerics.POWER_RULES):
        raise ConfigError(
            f"scale_rule {rule!r} with scale_dtype {scale_dtype!r}: {numerics.POWERS_OF_TWO} holds "
            f"powers of 2, which are what {', '.join(numerics.POWER_RULES)} give"
        )
    if scale_dtype == numerics.TWO_LEVELS and (fmt.is_integer or not symmetric):
        raise ConfigError(
            f"scale_dtype {scale_dtype!r} is for float formats, not {fmt.name!r}; use 'bfloat16'"
        )
