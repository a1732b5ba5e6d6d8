"""Statistics of inputs, against NumPy over all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.cases import inputs

from qjax.algorithms.statistics import (
    gram_loss,
    init_stats,
    merge_stats,
    scale_stats,
    update_stats,
)

# What the layer sees is bfloat16, and that is what the oracle is given too.
X = np.asarray(jnp.asarray(inputs(240, 24), jnp.bfloat16), np.float64).reshape(4, 60, 24)
# Products of two bfloat16 numbers are exact in float32; 240 of them are summed.
SUM = 240 * 2.0**-24


def collected(parts, masks=None):
    stats = init_stats(24)
    for i, part in enumerate(parts):
        mask = None if masks is None else jnp.asarray(masks[i])
        stats = update_stats(stats, jnp.asarray(part, jnp.bfloat16), mask)
    return stats


def check(stats, x):
    size = np.abs(x)
    np.testing.assert_allclose(stats.gram, x.T @ x, atol=SUM * np.max(size.T @ size))
    np.testing.assert_allclose(stats.total, x.sum(axis=0), atol=SUM * size.sum(axis=0).max())
    np.testing.assert_allclose(stats.total_abs, size.sum(axis=0), rtol=SUM)
    np.testing.assert_array_equal(stats.amax, size.max(axis=0))
    np.testing.assert_array_equal(stats.tokens, len(x))
    np.testing.assert_allclose(stats.mean, stats.total / len(x), rtol=1e-6)
    np.testing.assert_allclose(stats.mean_abs, stats.total_abs / len(x), rtol=1e-6)


def test_batches_add_up():
    check(collected(X), X.reshape(-1, 24))


def test_a_batch_may_have_any_leading_axes():
    check(collected([X]), X.reshape(-1, 24))


def test_devices_merge():
    check(merge_stats(collected(X[:1]), collected(X[1:])), X.reshape(-1, 24))


def test_masked_rows_are_left_out_whatever_they_hold():
    mask = np.random.default_rng(0).random((4, 60)) < 0.5
    x = np.where(mask[..., None], X, np.nan)
    check(collected(x, mask), X[mask])


def test_no_token_is_zeros():
    stats = collected([X[0]], [np.zeros(60, bool)])
    assert all(not leaf.any() for leaf in jax.tree.leaves(stats))
    assert not stats.mean.any()
    assert not stats.mean_abs.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(bad):
    x = X.copy()
    x[1, 2, 3] = bad
    amax = np.asarray(collected(x).amax)
    assert np.isnan(amax[3])
    assert np.isfinite(np.delete(amax, 3)).all()


def test_scaling_is_that_of_the_inputs():
    # By powers of 2, so that rescaled inputs are bfloat16 too.
    factor = 2.0 ** np.random.default_rng(1).integers(-3, 4, 24)
    stats = scale_stats(collected(X), jnp.asarray(factor, jnp.float32))
    other = collected(X * factor)
    for got, expected in zip(jax.tree.leaves(stats), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_experts_are_a_leading_axis():
    masks = np.arange(60) % 3 == np.arange(3)[:, None]
    stats = jax.vmap(lambda _: init_stats(24))(jnp.arange(3))
    stats = jax.vmap(update_stats, in_axes=(0, None, 0))(
        stats, jnp.asarray(X[0], jnp.bfloat16), jnp.asarray(masks)
    )
    for i in range(3):
        check(jax.tree.map(lambda leaf, i=i: leaf[i], stats), X[0][masks[i]])


def test_the_loss_is_that_of_the_outputs():
    change = np.random.default_rng(2).standard_normal((3, 5, 24))
    x = X.reshape(-1, 24)
    losses = gram_loss(jnp.asarray(change, jnp.float32), jnp.asarray(x.T @ x, jnp.float32))
    outputs = np.einsum("bok,tk->bto", change, x)
    # 24 * 24 terms, larger than what is left of them by less than the condition of X: 1e3.
    np.testing.assert_allclose(losses, (outputs**2).sum(axis=1), rtol=576 * 2.0**-24 * 1e3)
