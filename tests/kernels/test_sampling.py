"""The largest logit, and tokens drawn by inverting the distribution, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_oracles
from qjax_kernels.sampling import triton, xla
from qjax_kernels.sampling.api import argmax, sample
from qjax_kernels.sampling.config import ArgmaxConfig, Config, argmax_candidates, candidates

samplers = row_oracles.implementations(xla.sample, triton.sample)
maximizers = row_oracles.implementations(xla.argmax, triton.argmax)

# Sums in float32 have trees or short chains: some dozens of additions, each off by a unit.
SUM = 64 * row_oracles.UNIT


def kept(x, temperature, k, p):
    """Weights of a row in float64, 0 for what top_k and top_p exclude."""
    weight = np.exp((x - x.max()) / temperature)
    if 0 < k < len(x):
        weight = np.where(x >= np.sort(x)[-k], weight, 0)
    if p < 1:
        order = np.argsort(-x, kind="stable")
        larger = np.cumsum(weight[order]) - weight[order]
        # Of equal logits the first has the sum of all larger ones before it.
        _, group = np.unique(-x[order], return_inverse=True)
        starts = np.searchsorted(group, group)
        inside = np.empty(len(x), bool)
        inside[order] = larger[starts] < p * weight.sum()
        weight = np.where(inside, weight, 0)
    return weight


def allowed(token, x, uniform, temperature, k, p):
    """Whether float32 sums may come to this token."""
    for close in (p, p * (1 - SUM), min(p * (1 + SUM), 1.0)):
        weight = kept(x, temperature, k, close if p < 1 else p)
        if weight[token] == 0:
            continue
        above = weight[: token + 1].sum()
        target, off = uniform * weight.sum(), SUM * weight.sum()
        if above - weight[token] - off <= target <= above + off:
            return True
    return False


def check(run, x, uniform, temperature, top_k, top_p, dtype="float32", **extra):
    """x: float64 [rows, vocab]; settings: lists of one for each row."""
    logits = jnp.asarray(x, dtype)
    x = np.asarray(logits, np.float64)
    settings = (uniform, temperature, top_k, top_p)
    types = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    arrays = [jnp.asarray(s, t) for s, t in zip(settings, types, strict=True)]
    tokens = np.asarray(run(logits, *arrays, **extra))
    assert tokens.dtype == np.int32
    assert tokens.shape == (len(x),)
    for row, token in enumerate(tokens):
        u, t, k, p = (float(np.asarray(a)[row]) for a in arrays)
        if t == 0:
            assert token == np.argmax(x[row])
        else:
            assert allowed(token, x[row], u, t, int(k), p), f"row {row}: {token}"
    return tokens


def peaked(rng, rows, vocab):
    """Logits like a model's: a few tokens have most of the weight."""
    return rng.normal(size=(rows, vocab)) * 2 + rng.gumbel(size=(rows, vocab)) * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab", [3000, 4096])
@samplers
def test_rows_with_different_settings(run, vocab, dtype):
    rng = np.random.default_rng(1)
    settings = [
        (temperature, k, p)
        for temperature in (0.0, 0.7, 1.3)
        for k in (0, 1, 50)
        for p in (1.0, 0.9, 0.3)
    ]
    temperature, k, p = zip(*settings, strict=True)
    x = peaked(rng, len(settings), vocab)
    check(run, x, rng.uniform(size=len(settings)), temperature, k, p, dtype)


@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (30, 1.0), (0, 0.8), (100, 0.6)])
@samplers
def test_the_whole_distribution_is_drawn(run, k, p):
    """One row again and again, from the first possible random number to the last."""
    rng = np.random.default_rng(2)
    x = peaked(rng, 1, 700).repeat(20, axis=0)
    uniform = np.linspace(0, 1 - 2.0**-24, 20, dtype=np.float32)
    tokens = check(run, x, uniform, [1.0] * 20, [k] * 20, [p] * 20)
    assert (np.diff(tokens) >= 0).all()
    assert len(set(tokens)) >= 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@samplers
