"""Gated linear units and quantization against float64."""

import math

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import row_oracles
from qjax_kernels.glu_quant import triton, xla
from qjax_kernels.glu_quant.api import glu_quant
from qjax_kernels.glu_quant.config import Config
from row_oracles import TINY, UNIT

implementations = row_oracles.implementations(xla.glu_quant, triton.glu_quant)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def rows(seed, count, features, dtype="bfloat16"):
    """Gates where the activation bends, ups of very different sizes with outliers."""
    rng = np.random.default_rng(seed)
    gate = rng.normal(size=(count, features)) * 4
    up = rng.normal(size=(count, features)) * 10.0 ** rng.uniform(-3, 2, (count, 1))
    up[:, rng.integers(features)] *= 50
    return np.asarray(jnp.asarray(np.concatenate([gate, up], axis=-1), dtype), np.float64)


def oracle(x, activation):
    """y and how far float32 may be off."""
    gate, up = np.split(x, 2, axis=-1)
    if activation == "silu":
        y = gate / (1 + np.exp(-gate))
        # The exponent is off by a unit of itself, which scales the power; then a few operations.
        # Logistic functions and results that are subnormal may become 0.
        slack = np.abs(y * up) * UNIT * (8 + 2 * np.abs(gate)) + TINY * (1 + np.abs(gate * up))
        return y * up, slack
    if activation == "gelu":
        y = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    else:
        y = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    # 1 + erf and 1 + tanh cancel for negative gates: the error is relative to the gate, not to y.
    # The argument of tanh, up to 0.8 |g| (1 + 0.04 g^2), is off by a few units of itself, where the
    # slope of tanh is still more than nothing.
    argument = np.minimum(np.abs(gate) * (1 + 0.045 * gate**2), 20)
    return y * up, np.abs(gate * up) * UNIT * (8 + 4 * argument)


def ungated(x, activation):
    """y and how far float32 may be off, of an activation that no other number multiplies."""
    if activation == "relu":
        return np.maximum(x, 0), np.zeros_like(x)
    if activation == "quick_gelu":  # silu of 1.702 x, whose rounding is doubled to hold one more
        y, slack = oracle(np.concatenate([1.702 * x, np.ones_like(x)], axis=-1), "silu")
        return y / 1.702, slack / 1.702 * 2
    return oracle(np.concatenate([x, np.ones_like(x)], axis=-1), activation)


def check(run, x, activation="silu", *, out="int8", static=None, sums=False, dtype="bfloat16",
          config=None):  # fmt: skip
    extra = {} if config is None else {"config": config}
    result = run(
        jnp.asarray(x, dtype),
        None if static is None else jnp.float32(static),
        activation=activation,
        out_dtype=jnp.dtype(out),
        group_sums=sums,
        **extra,
    )
    y, slack = oracle(x, activation)
    values = np.asarray(result.values)
    assert values.dtype == out
    scale = None if result.scale is None else np.asarray(result.scale)
    row_oracles.check(values, scale, y, slack, static)
    if sums:
        row_oracles.check_sums(np.asarray(result.group_sums), values)
    else:
        assert result.group_sums is None
    return result


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@implementations
def test_every_output(run, activation, out):
    check(run, rows(1, 5, 640), activation, out=out, sums=True)


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu", "quick_gelu"])
@implementations
def test_without_a_gate(run, activation, out):
    """Of the last columns: those in front belong to others."""
    x = np.split(rows(8, 5, 640), 2, axis=-1)[0]
    wide = np.concatenate([np.full((5, 72), np.nan), x], axis=-1)
    for static in (None,) if out == "bfloat16" else (None, np.float32(2.0**-6)):
        result = run(
            jnp.asarray(wide, "bfloat16"),
            None if static is None else jnp.float32(static),
            activation=activation, gated=False, features=640, out_dtype=jnp.dtype(out),
            group_sums=False,
        )  # fmt: skip
        scale = None if result.scale is None else np.asarray(result.scale)
        row_oracles.check(np.asarray(result.values), scale, *ungated(x, activation), static)


