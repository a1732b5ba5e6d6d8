"""GPTQ against the paper's column loop in float64, and what must hold for every grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.cases import SPECS, gptq_by_the_paper, gram_of, inputs, output_error, weights

from qjax.algorithms.descent import descend
from qjax.algorithms.gptq import gptq
from qjax.algorithms.scale_search import ScaleSearch, search_scales
from qjax.algorithms.scales import find_scales, round_to_scales, split_rows
from qjax.errors import ConfigError
from qjax.qarray import dequantize, validate

X = inputs(300, 128)
GRAM = gram_of(X)
WEIGHT = weights(48, 128)
KINDS = ("int4_asymmetric", "fp8_block", "nvfp4")
every_grid = pytest.mark.parametrize("spec", [SPECS[name] for name in KINDS], ids=KINDS)


def same(a, b):
    """Two QArrays, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def change_of(q):
    return np.asarray(dequantize(q, "float32")) - WEIGHT


@pytest.mark.parametrize(
    ("name", "act_order"),
    [
        ("int4_group", False),
        ("int4_asymmetric", False),
        ("int4_asymmetric", True),
        pytest.param("int4_group", True, marks=pytest.mark.heavy),
        pytest.param("int8_channel", False, marks=pytest.mark.heavy),
    ],
)
def test_codes_are_the_papers(name, act_order):
    # Sums of 128 float32 terms put a column off by about 1e-5 of a step, so one number in 5e4 is
    # that near to a tie: less than one here is expected to fall to the other side. It then moves
    # some of what follows in its row, of 48 rows of 128 numbers: 0.1 % is six of them.
    # ('absmax_half' is not among these: the largest number of each group is a tie, -7.5.)
    spec = SPECS[name]
    q, info = gptq(jnp.asarray(WEIGHT), GRAM, spec, act_order=act_order)
    expected = gptq_by_the_paper(WEIGHT, np.asarray(GRAM), spec, damping=0.01, act_order=act_order)
    assert np.mean(np.asarray(q.values, np.float64) == expected) >= 0.999
    assert not info.fell_back
    assert info.damping == jnp.float32(0.01)


def test_dead_inputs_get_weight_zero():
    x = X.copy()
    x[:, [0, 5, 77]] = 0
    spec = SPECS["int4_group"]
    q, info = gptq(jnp.asarray(WEIGHT), gram_of(x), spec)
    expected = gptq_by_the_paper(WEIGHT, x.T @ x, spec, damping=0.01, act_order=False)
    assert np.mean(np.asarray(q.values, np.float64) == expected) >= 0.999  # as above
    assert not np.asarray(q.values)[:, [0, 5, 77]].any()
    assert not info.fell_back


@every_grid
@pytest.mark.parametrize("act_order", [False, True])
def test_weight_error_grows_and_output_error_shrinks(spec, act_order):
    q, info = gptq(jnp.asarray(WEIGHT), GRAM, spec, act_order=act_order)
    validate(q)
    plain = change_of(round_to_scales(jnp.asarray(WEIGHT), spec, find_scales(WEIGHT, spec)))
    solved = change_of(q)
    assert np.sum(solved**2) > np.sum(plain**2)
    assert output_error(solved, X) < output_error(plain, X)
    # float32 sums of 128 * 128 terms, some negative: 1e-3 is far above what they can be off by.
    np.testing.assert_allclose(info.error, output_error(solved, X), rtol=1e-3)


@every_grid
@pytest.mark.parametrize("act_order", [False, True])
def test_a_diagonal_gram_is_round_to_nearest(spec, act_order):
    gram = jnp.diag(jnp.asarray(np.random.default_rng(0).uniform(1, 9, 128), jnp.float32))
    q, _ = gptq(jnp.asarray(WEIGHT), gram, spec, act_order=act_order)
    same(q, round_to_scales(jnp.asarray(WEIGHT), spec, find_scales(WEIGHT, spec)))


