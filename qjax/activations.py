"""What a product does to its activations before they meet the weight: see `qarray.InputSpec`."""

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.qarray import InputSpec


def transform(x: jax.Array, spec: InputSpec) -> jax.Array:
    """x [..., in], permuted and rescaled."""
    if spec.perm is not None:
        x = jnp.take(x, spec.perm, axis=-1)
    if spec.pre_scale is not None:
        x = x * spec.pre_scale.astype(x.dtype)
    return x


def quantize_activations(x: jax.Array, spec: InputSpec) -> tuple[jax.Array, jax.Array]:
    """Activations -> (values, scale) in the format of `spec`.

    Beside scales in e4m3 there is a global one, `spec.scale` or each token's own; what is returned
    is their product, which is what the numbers were divided by.

    Args:
      x: [..., in].

    Returns:
      values [..., in], and scale: float32 [] (per_tensor), [..., 1] (per_token) or
      [..., ceil(in / group_size)] (per_group).
    """
    assert spec.format is not None
    fmt = numerics.get_format(spec.format)
    x = x.astype(jnp.float32)
    if spec.granularity == "per_group":
        return _by_group(x, spec, fmt)
    if spec.scale is not None:
        scale = spec.scale
    else:
        per_token = spec.granularity == "per_token"
        axis = -1 if per_token else None
        amax = jnp.max(jnp.abs(x), axis=axis, keepdims=per_token, initial=0.0)
        scale = numerics.scale_from_amax(amax, fmt, spec.scale_rule)
        scale = numerics.representable(scale, spec.scale_dtype)
    return numerics.round_to_format(numerics.divide(x, scale), fmt), scale


def _by_group(x: jax.Array, spec: InputSpec, fmt: numerics.Format) -> tuple[jax.Array, jax.Array]:
    groups = _grouped(x, spec.group_size)
    amax = jnp.max(jnp.abs(groups), axis=-1, initial=0.0)
    if spec.scale_dtype == numerics.TWO_LEVELS:
        total = spec.scale
        if total is None:
            total = numerics.global_scale(jnp.max(amax, axis=-1, keepdims=True, initial=0.0), fmt)
        scale = numerics.scale_beside(total, amax, fmt) * total
    else:
        scale = numerics.scale_from_amax(amax, fmt, spec.scale_rule)
        scale = numerics.representable(scale, spec.scale_dtype)
    values = numerics.round_to_format(numerics.divide(groups, scale[..., None]), fmt)
    return _ungrouped(values, x.shape[-1]), scale


def dequantize_activations(values: jax.Array, scale: jax.Array, spec: InputSpec) -> jax.Array:
    """The float32 activations [..., in] that quantized ones stand for."""
    wide = values.astype(jnp.float32)
    if spec.granularity != "per_group":
        return wide * scale
    return _ungrouped(_grouped(wide, spec.group_size) * scale[..., None], values.shape[-1])


def _grouped(x: jax.Array, size: int) -> jax.Array:
    """[..., in] -> [..., groups, size], the last group filled up with zeros."""
    fill = -x.shape[-1] % size
    if fill:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _ungrouped(groups: jax.Array, features: int) -> jax.Array:
    return groups.reshape(*groups.shape[:-2], groups.shape[-2] * groups.shape[-1])[..., :features]
