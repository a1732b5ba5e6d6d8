"""Where to clip activations: percentile, least squared error, least divergence of a histogram.

Migacz, 8-bit inference with TensorRT (GTC 2017), for the entropy of histograms; Krishnamoorthi,
https://arxiv.org/abs/1806.08342, for percentiles.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax import numerics
from qjax.algorithms.scales import nearest
from qjax.errors import ConfigError

LOWEST = -126  # exponent of an empty histogram, and the smallest there is


@partial(jax.tree_util.register_dataclass, data_fields=["counts", "exponent"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """How many magnitudes fell into equal bins over [0, 2**exponent).

    The range is a power of 2, so that a larger one folds bins in pairs: whatever the batches and
    their order, the result is that of all numbers at once (up to 2**24 in a bin, and to float32
    beyond).

    Attributes:
      counts: float32 [bins], bins a power of 2.
      exponent: int32 scalar.
    """

    counts: Any
    exponent: Any

    @property
    def width(self) -> jax.Array:
        """float32 scalar, of a bin."""
        return jnp.ldexp(jnp.float32(1) / len(self.counts), self.exponent)


def init_histogram(bins: int = 2048) -> Histogram:
    """A histogram of nothing. Raises ConfigError unless bins is a power of 2."""
    if bins < 2 or bins & (bins - 1):
        raise ConfigError(f"{bins} bins cannot be folded in pairs; choose a power of 2")
    return Histogram(counts=jnp.zeros(bins, jnp.float32), exponent=jnp.int32(LOWEST))


@jax.jit
def update_histogram(histogram: Histogram, x: jax.Array) -> Histogram:
    """Add the magnitudes of x, of any shape and float type, which must be finite."""
    size = jnp.abs(x.astype(jnp.float32)).ravel()
    _, exponent = jnp.frexp(size.max(initial=0))  # max < 2**exponent
    exponent = jnp.maximum(exponent.astype(jnp.int32), LOWEST)
    bins = len(histogram.counts)
    index = jnp.floor(jnp.ldexp(size, jnp.int32(bins.bit_length() - 1) - exponent))
    counts = jnp.bincount(index.astype(jnp.int32), length=bins).astype(jnp.float32)
    return merge_histograms(histogram, Histogram(counts=counts, exponent=exponent))


@jax.jit
def merge_histograms(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of the numbers of both, with the wider range."""
    exponent = jnp.maximum(a.exponent, b.exponent)
    counts = _fold(a, exponent) + _fold(b, exponent)
    return Histogram(counts=counts, exponent=exponent)


def _fold(histogram: Histogram, exponent: jax.Array) -> jax.Array:
    """Counts over the wider range [0, 2**exponent)."""
    bins = len(histogram.counts)
    # 31 folds empty all bins but the first, and are as far as int32 shifts.
    index = jnp.arange(bins) >> jnp.minimum(exponent - histogram.exponent, 31)
    return jnp.zeros(bins, jnp.float32).at[index].add(histogram.counts)


@partial(jax.jit, static_argnames="percent")
def percentile_amax(histogram: Histogram, percent: float = 99.99) -> jax.Array:
    """The upper edge of the first bin up to which at least `percent` of the magnitudes lie.

    Raises:
      ConfigError: percent outside (0, 100].
    """
    if not 0 < percent <= 100:
        raise ConfigError(f"percentile {percent} is not in (0, 100]")
    reached = jnp.cumsum(histogram.counts)
    enough = reached >= jnp.float32(percent / 100) * reached[-1]
    return (jnp.argmax(enough) + 1).astype(jnp.float32) * histogram.width


@partial(jax.jit, static_argnames="format")
def mse_amax(histogram: Histogram, format: str) -> jax.Array:
    """The clipping limit with the least squared error, each bin standing at its middle.

    Limits are upper edges of bins, from 1/16 of the last one used.

    Args:
      format: a name of numerics.FORMATS.

    Returns:
      float32 scalar, 0 for an empty histogram.
    """
    fmt = numerics.get_format(format)
    middles = _middles(histogram)

    def error(limit: jax.Array) -> jax.Array:
        scale = numerics.scale_from_amax(limit, fmt)
        difference = middles - nearest(middles / scale, fmt) * scale
        return jnp.sum(histogram.counts * difference**2)

    return _least(histogram, error, lambda last: jnp.maximum(last // 16, 1))


@partial(jax.jit, static_argnames="format")
def entropy_amax(histogram: Histogram, format: str) -> jax.Array:
    """The clipping limit after which the distribution of magnitudes diverges least.

    For each limit, the upper edge of a bin from the 128th on: P is the histogram up to it, what
    lies beyond counted in the last bin that is not empty; Q is the histogram up to it with the bins
    that round to one number of the format sharing their counts equally, empty bins left empty. The
    limit with the least KL(P, Q) wins.

    Args:
      format: a name of numerics.FORMATS.

    Returns:
      float32 scalar, 0 for an empty histogram.
    """
    fmt = numerics.get_format(format)
    middles, counts = _middles(histogram), histogram.counts
    bins = len(counts)
    at = jnp.arange(bins)

    def divergence(limit: jax.Array) -> jax.Array:
        within = middles < limit
        kept = jnp.where(within, counts, 0)
        last = jnp.max(jnp.where(kept > 0, at, 0))
        p = jnp.where(at == last, kept + jnp.sum(counts - kept), kept)
        numbers = nearest(middles / numerics.scale_from_amax(limit, fmt), fmt)
        # Numbers ascend, so that their changes count the levels.
        level = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), numbers[1:] != numbers[:-1]]))
        total = jax.ops.segment_sum(kept, level, bins)
        sharing = jax.ops.segment_sum((kept > 0).astype(jnp.float32), level, bins)
        q = jnp.where(kept > 0, (total / jnp.maximum(sharing, 1))[level], 0)
        p, q = p / jnp.maximum(p.sum(), 1), q / jnp.maximum(q.sum(), 1)
        used = p > 0  # and q as well
        ratio = jnp.where(used, p, 1) / jnp.where(used, q, 1)
        return jnp.sum(p * jnp.log(ratio))

    return _least(histogram, divergence, lambda last: jnp.minimum(127, last))


def _middles(histogram: Histogram) -> jax.Array:
    return (jnp.arange(len(histogram.counts), dtype=jnp.float32) + 0.5) * histogram.width


def _least(histogram: Histogram, loss: Any, first_of: Any) -> jax.Array:
    """The upper edge, of bins first_of(last used) ... last used, where `loss` is least."""
    used = histogram.counts > 0
    at = jnp.arange(len(used))
    last = jnp.max(jnp.where(used, at, 0))
    edges = (at + 1).astype(jnp.float32) * histogram.width
    losses = lax.map(loss, edges, batch_size=64)
    losses = jnp.where((at >= first_of(last)) & (at <= last), losses, jnp.inf)
    # The widest of equals: it clips least.
    best = len(used) - 1 - jnp.argmin(losses[::-1])
    return jnp.where(used.any(), edges[best], 0)