def test_block_length_is_a_matter_of_speed():
    # With static groups nothing but the order of float32 sums changes.
    spec = SPECS["int4_asymmetric"]
    scales = find_scales(WEIGHT, spec)
    one, _ = gptq(jnp.asarray(WEIGHT), GRAM, spec, scales=scales, block=128)
    other, _ = gptq(jnp.asarray(WEIGHT), GRAM, spec, scales=scales, block=16)
    equal = np.asarray(one.values, np.float32) == np.asarray(other.values, np.float32)
    assert equal.mean() >= 0.999  # as against the paper


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["nvfp4", "fp8_block"])
def test_a_stack_is_its_matrices(name):
    spec = SPECS[name]
    stack = np.stack([WEIGHT, weights(48, 128, seed=2), weights(48, 128, seed=3)])
    grams = jnp.stack([GRAM, gram_of(inputs(300, 128, seed=4)), jnp.full((128, 128), jnp.nan)])
    q, info = gptq(jnp.asarray(stack[:, None]), grams[:, None], spec)
    assert q.shape == (3, 1, 48, 128)
    assert info.fell_back.shape == (3, 1)
    assert info.fell_back.tolist() == [[False], [False], [True]]
    for i, weight in enumerate(stack):
        alone, _ = gptq(jnp.asarray(weight), grams[i], spec)
        same(jax.tree.map(lambda x, i=i: x[i, 0], q), alone)


def test_rows_do_not_see_each_other():
    spec = SPECS["int4_asymmetric"]
    parts = split_rows(gptq(jnp.asarray(WEIGHT), GRAM, spec)[0], (8, 40))
    alone, _ = gptq(jnp.asarray(WEIGHT[:8]), GRAM, spec)
    # Products of other shapes sum in another order: float32 scales move, and ties with them.
    np.testing.assert_allclose(parts[0].scale, alone.scale, rtol=1e-5)
    equal = np.asarray(parts[0].values, np.float32) == np.asarray(alone.values, np.float32)
    assert equal.mean() >= 0.999
    assert parts[1].shape == (40, 128)


@pytest.mark.parametrize(("name", "refit"), [("int4_asymmetric", False), ("nvfp4", True)])
def test_searched_scales_help(name, refit):
    spec, search = SPECS[name], ScaleSearch(grid=10, refit=refit)
    plain = gptq(jnp.asarray(WEIGHT), GRAM, spec)[1].error
    assert gptq(jnp.asarray(WEIGHT), GRAM, spec, search=search)[1].error < plain


def test_given_scales_are_used():
    spec = SPECS["int4_group_bf16"]
    scales = search_scales(WEIGHT, spec, ScaleSearch())
    q, _ = gptq(jnp.asarray(WEIGHT), GRAM, spec, scales=scales)
    np.testing.assert_array_equal(np.asarray(q.scale, np.float32), scales.scale)


# ---------------------------------------------------------------- coordinate descent after it


def damped_error(change):
    gram = np.asarray(GRAM, np.float64)
    gram = gram + 0.01 * np.diag(gram).mean() * np.eye(128)
    return np.sum(change.astype(np.float64) @ gram * change, axis=1)


@pytest.mark.parametrize("name", ["int4_asymmetric", "nvfp4"])
def test_descent_makes_no_row_worse_and_the_whole_better(name):
    spec = SPECS[name]
    before, _ = gptq(jnp.asarray(WEIGHT), GRAM, spec)
    after = descend(jnp.asarray(WEIGHT), before, GRAM, spec)
    validate(after)
    was, now = damped_error(change_of(before)), damped_error(change_of(after))
    # A step that is a tie in float32 may lose as much as float32 cannot see.
    assert (now <= was * (1 + 1e-5)).all()
    assert now.sum() < 0.98 * was.sum()
    same((before.scale, before.zero_point), (after.scale, after.zero_point))


def test_descent_ends_where_no_number_can_be_bettered():
    spec = SPECS["int4_group"]
    start = round_to_scales(jnp.asarray(WEIGHT[:4]), spec, find_scales(WEIGHT[:4], spec))
    q = descend(jnp.asarray(WEIGHT[:4]), start, GRAM, spec, sweeps=60, block=32)
    same(q, descend(jnp.asarray(WEIGHT[:4]), q, GRAM, spec, sweeps=1, block=128))
    gram = np.asarray(GRAM, np.float64)
    gram = gram + 0.01 * np.diag(gram).mean() * np.eye(128)
    step = np.repeat(np.asarray(q.scale, np.float64), 32, axis=1)
    codes = np.asarray(q.values, np.float64)
    change = codes * step - WEIGHT[:4]
    moved = change @ gram
    for direction in (-1, 1):
        d = direction * step
        gain = 2 * d * moved + d * d * np.diag(gram)
        allowed = (codes + direction >= -8) & (codes + direction <= 7)
        assert gain[allowed].min() > -1e-4 * np.abs(2 * d * moved).max()


