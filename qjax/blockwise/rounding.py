"""Weights that read one input -> QArrays, by the methods of their rules."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.algorithms.awq import awq_clip, clip_scales
from qjax.algorithms.gptq import gptq
from qjax.algorithms.observers import Histogram, entropy_amax, mse_amax, percentile_amax
from qjax.algorithms.rtn import input_spec
from qjax.algorithms.scale_search import ScaleSearch, search_scales
from qjax.algorithms.scales import (
    Scales,
    WeightSpec,
    find_scales,
    round_to_scales,
    spec_of,
    split_rows,
)
from qjax.algorithms.sensitivity import output_error
from qjax.algorithms.statistics import InputStats
from qjax.blockwise.report import WeightReport
from qjax.config import Rule
from qjax.errors import DataError
from qjax.qarray import InputSpec, QArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """What is known of the input of some weights, after all scaling.

    Attributes:
      stats: its InputStats.
      amax: float32 [], what a static scale covers.
      pre_scale: float32 [in], what products multiply it by; None: nothing.
      name: of the first linear that reads it, for messages.
    """

    stats: InputStats
    amax: jax.Array
    pre_scale: jax.Array | None = None
    name: str = "the weight"


def round_group(
    weights: Mapping[str, jax.Array],
    rules: Mapping[str, Rule],
    given: Input,
    dtypes: Mapping[str, str],
) -> tuple[dict[str, QArray], list[WeightReport]]:
    """Quantize the weights of a group.

    Weights with one rule are solved together: they share a Hessian, and its factor.

    Args:
      weights: name -> [out, in] or [experts, out, in], float32 where a scale was moved into it.
      rules: name -> its rule; the names of `weights`.
      dtypes: name -> what the weight dequantizes to.

    Raises:
      DataError: too few tokens for a Hessian.
    """
    results: dict[str, QArray] = {}
    reports = []
    for names, rule in _by_rule(weights, rules):
        parts = [weights[name] for name in names]
        solved, notes = _solve(parts, rule, given)
        for name, part, q in zip(names, parts, solved, strict=True):
            error = _relative_error(part, q, given.stats)
            q = dataclasses.replace(q, input=_input(rule, given), dtype=dtypes[name])
            results[name] = q
            reports.append(WeightReport(name=name, error=error, **notes))
    return results, reports


def static_amax(rule: Rule, stats: InputStats, histogram: Histogram | None) -> jax.Array:
    """float32 []: what a static activation scale covers, by the rule's observer."""
    if rule.observer == "amax":
        return jnp.max(stats.amax)
    assert histogram is not None
    if rule.observer == "percentile":
        return percentile_amax(histogram)
    find = mse_amax if rule.observer == "mse" else entropy_amax
    return find(histogram, str(rule.act))


def _by_rule(
    weights: Mapping[str, jax.Array], rules: Mapping[str, Rule]
) -> list[tuple[list[str], Rule]]:
    """Names that are solved together. Where a scale covers several rows each is on its own."""
    found: list[tuple[list[str], Rule]] = []
    for name in weights:
        rule = rules[name]
        rows_apart = spec_of(rule).block[0] == 1
        for names, other in found:
            if rows_apart and dataclasses.replace(other, path=rule.path) == rule:
                names.append(name)
                break
        else:
            found.append(([name], rule))
    return found


def _solve(
    parts: Sequence[jax.Array], rule: Rule, given: Input
) -> tuple[list[QArray], dict[str, Any]]:
    """One QArray for each part, and what the reports of all say."""
    spec = spec_of(rule)
    weight = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)
    stats = given.stats
    tokens = int(jnp.min(stats.tokens))
    notes: dict[str, Any] = {"method": _method_name(rule), "tokens": tokens}
    gram, unseen = _gram(stats)
    if unseen:
        notes["note"] = f"experts {unseen} saw no token: round to nearest"
    if rule.method == "gptq":
        _check_tokens(given.name, weight.shape[-1], stats)
        q, info = gptq(
            weight,
            gram,
            spec,
            scales=_static_scales(weight, rule, spec, gram),
            act_order=rule.act_order,
            damping=rule.damping,
            search=ScaleSearch() if rule.range_search == "mse" else None,
        )
        notes["damping"] = float(jnp.max(info.damping))
        if bool(jnp.any(info.fell_back)):
            notes |= {
                "note": "the Hessian could not be factorized: round to nearest",
                "method": notes["method"].replace("gptq", "rtn"),
            }
    else:
        scales = _searched_scales(weight, rule, spec, gram)
        q = round_to_scales(weight, spec, scales)
    if len(parts) == 1:
        return [q], notes
    return split_rows(q, tuple(part.shape[-2] for part in parts)), notes