def test_flat_rows_that_no_candidates_cover(run, dtype):
    """More tokens are possible than the first kernel keeps."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 3000)) / 10
    extra = {} if run is xla.sample else {"config": Config(256, 8, 4)}
    settings = ([0.1, 0.5, 0.9, 0.999], [1.0] * 4, [0, 1500, 1000, 2999], [0.9, 1.0, 0.7, 1.0])
    check(run, x, *settings, dtype, **extra)


@samplers
def test_large_logits_that_lie_close_together(run):
    """As those of the most frequent tokens do."""
    x = np.random.default_rng(4).normal(size=(3, 4000))
    x[:, :60] += 12
    check(run, x, [0.2, 0.6, 0.99], [1.0] * 3, [50, 40, 0], [1.0, 0.9, 0.9])


@samplers
def test_equal_logits_at_the_edge_stay(run):
    x = np.zeros((3, 600))
    x[:, ::3] = 1  # 200 equal ones
    uniform = [0, 0.5, 0.999]
    tokens = check(run, x, uniform, [1.0] * 3, [5] * 3, [1.0] * 3)
    assert tokens[0] == 0
    assert tokens[-1] > 590
    tokens = check(run, x, uniform, [1.0] * 3, [0] * 3, [0.01] * 3)
    assert tokens[-1] > 590


@samplers
def test_minus_infinity_is_never_drawn(run):
    x = np.full((6, 1000), -np.inf)
    x[:, [10, 500, 999]] = [0.0, -1.0, 2.0]
    uniform = [0, 0.2, 0.5, 0.9, 0.99, 1 - 2.0**-24]
    for k, p in ((0, 1.0), (2, 1.0), (100, 1.0), (0, 0.95)):
        tokens = check(run, x, uniform, [1.0] * 6, [k] * 6, [p] * 6)
        assert set(tokens) <= {10, 500, 999}
    assert set(check(run, x, uniform, [0.0] * 6, [0] * 6, [1.0] * 6)) == {999}


@samplers
def test_logits_that_differ_in_their_last_bits(run):
    """Far more than are kept of a tile, the largest of them last."""
    x = np.float32(3) + np.arange(2000, dtype=np.float32) * np.float32(2.0**-22)
    x = x[None].repeat(4, axis=0)
    tokens = check(run, x, [0.5, 0.5, 0.0, 0.999], [0.0, 1, 1, 1], [0, 1, 700, 3], [1.0] * 4)
    assert list(tokens) == [1999, 1999, 1300, 1999]


@samplers
def test_zeros_of_both_signs_are_equal(run):
    x = np.full((2, 300), -5.0)
    x[:, 7], x[:, 200] = -0.0, 0.0
    tokens = check(run, x, [0.1, 0.9], [1.0] * 2, [1] * 2, [1.0] * 2)
    assert list(tokens) == [7, 200]
    assert list(check(run, x, [0.1, 0.9], [0.0] * 2, [0] * 2, [1.0] * 2)) == [7, 7]


@pytest.mark.parametrize("vocab", [1, 2, 17, 255, 257])
@samplers
def test_small_vocabularies(run, vocab):
    x = np.random.default_rng(5).normal(size=(4, vocab))
    check(run, x, [0.3] * 4, [1.0, 0.5, 0.0, 2.0], [0, 3, 0, 1], [1.0, 0.9, 1.0, 0.5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab", [1, 100, 5000])
@maximizers
def test_argmax(run, vocab, dtype):
    x = jnp.asarray(np.random.default_rng(6).normal(size=(5, vocab)), dtype)
    x = x.at[1].set(3.0)  # all equal
    x = x.at[2].set(-jnp.inf)
    x = x.at[3, -1].set(100.0)
    tokens = np.asarray(run(x))
    assert tokens.dtype == np.int32
    assert (tokens == np.argmax(np.asarray(x, np.float64), axis=-1)).all()


@pytest.mark.parametrize("config", [ArgmaxConfig(1, 1), ArgmaxConfig(3, 1), ArgmaxConfig(8, 2)])
def test_argmax_in_parts(config):
    pytest.importorskip("triton")
    import triton_interpreter  # noqa: F401

    x = jnp.asarray(np.random.default_rng(7).integers(0, 50, (3, 4000)), jnp.bfloat16)
    tokens = triton.argmax(x, config=config, interpret=True)
    assert (np.asarray(tokens) == np.argmax(np.asarray(x, np.float32), axis=-1)).all()


def test_one_setting_for_all_rows():
    x = jnp.asarray(peaked(np.random.default_rng(8), 3, 500), jnp.float32)
    uniform = jnp.asarray([0.1, 0.5, 0.9])
    one = sample(x, uniform, temperature=0.8, top_k=20, top_p=0.9)
    each = sample(x, uniform, temperature=jnp.full(3, 0.8), top_k=jnp.full(3, 20),
                  top_p=jnp.full(3, 0.9))  # fmt: skip
    assert (one == each).all()
    assert (sample(x, uniform, temperature=0.0) == argmax(x)).all()


def test_candidates_are_few_enough():
    for vocab in (100, 32000, 128256, 262144):
        for config in candidates(1, vocab):
            assert config.tile // config.keep >= 16
        for rows in (1, 64, 1000):
            assert 1 <= len(argmax_candidates(rows, vocab, 132)) <= 6


def test_what_does_not_fit_together_is_refused():
    x, uniform = jnp.ones((2, 10)), jnp.ones(2) / 2
    with pytest.raises(ValueError, match="logits"):
        argmax(x[0])
    with pytest.raises(ValueError, match="logits"):
        sample(x.astype(jnp.int32), uniform)
    with pytest.raises(ValueError, match="uniform"):
        sample(x, uniform[:1])
    with pytest.raises(ValueError, match="uniform"):
        sample(x, uniform.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="top_p"):
        sample(x, uniform, top_p=jnp.ones(3))
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        sample(x, uniform, implementation="triton")
    assert jax.eval_shape(argmax, jnp.ones((0, 5))).shape == (0,)
