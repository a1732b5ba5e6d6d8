"""The settings of a Rule that say how its numbers are found, and what they ask of calibration.

Which numbers a format has is `numerics`; how good ones are chosen is `qjax.algorithms`.
"""

from typing import Any

from qjax.errors import ConfigError, one_of

METHODS = ("rtn", "gptq")
SCALINGS = ("smoothquant", "awq")
RANGE_SEARCHES = ("clip", "mse", "imatrix")
OBSERVERS = ("amax", "percentile", "mse", "entropy")


def check_method(rule: Any) -> None:
    """Raise ConfigError if the method settings of a Rule are unknown or do not go together."""
    one_of("method", rule.method, METHODS)
    one_of("observer", rule.observer, OBSERVERS)
    if rule.scaling is not None:
        one_of("scaling", rule.scaling, SCALINGS)
    if rule.range_search is not None:
        one_of("range_search", rule.range_search, RANGE_SEARCHES)
    if rule.scaling == "smoothquant" and rule.act is None:
        raise ConfigError(
            "scaling 'smoothquant' makes room for the rounding of activations; name their format "
            "as act, or use scaling='awq' for weights alone"
        )
    _check_alpha(rule)
    if not isinstance(rule.act_order, bool):
        raise ConfigError(f"act_order is {rule.act_order!r}; choose true or false")
    if rule.act_order and rule.method != "gptq":
        raise ConfigError(f"act_order is for method 'gptq', not {rule.method!r}")
    if not is_number(rule.damping) or not 0 < rule.damping < 1:
        raise ConfigError(
            f"damping is {rule.damping!r}; it is a part of the Hessian's mean diagonal, between 0 "
            "and 1: 0.01 is usual"
        )
    if rule.observer != "amax" and rule.act_scale != "static":
        raise ConfigError(
            f"observer {rule.observer!r} finds a static activation scale; set act_scale='static'"
        )
    if rule.contract_axis == -2 and needs_blocks(rule):
        raise ConfigError(
            "methods that calibrate block by block take [out, in] weights, of qjax's own models; "
            f"this rule says contract_axis=-2 and {_method_words(rule)}"
        )


def needs_blocks(rule: Any) -> bool:
    """Whether a rule needs more than the largest magnitudes of inputs: `quantize_model` then runs
    block by block."""
    return (
        rule.method != "rtn"
        or rule.scaling is not None
        or rule.range_search is not None
        or rule.observer != "amax"
    )


def needs_gram(rule: Any) -> bool:
    """Whether a rule needs the second moments of its inputs, sum of x x^T."""
    searched = rule.scaling == "smoothquant" and rule.alpha is None
    moments = rule.range_search in ("clip", "imatrix")
    return rule.method == "gptq" or rule.scaling == "awq" or searched or moments


def makes_up(rule: Any) -> bool:
    """Whether a rule answers to errors of its inputs: the blocks before it are then quantized when
    it sees what they give."""
    return rule.method == "gptq" or rule.scaling == "awq" or rule.range_search == "clip"


def is_number(value: object) -> bool:
    """Whether a value from JSON or a caller is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_alpha(rule: Any) -> None:
    if rule.alpha is None:
        return
    if not is_number(rule.alpha) or not 0 <= rule.alpha <= 1:
        raise ConfigError(
            f"alpha is {rule.alpha!r}; it shares the range between activations and weights: choose "
            "a number from 0 to 1, or None to search for the best of each layer"
        )
    if rule.scaling is None:
        raise ConfigError(f"alpha {rule.alpha} without scaling: choose one of {SCALINGS}")


def _method_words(rule: Any) -> str:
    return (
        f"method={rule.method!r}, scaling={rule.scaling!r}, range_search={rule.range_search!r}, "
        f"observer={rule.observer!r}"
    )
