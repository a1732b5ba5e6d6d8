"""Scores of formats, the choice between them against trying all, and bias correction."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.cases import SPECS, gram_of, inputs, output_error, weights

from qjax.algorithms.bias import bias_correction
from qjax.algorithms.scales import find_scales, round_to_scales
from qjax.algorithms.sensitivity import choose_formats
from qjax.algorithms.sensitivity import output_error as score
from qjax.errors import ConfigError, DataError
from qjax.qarray import dequantize

X = inputs(200, 64) + 0.5
WEIGHT = weights(32, 64)


def quantized(spec):
    return round_to_scales(jnp.asarray(WEIGHT), spec, find_scales(WEIGHT, spec))


@pytest.mark.parametrize("spec", [SPECS["int4_asymmetric"], SPECS["nvfp4"]])
def test_score_is_the_squared_error_of_outputs(spec):
    q = quantized(spec)
    change = np.asarray(dequantize(q, "float32"), np.float64) - WEIGHT
    got = score(jnp.asarray(WEIGHT), q, gram_of(X))
    np.testing.assert_allclose(got, output_error(change, X), rtol=1e-3)  # float32 sums
    importance = np.random.default_rng(0).uniform(0, 1, 32)
    weighted = np.sum(((X @ change.T) ** 2) * importance)
    got = score(jnp.asarray(WEIGHT), q, gram_of(X), jnp.asarray(importance, jnp.float32))
    np.testing.assert_allclose(got, weighted, rtol=1e-3)


def test_fewer_bits_score_worse():
    scores = [score(WEIGHT, quantized(SPECS[n]), gram_of(X)) for n in ("int3_group", "int4_group")]
    assert scores[0] > scores[1] > score(WEIGHT, quantized(SPECS["int8_channel"]), gram_of(X))


def test_bias_correction_keeps_the_mean():
    q = quantized(SPECS["int4_group"])
    rounded = np.asarray(dequantize(q, "float32"), np.float64)
    delta = bias_correction(jnp.asarray(WEIGHT), q, jnp.asarray(X.mean(axis=0), jnp.float32))
    before = np.abs((X @ (rounded - WEIGHT).T).mean(axis=0)).max()
    after = np.abs((X @ (rounded - WEIGHT).T).mean(axis=0) + delta).max()
    assert after < before * 1e-5  # 64 float32 terms
    corrected = np.sum((X @ (rounded - WEIGHT).T + np.asarray(delta)) ** 2)
    assert corrected < output_error(rounded - WEIGHT, X)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_the_choice_is_the_best_of_all(seed, unit):
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 6, (5, 1)) * np.array([4, 8, 16]) * 1_000_000
    costs = rng.exponential(1, (5, 1)) * np.sort(rng.random((5, 3)), axis=1)[:, ::-1]
    costs[0, 2] = np.inf
    budget = rng.uniform(4.5, 12) / 4 * bits[:, 0].sum()
    best = min(
        (sum(costs[i, f] for i, f in enumerate(choice)), choice)
        for choice in itertools.product(range(3), repeat=5)
        if sum(bits[i, f] for i, f in enumerate(choice)) <= budget
    )
    chosen = choose_formats(costs * unit, bits, budget)
    assert bits[np.arange(5), chosen].sum() <= budget
    np.testing.assert_allclose(costs[np.arange(5), chosen].sum(), best[0], rtol=1e-6)


def test_costs_of_very_different_size_are_told_apart():
    # The layers that suffer least matter too, once the others are settled.
    costs = np.array([[1e6, 1.0], [2e-3, 1e-3], [5e-3, 1e-3]])
    bits = np.array([[4, 8]] * 3)
    assert choose_formats(costs, bits, 20).tolist() == [1, 0, 1]


def test_a_budget_that_allows_all_takes_the_best():
    costs = np.array([[3.0, 1.0, 2.0], [1.0, 0.0, 5.0]])
    assert choose_formats(costs, np.ones((2, 3)), 2).tolist() == [1, 1]
    assert choose_formats(np.zeros((2, 3)), np.ones((2, 3)), 2).shape == (2,)


def test_bad_problems_are_refused():
    bits = np.array([[4.0, 8.0]])
    with pytest.raises(ConfigError, match="budget"):
        choose_formats(np.ones((1, 2)), bits, 3)
    with pytest.raises(DataError, match="layer 0 has no format"):
        choose_formats(np.full((1, 2), np.inf), bits, 9)
    with pytest.raises(DataError, match="NaN"):
        choose_formats(np.array([[np.nan, 1]]), bits, 9)
    with pytest.raises(DataError, match=r"\(2, 2\)"):
        choose_formats(np.ones((2, 2)), bits, 9)