def _static_scales(
    weight: jax.Array, rule: Rule, spec: WeightSpec, gram: jax.Array | None
) -> Scales | None:
    """Grids that GPTQ keeps to; None: it finds them as it goes."""
    if rule.range_search in ("clip", "imatrix"):
        return _searched_scales(weight, rule, spec, gram)
    return None


def _searched_scales(
    weight: jax.Array, rule: Rule, spec: WeightSpec, gram: jax.Array | None
) -> Scales:
    if rule.range_search is None:
        return find_scales(weight, spec)
    if rule.range_search == "clip":
        return clip_scales(weight, spec, awq_clip(weight, gram, spec))
    importance = None
    if rule.range_search == "imatrix":
        assert gram is not None
        diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
        importance = diagonal if diagonal.ndim == 1 else diagonal[..., None, :]
    return search_scales(weight, spec, ScaleSearch(), importance)


def _gram(stats: InputStats) -> tuple[jax.Array | None, list[int]]:
    """The Gram matrix that methods see, and the experts that no token reached.

    A feature that was 0 for all tokens gets a moment of its own, unrelated to the others: its
    weights are then rounded to nearest, not dropped as in GPTQ's code, since data may come that has
    it. So are all weights of an expert that saw nothing.
    """
    if stats.gram is None:
        return None, []
    empty = jnp.flatnonzero(stats.tokens == 0) if stats.tokens.ndim else ()
    return _with_unseen(stats.gram), [int(e) for e in empty]


@jax.jit
def _with_unseen(gram: jax.Array) -> jax.Array:
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    seen = jnp.sum(diagonal > 0, axis=-1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(diagonal, axis=-1, keepdims=True) / jnp.maximum(seen, 1)
    own = jnp.where(diagonal > 0, 0, jnp.where(mean > 0, mean, 1))
    return gram + own[..., None] * jnp.eye(gram.shape[-1], dtype=jnp.float32)


def _check_tokens(name: str, inputs: int, stats: InputStats) -> None:
    """A Hessian of fewer tokens than inputs is singular: GPTQ would fit their noise."""
    tokens = int(jnp.sum(stats.tokens))
    if tokens < inputs:
        raise DataError(
            f"gptq needs {inputs} calibration tokens or more for the Hessian of {name}, which has "
            f"{inputs} inputs; there were {tokens}: raise num_samples or max_seq_length"
        )


def _input(rule: Rule, given: Input) -> InputSpec | None:
    spec = input_spec(rule, given.amax)
    if given.pre_scale is None or rule.scaling is None:
        return spec
    return dataclasses.replace(spec or InputSpec(), pre_scale=given.pre_scale)


def _relative_error(weight: jax.Array, q: QArray, stats: InputStats) -> float | None:
    if stats.gram is None:
        return None
    wide = weight.astype(jnp.float32)
    lost = jnp.sum(output_error(wide, q, stats.gram))
    whole = jnp.sum(_energy(wide, stats.gram))
    return float(lost / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny))


@jax.jit
def _energy(weight: jax.Array, gram: jax.Array) -> jax.Array:
    return jnp.sum(jnp.matmul(weight, gram) * weight, axis=(-2, -1))


def _method_name(rule: Rule) -> str:
    """'awq+gptq', 'smoothquant+rtn', 'clip+rtn', ..."""
    parts = [rule.scaling, rule.range_search, rule.method]
    return "+".join(part for part in parts if part is not None)
