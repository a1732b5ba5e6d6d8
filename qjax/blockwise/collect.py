"""One pass of a block over a batch: its outputs, and statistics of what its linears read."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.algorithms.observers import Histogram, init_histogram, update_histogram
from qjax.algorithms.statistics import InputStats, init_stats, update_stats
from qjax.blockwise.blocks import LayerSpec, Leaves, Spec, module_of, submodule
from qjax.tree import path_name

# Rows of one expert that are added up at once.
TILE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Want:
    """What to keep of one input of a block.

    Attributes:
      group: name of the structure.Group.
      reader: the linear that is observed.
      features: of the input.
      experts: how many see rows of their own; 0: there are none.
      gram: whether second moments are needed.
    """

    group: str
    reader: str
    features: int
    experts: int = 0
    gram: bool = False

    def start(self) -> InputStats:
        """Statistics of no tokens; with experts each array has one more axis in front."""
        none = jax.eval_shape(lambda: init_stats(self.features, gram=self.gram))
        lead = (self.experts,) if self.experts else ()
        # Arrays of their own, all zeros: they are donated.
        return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), none)


Stats = dict[str, InputStats]  # by the name of the group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What to keep of a pass.

    Attributes:
      wants: of its inputs.
      kv: whether the largest keys and values.
      output: whether the block's output.
    """

    wants: tuple[Want, ...]
    kv: bool = False
    output: bool = True


@partial(jax.jit, static_argnames=("spec", "how"), donate_argnames=("stats", "kv_amax"))
def observe(
    spec: Spec, how: Watch, leaves: Leaves, x: jax.Array, stats: Stats, kv_amax: Any
) -> tuple[jax.Array | None, Stats, Any]:
    """Run a block on x and add what its linears read to `stats`.

    Args:
      x: [batch, tokens, hidden_size].
      kv_amax: (k, v) so far, float32 [kv_heads]; None without `how.kv`.

    Returns:
      the block's output or None, the new statistics, the new kv_amax. The old ones are donated.
    """
    y, kept = _run(spec, how.wants, how.kv, leaves, x)
    for want in how.wants:
        rows, sizes = _rows(kept, want)
        old = stats[want.group]
        if want.experts:
            stats = stats | {want.group: _update_experts(old, rows, sizes)}
        else:
            stats = stats | {want.group: update_stats(old, rows)}
    if how.kv:
        new = (kept["self_attn.k_amax"], kept["self_attn.v_amax"])
        kv_amax = jax.tree.map(lambda a, b: a + jnp.maximum(b - a, 0), kv_amax, new)
    return y if how.output else None, stats, kv_amax


@partial(jax.jit, static_argnames=("spec", "wants"), donate_argnames=("histograms",))
def observe_histograms(
    spec: Spec,
    wants: tuple[Want, ...],
    leaves: Leaves,
    x: jax.Array,
    factors: Mapping[str, jax.Array],
    histograms: dict[str, Histogram],
) -> dict[str, Histogram]:
    """Add the magnitudes of inputs, each multiplied by its factor, to `histograms`.

    Args:
      factors: group -> float32 [features], what a scale makes of the input.
    """
    _, kept = _run(spec, wants, False, leaves, x)
    new = {}
    for want in wants:
        rows, _ = _rows(kept, want)
        values = rows.astype(jnp.float32) * factors[want.group]
        new[want.group] = update_histogram(histograms[want.group], values)
    return new


def start_histograms(wants: tuple[Want, ...]) -> dict[str, Histogram]:
    """Histograms of nothing."""
    return {want.group: init_histogram() for want in wants}


@partial(jax.jit, static_argnames=("spec",))
def forward(spec: Spec, leaves: Leaves, x: jax.Array) -> jax.Array:
    """The block's output, [batch, tokens, hidden_size]."""
    y, _ = module_of(spec, leaves)(*spec.args(x))
    return y


def _run(
    spec: Spec, wants: tuple[Want, ...], kv: bool, leaves: Leaves, x: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """The output, and what was kept: dotted name -> array."""
    module = module_of(spec, leaves)
    for want in wants:
        submodule(module, want.reader).keep_input = True
    if kv and isinstance(spec, LayerSpec):
        module.self_attn.observe_kv = True
    (y, _), sown = nnx.capture(module, nnx.Intermediate)(*spec.args(x))
    flat, _ = jax.tree_util.tree_flatten_with_path(sown, is_leaf=lambda v: isinstance(v, tuple))
    return y, {path_name(path): calls[0] for path, calls in flat}


def _rows(kept: dict[str, Any], want: Want) -> tuple[jax.Array, Any]:
    """The input as the linear multiplies it, and for experts how many rows each has."""
    x = kept[f"{want.reader}.input"]
    if not want.experts:
        return x, None
    row_ids = kept.get(f"{want.reader}.row_ids")
    rows = x if row_ids is None else jnp.take(x, row_ids, axis=0)
    return rows, kept[f"{want.reader}.group_sizes"]


def _update_experts(stats: InputStats, rows: jax.Array, sizes: jax.Array) -> InputStats:
    """Add rows [rows, in], sorted by expert, to the statistics of their experts.

    A tile has rows of one expert only, so that the work grows with rows and not with experts.

    Args:
      stats: arrays [experts, ...].
      sizes: int32 [experts], rows of each.
    """
    tiles = -(-sizes // TILE)
    ends, starts = jnp.cumsum(tiles), jnp.cumsum(sizes) - sizes

    def add(tile: jax.Array, stats: InputStats) -> InputStats:
        expert = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
        first = (tile - (ends[expert] - tiles[expert])) * TILE
        at = first + jnp.arange(TILE, dtype=jnp.int32)
        picked = jnp.take(rows, starts[expert] + at, axis=0, mode="clip")
        mine = jax.tree.map(lambda s: s[expert], stats)
        mine = update_stats(mine, picked, at < sizes[expert])
        return jax.tree.map(lambda s, new: s.at[expert].set(new), stats, mine)

    return jax.lax.fori_loop(0, ends[-1].astype(jnp.int32), add, stats)
