"""Residual sum, norm and quantization against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import row_oracles
from qjax_kernels.norm_quant import triton, xla
from qjax_kernels.norm_quant.api import norm_quant
from qjax_kernels.norm_quant.config import Config, candidates

implementations = row_oracles.implementations(xla.norm_quant, triton.norm_quant)
EPS = 1e-5


def rows(seed, count, features, dtype="bfloat16"):
    """Rows of very different sizes, with outliers, as float64 numbers of the dtype."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features)) * 10.0 ** rng.uniform(-3, 2, (count, 1))
    x[:, rng.integers(features)] *= 50
    return np.asarray(jnp.asarray(x, dtype), np.float64)


def oracle(x, weight, bias, residual, kind, offset, dtype):
    """y, how far float32 may be off, and the new residual; all float64."""
    features = x.shape[-1]
    h = x if residual is None else x + residual
    new = h.astype(np.float16).astype(float) if dtype == "float16" else oracles.narrow(h, dtype)
    h = new
    if kind == "layer":
        h = h - h.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt((h**2).mean(axis=-1, keepdims=True) + EPS)
    y = h * inverse * (offset + weight) + (0 if bias is None else bias)
    # A sum of n numbers is off by at most n units of the sum of their magnitudes; half of that
    # after the root. The rest are a few operations on each number.
    units = row_oracles.UNIT * (features / 2 + 8)
    slack = np.abs(h * inverse * (offset + weight)) * units
    if kind == "layer":
        # The mean is off by n units of the mean magnitude, and so is each h - mean.
        mean = np.abs(new).mean(axis=-1, keepdims=True) * row_oracles.UNIT * (features + 2)
        mean = mean + np.abs(h) * row_oracles.UNIT
        slack = slack + mean * 2 * inverse * np.abs(offset + weight) + 2 * row_oracles.UNIT * abs(y)
    return y, slack, new


def check(run, x, weight, bias=None, residual=None, *, kind="rms", offset=0.0, out="int8",
          static=None, sums=False, dtype="bfloat16", config=None):  # fmt: skip
    def array(a):
        return None if a is None else jnp.asarray(a, dtype)

    extra = {} if config is None else {"config": config}
    result = run(
        array(x), array(weight), array(bias), array(residual),
        None if static is None else jnp.float32(static),
        kind=kind, eps=EPS, weight_offset=offset, out_dtype=jnp.dtype(out), group_sums=sums,
        **extra,
    )  # fmt: skip
    y, slack, new = oracle(x, weight, bias, residual, kind, offset, dtype)
    values = np.asarray(result.values)
    scale = None if result.scale is None else np.asarray(result.scale)
    row_oracles.check(values, scale, y, slack, static)
    assert values.dtype == out
    if residual is None:
        assert result.residual is None
    else:
        assert (np.asarray(result.residual, np.float64) == new).all()
    if sums:
        row_oracles.check_sums(np.asarray(result.group_sums), values)
    else:
        assert result.group_sums is None
    return result


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("with_residual", [False, True])
@implementations
def test_every_output(run, kind, out, with_residual):
    features = 640
    x, residual = rows(1, 5, features), rows(2, 5, features)
    weight, bias = rows(3, 2, features)
    check(
        run, x, weight, bias if kind == "layer" else None, residual if with_residual else None,
        kind=kind, out=out, sums=True,
    )  # fmt: skip


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@implementations
def test_static_scale_clips(run, kind, out):
    x = rows(4, 3, 512)
    weight = rows(5, 1, 512)[0]
    y, _, _ = oracle(x, weight, None, None, kind, 0.0, "bfloat16")
    static = np.float32(np.quantile(np.abs(y), 0.9) / row_oracles.TOPS[out])
    result = check(run, x, weight, kind=kind, out=out, static=static)
    assert result.scale == static
    # -128 is a number of int8, and what lies below it becomes it.
    assert oracles.decode(np.asarray(result.values)).min() == {"int8": -128}.get(out, -448)


# Rows that lie side by side, that fill one vector a thread, several, with idle lanes, and lengths
# that no vector of 16 bytes divides.
@pytest.mark.parametrize("features", [1, 64, 100, 128, 384, 1001, 2048, 2880])
@implementations
def test_row_lengths(run, features):
    x, residual = rows(6, 7, features), rows(7, 7, features)
    check(run, x, rows(8, 1, features)[0], residual=residual, out="float8_e4m3fn")