@implementations
def test_columns_in_front_of_a_gate_are_not_read(run):
    x = rows(9, 3, 256)
    wide = jnp.asarray(np.concatenate([np.full((3, 200), np.nan), x], axis=-1), "bfloat16")
    kwargs = {"activation": "silu", "out_dtype": jnp.dtype("int8"), "group_sums": True}
    expected = run(jnp.asarray(x, "bfloat16"), None, **kwargs)
    got = run(wide, None, features=256, **kwargs)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn"])
@implementations
def test_static_scale_clips(run, out):
    x = rows(2, 3, 512)
    y, _ = oracle(x, "silu")
    static = np.float32(np.quantile(np.abs(y), 0.9) / row_oracles.TOPS[out])
    result = check(run, x, out=out, static=static, sums=True)
    assert result.scale == static
    assert np.abs(oracles.decode(np.asarray(result.values))).max() >= row_oracles.TOPS[out]


@pytest.mark.parametrize("features", [1, 64, 100, 128, 384, 1001, 2880, 5120])
@pytest.mark.parametrize("out", ["float8_e4m3fn", "bfloat16"])
@implementations
def test_row_lengths(run, features, out):
    check(run, rows(3, 5, features), out=out)


@pytest.mark.parametrize("rows_of_block", [1, 2, 4])
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("static", [None, 0.25])
def test_every_split_of_rows(warps, rows_of_block, static):
    pytest.importorskip("triton")
    import triton_interpreter  # noqa: F401

    def run(*args, **kwargs):
        return triton.glu_quant(*args, **kwargs, interpret=True)

    config = Config(warps, rows_of_block)
    check(run, rows(4, 5, 1280), sums=config.chunk >= 128, static=static, config=config)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@implementations
def test_other_float_types(run, dtype):
    check(run, rows(5, 3, 256, dtype), dtype=dtype, out="int8")


@pytest.mark.parametrize("out", ["int8", "float8_e4m3fn"])
@implementations
def test_rows_of_zeros_and_of_next_to_nothing(run, out):
    x = rows(6, 3, 256)
    x[0, 256:] = 0
    # The scale would be subnormal, and is the smallest normal number instead.
    x[1, 256:] = 2.0**-122
    x[1, :256] = 1.0
    result = check(run, x, out=out)
    assert result.scale[0, 0] == 1
    assert not np.asarray(result.values, np.float32)[0].any()
    assert result.scale[1, 0] == np.finfo(np.float32).tiny


@implementations
def test_large_gates_neither_overflow_nor_leave_nan(run):
    x = np.zeros((2, 512))
    x[:, :256] = np.linspace(-300, 300, 256).astype(jnp.bfloat16)
    x[:, 256:] = 1
    for activation in ACTIVATIONS:
        check(run, x, activation, out="bfloat16")


def test_leading_axes_and_defaults():
    x = jnp.asarray(rows(7, 6, 128), jnp.bfloat16)
    whole = glu_quant(x.reshape(2, 3, 256), out_dtype=jnp.int8, group_sums=True)
    parts = glu_quant(x, out_dtype=jnp.int8, group_sums=True)
    for a, b in zip(whole, parts, strict=True):
        assert a.shape[:-1] == (2, 3)
        assert (np.asarray(a).reshape(b.shape) == np.asarray(b)).all()
    plain = glu_quant(x)
    assert plain.values.dtype == jnp.bfloat16
    assert plain[1:] == (None, None)


def test_what_does_not_fit_together_is_refused():
    x = jnp.ones((2, 100), jnp.bfloat16)
    for message, kwargs in (
        ("activation", {"activation": "relu"}),
        ("activation", {"activation": "tanh", "gated": False}),
        ("need 102 columns", {"features": 51}),
        ("multiple of 128", {"group_sums": True}),
        ("writes", {"out_dtype": jnp.int4}),
        ("scale", {"scale": jnp.ones(3), "out_dtype": jnp.int8}),
        ("scale", {"scale": jnp.float32(1)}),
        ("no implementation", {"implementation": "cuda"}),
    ):
        with pytest.raises(ValueError, match=message):
            glu_quant(x, **kwargs)
    with pytest.raises(ValueError, match="one length"):
        glu_quant(x[:, :99])
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        glu_quant(x, implementation="triton")
