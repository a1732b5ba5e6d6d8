"""AWQ's scale and clip searches against loops over real activations in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.cases import SPECS, gram_of, inputs, output_error, scales_of, weights

from qjax.algorithms.awq import awq_clip, awq_scale, clip_scales
from qjax.algorithms.scales import block_amax, fake_quantize, find_scales
from qjax.errors import ConfigError

X = inputs(400, 96)
X[:, 7] *= 60  # a salient channel
GRAM, MEAN_ABS = gram_of(X), jnp.asarray(np.abs(X).mean(axis=0), jnp.float32)
WEIGHTS = (weights(32, 96), weights(48, 96, seed=2))
KINDS = ("int4_group", "int4_asymmetric", "fp8_block", "nvfp4", "mxfp4")
every_grid = pytest.mark.parametrize("spec", [SPECS[name] for name in KINDS], ids=KINDS)


def search(spec, **settings):
    return awq_scale(tuple(map(jnp.asarray, WEIGHTS)), GRAM, MEAN_ABS, spec, **settings)


def loss_of(scale, spec):
    total = 0.0
    for weight in WEIGHTS:
        rounded = np.asarray(fake_quantize(jnp.asarray(weight) * scale, spec), np.float64)
        total += output_error(rounded / np.asarray(scale, np.float64) - weight, X)
    return total


@every_grid
@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_losses_are_those_of_the_outputs(spec, duo_scaling):
    found = search(spec, grid=4, duo_scaling=duo_scaling)
    points = 9 if duo_scaling == "both" else 5
    assert found.losses.shape == found.alphas.shape == (points,)
    # float32 sums with cancellation; the Gram matrix itself is rounded to 2^-24.
    np.testing.assert_allclose(found.losses.min(), loss_of(found.scale, spec), rtol=1e-3)
    ones = jnp.ones(96)
    np.testing.assert_allclose(found.losses[0], loss_of(ones, spec), rtol=1e-3)
    assert found.losses[found.best] == found.losses.min() < found.losses[0]


@pytest.mark.parametrize("duo_scaling", [True, False])
def test_scales_are_the_formula(duo_scaling):
    found = search(SPECS["int4_group"], grid=10, duo_scaling=duo_scaling)
    alpha = float(found.alphas[found.best])
    joined = np.concatenate(WEIGHTS).astype(np.float64)
    size = np.abs(joined).reshape(80, 3, 32)
    relative = (size / (size.max(axis=-1, keepdims=True) + 1e-6)).reshape(80, 96).mean(axis=0)
    x = np.abs(X).mean(axis=0)
    scale = x**alpha
    if duo_scaling:
        scale = scale / (relative ** (1 - alpha) + 1e-4)
    scale = np.clip(scale, 1e-4, 1e4)
    scale /= np.sqrt(scale.max() * scale.min())
    # A dozen float32 operations, two of them powers.
    np.testing.assert_allclose(found.scale, scale, rtol=1e-4)
    assert found.alphas[0] == 0
    assert found.alphas[-1] == 1


def test_alpha_zero_is_round_to_nearest():
    # Weights without error and inputs without difference: nothing beats s = 1, exactly.
    exact = jnp.asarray(np.random.default_rng(0).integers(-7, 8, (16, 96)), jnp.float32)
    exact = exact.at[:, ::32].set(7)
    found = awq_scale((exact,), GRAM, MEAN_ABS, SPECS["int4_group"])
    assert found.best == 0
    assert found.losses[0] == 0
    assert (found.scale == 1).all()


def test_channels_without_input_are_harmless():
    x = X.copy()
    x[:, :40] = 0
    mean_abs = jnp.asarray(np.abs(x).mean(axis=0), jnp.float32)
    found = awq_scale((jnp.asarray(WEIGHTS[0]),), gram_of(x), mean_abs, SPECS["int4_group"])
    assert np.isfinite(found.scale).all()
    assert (np.asarray(found.scale) > 0).all()
    assert found.losses.min() <= found.losses[0]


def test_no_point_that_is_nan_is_chosen():
    found = awq_scale(
        (jnp.asarray(WEIGHTS[0]),), GRAM, MEAN_ABS.at[0].set(jnp.nan), SPECS["int4_group"]
    )
    assert found.best == 0
    assert (found.scale == 1).all()


def clip_by_outputs(weight, spec, group, ratio):
    """Squared error of each row's part of the outputs, from the activations."""
    columns = slice(group * 32, group * 32 + 32)
    part = weight[:, columns].astype(np.float64)
    limit = np.abs(part).max(axis=1, keepdims=True) * ratio
    step, zero = (x[:, None] for x in scales_of(np.clip(part, -limit, limit), spec))
    # What was clipped saturates: in a symmetric grid at -8, one step beyond the limit.
    rounded = (np.clip(np.round(part / step) + zero, -8, 7) - zero) * step
    return ((X[:, columns] @ (rounded - part).T) ** 2).sum(axis=0)


