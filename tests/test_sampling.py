"""Sampling against float64, enumeration and chi-square; settings that are data."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import DataError
from qjax.sampling import How, Sampling, draw, greedy, logprobs, sample

VOCAB = 12
U = oracles.UNIT["float32"]
FAST = settings(deadline=None, derandomize=True, max_examples=60)
jit_sample = jax.jit(sample, static_argnames="how")
jit_draw = jax.jit(draw, static_argnames="how")
jit_greedy = jax.jit(greedy, static_argnames="how")
# Everything in use: the values decide, and one executable serves all of them.
ALL = How(draws=True, min_p=True, penalty=True)


def random(shape, seed=0):
    return oracles.narrow(np.random.default_rng(seed).normal(size=shape), "float32")


def f32(x):
    return jnp.asarray(np.asarray(x, np.float32))


def tokens_of(logits, how=None, step=0, seen=None, **chosen):
    how_drawn = Sampling(**chosen)
    if how_drawn.how.penalty or (how is not None and how.penalty):
        seen = jnp.zeros(np.shape(logits), bool) if seen is None else jnp.asarray(seen)
    tokens = jit_sample(
        f32(logits),
        jnp.int32(step),
        how_drawn.settings(len(logits), 8),
        how=how or how_drawn.how,
        seen=seen,
    )
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


# The oracle --------------------------------------------------------------------------------------


def probabilities(
    row, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, seen=()
):
    """One row, in float64 and Python loops: penalty, temperature, min_p, top_k, top_p."""
    row = [float(x) for x in row]
    penalty = float(np.float32(repetition_penalty))
    for token in set(seen):
        # Rounded as float32 would, so that the same logits are equal.
        changed = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[token] = float(np.float32(changed))
    weights = [math.exp((x - max(row)) / temperature) for x in row]
    ids = [i for i in range(len(row)) if weights[i] >= (min_p or 0)]
    ids.sort(key=lambda i: -row[i])
    if top_k is not None:
        ids = [i for i in ids if row[i] >= row[ids[min(top_k, len(ids)) - 1]]]
    if top_p is not None and top_p < 1:
        total, reached, count = sum(weights[i] for i in ids), 0.0, 0
        while count < len(ids) and reached < top_p * total:
            reached += weights[ids[count]]
            count += 1
        ids = [i for i in ids if row[i] >= row[ids[count - 1]]]
    result = np.zeros(len(row))
    result[ids] = np.array(weights)[ids]
    return result / result.sum()


def measured(row, seen=None, how=None, **chosen):
    """The distribution by enumeration: which token each of 4096 evenly spaced numbers draws."""
    points = 4096
    uniform = f32((np.arange(points) + 0.5) / points)
    sampling = Sampling(**chosen)
    how = how or ALL
    marks = np.zeros((points, len(row)), bool)
    marks[:, list(seen or ())] = True
    logits = np.tile(np.asarray(row, np.float32), (points, 1))
    tokens = jit_draw(
        f32(logits), uniform, sampling.settings(points, 8), how=how, seen=jnp.asarray(marks)
    )
    tokens = np.asarray(tokens)
    assert (np.diff(tokens) >= 0).all()  # the inverse of a distribution function
    return np.bincount(tokens, minlength=len(row)) / points


def assert_same(actual, expected):
    # Each of the two ends of a token's interval may gain or lose one point, and float32 sums of
    # VOCAB terms move an end by less than VOCAB * 2 u, far less than a point.
    assert np.abs(actual - expected).max() <= 2 / 4096


@FAST
@given(
    row=st.lists(st.floats(-4, 4, width=32), min_size=VOCAB, max_size=VOCAB),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 3, VOCAB, 1000]),
    top_p=st.sampled_from([None, 0.35, 0.8, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.05, 0.4, 1.0]),
    penalty=st.sampled_from([1.0, 0.5, 1.7]),
    seen=st.sets(st.integers(0, VOCAB - 1)),
)
def test_draws_have_the_distribution_of_the_loop(
    row, temperature, top_k, top_p, min_p, penalty, seen
):
    chosen = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
    }
    actual = measured(row, seen=seen, **chosen)
    row = np.asarray(row, np.float32).astype(np.float64)
    # At the edge of a filter, where float32 may round to the other side, both sides are right.
    close = 64 * U
    candidates = [
        probabilities(row, **chosen | {"top_p": p, "min_p": m}, seen=seen)
        for p in {top_p, None if top_p is None else top_p * (1 - close)}
        | ({top_p * (1 + close)} if top_p is not None and top_p < 1 else set())
        for m in {min_p, min_p and min_p * (1 - close), min_p and min(min_p * (1 + close), 1)}
    ]
    assert min(np.abs(actual - expected).max() for expected in candidates) <= 2 / 4096


def test_min_p_by_hand():
    row = np.log([0.5, 0.3, 0.15, 0.05])
    assert_same(measured(row, temperature=1, min_p=0.25), [10 / 19, 6 / 19, 3 / 19, 0])
    assert_same(measured(row, temperature=1, min_p=0.7), [1, 0, 0, 0])
    # It is the temperature's distribution that counts: at 2, 0.05 has 0.32 of the largest.
    assert (measured(row, temperature=2, min_p=0.3) > 0).all()
    # Of what min_p keeps, 10/19 and 6/19 and 3/19, two reach 0.8.
    assert_same(measured(row, temperature=1, min_p=0.25, top_p=0.8), [10 / 16, 6 / 16, 0, 0])


def test_top_p_keeps_the_token_that_crosses_and_counts_within_top_k():
    row = np.log([0.5, 0.3, 0.15, 0.05])
    for top_p, count in [(0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)]:
        assert (measured(row, temperature=1, top_p=top_p) > 0).sum() == count
    # Of the two most likely, 0.5 and 0.3, the first alone has 0.625.
    assert_same(measured(row, temperature=1, top_k=2, top_p=0.6), [1, 0, 0, 0])


def test_the_repetition_penalty_by_hand():
    logits = np.array([[2.0, 1.5, -1.0, -1.2]])
    seen = np.array([[True, False, True, False]])
    settings_ = Sampling(repetition_penalty=2.0).settings(1, 8)
    assert jit_greedy(f32(logits), settings_, how=ALL, seen=jnp.asarray(seen)).tolist() == [1]
    # 2 / 2, 1.5, -1 * 2, -1.2
    expected = np.exp([1.0, 1.5, -2.0, -1.2])
    actual = measured(logits[0], seen={0, 2}, temperature=1, repetition_penalty=2.0)
    assert_same(actual, expected / expected.sum())


# Draws by seed -----------------------------------------------------------------------------------


def chi_square(tokens, expected):
    counts = np.bincount(tokens, minlength=len(expected))
    assert (counts[expected == 0] == 0).all()
    some = expected > 0
    expected = len(tokens) * expected[some]
    return ((counts[some] - expected) ** 2 / expected).sum()


def likely(degrees):
    """Chi-square stays under d + 2 sqrt(d t) + 2 t but for e**-t (Laurent and Massart 2000)."""
    t = math.log(1e6)
    return degrees + 2 * math.sqrt(degrees * t) + 2 * t


@pytest.mark.parametrize("along", ["seeds", "steps"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 0.7, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(chosen, along):
    """Over neighbouring seeds at one step, and over the steps of one seed."""
    row = np.array([1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 0.2, -0.2])
    count = 8192
    if along == "seeds":
        tokens = tokens_of(np.tile(row, (count, 1)), **chosen)
    else:
        sampling = Sampling(**chosen)
        one = partial_draw(f32(row[None]), sampling.settings(1, 8), sampling.how)
        tokens = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(count, dtype=jnp.int32)))[:, 0]
    expected = probabilities(row, **chosen)
    bound = likely((expected > 0).sum() - 1)
    assert chi_square(tokens, expected) <= bound
    # The same draws are not mistaken for another temperature: the test can fail.
    other = probabilities(row, **chosen | {"temperature": 1.4 * chosen["temperature"]})
    if ((other > 0) == (expected > 0)).all():
        assert chi_square(tokens, other) > bound


def partial_draw(logits, settings_, how):
    return lambda step: sample(logits, step, settings_, how)


def test_draws_repeat_by_seed_and_step():
    logits = random((64, 100))
    first = tokens_of(logits, temperature=1.0, seed=1, step=2)
    np.testing.assert_array_equal(tokens_of(logits, temperature=1.0, seed=1, step=2), first)
    assert (tokens_of(logits, temperature=1.0, seed=1000, step=2) != first).any()
    assert (tokens_of(logits, temperature=1.0, seed=1, step=3) != first).any()


def test_one_seed_means_consecutive_ones():
    logits = random((5, 100))
    together = tokens_of(logits, temperature=1.0, seed=2**32 - 2)
    listed = [2**32 - 2, 2**32 - 1, 0, 1, 2]
    np.testing.assert_array_equal(tokens_of(logits, temperature=1.0, seed=listed), together)


@FAST
@given(order=st.permutations(range(6)), keep=st.integers(1, 6), step=st.integers(0, 50))
def test_rows_do_not_depend_on_the_batch(order, keep, step):
    """Any subset in any order, every row with its own settings."""
    logits, seen = random((6, 50)) * 3, random((6, 50), 1) > 1
    own = {
        "temperature": [0, 1, 0.7, 2, 1, 0],
        "top_k": [None, 5, None, 20, 1, 3],
        "top_p": [None, None, 0.8, 0.9, 1, 0.5],
        "min_p": [0.1, 0, 0.02, None, 0.5, None],
        "repetition_penalty": [1, 2, 1.3, 1, 0.7, 1.5],
        "seed": [3, 1, 4, 1, 5, 9],
    }
    everyone = tokens_of(logits, how=ALL, step=step, seen=seen, **own)
    rows = list(order[:keep])
    chosen = {name: [values[i] for i in rows] for name, values in own.items()}
    some = tokens_of(logits[rows], how=ALL, step=step, seen=seen[rows], **chosen)
    np.testing.assert_array_equal(some, everyone[rows])


def test_rows_are_drawn_independently():
    # 1000 equal rows over 50 equal tokens: were they drawn together, one token would fill all.
    tokens = tokens_of(np.zeros((1000, 50)), temperature=1)
    assert len(set(tokens.tolist())) == 50  # each is missing with probability 0.98**1000 = 2e-9
    pairs = tokens[::2] * 50 + tokens[1::2]
    # Two of 500 pairs are equal with probability 1/2500 each: 50 expected, variance under that.
    equal = 500 - len(set(pairs.tolist()))
    assert equal <= 50 + 6 * math.sqrt(50)


# Invariants --------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_and_the_first_of_equals():
    logits = random((50, 37))
    logits[0, 5] = logits[0, 20] = logits.max() + 1
    chosen = tokens_of(logits)
    np.testing.assert_array_equal(chosen, logits.argmax(axis=1))
    assert chosen[0] == 5
    # Also where neighbours draw, whatever the filters.
    mixed = tokens_of(logits, temperature=[0, 1] * 25, top_k=7, top_p=0.5, min_p=0.2)
    np.testing.assert_array_equal(mixed[::2], chosen[::2])
    some_axes = jit_greedy(
        f32(logits).reshape(5, 10, 37), Sampling().settings(5, 8), how=Sampling().how
    )
    np.testing.assert_array_equal(some_axes, chosen.reshape(5, 10))


@FAST
@given(
    seed=st.integers(0, 2**32 - 1), step=st.integers(0, 2**31 - 1), temperature=st.floats(0.001, 99)
)
def test_filters_that_leave_one_token_are_greedy(seed, step, temperature):
    logits = random((8, 50), seed % 1000)
    best = logits.argmax(axis=1)
    common = {"how": ALL, "seed": seed, "step": step, "temperature": temperature}
    for one in ({"top_k": 1}, {"top_p": 1e-30}, {"min_p": 1.0}):
        np.testing.assert_array_equal(tokens_of(logits, **common, **one), best)


@FAST
@given(seed=st.integers(0, 2**32 - 1), temperature=st.floats(0.01, 10))
def test_filters_at_their_limits_are_none(seed, temperature):
    logits = random((8, 50), seed % 1000)
    common = {"seed": seed, "temperature": temperature}
    free = tokens_of(logits, **common)
    seen = random((8, 50), 1) > 0
    limits = ({"top_k": 50}, {"top_k": 2**31 - 1}, {"top_p": 1.0}, {"min_p": 0.0})
    for none in (*limits, {"repetition_penalty": 1.0}):
        np.testing.assert_array_equal(tokens_of(logits, how=ALL, seen=seen, **common, **none), free)


def test_logprobs_against_float64():
    logits = oracles.narrow(random((3, 4, 40)) * 5, "float32")
    tokens = np.random.default_rng(1).integers(0, 40, (3, 4))
    result = jax.jit(logprobs, static_argnums=2)(f32(logits), jnp.asarray(tokens, jnp.int32), 5)
    exact = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ids = np.argsort(-exact, axis=-1)[..., :5]
    np.testing.assert_array_equal(result.top_ids, ids)
    # A difference of two numbers, one of them the logarithm of 40 float32 sums: each rounds by u of
    # its size, and the sum of 40 terms by 40 u at most, which its logarithm takes over as such.
    bound = U * (2 * np.abs(exact).max() + 2 * np.abs(logits).max() + 2 * 40 + 4)
    top = np.take_along_axis(exact, ids, axis=-1)
    assert np.abs(np.asarray(result.top, np.float64) - top).max() <= bound
    chosen = np.take_along_axis(exact, tokens[..., None], axis=-1)[..., 0]
    assert np.abs(np.asarray(result.chosen, np.float64) - chosen).max() <= bound


# Settings ----------------------------------------------------------------------------------------


def test_numbers_are_data_and_features_are_compiled():
    traces = []

    def counted(logits, settings_, how):
        traces.append(how)
        return sample(logits, jnp.int32(0), settings_, how, jnp.zeros(logits.shape, bool))

    jitted = jax.jit(counted, static_argnums=2)

    def run(**chosen):
        sampling = Sampling(**chosen)
        jitted(jnp.zeros((2, 9)), sampling.settings(2, 8), sampling.how)
        return len(traces)

    assert run(temperature=1.0, top_k=3, top_p=0.5, seed=1) == 1
    assert run(temperature=0.5, top_k=None, top_p=[None, 0.1], seed=[5, 5]) == 1
    assert run(temperature=[0, 2.0]) == 1
    assert run(temperature=1.0, min_p=0.1) == 2
    assert run(temperature=2.0, min_p=[0.3, None]) == 2
    assert run(temperature=1.0, repetition_penalty=1.2) == 3
    assert run() == 4
    assert run(top_k=2, seed=7) == 4


def test_how_is_what_is_in_use():
    assert Sampling().how == Sampling(min_p=0, temperature=0, repetition_penalty=[1, 1.0]).how
    assert Sampling(temperature=[0, 1]).how == dataclasses.replace(Sampling().how, draws=True)
    assert Sampling(repetition_penalty=[1, 1.1]).how.penalty
    assert Sampling(logprobs=0).how.logprobs == 0
    assert Sampling(temperature=np.float32(0.5), seed=np.arange(3), top_k=jnp.array([1, 2, 3])).how


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; it must be 0 \(greedy\), or from 0.001"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": [0.5, 1e-5]}, r"temperature\[1\] is 1e-05"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": [4, -1]}, r"top_k\[1\] is -1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\], or None"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, r"min_p is -0.1; it must be in \[0, 1\], or None"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": "0.1"}, "min_p is '0.1'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be from 0.01 to 100"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"repetition_penalty": None}, "repetition_penalty is None"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0"),
        ({"seed": [1, 2**32]}, r"seed\[1\] is 4294967296"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"logprobs": -1}, "logprobs is -1; it must be how many"),
        ({"logprobs": True}, "logprobs is True"),
    ],
)
def test_settings_out_of_range(chosen, message):
    with pytest.raises(DataError, match=message):
        Sampling(**chosen)


@pytest.mark.parametrize("name", ["temperature", "top_k", "min_p", "seed"])
def test_lists_have_an_entry_for_each_prompt(name):
    for entries in ([1], [1, 1], []):
        with pytest.raises(DataError, match=f"{name} has {len(entries)} entries for 3 prompts"):
            Sampling(**{name: entries}).settings(3, 8)
