"""The Hopper weight-only kernels in the interpreter, against float64; and their packed layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plgpu_shim  # noqa: F401 (teaches the interpreter wgmma with registers)
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qjax_kernels.gemm_swiglu.layout import interleave
from qjax_kernels.weight_only_gemm import api, mosaic
from qjax_kernels.weight_only_gemm.config import (
    SHARED_MEMORY,
    Config,
    candidates,
    stream_fits,
    tiled_shared_memory,
)

LIMITS = {"int4": (-8, 8), "int8": (-128, 128)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # its numbers (OCP MX 1.0, table 5)


def weight(out, features, format, group_size, zeros=False, seed=0):
    """Canonical arrays, with scales that differ by a factor of 20, as NumPy and JAX arrays."""
    rng = np.random.default_rng(seed)
    if format in LIMITS:
        values = rng.integers(*LIMITS[format], (out, features))
    elif format == "float4_e2m1fn":
        values = rng.choice(np.concatenate([E2M1, -E2M1]), (out, features))
    else:
        values = rng.normal(size=(out, features)) * 20
    values = jnp.asarray(values.astype(np.float32)).astype(format)
    groups = features // group_size if group_size else 1
    scale = jnp.asarray(np.exp(rng.uniform(-3, 0, (out, groups))), jnp.bfloat16)
    zero = jnp.asarray(rng.integers(-8, 8, (out, groups)), jnp.int32) if zeros else None
    return values, scale, zero


def float64(values, scale, zero):
    width = values.shape[1] // scale.shape[1]
    dense = np.asarray(values.astype(jnp.float32), np.float64)
    if zero is not None:
        dense = dense - np.repeat(np.asarray(zero, np.float64), width, axis=1)
    return dense * np.repeat(np.asarray(scale.astype(jnp.float32), np.float64), width, axis=1)


def activations(tokens, features, dtype, outliers=False, seed=1):
    x = np.random.default_rng(seed).normal(size=(tokens, features))
    if outliers:
        x[:, ::97] *= 300
    return jnp.asarray(x, dtype)


def check(y, x, dense, bias, out_unit, weight_unit):
    """Every element within the sum of what each rounding can do.

    weight_unit: of the rounding of weight times scale to the type of x, where a kernel does it (its
    scale is exact in that type). Sums of k products in float32, in any order; the tensor cores keep
    a few bits fewer, 2^-21 for each of their steps of 16, which covers both.
    """
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    reference = wide @ dense.T + bias
    size = np.abs(wide) @ np.abs(dense).T + np.abs(bias)
    steps = x.shape[1] / 16 + 8
    bound = (weight_unit + steps * 2.0**-21) * size + 1.01 * out_unit * (np.abs(reference) + size)
    bound = np.minimum(bound, (weight_unit + steps * 2.0**-21) * size + 1.1 * out_unit * size)
    found = np.asarray(y.astype(jnp.float32), np.float64)
    assert found.shape == reference.shape
    assert np.isfinite(found).all()
    assert (np.abs(found - reference) <= bound).all()
    # Tighter, by row: roundings do not conspire.
    error = np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
    assert error.max() <= 2 * (out_unit + weight_unit) + 1e-5


UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
FORMATS = [
    ("int4", 128, False), ("int4", 128, True), ("int4", 64, True), ("int4", 32, False),
    ("int4", 0, True), ("int8", 0, False), ("int8", 64, True), ("float8_e4m3fn", 0, False),
    ("float8_e4m3fn", 128, False), ("float8_e5m2", 0, False), ("float4_e2m1fn", 32, False),
    ("float4_e2m1fn", 16, False), ("float4_e2m1fn", 128, False),
]  # fmt: skip
STREAM = Config(kernel="stream", tokens=8, warpgroups=2, tiles=2, stages=2)
CLUSTER = Config(kernel="stream", tokens=16, warpgroups=1, tiles=2, stages=2, cluster=2)
TILED = Config(kernel="tiled", tokens=64, warpgroups=2, tiles=2, stages=2)


def rounds_weights(config, group_size) -> bool:
    return bool(group_size) and (config.kernel == "tiled" or group_size % 64 != 0)


@pytest.mark.parametrize("config", [STREAM, TILED], ids=["stream", "tiled"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("format", "group_size", "zeros"), FORMATS)
def test_formats(format, group_size, zeros, dtype, config):
    arrays = weight(128, 512, format, group_size, zeros)
    if dtype == "float16":  # e4m3's 448 times 300 would overflow the sum's type otherwise
        arrays = (arrays[0], arrays[1] / 64, arrays[2])
    x = activations(5, 512, dtype, outliers=True)
    bias = jnp.linspace(-3, 3, 128, dtype=dtype)
    y = mosaic.prepared_gemm(
        x, api.prepare(*arrays), bias, out_dtype=jnp.float32, config=config, interpret=True
    )
    unit = UNIT[dtype] if rounds_weights(config, group_size) else 0
    check(y, x, float64(*arrays), np.asarray(bias, np.float64), UNIT["float32"], unit)


@pytest.mark.parametrize(
    ("tokens", "out", "features", "config"),
    [
        (1, 64, 256, STREAM),
        (3, 72, 200, STREAM),  # nothing divides
        (9, 64, 1000, STREAM),
        (8, 64, 512, CLUSTER),
        (20, 200, 384, CLUSTER),
        (20, 72, 384, dataclasses.replace(STREAM, tokens=24)),
        (40, 64, 512, dataclasses.replace(CLUSTER, tokens=40)),
        (1, 64, 64, TILED),
        (70, 200, 328, TILED),
        (129, 136, 128, TILED),
        (64, 128, 384, Config(kernel="tiled", tokens=64, warpgroups=1, tiles=1, stages=3)),
        (64, 128, 384, Config(kernel="tiled", tokens=64, warpgroups=1, tiles=2, stages=2, parts=2)),
    ],
)
def test_any_shape(tokens, out, features, config):
    arrays = weight(out, features, "int4", 0)
    x = activations(tokens, features, jnp.bfloat16)
    y = mosaic.prepared_gemm(
        x, api.prepare(*arrays), out_dtype=jnp.bfloat16, config=config, interpret=True
    )
    check(y, x, float64(*arrays), np.zeros(out), UNIT["bfloat16"], 0)


@pytest.mark.parametrize(
    ("tokens", "out_dtype"), [(1, "bfloat16"), (9, "float32"), (130, "bfloat16")]
)
@pytest.mark.parametrize("config", [STREAM, CLUSTER, TILED], ids=["stream", "cluster", "tiled"])
def test_a_residual(tokens, config, out_dtype):
    arrays = weight(200, 384, "int4", 128)
    x = activations(tokens, 384, jnp.bfloat16)
    residual = activations(tokens, 200, jnp.dtype(out_dtype), seed=5) * 100
    bias = jnp.linspace(-3, 3, 200, dtype=jnp.float32)
    y = mosaic.prepared_gemm(
        x, api.prepare(*arrays), bias, residual,
        out_dtype=jnp.dtype(out_dtype), config=config, interpret=True,
    )  # fmt: skip
    added = np.asarray(bias, np.float64) + np.asarray(residual.astype(jnp.float32), np.float64)
    unit = UNIT["bfloat16"] if rounds_weights(config, 128) else 0
    check(y, x, float64(*arrays), added, UNIT[out_dtype], unit)


def rms_norm(h, gain, eps):
    return h / np.sqrt((h * h).mean(-1, keepdims=True) + eps) * gain


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("config", [STREAM, CLUSTER], ids=["stream", "cluster"])
def test_a_norm_between_two_products(tokens, config):
    eps, out, last = 1e-5, 192, 128
    first, second = weight(out, 256, "int4", 64), weight(last, out, "int8", None, seed=4)
    x = activations(tokens, 256, jnp.bfloat16)
    residual = activations(tokens, out, jnp.bfloat16, seed=5) * 30
    gain = activations(1, out, jnp.bfloat16, seed=6)[0]
    bias = activations(1, out, jnp.bfloat16, seed=7)[0]
    config = dataclasses.replace(config, tokens=64 if tokens > 16 else config.tokens)
    how = {"config": config, "interpret": True}
    summed = mosaic.residual_gemm(x, api.prepare(*first), bias, residual, gain, **how)
    wide = [np.asarray(a.astype(jnp.float32), np.float64) for a in (x, residual, gain, bias)]
    h = wide[0] @ float64(*first).T + wide[1] + wide[3]
    total, scaled, squares = (np.asarray(a.astype(jnp.float32), np.float64) for a in summed)
    # Weights times scales, and results, are rounded to 8 bits; products add at random.
    largest = np.abs(h).max(-1, keepdims=True)
    assert (np.abs(total - h) < 2**-8 * largest).all()
    assert (np.abs(scaled - h * wide[2]) < 2**-7 * np.abs(h * wide[2]).max()).all()
    np.testing.assert_allclose(squares.sum(0)[:tokens], (h * h).sum(-1), rtol=2**-7)

    y = mosaic.prepared_gemm(
        summed[1], api.prepare(*second), out_dtype=jnp.float32, squares=summed[2], eps=eps,
        **how | {"config": dataclasses.replace(config, tiles=1, tokens=-(-tokens // 8) * 8)},
    )  # fmt: skip
    expected = rms_norm(total, wide[2], eps) @ float64(*second).T
    # A norm's input is off by 2^-9 in each of `out` features, and so is what it is scaled to.
    bound = 2**-8 * np.abs(rms_norm(total, wide[2], eps)) @ np.abs(float64(*second)).T
    np.testing.assert_array_less(np.abs(y - expected), bound)

    reference = api.residual_gemm(x, api.prepare(*first), residual, gain, bias)
    np.testing.assert_allclose(reference.total.astype(jnp.float32), total, atol=2**-7 * h.max())
    z = api.prepared_gemm(
        reference.scaled, api.prepare(*second), out_dtype=jnp.float32,
        squares=reference.squares, eps=eps,
    )  # fmt: skip
    np.testing.assert_array_less(np.abs(z - y), 2 * bound)


def test_what_a_norm_refuses():
    values = api.prepare(*weight(64, 128, "int4", 64))
    x, residual = activations(65, 128, jnp.bfloat16), activations(65, 64, jnp.bfloat16)
    gain = activations(1, 64, jnp.bfloat16)[0]
    with pytest.raises(NotImplementedError, match="65 tokens with a norm; at most 64"):
        mosaic.residual_gemm(x, values, None, residual, gain, interpret=True)
    with pytest.raises(NotImplementedError, match="tiles of 40 tokens; 8, 16, 32 or 64"):
        mosaic.residual_gemm(
            x[:40], values, None, residual[:40], gain,
            config=dataclasses.replace(STREAM, tokens=40), interpret=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"gain is \(65,\); it must be \(64,\)"):
        api.residual_gemm(x, values, residual, jnp.ones(65))
    with pytest.raises(
        ValueError, match=r"squares is \(3, 64\); it must be \(parts, at least 65\)"
    ):
        api.prepared_gemm(x, values, squares=jnp.ones((3, 64)), eps=1e-5, out_dtype=jnp.bfloat16)


@pytest.mark.parametrize("config", [STREAM, TILED], ids=["stream", "tiled"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nvfp4(dtype, config):
    """Groups of 16 with a scale in e4m3, and one float32 for all. A weight times its scale has six
    bits, so nothing rounds but sums and the result."""
    rng = np.random.default_rng(3)
    values, _, _ = weight(72, 512, "float4_e2m1fn", 16)
    scale = jnp.asarray(np.exp(rng.uniform(-3, 5, (72, 32))), jnp.float8_e4m3fn)
    factor = jnp.float32(0.0123)
    x = activations(5, 512, dtype)
    prepared = api.prepare(values, scale, factor=factor)
    dense = float64(values, scale, None) * float(factor)
    for y in (
        mosaic.prepared_gemm(x, prepared, out_dtype=jnp.float32, config=config, interpret=True),
        api.prepared_gemm(x, prepared, out_dtype=jnp.float32, implementation="xla"),
    ):
        check(y, x, dense, np.zeros(72), UNIT["float32"], 0)


def test_mxfp4():
    """Groups of 32 with a power of two."""
    rng = np.random.default_rng(4)
    values, _, _ = weight(64, 512, "float4_e2m1fn", 32)
    scale = jnp.asarray(2.0 ** rng.integers(-20, 20, (64, 16)), jnp.float8_e8m0fnu)
    x = activations(5, 512, "bfloat16")
    prepared = api.prepare(values, scale)
    y = mosaic.prepared_gemm(x, prepared, out_dtype=jnp.float32, config=STREAM, interpret=True)
    check(y, x, float64(values, scale, None), np.zeros(64), UNIT["float32"], 0)


@pytest.mark.parametrize(("tokens", "activation"), [(1, "silu"), (9, "gelu_tanh"), (70, "silu")])
@pytest.mark.parametrize("config", [STREAM, CLUSTER, TILED], ids=["stream", "cluster", "tiled"])
def test_a_gated_unit(tokens, config, activation):
    """Against float64 of both weights apart: 1.13 is the largest slope of the activations, and the
    sums are off by their own roundings."""
    features = 72
    parts = [weight(features, 384, "int4", 128, seed=seed) for seed in (1, 2)]
    both = [interleave(*pair) for pair in zip(*[part[:2] for part in parts], strict=True)]
    x = activations(tokens, 384, jnp.bfloat16) / 64
    for y in (
        mosaic.prepared_gemm(
            x, api.prepare(*both), out_dtype=jnp.bfloat16, activation=activation,
            config=config, interpret=True,
        ),
        api.prepared_gemm(x, api.prepare(*both), out_dtype=jnp.bfloat16, activation=activation),
    ):  # fmt: skip
        wide = np.asarray(x.astype(jnp.float32), np.float64)
        gate, up = (wide @ float64(*part).T for part in parts)
        size = max(np.abs(wide).sum(axis=1).max() * 8, 1)
        if activation == "silu":
            acted = gate / (1 + np.exp(-gate))
        else:
            acted = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
        expected = acted * up
        assert y.shape == expected.shape
        rounded = 2.0**-9 * size  # of weights times scales to bfloat16, in the worst case
        bound = rounded * (1.13 * np.abs(up) + np.abs(acted) + rounded) + 2.0**-8 * np.abs(expected)
        found = np.asarray(y.astype(jnp.float32), np.float64)
        assert (np.abs(found - expected) <= bound).all()
        error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() <= 1e-2


def test_what_a_gated_unit_refuses():
    prepared = api.prepare(*weight(72, 128, "int8", 0))
    x = activations(2, 128, jnp.bfloat16)
    with pytest.raises(ValueError, match="takes no residual, and a weight of gates and ups"):
        api.prepared_gemm(x, prepared, out_dtype=jnp.bfloat16, activation="silu")
    prepared = api.prepare(*weight(64, 128, "int8", 0))
    with pytest.raises(ValueError, match="activation is 'relu'; choose one of: silu"):
        api.prepared_gemm(x, prepared, out_dtype=jnp.bfloat16, activation="relu")
    with pytest.raises(NotImplementedError, match="an activation with a result in float32"):
        mosaic.prepared_gemm(x, prepared, out_dtype=jnp.float32, activation="silu", interpret=True)


def test_leading_axes_and_no_tokens():
    arrays = weight(64, 128, "int8", 0)
    prepared = api.prepare(*arrays)
    x = activations(6, 128, jnp.bfloat16)

    def run(x):
        return mosaic.prepared_gemm(x, prepared, out_dtype=jnp.bfloat16, interpret=True)

    np.testing.assert_array_equal(run(x.reshape(2, 3, 128)).reshape(6, 64), run(x))
    assert run(x[:0]).shape == (0, 64)


@settings(deadline=None, max_examples=25)
@given(
    format=st.sampled_from(["int4", "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]),
    out=st.integers(1, 150), groups=st.integers(1, 5), group_size=st.sampled_from([32, 64, 128]),
    zeros=st.booleans(),
)  # fmt: skip
def test_preparing_is_reversible(format, out, groups, group_size, zeros):
    zeros = zeros and format.startswith("int")
    arrays = weight(out, groups * group_size, format, group_size, zeros)
    prepared = api.prepare(*arrays)
    assert prepared.shape == arrays[0].shape
    for before, after in zip(arrays, api.unprepare(prepared), strict=True):
        if before is None:
            assert after is None
        else:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before.astype(jnp.float32), after.astype(jnp.float32))


def test_a_thread_has_its_words_together():
    """The nibbles of word 0 of thread 0 are rows 0, 8 and columns 0, 1, 8, 9 (PTX, wgmma's A)."""
    codes = np.zeros((64, 64), np.int8)
    for nibble, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        codes[row, column], codes[row, column + 1] = nibble, nibble + 4
    prepared = api.prepare(jnp.asarray(codes - 8).astype(jnp.int4), jnp.ones((64, 1)))
    word = int(np.asarray(prepared.words).reshape(-1)[0])
    assert [word >> 4 * i & 15 for i in range(8)] == list(range(8))


FP8 = [
    (3, 128, 512, 128, STREAM),
    (3, 72, 512, 0, Config(kernel="stream", tokens=8, warpgroups=1, tiles=4, stages=2, cluster=2)),
    (20, 64, 1536, 256, Config(kernel="stream", tokens=16, warpgroups=3, tiles=4, stages=2)),
    (70, 136, 512, 256, TILED),
    (70, 136, 384, 128, TILED),
    (70, 136, 512, 0, TILED),
    (70, 136, 640, 128, Config(kernel="tiled", tokens=64, warpgroups=2, tiles=4, stages=2)),
    (70, 136, 768, 256, Config(kernel="tiled", tokens=64, warpgroups=2, tiles=4, stages=2)),
    (70, 136, 384, 0, Config(kernel="tiled", tokens=64, warpgroups=1, tiles=4, stages=2)),
]


@pytest.mark.parametrize(("tokens", "out", "features", "group_size", "config"), FP8)
def test_fp8_activations(tokens, out, features, group_size, config):
    """The products and their sums are float32 in the interpreter; only they round."""
    arrays = weight(out, features, "int4", group_size)
    x = jnp.clip(activations(tokens, features, jnp.float32, outliers=True), -448, 448)
    x = x.astype(jnp.float8_e4m3fn)
    x_scale = jnp.linspace(0.5, 2.5, tokens, dtype=jnp.float32)[:, None]
    bias = jnp.linspace(-3, 3, out, dtype=jnp.float32)
    prepared = api.prepare(*arrays[:2], operand="float8_e4m3fn")
    for values, again in zip(arrays[:2], api.unprepare(prepared), strict=False):
        np.testing.assert_array_equal(values.astype(jnp.float32), again.astype(jnp.float32))
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    dense = float64(*arrays)
    reference = wide @ dense.T * np.asarray(x_scale) + np.asarray(bias)
    # Sums, then four products and sums.
    size = np.asarray(x_scale) * (np.abs(wide) @ np.abs(dense).T) + np.abs(bias)
    bound = (features + 8) * UNIT["float32"] * size
    for y in (
        mosaic.fp8_prepared_gemm(
            x, x_scale, prepared, bias, out_dtype=jnp.float32, config=config, interpret=True
        ),
        api.w4a8_gemm(x, x_scale, prepared, bias, out_dtype=jnp.float32),
    ):
        assert (np.abs(np.asarray(y, np.float64) - reference) <= bound).all()
        error = np.linalg.norm(y - reference, axis=1) / np.linalg.norm(reference, axis=1)
        assert error.max() <= 1e-5


def test_fp8_activations_take_one_scale_and_a_residual():
    arrays = weight(64, 256, "int4", 128)
    prepared = api.prepare(*arrays[:2], operand="float8_e4m3fn")
    x = activations(4, 256, jnp.float8_e4m3fn)
    one, each = jnp.float32(0.25), jnp.full((4, 1), 0.25, jnp.float32)
    run = functools.partial(
        mosaic.fp8_prepared_gemm, out_dtype=jnp.float32, config=STREAM, interpret=True
    )
    np.testing.assert_array_equal(run(x, one, prepared), run(x, each, prepared))
    residual = activations(4, 64, jnp.float32)
    np.testing.assert_array_equal(
        run(x, one, prepared, None, residual), run(x, one, prepared) + residual
    )


def test_what_fp8_activations_refuse():
    arrays = weight(64, 256, "int4", 64, zeros=True)
    with pytest.raises(NotImplementedError, match="groups of 64 with fp8 activations; 128 or 256"):
        api.prepare(*arrays[:2], operand="float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="a zero point with fp8"):
        api.prepare(arrays[0], arrays[1][:, :1], arrays[2][:, :1], operand="float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="int8 weights for activations in float8_e4m3fn"):
        api.prepare(jnp.ones((64, 128), jnp.int8), jnp.ones((64, 1)), operand="float8_e4m3fn")
    x, scale = activations(4, 256, jnp.float8_e4m3fn), jnp.float32(1)
    with pytest.raises(ValueError, match="prepared with operand='float8_e4m3fn'"):
        api.w4a8_gemm(x, scale, api.prepare(*arrays), out_dtype=jnp.float32)
    prepared = api.prepare(arrays[0], arrays[1][:, :1], operand="float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="activations in float8_e5m2; float8_e4m3fn"):
        mosaic.fp8_prepared_gemm(
            x.astype(jnp.float8_e5m2), scale, prepared, out_dtype=jnp.float32, interpret=True
        )


def test_the_fallback_computes_the_same():
    arrays = weight(72, 256, "int4", 128, zeros=True)
    x, bias = activations(4, 256, jnp.bfloat16), jnp.ones(72, jnp.bfloat16)
    y = api.prepared_gemm(x, api.prepare(*arrays), bias, out_dtype=jnp.float32)
    check(y, x, float64(*arrays), np.ones(72), UNIT["float32"], UNIT["bfloat16"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "activations in float32; bfloat16 or float16"),
        (dict(features=132), "132 in features; a multiple of 8"),
        (dict(out=100), "100 out features; a multiple of 8"),
    ],
)
def test_what_the_kernels_refuse(change, message):
    size = dict(out=64, features=128, dtype="bfloat16") | change
    arrays = weight(size["out"], size["features"], "int8", 0)
    x = activations(2, size["features"], size["dtype"])
    with pytest.raises(NotImplementedError, match=message):
        mosaic.prepared_gemm(x, api.prepare(*arrays), out_dtype=jnp.bfloat16, interpret=True)


def test_what_preparing_refuses():
    with pytest.raises(NotImplementedError, match="weights in int16; the formats are int4"):
        api.prepare(jnp.ones((64, 64), jnp.int16), jnp.ones((64, 1)))
    with pytest.raises(NotImplementedError, match="groups of 48; the kernels take 16, 32"):
        api.prepare(jnp.ones((64, 96), jnp.int8), jnp.ones((64, 2)))
    fp8 = jnp.ones((64, 64), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="a zero point with float8_e4m3fn"):
        api.prepare(fp8, jnp.ones((64, 1)), jnp.ones((64, 1), jnp.int32))


def test_a_cpu_is_refused_by_name():
    arrays = weight(64, 128, "int8", 0)
    x = activations(2, 128, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"mosaic: it needs an NVIDIA GPU .* not cpu"):
        api.prepared_gemm(x, api.prepare(*arrays), out_dtype=jnp.bfloat16, implementation="mosaic")
    with pytest.raises(ValueError, match="their last axes must agree"):
        api.prepared_gemm(x[:, :64], api.prepare(*arrays), out_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"bias is \(3,\); it must be \(64,\)"):
        api.prepared_gemm(x, api.prepare(*arrays), jnp.ones(3), out_dtype=jnp.bfloat16)


def prepared_shapes(out, features, format, groups):
    values = jax.ShapeDtypeStruct((out, features), format)
    return jax.eval_shape(api.prepare, values, jax.ShapeDtypeStruct((out, groups), jnp.bfloat16))


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 9000), out=st.integers(1, 2000), features=st.integers(1, 500),
    format=st.sampled_from(["int4", "int8"]), grouped=st.booleans(),
)  # fmt: skip
def test_candidates_fit(tokens, out, features, format, grouped):
    features *= 128
    shapes = prepared_shapes(out * 8, features, format, features // 128 if grouped else 1)
    configs = candidates(tokens, shapes)
    assert 1 <= len(configs) <= 6
    assert len(set(configs)) == len(configs)
    for config in configs:
        if config.kernel == "stream":
            assert stream_fits(config, shapes)
        else:
            assert tiled_shared_memory(config, shapes) <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("tokens", "out", "first"),
    [(64, 1024, "stream"), (65, 1024, "stream"), (128, 33 * 128, "stream"),
     (65, 34 * 128, "tiled"), (128, 28672, "tiled"), (129, 1024, "tiled")],
)  # fmt: skip
def test_the_first_guess_around_100_tokens(tokens, out, first):
    """Up to 128 tokens, few rows of the weight: a tiled kernel's blocks would leave most
    multiprocessors idle."""
    found = candidates(tokens, prepared_shapes(out, 4096, "int4", 32))
    assert found[0].kernel == first
    kinds = {config.kernel for config in found}
    assert kinds == ({"stream", "tiled"} if tokens <= 128 else {"tiled"})
