"""QArray: quantize_array and dequantize against a block-by-block oracle, and the pytree itself."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from qjax.errors import ConfigError, DataError
from qjax.qarray import (
    InputSpec,
    QArray,
    bits_of,
    block_for,
    dequantize,
    is_qarray,
    quantize_array,
    scale_shape,
    validate,
)

U = oracles.UNIT["float32"]

BLOCKS = {
    "per_tensor": (-1, -1),
    "per_channel": (1, -1),
    "per_group": (1, 8),
    "square": (4, 16),
}

# Widths of every kind; test_formats.py has the others, and scales in 8 bits.
INTEGERS, FLOATS = ("int3", "int4", "int8"), ("fp4_e2m1", "fp8_e4m3", "fp8_e5m2")
# format, symmetric, scale rule.
SCHEMES = [
    *((name, True, "absmax") for name in INTEGERS + FLOATS),
    *((name, True, "absmax_half") for name in INTEGERS),
    *((name, False, "absmax") for name in INTEGERS),
]
every_scheme = pytest.mark.parametrize(("name", "symmetric", "rule"), SCHEMES)
# One of each kind: symmetric, both of its rules, asymmetric, float.
KINDS = [("int4", True, "absmax"), ("int8", True, "absmax_half"), ("int4", False, "absmax")]
KINDS += [("fp8_e4m3", True, "absmax")]
every_kind = pytest.mark.parametrize(("name", "symmetric", "rule"), KINDS)


def random(shape, dtype="float32", seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return oracles.narrow(x, dtype)


def as_jax(x, dtype="float32"):
    return jnp.asarray(np.asarray(x, np.float32).astype(jnp.dtype(dtype)))  # compiles nothing


# One compilation for each call instead of one for each operation; test_jit_agrees_with_eager.
STATIC = ("format", "block", "axis", "symmetric", "scale_rule", "scale_dtype")
quantized = jax.jit(quantize_array, static_argnames=STATIC)
dequantized = jax.jit(dequantize, static_argnames="dtype")


def parts(q):
    """values, scale and zero point as float64; zeros for a symmetric QArray."""
    zero = np.zeros(q.scale.shape) if q.zero_point is None else oracles.decode(q.zero_point)
    return oracles.decode(q.values), oracles.decode(q.scale), zero


def check_scales(scale, x, name, block, symmetric, rule, scale_dtype):
    """Stored scales are the formula, rounded."""
    expected = oracles.scales(x, name, block, symmetric=symmetric, rule=rule)
    assert scale.shape == expected.shape
    np.testing.assert_array_equal(oracles.narrow(scale, scale_dtype), scale)
    # float32: max - min, the reciprocal of a constant, the product; then the storage type.
    roundings = 3 * U + (oracles.UNIT["bfloat16"] if scale_dtype == "bfloat16" else 0)
    assert np.abs(scale / expected - 1).max() <= roundings * (1 + roundings)


def check_numbers(q, x):
    """Against the scale that is stored, every number and every zero point is exact."""
    values, scale, zero = parts(q)
    symmetric = q.zero_point is None
    nearest, zeros = oracles.quantize(x, q.format, q.block, scale, symmetric=symmetric)
    np.testing.assert_array_equal(zero, zeros)
    np.testing.assert_array_equal(values, nearest)


# quantize_array against the oracle -------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_numbers_are_the_nearest(name, symmetric, rule, block):
    check_quantized(name, symmetric, rule, block, "float32", "float32")


@every_scheme
def test_numbers_are_the_nearest_in_bfloat16(name, symmetric, rule):
    check_quantized(name, symmetric, rule, (1, 8), "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_weights_and_scales_of_different_types(dtype, scale_dtype):
    check_quantized("int4", True, "absmax", (1, 8), dtype, scale_dtype)


def check_quantized(name, symmetric, rule, block, dtype, scale_dtype):
    x = random((16, 32), dtype)
    q = quantized(
        as_jax(x, dtype),
        name,
        block=block,
        symmetric=symmetric,
        scale_rule=rule,
        scale_dtype=scale_dtype,
    )
    values, scale, zero = parts(q)
    check_scales(scale, x, name, block, symmetric, rule, scale_dtype)
    check_numbers(q, x)
    # One product, rounded to float32, then to the dtype of x.
    exact = oracles.narrow(oracles.dequantize(values, block, scale, zero), "float32")
    y = dequantized(q)
    assert y.dtype == dtype
    np.testing.assert_array_equal(oracles.decode(y), oracles.narrow(exact, dtype))
    validate(q)
    assert (q.format, q.block, q.dtype, q.layout) == (name, block, dtype, "canonical")
    assert (q.zero_point is None) == symmetric
    assert q.scale.dtype == scale_dtype


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("name", ["int4", "fp8_e4m3"])
def test_granularity_follows_the_contracting_axis(granularity, name):
    x = random((16, 32))
    q = quantized(as_jax(x), name, block=block_for(granularity, 8, -1), axis=-1)
    # Quantizing the transpose along the other axis is the same thing.
    block = block_for(granularity, 8, -2)
    transposed = quantized(as_jax(x.T), name, block=block, axis=-2)
    for mine, theirs in zip(parts(q), parts(transposed), strict=True):
        np.testing.assert_array_equal(mine, theirs.T)
    scales = {"per_tensor": 1, "per_channel": 16, "per_group": 16 * 32 // 8}[granularity]
    assert q.scale.size == transposed.scale.size == scales
    assert q.group_size == transposed.group_size == (8 if granularity == "per_group" else -1)
    assert (q.axis, transposed.axis) == (-1, -2)


def test_block_for():
    assert block_for("per_tensor", -1, -1) == block_for("per_tensor", -1, -2) == (-1, -1)
    assert block_for("per_channel", -1, -1) == (1, -1)
    assert block_for("per_channel", -1, -2) == (-1, 1)
    assert block_for("per_group", 64, -1) == (1, 64)
    assert block_for("per_group", 64, -2) == (64, 1)
    with pytest.raises(ConfigError, match=r"'per_row'.*per_channel, per_group, per_tensor"):
        block_for("per_row", -1, -1)


@every_kind
@pytest.mark.parametrize("block", [(1, 8), (-1, -1)])
def test_stacked_matrices_are_quantized_one_by_one(name, symmetric, rule, block):
    x = random((3, 16, 32)) * np.array([1, 100, 0.01])[:, None, None]
    x = oracles.narrow(x, "float32")
    settings = {"block": block, "symmetric": symmetric, "scale_rule": rule}
    q = quantized(as_jax(x), name, **settings)
    validate(q)
    assert q.scale.shape == oracles.scale_shape(x.shape, block)
    check_numbers(q, x)
    for i in range(3):
        alone = quantized(as_jax(x[i]), name, **settings)
        # A single scale is divided, several are multiplied by the reciprocal: see check_scales.
        np.testing.assert_allclose(q.scale[i], alone.scale, rtol=6 * U, atol=0)
    np.testing.assert_array_equal(
        oracles.decode(dequantized(q)),
        oracles.narrow(oracles.dequantize(parts(q)[0], block, *parts(q)[1:]), "float32"),
    )


def test_ties_go_to_even():
    # bfloat16 weights and scales have few bits: quotients that are exactly ties are common.
    x = random((64, 256), "bfloat16")
    q = quantized(as_jax(x, "bfloat16"), "int4", block=(1, 8), scale_dtype="bfloat16")
    values, scale, _ = parts(q)
    nearest, _ = oracles.quantize(x, "int4", (1, 8), scale)
    np.testing.assert_array_equal(values, nearest)


# Error bounds ------------------------------------------------------------------------------------


def most_error_in_steps(name, symmetric, rule, scale_dtype):
    """Largest |x - dequantized| / s of an integer format.

    Rounding costs 1/2. A stored scale that was rounded down by u (its type's roundoff) makes the
    range of `levels` steps longer by levels * u / (1 - u), which is clipped: on top of the exact
    fit (absmax), where the clip costs less than the 1/2; of half a step (absmax_half), which
    clips 1/2 already; of 1/2 by the rounded zero point (asymmetric). Then roundings to float32 of
    up to `levels` steps: scale 3, quotient 2, zero point 2, dequantized product 1.
    """
    low, high = oracles.INTEGERS[name]
    u = oracles.UNIT["bfloat16"] if scale_dtype == "bfloat16" else 0
    if not symmetric:
        levels, clipped = high - low, 0.5
    else:
        levels, clipped = high + 0.5, 0.5 if rule == "absmax_half" else 0
    stretch = levels * u / (1 - u)
    return max(0.5, clipped + stretch) + 8 * levels * U


# 21 significant bits, then a power of 2: exact in float32, and far from its limits.
matrices = hnp.arrays(np.int32, (4, 16), elements=st.integers(-(2**20), 2**20))
exponents = st.integers(-80, 80)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "symmetric", "rule"), [s for s in SCHEMES if "int" in s[0]])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(x=matrices, exponent=exponents, offset=st.sampled_from([0, 2**20, -(2**20)]))
def test_integer_error_is_half_a_step(name, symmetric, rule, scale_dtype, x, exponent, offset):
    x = (x + offset) * 2.0**exponent
    q = quantized(
        as_jax(x),
        name,
        block=(1, 8),
        symmetric=symmetric,
        scale_rule=rule,
        scale_dtype=scale_dtype,
    )
    y = oracles.decode(dequantized(q))
    step = np.repeat(oracles.decode(q.scale), 8, axis=1)
    error = np.abs(y - x) / step
    assert error.max() <= most_error_in_steps(name, symmetric, rule, scale_dtype)
    if not symmetric or rule == "absmax":
        np.testing.assert_array_equal(y[x == 0], 0)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FLOATS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(x=matrices, exponent=exponents)
def test_float_error_is_relative(name, scale_dtype, x, exponent):
    x = x * 2.0**exponent
    q = quantized(as_jax(x), name, block=(1, 8), scale_dtype=scale_dtype)
    step = np.repeat(oracles.decode(q.scale), 8, axis=1)
    error = np.abs(oracles.decode(dequantized(q)) - x)
    # Half a place of the mantissa, or half the smallest subnormal; what a bf16 scale makes clip
    # (2**-8 at the top) is less. Then 6 roundings to float32: scale 3, quotient 2, product 1.
    _, mantissa_bits, bias, _ = oracles.FLOATS[name]
    relative = 2.0 ** -(mantissa_bits + 1)
    smallest = 2.0 ** (1 - bias - mantissa_bits)
    bound = np.maximum(relative * np.abs(x), step * smallest / 2) + 6 * U * np.abs(x)
    assert (error <= bound).all()


@every_scheme
def test_zeros_stay_zero(name, symmetric, rule):
    q = quantized(jnp.zeros((4, 8)), name, block=(1, 4), symmetric=symmetric, scale_rule=rule)
    np.testing.assert_array_equal(oracles.decode(dequantized(q)), 0)
    np.testing.assert_array_equal(oracles.decode(q.scale), 1)


@every_scheme
@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e10, 1e37])
def test_magnitude_does_not_matter(name, symmetric, rule, magnitude):
    # A power of 2, so that scaling x scales the scale and changes no number.
    factor = 2.0 ** np.round(np.log2(magnitude))
    x = random((4, 16)) / 8
    q = quantized(as_jax(x), name, symmetric=symmetric, scale_rule=rule)
    scaled = quantized(as_jax(x * factor), name, symmetric=symmetric, scale_rule=rule)
    values, scale, zero = parts(q)
    np.testing.assert_array_equal(parts(scaled)[0], values)
    np.testing.assert_array_equal(parts(scaled)[1], scale * factor)
    np.testing.assert_array_equal(parts(scaled)[2], zero)


@pytest.mark.parametrize("name", FLOATS)
def test_tiny_rows_stay_finite(name):
    q = quantize_array(jnp.array([[0.0, 1e-36, -5e-37]]), name)
    assert np.isfinite(oracles.decode(dequantize(q))).all()


def test_asymmetric_range_beyond_float32_stays_finite():
    q = quantize_array(jnp.array([[-3e38, 3e38]]), "int8", symmetric=False)
    assert np.isfinite(oracles.decode(dequantize(q))).all()


@every_kind
@pytest.mark.parametrize("shape", [(1, 16), (16, 1)])
def test_single_rows_and_columns(name, symmetric, rule, shape):
    x = random(shape)
    q = quantized(as_jax(x), name, symmetric=symmetric, scale_rule=rule)
    check_numbers(q, x)


@pytest.mark.parametrize("offset", [5.0, -5.0])
@pytest.mark.parametrize("name", INTEGERS)
def test_one_sided_weights_use_all_levels_but_keep_zero(name, offset):
    x = oracles.narrow(np.random.default_rng(0).uniform(-1, 1, (4, 64)) + offset, "float32")
    q = quantized(as_jax(x), name, symmetric=False)
    values, _, zero = parts(q)
    low, high = oracles.INTEGERS[name]
    np.testing.assert_array_equal(zero, low if offset > 0 else high)
    np.testing.assert_array_equal(
        values.max(axis=1) if offset > 0 else values.min(axis=1), high if offset > 0 else low
    )


def test_global_scale_multiplies():
    x = random((4, 16))
    q = quantize_array(as_jax(x), "int8", block=(1, 8))
    doubled = dataclasses.replace(q, global_scale=jnp.float32(2))
    np.testing.assert_array_equal(dequantize(doubled), 2 * dequantize(q))


def test_dequantize_to_another_dtype():
    q = quantize_array(as_jax(random((4, 16)), "bfloat16"), "int8")
    wide = dequantize(q, "float32")
    assert wide.dtype == jnp.float32
    values, scale, _ = parts(q)
    exact = oracles.narrow(oracles.dequantize(values, (1, -1), scale), "float32")
    np.testing.assert_array_equal(oracles.decode(wide), exact)


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 5), (3, -1), (1, 64), (1, 0), (1, -2)])
def test_block_that_does_not_divide(block):
    length, size = (block[1], 32) if block[0] == 1 else (block[0], 16)
    with pytest.raises(ConfigError, match=f"{length} does not divide an axis of {size}"):
        scale_shape((16, 32), block)
    with pytest.raises(ConfigError, match=f"{length} does not divide an axis of {size}"):
        quantize_array(jnp.ones((16, 32)), "int8", block=block)


@pytest.mark.parametrize("shape", [(), (8,)])
def test_fewer_than_two_axes(shape):
    with pytest.raises(ConfigError, match="needs two axes"):
        quantize_array(jnp.ones(shape), "int8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "int9"}, "'int9'.*fp8_e4m3, fp8_e5m2, int2, int3, int4, .*, int8"),
        ({"scale_dtype": "float16"}, "'float16'.*bfloat16, float32, float8_e4m3fn, float8_e8m0fnu"),
        ({"scale_rule": "mse"}, "'mse'.*absmax, absmax_half, even"),
        ({"scale_dtype": "float8_e4m3fn"}, "'float8_e4m3fn' is for float formats, not 'int8'"),
        ({"scale_dtype": "float8_e8m0fnu"}, "'absmax' with scale_dtype 'float8_e8m0fnu'.*rceil"),
        ({"format": "fp8_e4m3", "scale_rule": "rceil"}, "'rceil' with scale_dtype 'float32'"),
        ({"axis": 0}, "axis 0.*-1.*-2"),
        ({"format": "fp8_e4m3", "symmetric": False}, "'fp8_e4m3' has no zero point"),
        ({"format": "fp8_e4m3", "scale_rule": "absmax_half"}, "not 'fp8_e4m3'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        quantize_array(jnp.ones((4, 8)), **({"format": "int8"} | settings))


def test_dequantize_refuses_device_layouts():
    q = quantize_array(jnp.ones((4, 8)), "int8")
    with pytest.raises(ConfigError, match="'tiled'"):
        dequantize(dataclasses.replace(q, layout="tiled"))


def broken(**changes):
    spec = InputSpec(pre_scale=jnp.ones(32), perm=jnp.arange(32))
    q = quantize_array(as_jax(random((16, 32))), "int4", block=(1, 8), symmetric=False, input=spec)
    return dataclasses.replace(q, **changes)


def test_validate_accepts_concrete_and_abstract():
    validate(broken())
    validate(jax.eval_shape(lambda: broken()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": jnp.zeros((16, 32), jnp.int8)}, "values are int8.*int4 needs int4"),
        ({"values": jnp.zeros((16, 16), jnp.int4)}, r"scale has shape \(16, 4\).*\(16, 2\)"),
        ({"format": "int8"}, "values are int4.*int8 needs int8"),
        ({"scale": jnp.ones((16, 1))}, r"scale has shape \(16, 1\).*\(16, 4\)"),
        ({"scale": jnp.ones((4, 16))}, r"scale has shape \(4, 16\)"),
        ({"zero_point": jnp.zeros((16, 1), jnp.int4)}, r"zero_point has shape \(16, 1\)"),
        ({"block": (1, 16)}, r".*blocks of \(1, 16\) need \(16, 2\)"),
        ({"input": InputSpec(pre_scale=jnp.ones(16))}, r"pre_scale has shape \(16,\), not \(32,"),
        ({"input": InputSpec(perm=jnp.arange(4))}, r"perm has shape \(4,\), not \(32,\)"),
        (
            {"input": InputSpec(format="int8")},
            "activations in 'int8' meet a weight in 'int4'; no product takes these, but int4 with "
            "fp8_e4m3, int8 with int8, ",
        ),
        (
            {"input": InputSpec(format="fp8_e4m3"), "zero_point": jnp.zeros((16, 4), jnp.int4)},
            r"activations in 'fp8_e4m3' need a symmetric int4 weight, not blocks of \(1, 8\) with",
        ),
        ({"axis": -2}, r"pre_scale has shape \(32,\), not \(16,\)"),
    ],
)
def test_validate_names_what_is_wrong(changes, message):
    for q in (broken(**changes), jax.eval_shape(lambda: broken(**changes))):
        with pytest.raises(DataError, match=rf"layers\.3\.weight: {message}"):
            validate(q, "layers.3.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": jnp.ones((16, 4), jnp.int32)},
        {"zero_point": jnp.zeros((16, 4), jnp.float32)},
        {"global_scale": jnp.ones((2, 1))},
        {"block": (1, 5)},
        {"axis": 1},
        {"format": "int9"},
        {"format": "int5"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_validate_checks_every_invariant(changes):
    with pytest.raises(DataError, match=r"layers\.3\.weight"):
        validate(broken(**changes), "layers.3.weight")


# Sizes -------------------------------------------------------------------------------------------


def test_int4_in_groups_of_128_takes_4_and_an_eighth_bits():
    q = quantize_array(jnp.ones((256, 1024)), "int4", block=(1, 128), scale_dtype="bfloat16")
    assert q.size == 256 * 1024
    assert bits_of(q) == 4.125 * q.size


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("int4", 4), ("uint4", 4), ("int8", 8), ("float8_e4m3fn", 8), ("bfloat16", 16), ("int32", 32)],
)
def test_bits_of_arrays(dtype, bits):
    assert bits_of(jnp.zeros((3, 5), dtype)) == 15 * bits
    assert bits_of(jax.ShapeDtypeStruct((3, 5), jnp.dtype(dtype))) == 15 * bits


def test_bits_of_trees_counts_every_part():
    spec = InputSpec(scale=jnp.float32(1), pre_scale=jnp.ones(32), perm=jnp.arange(32))
    q = quantize_array(jnp.ones((16, 32)), "int4", block=(1, 8), symmetric=False, input=spec)
    weight = 16 * 32 * 4 + 16 * 4 * (32 + 4)
    assert bits_of(q) == weight + 32 + 32 * 32 + 32 * 32
    assert bits_of({"a": q, "b": [jnp.zeros(3, jnp.int8)], "c": None}) == bits_of(q) + 24


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (lambda: jnp.ones(3, bool), 3 * 8),
        (lambda: jnp.ones(3, jnp.complex64), 3 * 64),
        (lambda: jax.random.key(0), 2 * 32),
    ],
)
def test_bits_of_other_leaves(make, bits):
    assert bits_of(make()) == bits_of(jax.eval_shape(make)) == bits


# The pytree --------------------------------------------------------------------------------------


def test_shape_comes_from_values():
    q = quantize_array(jnp.ones((3, 16, 32)), "int8")
    assert (q.shape, q.ndim, q.size) == ((3, 16, 32), 3, 3 * 16 * 32)
    assert jax.vmap(lambda row: jnp.zeros(row.shape))(q).shape == (3, 16, 32)
    assert is_qarray(q)
    assert not is_qarray(q.values)


@every_scheme
def test_jit_agrees_with_eager(name, symmetric, rule):
    x = as_jax(random((16, 32)))
    settings = {"block": (1, 8), "symmetric": symmetric, "scale_rule": rule}
    eager, jitted = quantize_array(x, name, **settings), quantized(x, name, **settings)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for a, b in zip(parts(eager), parts(jitted), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(dequantize(eager), dequantized(jitted))


def test_vmap_agrees_with_the_stack():
    x = as_jax(random((3, 16, 32)))
    stacked = quantize_array(x, "int4", block=(1, 8), symmetric=False)
    mapped = jax.vmap(lambda x: quantize_array(x, "int4", block=(1, 8), symmetric=False))(x)
    assert jax.tree.structure(stacked) == jax.tree.structure(mapped)
    for a, b in zip(parts(stacked), parts(mapped), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(jax.vmap(dequantize)(mapped), dequantize(stacked))


@every_kind
def test_eval_shape_agrees_with_the_result(name, symmetric, rule):
    def weight_of(x):
        return quantize_array(x, name, symmetric=symmetric, scale_rule=rule)

    x = jnp.ones((16, 32), jnp.bfloat16)
    abstract, concrete = jax.eval_shape(weight_of, x), jax.jit(weight_of)(x)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_maps_to_specs_and_back():
    q = broken()
    specs = jax.tree.map(lambda x: P(*[None] * x.ndim), q)
    assert is_qarray(specs)
    assert specs.values == P(None, None)
    assert specs.input.perm == P(None)
    leaves, structure = jax.tree.flatten(q)
    assert len(leaves) == 5
    back = jax.tree.unflatten(structure, leaves)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), leaves, strict=True))


def test_static_fields_are_part_of_the_structure():
    q = quantize_array(jnp.ones((4, 8)), "int8")
    for change in ({"block": (1, 8)}, {"dtype": "bfloat16"}, {"axis": -2}, {"layout": "tiled"}):
        assert jax.tree.structure(q) != jax.tree.structure(dataclasses.replace(q, **change))
    # Leaves of another shape are the same structure: no shape is stored.
    other = quantize_array(jnp.ones((2, 16)), "int8")
    assert jax.tree.structure(q) == jax.tree.structure(other)


def test_scans_over_a_stack_of_layers():
    x = as_jax(random((3, 8, 8)))
    q = quantize_array(x, "int8")

    def layer(h, weight: QArray):
        assert weight.shape == (8, 8)
        return dequantize(weight) @ h, None

    h, _ = jax.lax.scan(layer, jnp.ones(8), q)
    expected = bound = np.ones(8)
    for w in oracles.decode(dequantize(q)):
        expected, bound = w @ expected, np.abs(w) @ bound
    # Three layers of 8 products and sums: 3 * 8 roundings of at most `bound`.
    assert (np.abs(oracles.decode(h) - expected) <= 25 * U * bound).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"block": (1, 8)},
        {"symmetric": False},
        {"input": InputSpec(format="fp8_e4m3")},
        {"input": InputSpec(format="int8", granularity="per_row")},
        {"input": InputSpec(format="int8", granularity="per_group", group_size=8)},
        {"input": InputSpec(format="int8", granularity="per_group")},
        {"input": InputSpec(format="int8", group_size=8)},
        {"input": InputSpec(format="int8", scale_dtype="float8_e8m0fnu")},
    ],
    ids=str,
)
def test_activations_are_quantized_only_against_weights_that_allow_it(settings):
    """A product of int8 with int8 has no place for groups or zero points; they must not be lost."""
    arguments = {"input": InputSpec(format="int8")} | settings
    with pytest.raises(DataError):
        quantize_array(jnp.ones((16, 32)), "int8", **arguments)
