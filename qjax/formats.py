"""The settings of a Rule that say which numbers weights and activations become, and what goes
together.

How good numbers are found is `methods`; what the formats are is `numerics`.
"""

from typing import Any

from qjax import numerics
from qjax.errors import ConfigError, one_of
from qjax.invariants import ACT_GRANULARITIES, check_scale_dtype

WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group", "per_block")
ACT_SCALES = ("dynamic", "static")


def check_formats(rule: Any) -> None:
    """Raise ConfigError if the formats of a Rule are unknown or do not go together."""
    if rule.weight is not None:
        numerics.get_format(rule.weight)
    one_of("granularity", rule.granularity, WEIGHT_GRANULARITIES)
    one_of("scale rule", rule.scale_rule, numerics.SCALE_RULES)
    one_of("act_granularity", rule.act_granularity, ACT_GRANULARITIES)
    one_of("act_scale", rule.act_scale, ACT_SCALES)
    if rule.scale_dtype is not None:
        one_of("scale_dtype", rule.scale_dtype, numerics.SCALE_DTYPES)
    one_of("act_scale_dtype", rule.act_scale_dtype, numerics.SCALE_DTYPES)
    _check_group("granularity", rule.granularity, "group_size", rule.group_size)
    _check_group("act_granularity", rule.act_granularity, "act_group_size", rule.act_group_size)
    _check_weight(rule)
    _check_activation(rule)


def act_scale_rule(rule: Any) -> str:
    """How scales of activations follow from their range: as those of the weight, if both are
    powers of 2."""
    return rule.scale_rule if rule.act_scale_dtype == numerics.POWERS_OF_TWO else "absmax"


def is_integer(value: object) -> bool:
    """Whether a value from JSON or a caller is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_group(granularity: str, chosen: str, group_size: str, size: object) -> None:
    if not is_integer(size) or not isinstance(size, int) or size == 0 or size < -1:
        raise ConfigError(f"{group_size} is {size!r}; choose a positive integer or -1")
    if (chosen in ("per_group", "per_block")) != (size > 0):
        raise ConfigError(
            f"{granularity} {chosen!r} with {group_size} {size}: 'per_group' and 'per_block' "
            f"need a positive {group_size}, the others need -1"
        )


def _check_weight(rule: Any) -> None:
    if not isinstance(rule.symmetric, bool):
        raise ConfigError(f"symmetric is {rule.symmetric!r}; choose true or false")
    if rule.weight is None:
        return
    fmt = numerics.get_format(rule.weight)
    if not fmt.is_integer and not rule.symmetric:
        raise ConfigError(f"weight {rule.weight!r} has no zero point; set symmetric=True")
    if not rule.symmetric and rule.scale_rule != "absmax":
        raise ConfigError(
            f"scale_rule {rule.scale_rule!r} is for symmetric formats, not {rule.weight!r} with "
            "symmetric=False; use 'absmax'"
        )
    check_scale_dtype(rule.scale_dtype or "float32", rule.scale_rule, fmt, rule.symmetric)


def _check_activation(rule: Any) -> None:
    if rule.act is None:
        if rule.act_scale == "static":
            raise ConfigError("act_scale 'static' without act: name the format of activations")
        return
    fmt = numerics.get_format(rule.act)
    groups = numerics.PRODUCTS.get((str(rule.weight), rule.act))
    if groups is None:
        raise ConfigError(
            f"act {rule.act!r} with weight {rule.weight!r}: no product takes these formats; "
            f"choose one of: {numerics.known_products()}, or act=None for weight-only"
        )
    meet = groups or rule.group_size == rule.act_group_size
    if not rule.symmetric or not meet:
        alike = "per_channel or per_tensor"
        if rule.act_group_size != -1:
            alike = f"with group_size {rule.act_group_size}"
        raise ConfigError(
            f"act {rule.act!r} {rule.act_granularity!r} with weight {rule.weight!r} needs a "
            f"symmetric weight{'' if groups else ', ' + alike}; this rule says "
            f"granularity={rule.granularity!r}, group_size={rule.group_size}, "
            f"symmetric={rule.symmetric}"
        )
    check_scale_dtype(rule.act_scale_dtype, act_scale_rule(rule), fmt)
    two_levels = rule.act_scale_dtype == numerics.TWO_LEVELS
    if rule.act_scale == "static" and rule.act_granularity != "per_tensor" and not two_levels:
        raise ConfigError(
            "act_scale 'static' has one scale for all tokens; set act_granularity='per_tensor', or "
            f"act_scale_dtype={numerics.TWO_LEVELS!r}, beside which it is the global one"
        )