def test_limits_are_the_best_of_the_grid():
    # Of a symmetric grid: clipped at both ends, an asymmetric one has its zero point on a tie.
    spec, weight = SPECS["int4_group"], WEIGHTS[0]
    limits = awq_clip(jnp.asarray(weight), GRAM, spec)
    amax = np.asarray(block_amax(jnp.asarray(weight), spec.block))
    for group in range(3):
        ratios = 1 - np.arange(10) / 20
        losses = np.stack([clip_by_outputs(weight, spec, group, ratio) for ratio in ratios])
        chosen = np.round((1 - limits[:, group] / amax[:, group]) * 20).astype(int)
        got = losses[chosen, np.arange(len(weight))]
        # The best, or one that float32 cannot tell from it.
        np.testing.assert_allclose(got, losses.min(axis=0), rtol=1e-3)


@every_grid
def test_clipping_is_never_worse(spec):
    weight = jnp.asarray(WEIGHTS[1])
    limits = awq_clip(weight, GRAM, spec)
    assert limits.shape == find_scales(weight, spec).scale.shape
    width = spec.block[1]
    before = np.asarray(fake_quantize(weight, spec)) - WEIGHTS[1]
    scales = clip_scales(weight, spec, limits)
    after = np.asarray(fake_quantize(weight, spec, scales)) - WEIGHTS[1]
    was = now = 0.0
    for at in range(0, 96, width):
        part = slice(at, at + width)
        was += output_error(before[:, part], X[:, part])
        now += output_error(after[:, part], X[:, part])
    # Never worse in any block's own loss; float32 sums of it.
    assert now <= was * (1 + 1e-5)


def test_a_limit_of_the_largest_weight_clips_nothing():
    spec, weight = SPECS["nvfp4"], jnp.asarray(WEIGHTS[0])
    scales = clip_scales(weight, spec, block_amax(weight, spec.block))
    np.testing.assert_array_equal(scales.scale, find_scales(weight, spec).scale)


def test_a_stack_is_its_matrices():
    spec = SPECS["int4_group"]
    stack = jnp.stack([jnp.asarray(weights(16, 96, seed=i)) for i in range(2)])
    grams = jnp.stack([GRAM, gram_of(inputs(100, 96, seed=9))])
    limits = awq_clip(stack, grams, spec)
    for i in range(2):
        np.testing.assert_array_equal(limits[i], awq_clip(stack[i], grams[i], spec))


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="grid"):
        search(SPECS["int4_group"], grid=0)
    with pytest.raises(ConfigError, match="duo_scaling"):
        search(SPECS["int4_group"], duo_scaling="maybe")
    with pytest.raises(ConfigError, match="max_shrink"):
        awq_clip(jnp.asarray(WEIGHTS[0]), GRAM, SPECS["int4_group"], max_shrink=0.0)
