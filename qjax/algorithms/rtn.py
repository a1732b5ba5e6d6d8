"""Round to nearest: the baseline every other method is measured against.

No data, no search: the scale of each block comes from its largest magnitude, and each weight
takes the nearest number.
"""

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.config import Rule
from qjax.formats import act_scale_rule
from qjax.qarray import InputSpec, QArray, block_for, quantize_array


def rtn(weight: jax.Array, rule: Rule, axis: int, input_amax: jax.Array | None) -> QArray:
    """Quantize one weight by `rule`, rounding to nearest.

    Args:
      weight: floating point [..., out, in] (axis -1) or [..., in, out] (axis -2).
      rule: its `weight` is not None.
      axis: the contracting axis of weight.
      input_amax: float32 [in], largest magnitude of each input feature over the calibration
        data; needed by static activation scales only.

    Returns:
      a QArray that dequantizes to the shape and dtype of weight.
    """
    assert rule.weight is not None
    default_scale = "bfloat16" if rule.granularity == "per_group" else "float32"
    return quantize_array(
        weight,
        rule.weight,
        block=block_for(rule.granularity, rule.group_size, axis),
        axis=axis,
        symmetric=rule.symmetric,
        scale_rule=rule.scale_rule,
        scale_dtype=rule.scale_dtype or default_scale,
        input=input_spec(rule, input_amax),
    )


def input_spec(rule: Rule, input_amax: jax.Array | None) -> InputSpec | None:
    """What products by `rule` do to their activations; None for weight-only rules."""
    if rule.act is None:
        return None
    fmt, scale = numerics.get_format(rule.act), None
    if rule.act_scale == "static":
        assert input_amax is not None
        two_levels = rule.act_scale_dtype == numerics.TWO_LEVELS
        scale_of = numerics.global_scale if two_levels else numerics.scale_from_amax
        scale = scale_of(jnp.max(input_amax), fmt)
    return InputSpec(
        scale=scale,
        format=rule.act,
        granularity=rule.act_granularity,
        group_size=rule.act_group_size,
        scale_dtype=rule.act_scale_dtype,
        scale_rule=act_scale_rule(rule),
    )
