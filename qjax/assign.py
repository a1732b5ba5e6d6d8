"""Which rule each leaf gets. Computed from names and shapes alone, before any array work."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qjax.config import QuantConfig, Rule
from qjax.errors import ConfigError
from qjax.qarray import block_for, is_qarray, scale_shape
from qjax.tree import is_array, leaves_by_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """One leaf that will be quantized: by which rule, contracting over which axis."""

    rule: Rule
    axis: int


def assign(params: Any, cfg: QuantConfig) -> dict[str, Assignment]:
    """Leaf name -> what happens to it, for the leaves that `cfg` quantizes.

    Only floating-point leaves with at least two axes, not called 'bias', are candidates. A leaf
    that is a QArray already may be ignored, not quantized again.

    Raises:
      ConfigError: a rule or ignore pattern that matches no candidate; a leaf whose contracting
        axis is not known; a group size that does not divide; an already quantized leaf.
    """
    if isinstance(params, nnx.Module):
        raise ConfigError(
            "a module is not a tree of weights (layers it holds twice would come apart); pass its "
            "state: graphdef, state = nnx.split(model)"
        )
    rules = [*(Rule(path=pattern) for pattern in cfg.ignore), *cfg.rules]
    used = [False] * len(rules)
    assigned: dict[str, Assignment] = {}
    candidates = [(n, leaf) for n, leaf in leaves_by_name(params).items() if _is_candidate(n, leaf)]
    for name, leaf in candidates:
        matching = [i for i, rule in enumerate(rules) if _reaches(rule, name)]
        for i in matching:
            used[i] = True
        if matching and rules[matching[0]].weight is not None:
            assigned[name] = _assignment(name, leaf, rules[matching[0]])
    if all(used) and not assigned:
        raise ConfigError(
            "the recipe leaves every weight alone; give a rule with a weight format, or ignore less"
        )
    if not all(used):
        _raise_unmatched(rules, used, [name for name, _ in candidates])
    return assigned


def misfits(params: Any, cfg: QuantConfig) -> dict[str, str]:
    """Leaf name -> why its shape is none that the format of its rule takes."""
    found = {}
    for name, leaf in leaves_by_name(params).items():
        if not _is_candidate(name, leaf) or is_qarray(leaf):
            continue
        rules = [*(Rule(path=pattern) for pattern in cfg.ignore), *cfg.rules]
        rule = next((rule for rule in rules if _reaches(rule, name)), None)
        if rule is None or rule.weight is None:
            continue
        axis = -1 if rule.contract_axis is None else rule.contract_axis
        try:
            scale_shape(tuple(leaf.shape), block_for(rule.granularity, rule.group_size, axis))
        except ConfigError as error:
            found[name] = str(error)
    return found


def _reaches(rule: Rule, name: str) -> bool:
    """Whether a rule is about a leaf. The router of a mixture of experts must be spelled: it is
    small, and a token that it sends elsewhere is lost."""
    return rule.matches(name) and ("router" in rule.path or "router" not in name)


def _is_candidate(name: str, leaf: Any) -> bool:
    if is_qarray(leaf):
        return True
    if not is_array(leaf):
        return False
    # Biases of stacked layers and of many heads have two axes as well.
    matrix = len(leaf.shape) >= 2 and name.rpartition(".")[2] != "bias"
    return matrix and jnp.issubdtype(leaf.dtype, jnp.floating)


def _assignment(name: str, leaf: Any, rule: Rule) -> Assignment:
    if is_qarray(leaf):
        raise ConfigError(
            f"{name} is already quantized to {leaf.format}; quantize the original weights, or "
            f"leave it alone with ignore=[{name!r}]"
        )
    # Embedding tables are [vocabulary, features], and [out, in] when they are tied to the head.
    known = name.rpartition(".")[2] in ("weight", "embedding")
    axis = rule.contract_axis
    if len(leaf.shape) > 2 and not known:
        raise ConfigError(
            f"{name} {tuple(leaf.shape)} has more than two axes, and which of them contract is not "
            f"known; convert the model with qjax.nn.convert, or leave it alone: ignore=[{name!r}]"
        )
    # Experts are calibrated together, but other stacks are not calibrated at all.
    stacked = len(leaf.shape) > 2 and ".experts." not in name
    if rule.needs_stats and (stacked or name.endswith("embedding")):
        raise ConfigError(
            f"{name} {tuple(leaf.shape)} cannot have a static activation scale, or a method that "
            "calibrates: stacked weights and embeddings are not calibrated; give it "
            "act_scale='dynamic' and method='rtn' by a rule of its own"
        )
    if axis is None:
        if not known:
            raise ConfigError(
                f"which axis of {name} {tuple(leaf.shape)} contracts is not known: only leaves "
                "called 'weight' are [out, in] by convention. Say contract_axis=-2 for [in, out] "
                "kernels or -1 for [out, in], in the Rule or as preset(..., contract_axis=-2)"
            )
        axis = -1
    try:
        scale_shape(tuple(leaf.shape), block_for(rule.granularity, rule.group_size, axis))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return Assignment(rule=rule, axis=axis)


def _raise_unmatched(rules: list[Rule], used: list[bool], names: list[str]) -> None:
    unused = [repr(rule.path) for rule, hit in zip(rules, used, strict=True) if not hit]
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ConfigError(
        f"no weight matches {', '.join(unused)}. Patterns are searched in dotted names; those of "
        f"weights with two or more axes here: {some or 'none'}. Embeddings, norms, lm_head and "
        "routers are reached only by a pattern that spells the word"
    )
