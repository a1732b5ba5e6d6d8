"""Hadamard matrices, and rotations that leave a function as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.algorithms.hadamard import (
    hadamard,
    has_hadamard,
    random_rotation,
    rotate_input_heads,
    rotate_inputs,
    rotate_output_heads,
    rotate_outputs,
)
from qjax.errors import ConfigError

# Hidden sizes and head sizes of models in use.
SIZES = (64, 80, 96, 112, 128, 256, 576, 768, 896, 1152, 1536, 2048, 2304, 2560, 2880, 3072, 3584)
LARGE = (4096, 4544, 4608, 5120, 5376, 6144, 7168, 8192, 11008, 14336)


@pytest.mark.parametrize("n", [*(n for n in range(1, 130) if has_hadamard(n)), *SIZES])
def test_columns_are_orthogonal(n):
    h = hadamard(n)
    assert h.dtype == np.int8
    assert set(np.unique(h)) <= {-1, 1}
    h = h.astype(np.float64)  # sums of at most 3584 ones: exact
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


def test_orders_that_are_known():
    found = {n for n in range(1, 129) if has_hadamard(n)}
    # Of the multiples of 4 all but these, which need prime powers or other constructions.
    assert found == {1, 2, *range(4, 129, 4)} - {52, 92, 100, 116}
    assert all(has_hadamard(n) for n in LARGE)
    assert not has_hadamard(0)
    assert not has_hadamard(-4)


@pytest.mark.parametrize("n", [0, 3, 6, 52, 172])
def test_orders_that_are_not_say_so(n):
    with pytest.raises(ConfigError, match=f"order {n} "):
        hadamard(n)


@pytest.mark.parametrize("n", [64, 96, 896])
def test_rotations_are_orthogonal_and_follow_their_seed(n):
    q = np.asarray(random_rotation(n, 0), np.float64)
    # n products of numbers rounded once, 1/sqrt(n) each.
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=4 * 2.0**-24)
    np.testing.assert_array_equal(random_rotation(n, 0), random_rotation(n, 0))
    assert (random_rotation(n, 0) != random_rotation(n, 1)).any()


def test_a_rotation_spreads_an_outlier():
    x = np.zeros(96, np.float32)
    x[17] = 60
    np.testing.assert_allclose(np.abs(x @ random_rotation(96, 3)), 60 / np.sqrt(96), rtol=1e-5)


def test_rotated_weights_are_the_same_function():
    """x -> A -> (per head) -> B, in rotated bases of input, hidden features and output."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (50, 96))
    first = jax.random.normal(keys[1], (4 * 16, 96)) / 10
    second = jax.random.normal(keys[2], (96, 4 * 16)) / 8
    stream, head = random_rotation(96, 1), random_rotation(16, 2)
    turned_first = rotate_output_heads(rotate_inputs(first, stream), head)
    turned_second = rotate_outputs(rotate_input_heads(second, head), stream)
    plain = (
        np.asarray(x, np.float64)
        @ np.asarray(first.T, np.float64)
        @ np.asarray(second.T, np.float64)
    )
    hidden = np.asarray(x @ stream, np.float64) @ np.asarray(turned_first.T, np.float64)
    rotated = hidden @ np.asarray(turned_second.T, np.float64) @ np.asarray(stream.T, np.float64)
    size = np.linalg.norm(plain, axis=1)
    # Six float32 products of length 96, each off by about sqrt(96) * 2^-24 of its row's norm.
    worst = np.max(np.linalg.norm(rotated - plain, axis=1) / size)
    assert worst < 1e-5
    # And each head's features did turn.
    assert np.abs(np.asarray(turned_first) - np.asarray(first)).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacks_and_types_stay(dtype):
    weight = jnp.ones((3, 32, 64), dtype)
    stream, head = random_rotation(64, 0), random_rotation(16, 0)
    for turned in (rotate_inputs(weight, stream), rotate_input_heads(weight, head)):
        assert (turned.shape, turned.dtype) == (weight.shape, weight.dtype)
    one = rotate_output_heads(weight, head)[1]
    np.testing.assert_array_equal(one, rotate_output_heads(weight[1], head))
