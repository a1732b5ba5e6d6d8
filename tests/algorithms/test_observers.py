"""Histograms and the limits that follow from them, against NumPy."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.algorithms.observers import (
    entropy_amax,
    init_histogram,
    merge_histograms,
    mse_amax,
    percentile_amax,
    update_histogram,
)
from qjax.errors import ConfigError

NORMAL = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
HEAVY = np.random.default_rng(1).standard_t(3, 40_000).astype(np.float32)


def histogram(*parts, bins=2048):
    result = init_histogram(bins)
    for part in parts:
        result = update_histogram(result, jnp.asarray(part, jnp.float32))
    return result


def by_numpy(x, bins):
    exponent = int(np.frexp(np.abs(x).max())[1])
    counts, edges = np.histogram(np.abs(x), bins=bins, range=(0, 2.0**exponent))
    return counts, edges, exponent


@pytest.mark.parametrize("x", [NORMAL, HEAVY, HEAVY * 1e-6, np.array([1.0, 2.0, 4.0, 0.0])])
def test_counts_are_numpys(x):
    counts, _, exponent = by_numpy(x, 256)
    got = histogram(x, bins=256)
    assert got.exponent == exponent
    # The largest number of numpy's last bin is its upper edge, which no magnitude reaches here.
    np.testing.assert_array_equal(got.counts, counts)
    assert got.width == 2.0**exponent / 256


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=5
    ),
    st.randoms(),
)
def test_merging_is_exact_in_any_order(parts, random):
    whole = histogram(np.concatenate(parts), bins=64)
    shuffled = list(parts)
    random.shuffle(shuffled)
    merged = init_histogram(64)
    for part in shuffled:
        merged = merge_histograms(histogram(part, bins=64), merged)
    assert merged.exponent == whole.exponent
    np.testing.assert_array_equal(merged.counts, whole.counts)


@pytest.mark.parametrize("x", [NORMAL, HEAVY])
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.99, 100.0])
def test_percentiles_are_numpys_to_a_bin(x, percent):
    hist = histogram(x[:1000], x[1000:])
    expected = np.percentile(np.abs(x), percent, method="inverted_cdf")
    got = float(percentile_amax(hist, percent))
    assert got - float(hist.width) <= expected <= got


def middles_and_edges(x, bins):
    counts, edges, _ = by_numpy(x, bins)
    return counts.astype(np.float64), (edges[1:] + edges[:-1]) / 2, edges[1:]


@pytest.mark.parametrize("x", [NORMAL, HEAVY])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3"])
def test_mse_is_the_least_of_all_limits(x, name):
    counts, middles, edges = middles_and_edges(x, 512)
    top = oracles.grid(name)[0][-1]
    last = np.flatnonzero(counts)[-1]
    losses = {}
    for i in range(max(last // 16, 1), last + 1):
        step = edges[i] / top
        error = middles - oracles.round_to(middles / step, name) * step
        losses[edges[i]] = np.sum(counts * error**2)
    got = float(mse_amax(histogram(x, bins=512), name))
    # Ties and float32 sums may pick a neighbour, which is no worse to 1 part in 1000.
    nearest = min(losses, key=lambda edge: abs(edge - got))
    assert losses[nearest] <= min(losses.values()) * 1.001


def kl_by_definition(counts, middles, limit, name):
    """TensorRT's: clip into P, merge bins of one quantized number into Q, compare."""
    kept = np.where(middles < limit, counts, 0.0)
    if not kept.any():
        return 0.0
    last = np.flatnonzero(kept)[-1]
    p = kept.copy()
    p[last] += counts.sum() - kept.sum()
    numbers = oracles.round_to(middles / (limit / oracles.grid(name)[0][-1]), name)
    q = np.zeros_like(p)
    for number in np.unique(numbers):
        level = (numbers == number) & (kept > 0)
        if level.any():
            q[level] = kept[level].mean()
    p, q = p / p.sum(), q / q.sum()
    used = p > 0
    return np.sum(p[used] * np.log(p[used] / q[used]))


@pytest.mark.parametrize("x", [NORMAL, HEAVY])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3"])
def test_entropy_is_the_least_divergence(x, name):
    counts, middles, edges = middles_and_edges(x, 512)
    last = np.flatnonzero(counts)[-1]
    losses = {
        edges[i]: kl_by_definition(counts, middles, edges[i], name)
        for i in range(min(127, last), last + 1)
    }
    got = float(entropy_amax(histogram(x, bins=512), name))
    nearest = min(losses, key=lambda edge: abs(edge - got))
    np.testing.assert_allclose(nearest, got, rtol=1e-6)
    # Sums of 512 float32 terms of size 1 at most, whose total may be as small as 1e-4.
    assert losses[nearest] <= min(losses.values()) + 512 * 2.0**-24


def test_outliers_are_clipped():
    # To keep 100 in int4 costs each of 40 000 numbers its square, 1; to clip it costs 100^2 once.
    hist = histogram(np.concatenate([NORMAL, [100.0]]))
    assert percentile_amax(hist, 99.99) < 6
    assert entropy_amax(hist, "int8") < 12
    assert mse_amax(hist, "int4") < 12


def test_an_empty_histogram_has_no_range():
    for hist in (init_histogram(), histogram(np.zeros(0)), histogram(np.zeros(5))):
        assert hist.counts.sum() == hist.counts[0]
    empty = init_histogram()
    assert mse_amax(empty, "int8") == entropy_amax(empty, "int8") == 0


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="power of 2"):
        init_histogram(1000)
    for percent in (0.0, 101.0):
        with pytest.raises(ConfigError, match="percentile"):
            percentile_amax(init_histogram(), percent)
    with pytest.raises(ConfigError, match="format"):
        mse_amax(init_histogram(), "int1")