def test_descent_on_a_diagonal_gram_is_round_to_nearest():
    spec = SPECS["int4_asymmetric"]
    gram = jnp.diag(jnp.asarray(np.random.default_rng(0).uniform(1, 9, 128), jnp.float32))
    gram = gram.at[5, 5].set(0)
    nearest = round_to_scales(jnp.asarray(WEIGHT), spec, find_scales(WEIGHT, spec))
    start = dataclasses.replace(nearest, values=jnp.zeros_like(nearest.values))
    same(descend(jnp.asarray(WEIGHT), start, gram, spec, sweeps=1), nearest)


@pytest.mark.heavy
def test_descent_of_a_stack_is_that_of_its_matrices():
    spec = SPECS["nvfp4"]
    stack = jnp.stack([jnp.asarray(WEIGHT), jnp.asarray(weights(48, 128, seed=2))])
    grams = jnp.stack([GRAM, gram_of(inputs(300, 128, seed=4))])
    start = round_to_scales(stack, spec, find_scales(stack, spec))
    together = descend(stack, start, grams, spec)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], start)
        same(jax.tree.map(lambda x, i=i: x[i], together), descend(stack[i], one, grams[i], spec))


# ---------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize("tokens", [1, 20])
def test_few_tokens_still_factorize(tokens):
    # The Gram matrix is singular; damping makes it positive definite.
    _, info = gptq(jnp.asarray(WEIGHT), gram_of(X[:tokens]), SPECS["int4_group"])
    assert not info.fell_back


def test_damping_grows_until_there_is_a_factor():
    # One negative eigenvalue, -0.05 of the mean of the diagonal: 0.01 is too little, 0.1 is enough.
    vectors, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((128, 128)))
    values = np.ones(128)
    values[0] = -0.05
    gram = jnp.asarray(vectors * values @ vectors.T, jnp.float32)
    _, info = gptq(jnp.asarray(WEIGHT), gram, SPECS["int4_group"], damping=0.01)
    np.testing.assert_allclose(info.damping, 0.1, rtol=1e-6)
    assert not info.fell_back


@every_grid
@pytest.mark.parametrize("bad", ["negative", "nan", "infinite"])
def test_no_factor_is_round_to_nearest_and_said_so(spec, bad):
    gram = {
        "negative": jnp.where(jnp.eye(128, dtype=bool), 1.0, 5.0) * jnp.float32(1),
        "nan": GRAM.at[3, 4].set(jnp.nan).at[4, 3].set(jnp.nan),
        "infinite": GRAM.at[3, 3].set(jnp.inf),
    }[bad]
    q, info = gptq(jnp.asarray(WEIGHT), gram, spec)
    assert info.fell_back
    same(q, round_to_scales(jnp.asarray(WEIGHT), spec, find_scales(WEIGHT, spec)))


def test_inputs_that_are_all_zero_lose_their_weights_only():
    q, info = gptq(jnp.asarray(WEIGHT), jnp.zeros((128, 128)), SPECS["int4_group"])
    assert not np.asarray(q.values).any()
    assert not info.fell_back


def test_settings_are_checked():
    spec = SPECS["int4_group"]
    for damping in (0.0, -1.0, 1.5):
        with pytest.raises(ConfigError, match="damping"):
            gptq(jnp.asarray(WEIGHT), GRAM, spec, damping=damping)
    scales = find_scales(WEIGHT, spec)
    with pytest.raises(ConfigError, match="search"):
        gptq(jnp.asarray(WEIGHT), GRAM, spec, scales=scales, search=ScaleSearch())


def test_in_units_of_the_gram_nothing_changes():
    spec = SPECS["int4_group"]
    small = gptq(jnp.asarray(WEIGHT), GRAM * 2.0**-20, spec)[0]
    same(small, gptq(jnp.asarray(WEIGHT), GRAM, spec)[0])


@pytest.mark.heavy
def test_a_block_of_columns_that_is_cut_is_solved():
    spec = dataclasses.replace(SPECS["fp8_block"], block=(48, 48))
    q, info = gptq(jnp.asarray(WEIGHT), GRAM, spec)
    validate(q)
    plain = change_of(round_to_scales(jnp.asarray(WEIGHT), spec, find_scales(WEIGHT, spec)))
    assert info.error < output_error(plain, X)