@pytest.mark.parametrize("rows_of_block", [1, 2, 4])
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_every_split_of_rows(kind, warps, rows_of_block):
    pytest.importorskip("triton")
    import triton_interpreter  # noqa: F401

    def run(*args, **kwargs):
        return triton.norm_quant(*args, **kwargs, interpret=True)

    x = rows(9, 5, 768)
    config = Config(warps, rows_of_block)
    check(run, x, rows(10, 1, 768)[0], kind=kind, sums=config.chunk >= 128, config=config)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@implementations
def test_other_float_types(run, dtype):
    x = np.asarray(rows(11, 3, 256).astype(dtype), np.float64)
    residual = np.asarray(rows(12, 3, 256).astype(dtype), np.float64)
    weight = rows(13, 1, 256)[0].astype(dtype).astype(np.float64)
    check(run, x, weight, residual=residual, dtype=dtype, out="int8")
    check(run, x, weight, dtype=dtype, out=dtype)


@implementations
def test_gemma_adds_one_to_the_weight(run):
    check(run, rows(14, 3, 256), rows(15, 1, 256)[0], offset=1.0, out="float8_e4m3fn")


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn"])
@implementations
def test_a_row_of_zeros_has_scale_one(run, out):
    x = rows(16, 3, 256)
    x[1] = 0
    result = check(run, x, rows(17, 1, 256)[0], out=out)
    assert result.scale[1, 0] == 1
    assert not np.asarray(result.values, np.float32)[1].any()


def test_leading_axes_and_defaults():
    x = jnp.asarray(rows(18, 6, 128), jnp.bfloat16).reshape(2, 3, 128)
    weight = jnp.asarray(rows(19, 1, 128)[0], jnp.bfloat16)
    whole = norm_quant(x, weight, residual=x, eps=EPS, out_dtype=jnp.int8, group_sums=True)
    flat = x.reshape(6, 128)
    parts = norm_quant(flat, weight, residual=flat, eps=EPS, out_dtype=jnp.int8, group_sums=True)
    for a, b in zip(whole, parts, strict=True):
        assert a.shape[:-1] == (2, 3)
        assert (np.asarray(a).reshape(b.shape) == np.asarray(b)).all()
    plain = norm_quant(x, weight, eps=EPS)
    assert plain.values.dtype == jnp.bfloat16
    assert plain[1:] == (None, None, None)


def test_what_does_not_fit_together_is_refused():
    x, weight = jnp.ones((2, 100), jnp.bfloat16), jnp.ones(100, jnp.bfloat16)
    for message, kwargs in (
        ("residual", {"residual": x[:1]}),
        ("kind", {"kind": "group"}),
        ("kind", {"bias": weight}),
        ("bias", {"bias": weight[:3], "kind": "layer"}),
        ("multiple of 128", {"group_sums": True}),
        ("writes", {"out_dtype": jnp.int4}),
        ("scale", {"scale": jnp.ones(3), "out_dtype": jnp.int8}),
        ("scale", {"scale": jnp.float32(1)}),
        ("no implementation", {"implementation": "cuda"}),
    ):
        with pytest.raises(ValueError, match=message):
            norm_quant(x, weight, eps=EPS, **kwargs)
    with pytest.raises(ValueError, match="weight"):
        norm_quant(x, weight[:3], eps=EPS)
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        norm_quant(x, weight, eps=EPS, implementation="triton")


def test_no_rows():
    result = norm_quant(jnp.ones((0, 128)), jnp.ones(128), eps=EPS, out_dtype=jnp.int8)
    assert result.values.shape == (0, 128)
    assert result.scale.shape == (0, 1)


def test_candidates_cover_each_row_with_few_idle_lanes():
    for count in (1, 64, 8192):
        for features in (1, 128, 1000, 4096, 5120, 8192, 11008, 28672):
            found = candidates(count, features)
            assert 1 <= len(found) <= 6
            assert all(c.chunk * c.vectors(features) >= features for c in found)
            if count == 8192 and features % 1024 == 0:
                assert found[0].chunk * found[0].vectors(features) <= 1.15 * features


def test_one_compilation_serves_calls_of_one_shape():
    x, weight = jnp.ones((2, 128)), jnp.ones(128)
    call = jax.jit(lambda x: norm_quant(norm_quant(x, weight, eps=EPS).values, weight, eps=EPS))
    assert str(jax.make_jaxpr(call)(x)).count("jit[") >= 2
