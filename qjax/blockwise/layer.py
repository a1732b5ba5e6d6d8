"""Quantizing one block: observe its inputs, scale, round."""

import dataclasses
from collections.abc import Mapping, MutableSequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.algorithms.observers import Histogram
from qjax.algorithms.statistics import InputStats
from qjax.assign import Assignment
from qjax.blockwise.blocks import LayerSpec, Leaves, Spec
from qjax.blockwise.collect import (
    Stats,
    Want,
    Watch,
    forward,
    observe,
    observe_histograms,
    start_histograms,
)
from qjax.blockwise.report import WeightReport
from qjax.blockwise.rounding import Input, round_group, static_amax
from qjax.blockwise.scaling import Scaled, scale_group, scaled_stats
from qjax.config import Rule
from qjax.errors import ConfigError, DataError
from qjax.methods import needs_gram
from qjax.qarray import QArray
from qjax.quantize import quantize_leaf
from qjax.structure import Group

Rules = Mapping[str, Rule]  # name of a weight in the block -> its rule
# [batch, tokens, hidden_size] each, on the device or in host memory.
Activations = MutableSequence[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A block to quantize.

    Attributes:
      name: of the block in the model, 'layers.3'; '' for the head.
      spec: what it is, without a quantized cache.
      leaves: its original leaves.
      rules: weight -> rule, for those to be quantized.
      kv: what keys and values are rounded to, and whether each head has scales; None: nothing.
      through_quantized: whether the next block sees the quantized block's output.
      last: whether there is no next block.
    """

    name: str
    spec: Spec
    leaves: Leaves
    rules: Rules
    kv: tuple[str, bool] | None
    through_quantized: bool
    last: bool = False

    def full(self, name: str) -> str:
        """The name in the model of a leaf, or part, of the block."""
        return f"{self.name}.{name}" if self.name else name

    @property
    def finished_spec(self) -> Spec:
        """What the block is in the end."""
        if self.kv is None or not isinstance(self.spec, LayerSpec):
            return self.spec
        return dataclasses.replace(self.spec, kv=self.kv)


def quantize_block(
    task: Task, activations: Activations
) -> tuple[dict[str, Any], list[WeightReport]]:
    """The block's leaves, quantized, and what was done.

    Args:
      activations: what the block reads; they become what it gives.

    Raises:
      DataError: activations that are not finite, naming the layer; too few tokens.
      ConfigError: rules that do not go together.
    """
    wants = wants_of(task)
    histograms_for = _histogram_groups(task, wants)
    in_place = _single_pass(task, histograms_for)
    stats, kv_amax = _observed(task, wants, activations, in_place)
    plan: dict[str, Scaled] = {}
    leaves = dict(task.leaves)
    for group in task.spec.groups:
        if group.name in stats:
            scaled = scale_group(group, leaves, task.rules, stats[group.name], task.spec.plus_one)
            plan[group.name], leaves = scaled, scaled.leaves
    histograms = _histograms(task, wants, histograms_for, plan, activations)
    reports: list[WeightReport] = []
    for group in task.spec.groups:
        if group.name in stats:
            after = scaled_stats(stats.pop(group.name), plan[group.name].inverse)
            new, rows = _rounded(task, group, leaves, after, plan[group.name], histograms)
            leaves |= new
            reports += rows
    done = {row.name for row in reports}
    for name in [name for name in task.rules if task.full(name) not in done]:
        leaves[name], row = _plain(task, name, leaves[name])
        reports.append(row)
    if task.kv is not None and kv_amax is not None:
        leaves |= _kv_scales(task.kv, kv_amax)
    if not in_place and not task.last:
        _advance(task, leaves, activations)
    return leaves, reports


def pass_through(task: Task, leaves: Leaves, activations: Activations) -> None:
    """Make the activations what they would be behind `quantize_block`, bit by bit.

    Args:
      leaves: of the finished block.
    """
    wants = wants_of(task)
    if _single_pass(task, _histogram_groups(task, wants)):
        _observed(task, wants, activations, True)
    elif not task.last:
        _advance(task, leaves, activations)


def wants_of(task: Task) -> tuple[Want, ...]:
    """What has to be observed of a block, for its rules."""
    wants = []
    for group in task.spec.groups:
        rules = [task.rules[n] for n in _weights(group, task.leaves) if n in task.rules]
        if not any(rule.needs_stats for rule in rules):
            continue
        first = task.leaves[f"{group.readers[0]}.weight"]
        wants.append(
            Want(
                group=group.name,
                reader=group.readers[0],
                features=first.shape[-1],
                experts=first.shape[0] if group.experts else 0,
                gram=any(needs_gram(rule) for rule in rules),
            )
        )
    return tuple(wants)


def _single_pass(task: Task, histograms: tuple[Want, ...]) -> bool:
    """Whether the pass that observes gives the activations of the next block as well."""
    return not task.through_quantized and not histograms and not task.last


def _weights(group: Group, leaves: Leaves) -> list[str]:
    """Names of the weights that the group's statistics are about. A router reads tokens, where
    experts read rows."""
    readers = [r for r in group.readers if not (group.experts and r.endswith("router"))]
    return [name for r in readers if (name := f"{r}.weight") in leaves]


def _observed(
    task: Task, wants: tuple[Want, ...], activations: Activations, in_place: bool
) -> tuple[Stats, Any]:
    stats = {want.group: want.start() for want in wants}
    kv = task.kv is not None and isinstance(task.spec, LayerSpec)
    amax: Any = None
    if kv:
        assert isinstance(task.spec, LayerSpec)
        heads = task.spec.layer.attention.kv_heads
        amax = (jnp.zeros(heads, jnp.float32), jnp.zeros(heads, jnp.float32))
    if not wants and not kv and not in_place:
        return stats, None
    for index, x in enumerate(activations):
        how = Watch(wants=wants, kv=kv, output=in_place)
        y, stats, amax = observe(task.spec, how, task.leaves, jnp.asarray(x), stats, amax)
        if in_place:
            activations[index] = y
    for want in wants:
        _check_finite(f"the input of {task.full(want.reader)}", stats[want.group].amax)
        _check_reached(task.full(want.reader), stats[want.group])
    for part in amax or ():
        _check_finite(f"keys or values of {task.name}", part)
    return stats, amax


def _check_finite(what: str, amax: jax.Array) -> None:
    if not bool(jnp.isfinite(amax).all()):
        raise DataError(
            f"{what} is NaN or infinite for some calibration tokens; check the model in float32 "
            "and the calibration data"
        )


def _check_reached(name: str, stats: InputStats) -> None:
    if not bool(jnp.any(stats.amax > 0)):
        raise DataError(
            f"calibration never reached {name}: its largest input is 0; calibrate with data that "
            "uses the whole model"
        )


def _histogram_groups(task: Task, wants: tuple[Want, ...]) -> tuple[Want, ...]:
    """Those of which an observer needs to see more than the maximum."""
    found = []
    for want in wants:
        group = next(g for g in task.spec.groups if g.name == want.group)
        rules = [task.rules[n] for n in _weights(group, task.leaves) if n in task.rules]
        if any(rule.observer != "amax" for rule in rules):
            found.append(want)
    return tuple(found)


def _histograms(
    task: Task,
    wants: tuple[Want, ...],
    chosen: tuple[Want, ...],
    plan: Mapping[str, Scaled],
    activations: Activations,
) -> dict[str, Histogram]:
    """A second pass, when it is known what inputs will be multiplied by."""
    if not chosen:
        return {}
    factors = {}
    for want in chosen:
        inverse = plan[want.group].inverse
        if inverse is not None and inverse.ndim > 1:
            raise ConfigError(
                f"{task.full(want.reader)} has a scale for each expert, and observers other than "
                "'amax' see one input for all: use observer='amax'"
            )
        ones = jnp.ones(want.features, jnp.float32)
        factors[want.group] = ones if inverse is None else inverse
    found = start_histograms(chosen)
    for x in activations:
        found = observe_histograms(task.spec, chosen, task.leaves, jnp.asarray(x), factors, found)
    return found


def _rounded(
    task: Task,
    group: Group,
    leaves: Leaves,
    stats: InputStats,
    scaled: Scaled,
    histograms: Mapping[str, Histogram],
) -> tuple[dict[str, Any], list[WeightReport]]:
    """The group's quantized weights, and their reports by full names."""
    new: dict[str, Any] = {}
    reports = []
    names = [name for name in _weights(group, leaves) if name in task.rules]
    for observer in dict.fromkeys((task.rules[n].observer, task.rules[n].act) for n in names):
        mine = [n for n in names if (task.rules[n].observer, task.rules[n].act) == observer]
        given = Input(
            stats=stats,
            amax=static_amax(task.rules[mine[0]], stats, histograms.get(group.name)),
            pre_scale=scaled.pre_scale,
            name=task.full(group.readers[0]),
        )
        weights, rows = round_group(
            {name: leaves[name] for name in mine},
            {name: task.rules[name] for name in mine},
            given,
            {name: task.leaves[name].dtype.name for name in mine},
        )
        new |= weights
        reports += rows
    by = "pre_scale" if scaled.pre_scale is not None else scaled.folded
    return new, [
        dataclasses.replace(row, name=task.full(row.name), alpha=scaled.alpha, scaled_by=by)
        for row in reports
    ]


def _plain(task: Task, name: str, weight: jax.Array) -> tuple[QArray, WeightReport]:
    """A weight whose input nobody observed, rounded to nearest."""
    rule = task.rules[name]
    if rule.needs_stats:
        raise ConfigError(
            f"{task.full(name)} is a router, which is not calibrated: give it a rule of its own "
            "with method 'rtn' and act_scale 'dynamic', or leave it alone"
        )
    q = quantize_leaf(weight, Assignment(rule=rule, axis=-1), None)
    return dataclasses.replace(q, dtype=task.leaves[name].dtype.name), WeightReport(
        name=task.full(name), method="rtn"
    )


def _kv_scales(kv: tuple[str, bool], amax: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    fmt = numerics.get_format(kv[0])
    k, v = (a if kv[1] else jnp.max(a) for a in amax)
    return {
        "self_attn.k_scale": numerics.scale_from_amax(k, fmt),
        "self_attn.v_scale": numerics.scale_from_amax(v, fmt),
    }


def _advance(task: Task, leaves: Leaves, activations: Activations) -> None:
    """Activations become the outputs: of the quantized block, or of the original."""
    spec = task.finished_spec if task.through_quantized else task.spec
    source = leaves if task.through_quantized else task.leaves
    for index, x in enumerate(activations):
        activations[index] = forward(spec, source, jnp.asarray(x))
