"""Which scale to move between the input of a group and the weights that read it."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.algorithms.awq import awq_scale
from qjax.algorithms.scales import WeightSpec, fake_quantize, spec_of
from qjax.algorithms.smoothquant import smooth_scale, smooth_search
from qjax.algorithms.statistics import InputStats, gram_loss, scale_stats
from qjax.blockwise.fold import fold, is_exact, multiplied, power_of_two, shared
from qjax.config import Rule
from qjax.errors import ConfigError
from qjax.structure import Group

Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled:
    """What became of a group.

    Attributes:
      leaves: of the block.
      inverse: float32 [in] or [experts, in], what its input is multiplied by now; None: nothing.
      pre_scale: the same where products have to multiply; None where something else does.
      alpha: the exponent; None where none was chosen.
      folded: where the division went: the name of a module, or None.
    """

    leaves: Leaves
    inverse: jax.Array | None = None
    pre_scale: jax.Array | None = None
    alpha: float | None = None
    folded: str | None = None


def scale_group(
    group: Group,
    leaves: Leaves,
    rules: Mapping[str, Rule],
    stats: InputStats,
    plus_one: bool,
) -> Scaled:
    """Choose the scale of a group by the rules of its readers, and apply it.

    Args:
      rules: name of a weight -> the rule that quantizes it; of the whole block.
      stats: of the group's input.
      plus_one: whether the gain of the block's norms is 1 + what they store.

    Raises:
      ConfigError: readers ask for different scalings.
    """
    names = [f"{reader}.weight" for reader in group.readers]
    chosen = [name for name in names if name in rules and rules[name].scaling is not None]
    if not chosen:
        return Scaled(leaves=leaves)
    rule = _one_rule(group, chosen, rules)
    scale, alpha = _search(group, [leaves[name] for name in chosen], rule, stats)
    scale = shared(scale, group.fold)
    if group.fold is not None and not is_exact(group, leaves, rules.keys()):
        scale = power_of_two(scale)
    if rule.scaling == "awq" and rule.alpha is None and not group.own_scale:
        # It was searched before heads had to share and exponents were rounded.
        weights = tuple(_flat(leaves[name]) for name in chosen)
        if not _helps(weights, _together(group, stats).gram, scale, spec_of(rule)):
            scale, alpha = jnp.ones_like(scale), 0.0
    if group.fold is None:
        new = dict(leaves)
        for name in chosen:
            new |= multiplied(leaves, name, scale, rules.keys())
        return Scaled(leaves=new, inverse=1 / scale, pre_scale=1 / scale, alpha=alpha)
    new, scale = fold(leaves, group, scale, rules.keys(), plus_one)
    return Scaled(leaves=new, inverse=1 / scale, alpha=alpha, folded=group.fold.module)


def scaled_stats(stats: InputStats, inverse: jax.Array | None) -> InputStats:
    """Statistics of the input times `inverse`, float32 [in] or [experts, in]."""
    if inverse is None:
        return stats
    if stats.amax.ndim == 1:
        return scale_stats(stats, inverse)
    each = jnp.broadcast_to(inverse, stats.amax.shape)
    return jax.vmap(scale_stats)(stats, each)


def _one_rule(group: Group, chosen: Sequence[str], rules: Mapping[str, Rule]) -> Rule:
    kinds = {(rules[name].scaling, rules[name].alpha) for name in chosen}
    if len(kinds) > 1:
        raise ConfigError(
            f"{', '.join(chosen)} read one input, {group.name}, and their rules ask for different "
            f"scalings of it: {sorted(map(str, kinds))}; give them one"
        )
    return rules[chosen[0]]


def _search(
    group: Group, weights: Sequence[jax.Array], rule: Rule, stats: InputStats
) -> tuple[jax.Array, float | None]:
    """The scale [in] or [experts, in], and its exponent where there is one for all."""
    if group.own_scale:
        scale = _expert_scales(tuple(weights), rule, stats)
        return jnp.where(stats.tokens[:, None] > 0, scale, 1.0), None
    flat = tuple(_flat(weight) for weight in weights)
    return _scale(flat, rule, _together(group, stats))


def _scale(
    weights: tuple[jax.Array, ...], rule: Rule, stats: InputStats
) -> tuple[jax.Array, float | None]:
    if rule.scaling == "awq":
        awq = awq_scale(weights, stats.gram, stats.mean_abs, spec_of(rule), alpha=rule.alpha)
        return awq.scale, round(float(awq.alphas[awq.best]), 4)
    if rule.alpha is not None:
        amax = jnp.max(jnp.stack([jnp.max(jnp.abs(w), axis=0) for w in weights]), axis=0)
        return smooth_scale(stats.amax, amax.astype(jnp.float32), rule.alpha), rule.alpha
    found = smooth_search(
        weights,
        stats.gram,
        stats.tokens,
        stats.amax,
        spec_of(rule),
        act_format=rule.act,
        act_granularity=rule.act_granularity,
    )
    alpha = round(float(found.alpha), 4)
    return found.scale, None if alpha < 0 else alpha  # negative: no scale was best


def _expert_scales(weights: tuple[jax.Array, ...], rule: Rule, stats: InputStats) -> jax.Array:
    """[experts, in], one expert after the other."""
    experts = stats.amax.shape[0]
    each = [
        _scale(tuple(w[e] for w in weights), rule, jax.tree.map(lambda s, e=e: s[e], stats))[0]
        for e in range(experts)
    ]
    return jnp.stack(each)


def _together(group: Group, stats: InputStats) -> InputStats:
    """Statistics of all experts' rows as of one input."""
    if not group.experts:
        return stats
    total = jax.tree.map(lambda s: jnp.sum(s, axis=0), stats)
    return dataclasses.replace(total, amax=jnp.max(stats.amax, axis=0))


def _flat(weight: jax.Array) -> jax.Array:
    """[experts, out, in] -> [experts * out, in]."""
    return weight.reshape(-1, weight.shape[-1])


@partial(jax.jit, static_argnames="spec")
def _helps(
    weights: tuple[jax.Array, ...], gram: jax.Array, scale: jax.Array, spec: WeightSpec
) -> jax.Array:
    """Whether rounding loses less with the scale than without it."""

    def loss(scale: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for weight in weights:
            wide = weight.astype(jnp.float32)
            total += gram_loss(fake_quantize(wide * scale, spec) / scale - wide, gram).sum()
        return total

    return loss(scale) < loss(jnp.ones_like(scale))
