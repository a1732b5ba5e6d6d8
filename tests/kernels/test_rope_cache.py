"""Rotary embedding and the write into cache pages against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_oracles
from qjax_kernels.rope_cache import triton, xla
from qjax_kernels.rope_cache.api import rope_cache
from qjax_kernels.rope_cache.config import Config, candidates

implementations = row_oracles.implementations(xla.rope_cache, triton.rope_cache)
UNIT = row_oracles.UNIT


class Case:
    """Random operands; pages are full of a number that no write leaves behind unnoticed."""

    def __init__(self, tokens=7, heads=4, kv_heads=2, head_dim=32, rotary=None, *, pages=5,
                 page_size=8, kv="bfloat16", dtype="bfloat16", scales="one", seed=0):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        rotary = head_dim if rotary is None else rotary
        sizes = 10.0 ** rng.uniform(-1, 1, (tokens, heads + 2 * kv_heads, 1))
        qkv = rng.normal(size=(tokens, heads + 2 * kv_heads, head_dim)) * sizes
        qkv[0, :, 0] *= 100  # outliers, which quantization clips
        self.qkv = jnp.asarray(qkv.reshape(tokens, -1), dtype)
        angles = rng.uniform(0, 1e4, (tokens, 1)) * 0.5 ** np.arange(rotary // 2)
        self.cos = jnp.asarray(np.cos(angles), jnp.float32)
        self.sin = jnp.asarray(np.sin(angles), jnp.float32)
        shape = (pages, kv_heads, page_size, head_dim)
        self.old = [jnp.full(shape, fill, kv) for fill in (3, 5)]
        places = rng.permutation(pages * page_size)[:tokens]
        self.page = np.asarray(places // page_size, np.int32)
        self.slot = np.asarray(places % page_size, np.int32)
        self.norms = {}
        self.scales = [None, None]
        if jnp.dtype(kv).itemsize == 1:
            count = () if scales == "one" else (kv_heads,)
            top = row_oracles.TOPS[kv]
            self.scales = [
                jnp.asarray(rng.uniform(2, 20, count) / top, jnp.float32) for _ in range(2)
            ]

    def call(self, run, interleaved=False, with_kv=False, **extra):
        return run(
            self.qkv, self.cos, self.sin, *self.old, jnp.asarray(self.page),
            jnp.asarray(self.slot), *self.scales,
            heads=self.heads, interleaved=interleaved, with_kv=with_kv, **self.norms, **extra,
        )  # fmt: skip

    def rotated(self, interleaved):
        """q, k, v in float64, and how far float32 may be off."""
        x = np.asarray(self.qkv, np.float64).reshape(len(self.page), -1, self.head_dim)
        half = self.cos.shape[-1]
        turned = self.heads + self.kv_heads
        x, error = self.normalized(x)
        y, slack = x.copy(), error * np.abs(x)
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            cos, sin = (np.asarray(t, np.float64)[:, None, i] for t in (self.cos, self.sin))
            for to, first, second in ((a, (a, cos), (b, -sin)), (b, (b, cos), (a, sin))):
                terms = [x[:, :turned, at] * by for at, by in (first, second)]
                y[:, :turned, to] = sum(terms)
                # Two products and a sum, with or without a fused multiply-add.
                rounded = 2 * UNIT + error[:, :turned, 0]
                slack[:, :turned, to] = rounded * sum(map(np.abs, terms))
        parts = np.split(np.arange(x.shape[1]), [self.heads, turned])
        return [(y[:, part], slack[:, part]) for part in parts]

    def with_norms(self, eps=1e-3, offset=0.0, seed=1):
        rng = np.random.default_rng(seed)
        weights = (jnp.asarray(rng.normal(size=self.head_dim), jnp.bfloat16) for _ in range(2))
        names = zip(("q_norm", "k_norm"), weights, strict=True)
        self.norms = {**dict(names), "eps": eps, "weight_offset": offset}
        return self

    def normalized(self, x):
        """Heads of queries and keys behind their norms, and the relative error of float32."""
        error = np.zeros((*x.shape[:2], 1))
        if not self.norms:
            return x, error
        x, at = x.copy(), 0
        for name, heads in (("q_norm", self.heads), ("k_norm", self.kv_heads)):
            part = x[:, at : at + heads]
            inverse = 1 / np.sqrt(np.square(part).mean(-1, keepdims=True) + self.norms["eps"])
            weight = np.asarray(self.norms[name], np.float64) + self.norms["weight_offset"]
            x[:, at : at + heads] = part * inverse * weight
            # Half of the error of a sum of head_dim squares, and a few operations.
            error[:, at : at + heads] = UNIT * (self.head_dim / 2 + 8)
            at += heads
        return x, error

    def check(self, run, interleaved=False, with_kv=False, **extra):
        result = self.call(run, interleaved, with_kv, **extra)
        (q, q_slack), k, v = self.rotated(interleaved)
        self.check_rows(result.q, q, q_slack)
        for new, old, pages, scale, kept in zip(
            (k, v), self.old, (result.k_pages, result.v_pages), self.scales,
            (result.k, result.v), strict=True,
        ):  # fmt: skip
            if with_kv:
                self.check_rows(kept, *new)
            else:
                assert kept is None
            self.check_pages(pages, old, new, scale)
        return result

    def check_rows(self, got, exact, slack):
        assert got.dtype == self.qkv.dtype
        flat = (-1, self.head_dim)
        row_oracles.check(np.asarray(got).reshape(flat), None, exact.reshape(flat),
                          slack.reshape(flat))  # fmt: skip

    def check_pages(self, pages, old, new, scale):
        pages, expected = np.array(pages), np.array(old)
        exact, slack = new
        inside = (self.page >= 0) & (self.page < len(pages))
        where = (self.page[inside], slice(None), self.slot[inside])
        static = None
        if scale is not None:
            static = np.broadcast_to(np.asarray(scale), self.kv_heads)[None, :, None]
            static = np.broadcast_to(static, exact[inside].shape)
        row_oracles.check(pages[where], static, exact[inside], slack[inside], static)
        expected[where] = pages[where]  # checked; nothing else may have changed
        assert (pages.view(np.uint8) == expected.view(np.uint8)).all()


@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("scales", ["one", "each"])
@pytest.mark.parametrize("interleaved", [False, True])
@implementations
def test_every_cache(run, kv, scales, interleaved):
    Case(kv=kv, scales=scales).check(run, interleaved, with_kv=kv != "int8")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary"), [(80, 80), (80, 32), (96, 96), (64, 16), (256, 64)]
)
@implementations
def test_head_dims_and_partial_rotation(run, head_dim, rotary, interleaved):
    Case(3, 2, 1, head_dim, rotary, kv="float8_e4m3fn").check(run, interleaved, with_kv=True)


# Multi-query, multi-head, and group sizes that are no power of two.
@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 1), (1, 1), (8, 8), (6, 2), (12, 12), (28, 4)])
@pytest.mark.parametrize("tokens", [1, 70])
@implementations
def test_head_counts(run, heads, kv_heads, tokens):
    Case(tokens, heads, kv_heads, 16, pages=20).check(run)


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
@implementations
def test_no_rotation(run, kv):
    """Tables without columns: queries, keys and values go to their places as they are."""
    result = Case(3, rotary=0, kv=kv).check(run, with_kv=True)
    x = np.asarray(Case(3, rotary=0).qkv).reshape(3, 8, 32)
    np.testing.assert_array_equal(np.asarray(result.q), x[:, :4])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary"), [(32, 32), (80, 32), (48, 0), (256, 256)])
@implementations
def test_norms_of_heads(run, head_dim, rotary, interleaved):
    """Values are left as they are."""
    offset = 0.0 if interleaved else 1.0
    case = Case(5, 4, 2, head_dim, rotary, kv="bfloat16").with_norms(offset=offset)
    case.check(run, interleaved, with_kv=True)
    Case(5, 4, 2, head_dim, rotary, kv="int8").with_norms().check(run, interleaved)


@pytest.mark.parametrize("more", [40, 320])
@implementations
def test_columns_behind_the_heads_are_not_read(run, more):
    """Those of a product that has more than queries, keys and values to give."""
    case = Case(kv="float8_e4m3fn")
    expected = case.call(run)
    case.qkv = jnp.concatenate([case.qkv, jnp.full((7, more), jnp.nan, jnp.bfloat16)], axis=1)
    got = case.call(run)
    for a, b in zip(got[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    arguments = (case.cos, case.sin, *case.old, jnp.asarray(case.page), jnp.asarray(case.slot))
    scales = {"k_scale": case.scales[0], "v_scale": case.scales[1]}
    q = rope_cache(case.qkv, *arguments, heads=4, **scales).q
    np.testing.assert_array_equal(np.asarray(q), np.asarray(case.call(xla.rope_cache).q))
    with pytest.raises(ValueError, match="qkv is"):
        rope_cache(case.qkv, *arguments, heads=400, **scales)


@implementations
def test_tokens_without_a_page_are_not_written(run):
    case = Case(9, kv="int8")
    case.page[[0, 4]] = -1
    case.page[8] = 5  # one past the last page
    case.check(run)
    case.page[:] = -1
    case.check(run, with_kv=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@implementations
def test_other_float_types(run, dtype):
    Case(dtype=dtype, kv=dtype).check(run)
    Case(dtype=dtype, kv="int8").check(run)


@implementations
def test_values_are_copied_whatever_they_are(run):
    case = Case(2)
    x = np.array(case.qkv)
    x[:, -4:] = np.array([np.inf, -np.inf, 1, 2], x.dtype)
    case.qkv = jnp.asarray(x)
    got = np.asarray(case.call(run).v_pages, np.float32)[case.page, :, case.slot]
    assert (got.reshape(2, -1) == x[:, -2 * 32 :].astype(np.float32)).all()


@implementations
def test_pages_in_different_formats(run):
    case = Case(kv="int8")
    case.old[1] = case.old[1].astype(jnp.float8_e4m3fn)
    case.check(run)


@pytest.mark.parametrize("config", [Config(1, 1, 1), Config(1, 4, 2), Config(2, 2, 8)])
def test_every_split(config):
    pytest.importorskip("triton")
    import triton_interpreter  # noqa: F401

    def run(*args, **kwargs):
        return triton.rope_cache(*args, **kwargs, interpret=True)

    Case(5, 8, 4, kv="float8_e4m3fn").check(run, config=config)


def test_candidates_never_mix_queries_keys_and_values():
    for heads, kv_heads in ((32, 8), (71, 1), (28, 4), (12, 12), (40, 40), (6, 2)):
        for tokens in (1, 8192):
            for config in candidates(tokens, heads, kv_heads, 128):
                assert heads % config.heads == kv_heads % config.heads == 0


def test_the_cache_is_updated_in_place():
    case = Case()
    step = jax.jit(rope_cache, donate_argnums=(3, 4))
    text = step.lower(
        case.qkv, case.cos, case.sin, *case.old, jnp.asarray(case.page), jnp.asarray(case.slot)
    ).as_text()
    assert text.count("tf.aliasing_output") == 2


def test_what_does_not_fit_together_is_refused():
    case = Case(kv="int8")
    arguments = {
        "qkv": case.qkv, "cos": case.cos, "sin": case.sin, "k_pages": case.old[0],
        "v_pages": case.old[1], "page": jnp.asarray(case.page), "slot": jnp.asarray(case.slot),
        "k_scale": case.scales[0], "v_scale": case.scales[1],
    }  # fmt: skip
    for message, change in (
        ("pages are", {"k_pages": case.old[0][:1]}),
        ("pages are int4", {"k_pages": case.old[0].astype(jnp.int4)}),
        ("qkv is", {"qkv": case.qkv[:, :100]}),
        ("qkv is", {"qkv": case.qkv[:, : 4 * 32]}),
        ("cos", {"cos": case.cos[:3]}),
        ("float32", {"cos": case.cos.astype(jnp.bfloat16)}),
        ("page is", {"page": jnp.zeros(7, jnp.float32)}),
        ("slot is", {"slot": jnp.zeros(6, jnp.int32)}),
        ("k_scale is missing", {"k_scale": None}),
        ("v_scale is given", {"v_pages": case.old[1].astype(jnp.bfloat16)}),
        ("v_scale is", {"v_scale": jnp.ones(3)}),
        ("q_norm, k_norm", {"q_norm": jnp.ones(32)}),
        ("q_norm, k_norm", {"q_norm": jnp.ones(32), "k_norm": jnp.ones(16)}),
    ):
        with pytest.raises(ValueError, match=message):
            rope_cache(**(arguments | change))
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        rope_cache(**arguments, implementation="triton")


def test_the_oracle_rotates():
    """A quarter turn of the first pair, by hand."""
    case = Case(1, 1, 1, 4)
    case.cos, case.sin = jnp.zeros((1, 2)), jnp.ones((1, 2))
    case.qkv = jnp.arange(1, 13, dtype=jnp.bfloat16)[None]
    (q, _), _, (v, _) = case.rotated(False)
    assert q.tolist() == [[[-3, -4, 1, 2]]]
    assert v.tolist() == [[[9, 10, 11, 12]]]
    assert case.rotated(True)[0][0].tolist() == [[[-2, 1, -4, 3]]]
