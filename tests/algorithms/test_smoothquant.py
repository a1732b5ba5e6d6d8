"""SmoothQuant's scales from the formula, and its loss against rounding of both operands."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from algorithms.cases import gram_of, inputs, weights

from qjax.algorithms.scales import WeightSpec, fake_quantize
from qjax.algorithms.smoothquant import column_amax, smooth_scale, smooth_search
from qjax.errors import ConfigError

SPEC = WeightSpec(format="int8")
WEIGHTS = (weights(40, 64), weights(24, 64, seed=2))


def outliers(times):
    x = np.random.default_rng(0).standard_normal((500, 64))
    x[:, [3, 40]] *= times
    return x


def search(x, **settings):
    settings = {"act_format": "int8", "act_granularity": "per_tensor", **settings}
    return smooth_search(
        tuple(map(jnp.asarray, WEIGHTS)),
        gram_of(x),
        jnp.float32(len(x)),
        jnp.asarray(np.abs(x).max(axis=0), jnp.float32),
        SPEC,
        **settings,
    )


def scale_for(x, alpha):
    """s of an alpha, -1 standing for s = 1."""
    if alpha < 0:
        return jnp.ones(64)
    act = jnp.asarray(np.abs(x).max(axis=0), jnp.float32)
    return smooth_scale(act, column_amax(tuple(map(jnp.asarray, WEIGHTS))), float(alpha))


def measured(x, scale, act_format, granularity):
    """Squared error of the outputs with both operands rounded, activations with NumPy."""
    scaled = x / np.asarray(scale, np.float64)
    axis = 1 if granularity == "per_token" else None
    top = oracles.grid(act_format)[0][-1]
    step = np.abs(scaled).max(axis=axis, keepdims=True) / top
    rounded = oracles.round_to(scaled / step, act_format) * step
    total = 0.0
    for weight in WEIGHTS:
        quantized = np.asarray(fake_quantize(jnp.asarray(weight) * scale, SPEC), np.float64)
        total += np.sum((rounded @ quantized.T - x @ weight.astype(np.float64).T) ** 2)
    return total


@pytest.mark.parametrize("alpha", [0, 0.5, 0.85, 1])
def test_scale_is_the_formula(alpha):
    act = np.array([0.1, 3.0, 70.0, 0.0], np.float32)
    weight = np.array([0.2, 0.0, 1.5, 0.4], np.float32)
    expected = np.maximum(
        np.maximum(act, 1e-5) ** alpha / np.maximum(weight, 1e-5) ** (1 - alpha), 1e-5
    )
    got = smooth_scale(jnp.asarray(act), jnp.asarray(weight), alpha)
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # two float32 powers


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        smooth_scale(jnp.ones(3), jnp.ones(3), alpha)


def test_weights_that_share_an_input_share_their_columns_largest():
    expected = np.abs(np.concatenate(WEIGHTS)).max(axis=0)
    np.testing.assert_array_equal(column_amax(tuple(map(jnp.asarray, WEIGHTS))), expected)


@pytest.mark.parametrize(
    ("act_format", "granularity", "times"),
    [
        ("int8", "per_tensor", 1),
        ("int8", "per_tensor", 100),
        ("int8", "per_token", 100),
        ("fp8_e4m3", "per_token", 1),
        ("fp8_e4m3", "per_tensor", 100),
    ],
)
def test_the_loss_predicts_what_rounding_does(act_format, granularity, times):
    x = outliers(times)
    found = search(x, act_format=act_format, act_granularity=granularity, grid=4)
    for alpha, loss in zip(found.alphas, found.losses, strict=True):
        # Expected, not measured: errors are taken to be uniform and independent, and the step of
        # a token to follow from second moments. Within a factor of 2, where losses of different
        # alphas are apart by 100.
        assert 0.5 < loss / measured(x, scale_for(x, alpha), act_format, granularity) < 2


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_outliers_ask_for_smoothing(granularity):
    x = outliers(100)
    found = search(x, act_granularity=granularity)
    assert 0.2 < found.alpha <= 1
    before = measured(x, jnp.ones(64), "int8", granularity)
    assert measured(x, found.scale, "int8", granularity) < before / 20
    assert found.losses.shape == found.alphas.shape == (22,)


@pytest.mark.heavy
def test_the_searched_alpha_is_near_the_best_of_all():
    x = inputs(500, 64)
    found = search(x)
    errors = [measured(x, scale_for(x, alpha), "int8", "per_tensor") for alpha in found.alphas]
    # A loss that is right to a few percent finds a point that is as good to a few percent.
    assert measured(x, found.scale, "int8", "per_tensor") < 1.1 * min(errors)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="grid"):
        search(outliers(1), grid=0)
    with pytest.raises(ConfigError, match="act_granularity"):
        search(outliers(1), act_granularity="per_row")
    with pytest.raises(ConfigError, match="format"):
        search(outliers(1), act_format="int1")
