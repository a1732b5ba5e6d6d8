"""Searched scales against a loop over candidates in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.cases import SPECS, scales_of, weights

from qjax.algorithms.scale_search import ScaleSearch, search_scales
from qjax.algorithms.scales import block_sum, fake_quantize, find_scales
from qjax.errors import ConfigError

WEIGHT = weights(24, 96)
IMPORTANCE = np.random.default_rng(3).uniform(0.1, 5, 96).astype(np.float32)
every_grid = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def loss(spec, scales, importance, norm=2.0):
    error = np.abs(np.asarray(fake_quantize(WEIGHT, spec, scales)) - WEIGHT) ** norm
    return np.asarray(block_sum(jnp.asarray(error * importance, jnp.float32), spec.block))


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("name", ["int4_group", "int4_asymmetric", "int3_group"])
def test_the_best_candidate_wins(name, norm):
    spec, search = SPECS[name], ScaleSearch(grid=20, max_shrink=0.4, max_grow=0.1, norm=norm)
    found = search_scales(jnp.asarray(WEIGHT), spec, search, jnp.asarray(IMPORTANCE))
    bits = int(spec.format[3:])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ratios = [1 - i / 20 for i in range(8)] + [1 + i / 20 for i in (1, 2)]
    for group in range(3):
        columns = WEIGHT[:, 32 * group : 32 * group + 32].astype(np.float64)
        weighted = IMPORTANCE[32 * group : 32 * group + 32]
        losses, steps = [], []
        for ratio in ratios:
            step, zero = scales_of(columns * ratio, spec)
            codes = np.clip(np.round(columns / step[:, None]) + zero[:, None], low, high)
            error = np.abs((codes - zero[:, None]) * step[:, None] - columns) ** norm
            losses.append((error * weighted).sum(axis=1))
            steps.append(step)
        best = np.argmin(losses, axis=0)
        expected = np.array(steps)[best, np.arange(24)]
        # Equal up to float32 unless two candidates are as good as each other; none are here.
        np.testing.assert_allclose(found.scale[:, group], expected, rtol=1e-6)


@every_grid
@pytest.mark.parametrize("refit", [False, True])
def test_never_worse_than_plain_scales(spec, refit):
    for importance in (None, jnp.asarray(IMPORTANCE)):
        found = search_scales(jnp.asarray(WEIGHT), spec, ScaleSearch(refit=refit), importance)
        weighted = np.float32(1) if importance is None else IMPORTANCE
        before = loss(spec, find_scales(WEIGHT, spec), weighted)
        after = loss(spec, found, weighted)
        # Both are the same float32 sums: not one block may be worse.
        assert (after <= before).all()


@pytest.mark.parametrize("refit", [False, True])
def test_equal_importance_is_the_mean_square(refit):
    spec, search = SPECS["int4_asymmetric"], ScaleSearch(refit=refit)
    plain = search_scales(jnp.asarray(WEIGHT), spec, search)
    # A power of 2 scales every sum without rounding.
    equal = search_scales(jnp.asarray(WEIGHT), spec, search, jnp.full(96, 4.0))
    np.testing.assert_array_equal(plain.scale, equal.scale)
    np.testing.assert_array_equal(plain.zero_point, equal.zero_point)


@pytest.mark.parametrize("name", ["int4_group_bf16", "int4_asymmetric", "nvfp4"])
def test_refitting_helps(name):
    spec = SPECS[name]
    plain = search_scales(jnp.asarray(WEIGHT), spec, ScaleSearch(), jnp.asarray(IMPORTANCE))
    refit = search_scales(
        jnp.asarray(WEIGHT), spec, ScaleSearch(refit=True), jnp.asarray(IMPORTANCE)
    )
    assert loss(spec, refit, IMPORTANCE).sum() < loss(spec, plain, IMPORTANCE).sum()
    stored = refit.scale.astype(spec.scale_dtype).astype(jnp.float32)
    np.testing.assert_array_equal(stored, refit.scale)


def test_importance_moves_scales_to_what_matters():
    importance = np.full(96, 1e-6, np.float32)
    importance[::32] = 1  # of each group one weight counts
    spec = SPECS["int4_group"]
    found = search_scales(jnp.asarray(WEIGHT), spec, ScaleSearch(grid=100), jnp.asarray(importance))
    after = np.abs(np.asarray(fake_quantize(WEIGHT, spec, found)) - WEIGHT)[:, ::32]
    before = np.abs(np.asarray(fake_quantize(WEIGHT, spec)) - WEIGHT)[:, ::32]
    assert after.mean() < before.mean() / 4


def test_zero_weights_and_zero_importance_are_finite():
    spec = SPECS["int4_group"]
    for weight, importance in ((WEIGHT * 0, IMPORTANCE), (WEIGHT, IMPORTANCE * 0)):
        found = search_scales(
            jnp.asarray(weight), spec, ScaleSearch(refit=True), jnp.asarray(importance)
        )
        np.testing.assert_array_equal(found.scale, find_scales(jnp.asarray(weight), spec).scale)


def test_the_grids_of_the_toolkits():
    ratios = ScaleSearch(grid=100, max_shrink=0.2).ratios
    np.testing.assert_allclose(ratios, 1 - np.arange(20) / 100, rtol=1e-6)
    np.testing.assert_allclose(ScaleSearch().ratios, 1 - np.arange(10) / 20, rtol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"grid": 0}, {"max_shrink": 0.0}, {"max_shrink": 2.0}, {"max_grow": -1.0}]
)
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError, match="ScaleSearch"):
        ScaleSearch(**settings)
