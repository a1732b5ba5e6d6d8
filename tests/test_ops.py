"""Operations on arrays and QArrays against float64, and dispatch of kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from qjax_kernels.dispatch import dispatch
from qjax_kernels.scaled_gemm import api as scaled
from qjax_kernels.weight_only_gemm import api as weight_only

import qjax
from qjax import cache as kv
from qjax import ops
from qjax.attention import BLOCK_KEYS, BLOCK_QUERIES, Form, at_once
from qjax.qarray import InputSpec, QArray, dequantize, quantize_array, validate

U = oracles.UNIT["float32"]
BF16 = oracles.UNIT["bfloat16"]
both_types = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def random(shape, dtype="float32", seed=0):
    return oracles.narrow(np.random.default_rng(seed).normal(size=shape), dtype)


def as_jax(x, dtype="float32"):
    return jnp.asarray(np.asarray(x, np.float32).astype(jnp.dtype(dtype)))  # compiles nothing


def assert_within(y, reference, bound):
    """Every element: no row can hide."""
    error = np.abs(oracles.decode(y) - reference)
    assert error.shape == np.shape(reference)
    assert np.isfinite(error).all()
    assert (error <= bound).all(), f"{(error / np.maximum(bound, 1e-300)).max()} times the bound"


def with_output(bound, reference, dtype, bias=0.0):
    """Add what rounding the result, and the result with its bias, to dtype costs."""
    u = oracles.UNIT[dtype]
    size = np.abs(reference) + bound
    return bound + 1.01 * u * (size + (size + np.abs(bias) if np.any(bias) else 0))


# linear: plain weights ---------------------------------------------------------------------------


@both_types
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_linear_on_arrays(dtype, lead):
    x, w, b = random((*lead, 64), dtype), random((48, 64), dtype, 1), random((48,), dtype, 2)
    # 64 products and as many sums in float32, in any order.
    bound = 65 * U * (np.abs(x) @ np.abs(w).T)
    y = ops.linear(as_jax(x, dtype), as_jax(w, dtype))
    assert y.dtype == dtype
    assert_within(y, x @ w.T, with_output(bound, x @ w.T, dtype))
    y = ops.linear(as_jax(x, dtype), as_jax(w, dtype), as_jax(b, dtype))
    assert_within(y, x @ w.T + b, with_output(bound, x @ w.T, dtype, b))


def test_linear_computes_in_the_type_of_x():
    x, w = random((3, 64), "bfloat16"), random((48, 64))
    cast = oracles.narrow(w, "bfloat16")
    y = ops.linear(as_jax(x, "bfloat16"), as_jax(w), out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert_within(y, x @ cast.T, 65 * U * (np.abs(x) @ np.abs(cast).T))


# linear: quantized weights -----------------------------------------------------------------------

OUT, IN = 48, 64
linear = jax.jit(ops.linear, static_argnames=("out_dtype", "implementation"))
quantize_activations = jax.jit(ops.quantize_activations)


def weight_of(name, block, *, axis=-1, zero=False, scale_dtype="float32", **parts):
    """A QArray made of random parts, and the same parts as float64 [out, in]."""
    rng = np.random.default_rng(3)
    numbers, _ = oracles.grid(name)
    values = rng.choice(numbers, (OUT, IN))
    if name in oracles.FLOATS:  # spread over the exponents, but of a size that sums can hold
        values = oracles.round_to(rng.normal(size=(OUT, IN)) * 4, name)
    shape = oracles.scale_shape((OUT, IN), block)
    scale = oracles.narrow(rng.uniform(0.5, 2, shape) / 16, scale_dtype)
    zeros = rng.choice(numbers, shape) if zero else np.zeros(shape)

    def placed(x, dtype):
        return as_jax(x if axis == -1 else x.T, dtype)

    dtype = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(name, name)
    q = QArray(
        values=placed(values, dtype),
        scale=placed(scale, scale_dtype),
        zero_point=placed(zeros, dtype) if zero else None,
        format=name,
        block=block if axis == -1 else block[::-1],
        axis=axis,
        **parts,
    )
    validate(q)
    return q, values, scale, zeros


def weight_only_reference(x, values, scale, zeros, block, dtype):
    """x @ W.T in float64, and what float32 sums may add.

    A scale that is constant along a row leaves the sum; any other weight is dequantized in
    float32 and rounded to the type of x, as here.
    """
    weight = oracles.dequantize(values, block, scale, zeros)
    if scale.shape[1] > 1 or zeros.any() or scale.shape[0] not in (1, OUT):
        weight = oracles.narrow(oracles.narrow(weight, "float32"), dtype)
    # IN products and sums, the rounding of the weight, of a product by the scale: IN + 2.
    return x @ weight.T, (IN + 3) * U * (np.abs(x) @ np.abs(weight).T)


GRANULARITIES = {
    "per_tensor": (-1, -1),
    "per_channel": (1, -1),
    "per_group": (1, 16),
    "square": (16, 16),
}
every_granularity = pytest.mark.parametrize(
    "block", GRANULARITIES.values(), ids=GRANULARITIES.keys()
)
# Every type and every axis, without each with each.
type_and_axis = pytest.mark.parametrize(("dtype", "axis"), [("float32", -2), ("bfloat16", -1)])


def check_weight_only(name, block, axis, dtype, *, zero=False, scale_dtype="float32"):
    x = random((2, 3, IN), dtype)
    q, *parts = weight_of(name, block, axis=axis, zero=zero, scale_dtype=scale_dtype)
    y = linear(as_jax(x, dtype), q)
    assert y.dtype == dtype
    reference, bound = weight_only_reference(x, *parts, block, dtype)
    assert_within(y, reference, with_output(bound, reference, dtype))


@type_and_axis
@every_granularity
@pytest.mark.parametrize("name", oracles.COMMON)
def test_linear_weight_only(name, block, axis, dtype):
    check_weight_only(name, block, axis, dtype)


@type_and_axis
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_linear_weight_only_with_zero_points(name, axis, dtype):
    check_weight_only(name, (1, -1), axis, dtype, zero=True)
    check_weight_only(name, (1, 16), axis, dtype, zero=True, scale_dtype="bfloat16")


@both_types
@pytest.mark.parametrize("lead", [(), (1,), (0,), (4, 1)])
def test_linear_weight_only_of_any_batch_with_bias(dtype, lead):
    x, bias = random((*lead, IN), dtype), random((OUT,), dtype, 5)
    q, *parts = weight_of("int4", (1, 16))
    y = linear(as_jax(x, dtype), q, as_jax(bias, dtype))
    reference, bound = weight_only_reference(x, *parts, (1, 16), dtype)
    assert_within(y, reference + bias, with_output(bound, reference, dtype, bias))


def test_linear_out_dtype():
    x = random((3, IN), "bfloat16")
    q, *parts = weight_of("int8", (1, -1))
    y = ops.linear(as_jax(x, "bfloat16"), q, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert_within(y, *weight_only_reference(x, *parts, (1, -1), "bfloat16"))
    narrow = ops.linear(as_jax(x), q, out_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(oracles.decode(narrow), oracles.narrow(y, "bfloat16"))


def test_linear_global_scale():
    x = random((3, IN))
    q, values, scale, zeros = weight_of("int4", (1, 16))
    q = dataclasses.replace(q, global_scale=jnp.float32(0.3))
    scale = oracles.narrow(scale * np.float64(np.float32(0.3)), "float32")
    assert_within(
        ops.linear(as_jax(x), q),
        *weight_only_reference(x, values, scale, zeros, (1, 16), "float32"),
    )


# What products by int8 and fp8 activations combine.
ACTIVATIONS = [("per_token", False), ("per_tensor", False), ("per_tensor", True)]


def quantized_input(x, spec, name):
    """Numbers and scale of activations; each is checked against the oracle."""
    values, scale = quantize_activations(x, spec)
    values, scale = oracles.decode(values), oracles.decode(scale)
    x = oracles.decode(x)
    top = oracles.grid(name)[0][-1]
    if spec.scale is not None:
        exact = oracles.decode(spec.scale)
    elif spec.granularity == "per_token":
        exact = np.abs(x).max(axis=-1, keepdims=True) / top
    else:
        exact = np.abs(x).max() / top
    assert scale.shape == np.shape(exact)
    exact = np.where(exact == 0, 1, exact)  # nothing to scale
    # A division by a constant may be a product with its rounded reciprocal: two roundings.
    assert (np.abs(scale / exact - 1) <= (0 if spec.scale is not None else 2 * U)).all()
    divided = oracles.round_to(oracles.narrow(x / scale, "float32"), name)
    multiplied = x * oracles.narrow(1 / scale, "float32")
    multiplied = oracles.round_to(oracles.narrow(multiplied, "float32"), name)
    np.testing.assert_array_equal(values, np.where(values == divided, divided, multiplied))
    return values, scale


@type_and_axis
@pytest.mark.parametrize("block", [(1, -1), (-1, -1)], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize(("granularity", "static"), ACTIVATIONS)
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_linear_quantized_activations(name, granularity, static, block, axis, dtype):
    x, bias = random((2, 3, IN), dtype), random((OUT,), dtype, 5)
    x[0, 1] *= 64  # a token far from the others
    x[1, 2] = 0  # one without anything
    # A static scale under the largest magnitude, so that some numbers saturate.
    scale = jnp.float32(np.abs(x).max() / oracles.grid(name)[0][-1] / 2) if static else None
    spec = InputSpec(format=name, granularity=granularity, scale=scale)
    q, values, w_scale, _ = weight_of(name, block, axis=axis, input=spec)
    x_values, x_scale = quantized_input(as_jax(x, dtype), spec, name)
    if static:
        assert (np.abs(x_values) >= oracles.grid(name)[0][-1]).any()
    sums = x_values @ values.T
    reference = sums * x_scale * w_scale[:, 0]
    # int32 sums are exact, and those here exact in float32; fp8: IN products and sums in float32.
    assert name != "int8" or np.abs(sums).max() <= 2**24
    size = np.abs(x_values) @ np.abs(values).T * x_scale * w_scale[:, 0]
    bound = 3 * U * np.abs(reference) + (0 if name == "int8" else (IN + 1) * U * size)
    y = linear(as_jax(x, dtype), q)
    assert y.dtype == dtype
    assert_within(y, reference, with_output(bound, reference, dtype))
    y = linear(as_jax(x, dtype), q, as_jax(bias, dtype))
    assert_within(y, reference + bias, with_output(bound, reference, dtype, bias))


@type_and_axis
@every_granularity
@pytest.mark.parametrize(("granularity", "static"), ACTIVATIONS)
def test_linear_fp8_activations_and_int4_weights(granularity, static, block, axis, dtype):
    """Weights are decoded and multiplied in float32, whatever the type of x."""
    x = random((2, 3, IN), dtype)
    x[0, 1] *= 64  # a token far from the others
    scale = jnp.float32(np.abs(x).max() / 448 / 2) if static else None
    spec = InputSpec(format="fp8_e4m3", granularity=granularity, scale=scale)
    q, *parts = weight_of("int4", block, axis=axis, scale_dtype="bfloat16", input=spec)
    x_values, x_scale = quantized_input(as_jax(x, dtype), spec, "fp8_e4m3")
    sums, bound = weight_only_reference(x_values, *parts, block, "float32")
    # The sum is rounded once more, and its product with the scale.
    bound = (bound + 2 * U * np.abs(sums)) * x_scale
    y = linear(as_jax(x, dtype), q)
    assert y.dtype == dtype
    assert_within(y, sums * x_scale, with_output(bound, sums * x_scale, dtype))


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_quantized_activations_of_any_shape(name, granularity):
    for shape in [(7,), (2, 3, 7)]:
        spec = InputSpec(format=name, granularity=granularity)
        quantized_input(as_jax(random(shape)), spec, name)


def test_int8_products_are_exact():
    # 1024 products of at most 128 * 128 sum to at most 2**24: exact in int32 and in float32.
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (6, 1024)), rng.integers(-128, 128, (8, 1024))
    x[0], w[0] = -128, -128
    x[1], w[1] = 127, -128
    spec = InputSpec(format="int8", granularity="per_tensor", scale=jnp.float32(1))
    q = QArray(
        values=jnp.asarray(w, jnp.int8),
        scale=jnp.ones((8, 1)),
        format="int8",
        block=(1, -1),
        input=spec,
    )
    y = ops.linear(jnp.asarray(x, jnp.float32), q)
    expected = x.astype(np.int64) @ w.astype(np.int64).T
    assert np.abs(expected).max() == 2**24
    np.testing.assert_array_equal(np.asarray(y, np.int64), expected)
    raw = scaled.scaled_gemm(
        jnp.asarray(x, jnp.int8),
        jnp.float32(1),
        jnp.asarray(w, jnp.int8),
        jnp.ones((1, 1)),
        out_dtype=jnp.dtype(jnp.float32),
    )
    np.testing.assert_array_equal(np.asarray(raw, np.int64), expected)


def test_int8_sums_are_integers_beyond_float32():
    # Sums to 2**26, which float32 would round at every step: an exact sum is rounded once.
    rng = np.random.default_rng(0)
    x, w = rng.integers(60, 128, (6, 4096)), rng.integers(60, 128, (8, 4096))
    y = scaled.scaled_gemm(
        jnp.asarray(x, jnp.int8),
        jnp.float32(1),
        jnp.asarray(w, jnp.int8),
        jnp.ones((1, 1)),
        out_dtype=jnp.dtype(jnp.float32),
    )
    exact = x.astype(np.int64) @ w.astype(np.int64).T
    assert exact.min() > 2**24
    np.testing.assert_array_equal(oracles.decode(y), oracles.narrow(exact, "float32"))


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_linear_quantized_activations_of_an_empty_batch(granularity):
    q, *_ = weight_of("int8", (1, -1), input=InputSpec(format="int8", granularity=granularity))
    assert ops.linear(jnp.zeros((0, IN)), q).shape == (0, OUT)


@both_types
@pytest.mark.parametrize("act", [None, "int8"])
def test_linear_permutes_then_scales_its_input(dtype, act):
    rng = np.random.default_rng(4)
    x = random((3, IN), dtype)
    perm = rng.permutation(IN)
    pre_scale = oracles.narrow(rng.uniform(0.5, 2, IN), dtype)
    spec = InputSpec(pre_scale=as_jax(pre_scale), perm=jnp.asarray(perm, jnp.int32), format=act)
    q, values, scale, zeros = weight_of("int8", (1, -1), input=spec)
    moved = oracles.narrow(x[:, perm] * pre_scale, dtype)
    # Not jitted: XLA may fuse the product by pre_scale into what follows, without rounding it.
    y = ops.linear(as_jax(x, dtype), q)
    if act is None:
        reference, bound = weight_only_reference(moved, values, scale, zeros, (1, -1), dtype)
    else:
        x_values, x_scale = quantized_input(as_jax(moved, dtype), InputSpec(format=act), act)
        reference = x_values @ values.T * x_scale * scale[:, 0]
        bound = 3 * U * np.abs(reference)
    assert_within(y, reference, with_output(bound, reference, dtype))


@pytest.mark.parametrize("spec", [None, InputSpec(format="int8")], ids=["weight-only", "int8"])
def test_linear_without_jit(spec):
    x = as_jax(random((3, IN)))
    q, *_ = weight_of("int8", (1, -1), input=spec)
    # The same operations, which XLA may fuse: a few roundings apart.
    size = np.abs(oracles.decode(x)) @ np.abs(oracles.decode(dequantize(q, "float32"))).T
    assert_within(ops.linear(x, q), oracles.decode(linear(x, q)), 2 * (IN + 3) * U * size)


@pytest.mark.parametrize("act", [None, "int8"])
def test_quantized_linear_is_near_the_unquantized(act):
    x, w = random((16, IN)), random((OUT, IN), seed=1)
    spec = None if act is None else InputSpec(format=act)
    y = oracles.decode(ops.linear(as_jax(x), quantize_array(as_jax(w), "int8", input=spec)))
    exact = x @ w.T
    # Each number is off by at most half its step, amax / 254. A row of y is off by at most
    # |x|_1 dw (weights) + |w|_1 dx (activations) + IN dx dw in each element, plus float32's.
    dw = np.abs(w).max(axis=1) / 254
    dx = 0 if act is None else np.abs(x).max(axis=1, keepdims=True) / 254
    bound = np.abs(x).sum(axis=1, keepdims=True) * dw + dx * np.abs(w).sum(axis=1) + IN * dx * dw
    bound += (IN + 8) * U * (np.abs(x) @ np.abs(w).T)
    assert_within(y, exact, bound)
    assert oracles.rel_norm(y, exact) <= oracles.rel_norm(exact + bound, exact)
    assert oracles.max_row_error(y, exact) <= oracles.max_row_error(exact + bound, exact)
    # And the bound is no excuse: it is a small part of the product.
    assert oracles.max_row_error(exact + bound, exact) < 0.2


# embed -------------------------------------------------------------------------------------------


@both_types
@pytest.mark.parametrize("ids", [3, [0, OUT - 1, 3, 3], [[1, 2], [47, 0], [5, 5]]])
def test_embed_on_arrays(dtype, ids):
    table = random((OUT, IN), dtype)
    rows = ops.embed(jnp.asarray(ids, jnp.int32), as_jax(table, dtype))
    assert rows.dtype == dtype
    np.testing.assert_array_equal(oracles.decode(rows), table[np.array(ids)])


def check_embed(q, values, scale, zeros, block, dtype):
    ids = np.array([[0, 47, 3], [3, 3, 9]])
    rows = ops.embed(jnp.asarray(ids, jnp.int32), q)
    assert rows.dtype == dtype
    # One product, rounded to float32 and then to the type of the table.
    table = oracles.narrow(oracles.dequantize(values, block, scale, zeros), "float32")
    np.testing.assert_array_equal(oracles.decode(rows), oracles.narrow(table, dtype)[ids])


@every_granularity
@pytest.mark.parametrize(("name", "zero"), [("int8", False), ("int4", True), ("fp8_e5m2", False)])
def test_embed_on_qarrays(name, zero, block):
    q, *parts = weight_of(name, block, zero=zero, dtype="bfloat16")
    check_embed(q, *parts, block, "bfloat16")


@pytest.mark.parametrize("block", [(1, 16), (16, 1), (-1, 1)])
def test_embed_on_tables_of_either_axis(block):
    # The axis is recorded only: a table stays [rows, features].
    q, *parts = weight_of("int4", block, zero=True, dtype="float32")
    check_embed(dataclasses.replace(q, axis=-2), *parts, block, "float32")


def test_embed_scales_globally_and_under_jit():
    q, values, scale, _ = weight_of("int8", (1, 16), dtype="float32")
    q = dataclasses.replace(q, global_scale=jnp.float32(2))
    rows = jax.jit(ops.embed)(jnp.array([7, 1]), q)
    table = oracles.narrow(oracles.dequantize(values, (1, 16), 2 * scale), "float32")
    np.testing.assert_array_equal(oracles.decode(rows), table[[7, 1]])
    assert ops.embed(jnp.int32(7), q).shape == (IN,)


# Norm, rotation, attention -----------------------------------------------------------------------


@both_types
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(dtype, size):
    x = oracles.narrow(random((2, 3, 96)) * size, dtype)
    scale, eps = random((96,), dtype, 1), 1e-5
    y = ops.rms_norm(as_jax(x, dtype), as_jax(scale, dtype), eps)
    assert y.dtype == dtype
    reference = oracles.rms_norm(x, scale, eps)
    # Squares, their sum, the mean and eps: 99 roundings, halved by the root; the root itself (2),
    # two products. In bfloat16 two of them round to it.
    bound = (99 / 2 + 4) * U * np.abs(reference)
    narrow = 2.01 * BF16 if dtype == "bfloat16" else 0
    assert_within(y, reference, bound + narrow * np.abs(reference))


def test_rms_norm_of_zeros():
    y = ops.rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-6)
    np.testing.assert_array_equal(y, 0)


@both_types
def test_rope(dtype):
    x = random((2, 5, 3, 16), dtype)
    angles = np.random.default_rng(1).uniform(-50, 50, (2, 5, 8))
    y = ops.apply_rope(as_jax(x, dtype), as_jax(np.cos(angles)), as_jax(np.sin(angles)))
    assert y.dtype == dtype
    # Two products of rounded cosines and sines, and their sum: 3 roundings of each.
    halves = np.abs(x[..., :8]) + np.abs(x[..., 8:])
    bound = 3.01 * U * np.concatenate([halves, halves], axis=-1)
    reference = oracles.rope(x, angles)
    assert_within(y, reference, with_output(bound, reference, dtype))


def test_rope_at_position_zero_changes_nothing():
    x = as_jax(random((1, 2, 3, 8)))
    y = ops.apply_rope(x, jnp.ones((1, 2, 4)), jnp.zeros((1, 2, 4)))
    np.testing.assert_array_equal(y, x)


def attention_bound(q, k, v, positions, dtype):
    """Largest error of each output, from the roundings of scores, weights and sums."""
    dim, length = q.shape[-1], k.shape[2]
    group = q.shape[2] // k.shape[1]
    # A score sums dim products in float32, is divided, and loses the largest score.
    size = np.einsum("bthd,bhsd->bths", np.abs(q), np.abs(np.repeat(k, group, axis=1)))
    score = (dim + 4) * U * size.max(axis=-1) / np.sqrt(dim)
    # A weight is off by exp(+-score), up and down by the sum; exp, sum and quotient round too,
    # and it is rounded to the type of v. The output sums `length` products.
    unit = oracles.UNIT[dtype]
    relative = 2.2 * score + (2 * length + 12) * U + 1.01 * unit
    mixed = oracles.attention(q, k, np.abs(v), positions)
    return relative[..., None] * mixed


@both_types
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    ("tokens", "length"),
    [(4, 11), (1, 65), (2 * BLOCK_QUERIES, 2 * BLOCK_KEYS), (BLOCK_QUERIES + 1, 3 * BLOCK_KEYS)],
)
def test_attention(heads, kv_heads, tokens, length, dtype):
    batch, dim = 3, 8
    q = random((batch, tokens, heads, dim), dtype)
    k = random((batch, kv_heads, length, dim), dtype, 1)
    v = random((batch, kv_heads, length, dim), dtype, 2)
    # Ragged: every sequence stands elsewhere, the last at the end of the cache.
    positions = np.array([0, 3, length - tokens])[:, None] + np.arange(tokens)
    arguments = *(as_jax(a, dtype) for a in (q, k, v)), jnp.asarray(positions, jnp.int32)
    y = ops.attention(*arguments)
    assert y.dtype == dtype
    reference = oracles.attention(q, k, v, positions)
    bound = attention_bound(q, k, v, positions, dtype)
    assert_within(y, reference, with_output(bound, reference, dtype))
    if dtype == "float32":  # what GPUs run; in bfloat16 XLA's CPU has no such product
        form = Form(divisor=dim**0.5, window=None, soft_cap=None)
        assert_within(at_once(*arguments, None, form=form), reference, bound)


@both_types
def test_attention_does_not_see_past_its_position(dtype):
    batch, kv_heads, length, dim = 2, 2, 12, 8
    q = as_jax(random((batch, 1, 4, dim), dtype), dtype)
    k, v = (as_jax(random((batch, kv_heads, length, dim), dtype, i), dtype) for i in (1, 2))
    positions = jnp.array([[4], [0]], jnp.int32)
    past = (jnp.arange(length) > positions)[:, None, :, None]
    y = ops.attention(q, k, v, positions)
    for garbage in (0.0, -1e4, 3e38):
        fill = jnp.asarray(garbage, dtype)
        spoiled = (jnp.where(past, fill, k), jnp.where(past, fill, v))
        np.testing.assert_array_equal(ops.attention(q, *spoiled, positions), y)
    # Position 0 sees one key: its value comes back.
    np.testing.assert_array_equal(y[1, 0, 0], v[1, 0, 0])
    assert np.isfinite(oracles.decode(y)).all()


# Rows --------------------------------------------------------------------------------------------


def preset_weight(preset):
    weight = {"weight": as_jax(random((96, 256), seed=3))}
    cfg = qjax.preset(preset)
    return qjax.quantize(weight, cfg)["weight"]


ROWS = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), lambda: as_jax(random((256,), seed=1))),
    "plain": (ops.linear, lambda: as_jax(random((96, 256), seed=2))),
    "attention": (lambda x, keys: attention_of_rows(x, *keys), lambda: keys_and_values()),
    **{
        f"linear-{preset}": (ops.linear, lambda preset=preset: preset_weight(preset))
        for preset in ("fp8_per_token", "int8", "int8_wo", "int4_wo")
    },
}


def keys_and_values():
    return tuple(as_jax(random((1, 2, 80, 64), seed=seed)) for seed in (4, 5))


def attention_of_rows(x, k, v):
    """Rows as the queries of four heads, each at a position of its own, over the same keys."""
    # The position is read off the row, so that it stays with it.
    positions = (jnp.abs(x[:, :, 0].astype(jnp.float32)) * 20).astype(jnp.int32)
    queries = x.reshape(*x.shape[:2], 4, 64)
    return ops.attention(queries, k.astype(x.dtype), v.astype(x.dtype), positions)


@both_types
@pytest.mark.parametrize("name", ROWS)
def test_a_row_does_not_depend_on_the_rows_beside_it(name, dtype):
    """On a CPU a decode step has the bits of a full pass; it would flip roundings of activations
    otherwise, and take another path."""
    x = as_jax(random((1, 40, 256), dtype, 6), dtype)
    function, argument = jax.jit(ROWS[name][0]), ROWS[name][1]()
    together = function(x, argument)
    for first, count in ((0, 1), (7, 1), (39, 1), (3, 2), (20, 13)):
        alone = function(x[:, first : first + count], argument)
        np.testing.assert_array_equal(alone, together[:, first : first + count])


# The cache ---------------------------------------------------------------------------------------


def test_init_cache():
    caches = kv.init_cache(3, 2, 4, 16, 8, jnp.dtype(jnp.bfloat16))
    assert len(caches) == 3
    for cache in caches:
        for x in (cache.k, cache.v):
            assert (x.shape, x.dtype) == ((2, 4, 16, 8), jnp.bfloat16)
            np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("tokens", [1, 3])
def test_cache_write_puts_each_sequence_at_its_own_position(tokens):
    batch, kv_heads, length, dim = 3, 2, 9, 4
    k, v = random((batch, kv_heads, length, dim)), random((batch, kv_heads, length, dim), seed=1)
    new_k = random((batch, tokens, kv_heads, dim), seed=2)
    new_v = random((batch, tokens, kv_heads, dim), seed=3)
    start = [0, 4, length - tokens]
    before = kv.KVCache(as_jax(k), as_jax(v))
    after = jax.jit(kv.write)(before, as_jax(new_k), as_jax(new_v), jnp.array(start, jnp.int32))
    for b, t, h in np.ndindex(batch, tokens, kv_heads):
        k[b, h, start[b] + t] = new_k[b, t, h]
        v[b, h, start[b] + t] = new_v[b, t, h]
    np.testing.assert_array_equal(oracles.decode(after.k), k)
    np.testing.assert_array_equal(oracles.decode(after.v), v)
    assert not np.array_equal(before.k, after.k)  # the old cache is as it was


def test_cache_write_casts_to_the_type_of_the_cache():
    (cache,) = kv.init_cache(1, 1, 1, 4, 2, jnp.dtype(jnp.bfloat16))
    new = random((1, 1, 1, 2))
    cache = kv.write(cache, as_jax(new), as_jax(new), jnp.array([2], jnp.int32))
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
    expected = oracles.narrow(new[0, 0], "bfloat16")
    np.testing.assert_array_equal(oracles.decode(cache.k[0, :, 2]), expected)


def test_decoding_through_the_cache_equals_attending_to_everything():
    batch, tokens, heads, kv_heads, dim = 2, 6, 4, 2, 8
    q = random((batch, tokens, heads, dim))
    k, v = (random((batch, tokens, kv_heads, dim), seed=i) for i in (1, 2))
    (cache,) = kv.init_cache(1, batch, kv_heads, 10, dim, jnp.dtype(jnp.float32))
    rows = []
    for t in range(tokens):
        at = jnp.full((batch,), t, jnp.int32)
        now = slice(t, t + 1)
        cache = kv.write(cache, as_jax(k[:, now]), as_jax(v[:, now]), at)
        rows.append(ops.attention(as_jax(q[:, now]), cache.k, cache.v, at[:, None]))
    y = np.concatenate([oracles.decode(row) for row in rows], axis=1)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
    bound = attention_bound(q, k, v, positions, "float32")
    # Products of 10 keys, not 6.
    reference = oracles.attention(q, k, v, positions)
    assert_within(y, reference, with_output(2 * bound, reference, "float32"))


# Dispatch ----------------------------------------------------------------------------------------


def refuse(reason):
    def implementation(*args, **kwargs):
        raise NotImplementedError(reason)

    return implementation


def test_the_first_implementation_runs():
    table = {"fast": lambda a, *, b: ("fast", a, b), "slow": refuse("never asked")}
    assert dispatch("op", table, None, 1, b=2) == ("fast", 1, 2)


def test_a_refusing_implementation_is_passed_over():
    table = {"fast": refuse("no tiles"), "slow": lambda a: ("slow", a), "slower": refuse("no")}
    assert dispatch("op", table, None, 1) == ("slow", 1)


def test_every_reason_is_given_when_all_refuse():
    table = {"fast": refuse("no tiles"), "slow": refuse("no int3")}
    with pytest.raises(NotImplementedError) as error:
        dispatch("op", table, None)
    for words in ("op", "fast: no tiles", "slow: no int3"):
        assert words in str(error.value)


def test_a_named_implementation_runs_or_raises():
    table = {"fast": refuse("no tiles"), "slow": lambda: "slow"}
    assert dispatch("op", table, "slow") == "slow"
    with pytest.raises(NotImplementedError, match="fast: no tiles") as error:
        dispatch("op", table, "fast")
    assert "slow" not in str(error.value)


def test_errors_other_than_refusals_are_not_hidden():
    def broken():
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        dispatch("op", {"fast": broken, "slow": lambda: "slow"}, None)


def test_unknown_implementations_list_the_known():
    with pytest.raises(ValueError, match=r"op has no implementation 'cuda'.*fast, slow, or None"):
        dispatch("op", {"fast": refuse("no"), "slow": refuse("no")}, "cuda")


KERNELS = [
    ("weight_only_gemm", weight_only, None),
    ("scaled_gemm", scaled, InputSpec(format="int8")),
]
every_kernel = pytest.mark.parametrize(("op", "api", "spec"), KERNELS)


@every_kernel
def test_linear_takes_the_name_of_an_implementation(op, api, spec):
    assert ops.KERNELS[op] == tuple(api.IMPLEMENTATIONS)
    q, *_ = weight_of("int8", (1, -1), input=spec)
    x = as_jax(random((3, IN)))
    np.testing.assert_array_equal(ops.linear(x, q, implementation="xla"), ops.linear(x, q))
    with pytest.raises(ValueError, match=f"{op} has no implementation 'cuda'.*xla"):
        ops.linear(x, q, implementation="cuda")


@every_kernel
def test_linear_runs_the_named_implementation(op, api, spec, monkeypatch):
    def seven(x, *args):
        return jnp.full((*x.shape[:-1], OUT), 7.0)

    table = {"refusing": refuse("not today"), "seven": seven, **api.IMPLEMENTATIONS}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", table)
    q, *_ = weight_of("int8", (1, -1), input=spec)
    x = as_jax(random((3, IN)))
    np.testing.assert_array_equal(ops.linear(x, q), 7)
    np.testing.assert_array_equal(ops.linear(x, q, implementation="seven"), 7)
    assert not np.array_equal(ops.linear(x, q, implementation="xla"), np.full((3, OUT), 7))
    with pytest.raises(NotImplementedError, match="refusing: not today"):
        ops.linear(x, q, implementation="refusing")


def test_kernels_refuse_operands_that_do_not_fit():
    x, w = jnp.ones((3, IN)), jnp.ones((OUT, IN + 2), jnp.int8)
    scale = jnp.ones((OUT, 1))
    with pytest.raises(ValueError, match="last axis"):
        weight_only.weight_only_gemm(x, w, scale, out_dtype=x.dtype)
    with pytest.raises(ValueError, match="last axis"):
        scaled.scaled_gemm(x.astype(jnp.int8), jnp.float32(1), w, scale, out_dtype=x.dtype)
    with pytest.raises(ValueError, match="dtype"):
        scaled.scaled_gemm(x, jnp.float32(1), w[:, :IN], scale, out_dtype=x.dtype)
