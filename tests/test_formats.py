"""Formats whose scales are in 8 bits, blocks of rows and columns, and integers of any width:
numbers by independent NumPy, products, trees."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qjax_kernels.scaled_gemm import api as scaled

import qjax
from qjax import ops
from qjax.errors import ConfigError
from qjax.evaluate.compare import trees_equal
from qjax.numerics import FORMATS
from qjax.packing import pack
from qjax.qarray import InputSpec, bits_of, dequantize, quantize_array, validate

U = oracles.UNIT["float32"]
SETTINGS = {
    "nvfp4": {"format": "fp4_e2m1", "block": (1, 16), "scale_dtype": "float8_e4m3fn"},
    **{
        f"{name}-{rule}": {
            "format": format,
            "block": (1, 32),
            "scale_dtype": "float8_e8m0fnu",
            "scale_rule": rule,
        }
        for name, format in (("mxfp4", "fp4_e2m1"), ("mxfp8", "fp8_e4m3"))
        for rule in ("floor", "rceil", "even")
    },
    "fp8_block": {"format": "fp8_e4m3", "block": (128, 128)},
}
every_setting = pytest.mark.parametrize("name", SETTINGS)
STATIC = ("format", "block", "axis", "symmetric", "scale_rule", "scale_dtype")
quantized = jax.jit(quantize_array, static_argnames=STATIC)
dequantized = jax.jit(dequantize, static_argnames="dtype")


def random(shape, seed=0, dtype="float32"):
    """Rows and columns of many sizes, and one block of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.uniform(-3, 3, (shape[-2], 1))
    x[..., 0, :32] = 0
    return np.asarray(x, np.float32).astype(dtype)


# Golden numbers ----------------------------------------------------------------------------------


def nvfp4_by_modelopt(w):
    """Its formulas in float32, with ml_dtypes for e4m3, and e2m1 by counting bounds."""
    bounds = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    scale_2 = np.float32(np.abs(w).max()) / np.float32(6 * 448)
    blocks = w.reshape(w.shape[0], -1, 16)
    scale = np.abs(blocks).max(axis=-1) / (np.float32(6) * scale_2)
    scale = np.where(scale == 0, np.float32(1), np.clip(scale, 2.0**-9, 448))
    scale = scale.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    x = blocks / (scale.astype(np.float32) * scale_2)[..., None]
    codes = np.searchsorted(bounds, np.abs(x), side="left")
    # On the bounds with an odd number below them a tie goes up, to the even one.
    codes += np.isin(np.abs(x), bounds[1::2])
    codes = codes.astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 3)
    return codes.reshape(w.shape), scale, scale_2


def test_nvfp4_is_modelopts_bit_for_bit():
    w = random((24, 256))
    codes, scale, scale_2 = nvfp4_by_modelopt(w)
    q = quantized(jnp.asarray(w), **SETTINGS["nvfp4"])
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8), scale.view(np.uint8))
    assert np.asarray(q.global_scale).tobytes() == scale_2.tobytes()
    np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), codes)
    # As it is packed on disk, two a byte, and as compressed-tensors names it: 448 * 6 / amax.
    packed = np.asarray(pack(q.values, FORMATS["fp4_e2m1"]))
    np.testing.assert_array_equal(packed, codes[:, ::2] | codes[:, 1::2] << 4)
    assert abs(2688 / np.abs(w).max() * np.asarray(q.global_scale) - 1) <= 2 * U


def test_ties_of_e2m1_go_to_even():
    """As compressed-tensors', torchao's and ModelOpt's NVFP4 do; zeros keep their sign."""
    x = jnp.array([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -5, -0.0]])
    x = jnp.pad(x, ((0, 0), (0, 20)))
    # amax 6: the scale is 1.
    q = quantize_array(x, **SETTINGS["mxfp4-rceil"])
    assert np.asarray(q.scale).view(np.uint8).tolist() == [[127]]
    codes = np.asarray(q.values).view(np.uint8)[0, :12].tolist()
    numbers = [0, 1, 1, 2, 2, 4, 4, 6, 0, 1, 4, 0]
    table = oracles.float_table("fp4_e2m1").tolist()
    assert codes[:8] == [table.index(n) for n in numbers[:8]]
    assert codes[8:] == [8 + table.index(n) for n in numbers[8:]]


@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_microscaling_formats_by_their_definition(name, rule):
    """2^(bits - 127) for 32 numbers, each cast by ml_dtypes once it is clipped."""
    format, dtype, top = {
        "mxfp4": ("fp4_e2m1", ml_dtypes.float4_e2m1fn, 6),
        "mxfp8": ("fp8_e4m3", ml_dtypes.float8_e4m3fn, 448),
    }[name]
    w = random((24, 256), seed=3)
    blocks = w.reshape(24, -1, 32).astype(np.float64)
    scale = oracles.power_of_two(np.abs(blocks).max(axis=-1), format, rule)
    values = np.clip(blocks / scale[..., None], -top, top).astype(np.float32).astype(dtype)
    q = quantized(jnp.asarray(w), **SETTINGS[f"{name}-{rule}"])
    assert q.format == format
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8), np.log2(scale) + 127)
    np.testing.assert_array_equal(
        np.asarray(q.values).view(np.uint8), values.reshape(w.shape).view(np.uint8)
    )
    np.testing.assert_array_equal(
        dequantized(q), (values.astype(np.float64) * scale[..., None]).reshape(w.shape)
    )


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (64, 128), (128, 100)])
def test_blocks_of_128_are_deepseeks(shape):
    """ceil(out / 128) x ceil(in / 128) scales, multiplied with what they cover, edges included."""
    w = random(shape, seed=5)
    q = quantized(jnp.asarray(w), **SETTINGS["fp8_block"])
    expected = np.zeros(shape)
    assert q.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert q.scale.dtype == jnp.float32
    for i, j in np.ndindex(q.scale.shape):
        tile = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
        scale = np.abs(w[tile]).max() / np.float32(448)
        assert np.asarray(q.scale)[i, j] == scale
        values = oracles.round_to(oracles.narrow(w[tile] / scale, "float32"), "fp8_e4m3")
        np.testing.assert_array_equal(oracles.decode(q.values)[tile], values)
        expected[tile] = oracles.narrow(values * np.float64(scale), "float32")
    np.testing.assert_array_equal(dequantized(q), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 8))
def test_integers_of_any_width(bits, symmetric):
    name, block = f"int{bits}", (1, 8)
    w = oracles.narrow(random((16, 32), seed=bits), "float32")
    q = quantized(jnp.asarray(w, jnp.float32), name, block=block, symmetric=symmetric)
    scale = oracles.decode(q.scale)
    values, zeros = oracles.quantize(w, name, block, scale, symmetric=symmetric)
    np.testing.assert_array_equal(oracles.decode(q.values), values)
    exact = oracles.scales(w, name, block, symmetric=symmetric)
    assert np.abs(scale / exact - 1).max() <= 3.01 * U
    if not symmetric:
        np.testing.assert_array_equal(oracles.decode(q.zero_point), zeros)
    # Memory is counted as it is: a byte each, but for the types that JAX has.
    each = bits if bits in (2, 4) else 8
    groups = w.size // 8
    assert bits_of(q) == w.size * each + groups * (32 + (0 if symmetric else each))


def test_asymmetric_int3_by_hand():
    # Range 0..7, steps of 1: z = -4, and every number is exact.
    q = quantize_array(jnp.arange(8.0).reshape(1, 8), "int3", symmetric=False)
    assert q.values.tolist() == [list(range(-4, 4))]
    assert (q.zero_point.tolist(), q.scale.tolist()) == ([[-4]], [[1.0]])


# Properties --------------------------------------------------------------------------------------


@every_setting
@settings(deadline=None, derandomize=True, max_examples=12)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-40, 40))
def test_errors_are_those_of_the_element_format(name, seed, exponent):
    how = SETTINGS[name]
    x = (random((4, 128), seed) * 2.0**exponent).astype(np.float32)
    q = quantized(jnp.asarray(x), **how)
    step = oracles.decode(q.scale)
    if q.global_scale is not None:
        step = step * np.asarray(q.global_scale, np.float64)
    rows, columns = how["block"]
    step = np.repeat(np.repeat(step, rows, axis=0), columns, axis=1)[: len(x)]
    _, mantissa_bits, bias, _ = oracles.FLOATS[how["format"]]
    numbers, _ = oracles.grid(how["format"])
    # Half a place of the mantissa or half the smallest number; and what lies over the largest
    # number is clipped: floor and even leave it there, and a scale in e4m3 is up to 2^-4 too small.
    relative, smallest = 2.0 ** -(mantissa_bits + 1), 2.0 ** (1 - bias - mantissa_bits)
    bound = np.maximum(relative * np.abs(x), step * smallest / 2)
    bound = np.maximum(bound, np.abs(x) - numbers[-1] * step) + 8 * U * np.abs(x)
    error = np.abs(oracles.decode(dequantized(q)) - x)
    assert (error <= bound).all()
    if name.endswith("rceil"):
        assert (np.abs(x) <= numbers[-1] * step).all()


@every_setting
@settings(deadline=None, derandomize=True, max_examples=12)
@given(seed=st.integers(0, 2**31))
def test_quantizing_again_changes_nothing(name, seed):
    """Powers of 2 exactly. Beside other scales the largest magnitude of a block gets the largest
    number (of e2m1: its quotient is within 2^-4 of 6, and rounds to that from 5 on), so that the
    range is what it was but for roundings of scales: two of products, two of quotients."""
    how = SETTINGS[name]
    once = dequantized(quantized(jnp.asarray(random((4, 128), seed)), **how))
    again = dequantized(quantized(once, **how))
    np.testing.assert_allclose(again, once, rtol=0 if name.startswith("mx") else 4.01 * U, atol=0)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4-rceil", "fp8_block"])
def test_stacks_jit_and_abstract_arrays(name):
    how = SETTINGS[name]
    x = jnp.asarray(np.stack([random((8, 128), seed) * 10.0**seed for seed in range(3)]))
    stacked = quantized(x, **how)
    validate(stacked)
    assert trees_equal(stacked, jax.jit(jax.vmap(lambda x: quantize_array(x, **how)))(x))
    for i in range(3):
        alone = quantized(x[i], **how)
        assert trees_equal(alone, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        np.testing.assert_array_equal(dequantized(stacked)[i], dequantized(alone))
    assert trees_equal(quantize_array(x, **how), stacked)
    abstract = jax.eval_shape(lambda x: quantize_array(x, **how), x)
    assert jax.tree.structure(abstract) == jax.tree.structure(stacked)
    validate(abstract)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(abstract)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(stacked)
    ]


def test_matrices_that_run_together_share_a_global_scale():
    x = random((8, 64))
    amax = jnp.float32(2 * np.abs(x).max())
    q = quantize_array(jnp.asarray(x), **SETTINGS["nvfp4"], global_amax=amax)
    assert float(q.global_scale) == float(np.float32(amax) / np.float32(2688))
    assert float(jnp.max(q.scale.astype(jnp.float32))) == 224


# Activations and products ------------------------------------------------------------------------

NEW = ("fp8_block", "int4_wo_asym", "int3_wo", "int2_wo", "nvfp4", "nvfp4_wo")
NEW += ("mxfp4", "mxfp4_wo", "mxfp8")
GROUPED_INPUT = ("fp8_block", "nvfp4", "mxfp4", "mxfp8")
linear = jax.jit(ops.linear, static_argnames=("implementation", "out_dtype"))


def input_by_numpy(x, spec):
    """Activations in groups, rounded and put back together, in float64."""
    rows, size = x.reshape(-1, x.shape[-1]).astype(np.float32), spec.group_size
    out, top = np.zeros(rows.shape), np.float32(oracles.grid(spec.format)[0][-1])
    for row, result in zip(rows, out, strict=True):
        parts = [slice(start, start + size) for start in range(0, len(row), size)]
        amax = np.array([np.abs(row[part]).max() for part in parts])
        if spec.scale_dtype == "float8_e4m3fn":
            total = amax.max() / (top * np.float32(448)) if amax.any() else np.float32(1)
            if spec.scale is not None:
                total = np.asarray(spec.scale)
            local = oracles.round_to(amax / (top * total), "fp8_e4m3")
            local = np.where(amax == 0, 1, np.maximum(local, 2.0**-9))
            scale = oracles.narrow(local * total.astype(np.float64), "float32")
        elif spec.scale_dtype == "float8_e8m0fnu":
            amax = amax.astype(np.float64)
            scale = oracles.power_of_two(amax, spec.format, spec.scale_rule)
        else:
            scale = np.where(amax == 0, 1, amax / top).astype(np.float64)
        for part, s in zip(parts, scale, strict=True):
            quotient = oracles.narrow(row[part] / s, "float32")
            result[part] = oracles.round_to(quotient, spec.format) * s
    return out.reshape(x.shape)


def weight_in(preset, out=136, features=256, **changes):
    w = random((out, features), seed=7)
    return qjax.quantize({"weight": jnp.asarray(w)}, qjax.preset(preset, **changes))["weight"]


@pytest.mark.parametrize(
    ("preset", "static"), [*((preset, False) for preset in GROUPED_INPUT), ("nvfp4", True)]
)
def test_activations_in_groups(preset, static):
    spec = weight_in(preset).input
    x = random((5, 256), seed=1)
    x[2] = 0
    if static:
        spec = dataclasses.replace(spec, scale=jnp.float32(np.abs(x).max() / 2688 / 1.5))
    got = jax.jit(ops.rounded)(jnp.asarray(x), spec)
    np.testing.assert_array_equal(got, oracles.narrow(input_by_numpy(x, spec), "float32"))
    # A token does not depend on the others.
    alone = jax.jit(ops.rounded)(jnp.asarray(x[3:4]), spec)
    np.testing.assert_array_equal(alone, got[3:4])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", NEW)
def test_linear(preset, dtype):
    """Rounded activations times the dequantized weight; only sums round, if activations do."""
    x = random((2, 3, 256), seed=1, dtype=jnp.dtype(dtype))
    q = weight_in(preset)
    assert q.values.dtype == FORMATS[q.format].dtype
    exact = x.astype(np.float64) if q.input is None else input_by_numpy(x, q.input)
    weight = oracles.decode(dequantize(q, "float32"))
    unit = 0
    if q.input is None:  # the weight is rounded to the type of x
        weight = oracles.narrow(weight, dtype)
    elif preset == "fp8_block":
        unit = 2 * U  # each product of a block is scaled
    reference = exact @ weight.T
    bound = (257 * U + unit) * (np.abs(exact) @ np.abs(weight).T)
    bound += 2 * oracles.UNIT[dtype] * (np.abs(reference) + bound)
    y = linear(jnp.asarray(x), q)
    assert y.dtype == dtype
    assert (np.abs(oracles.decode(y) - reference) <= bound).all()
    np.testing.assert_array_equal(linear(jnp.asarray(x), q, implementation="xla"), y)


@pytest.mark.parametrize("preset", NEW)
def test_a_row_does_not_depend_on_the_rows_beside_it(preset):
    x, q = jnp.asarray(random((1, 24, 256), seed=2)), weight_in(preset)
    together = linear(x, q)
    for first, count in ((0, 1), (23, 1), (7, 3)):
        part = slice(first, first + count)
        np.testing.assert_array_equal(linear(x[:, part], q), together[:, part])


def test_blocks_of_128_reach_their_kernel(monkeypatch):
    """And sizes that it does not take go through one product of dequantized numbers."""
    calls = []

    def record(x, x_scale, values, scale, *rest):
        calls.append((x.dtype.name, x_scale.shape, values.dtype.name, scale.shape))
        return scaled.xla.scaled_gemm(x, x_scale, values, scale, *rest)

    monkeypatch.setattr(scaled, "IMPLEMENTATIONS", {"kernel": record})
    y = ops.linear(jnp.asarray(random((3, 256))), weight_in("fp8_block"))
    assert calls == [("float8_e4m3fn", (3, 2), "float8_e4m3fn", (2, 2))]
    x = random((3, 200))
    q = weight_in("fp8_block", features=200)
    y = ops.linear(jnp.asarray(x), q)
    assert len(calls) == 1
    exact, weight = input_by_numpy(x, q.input), oracles.decode(dequantize(q, "float32"))
    bound = 201 * U * (np.abs(exact) @ np.abs(weight).T)
    assert (np.abs(oracles.decode(y) - exact @ weight.T) <= bound).all()
    with pytest.raises(NotImplementedError, match=r"'mosaic' takes whole blocks, not \(136, 200\)"):
        ops.linear(jnp.asarray(x), q, implementation="mosaic")


@pytest.mark.parametrize("preset", ["fp8_block", "int3_wo", "nvfp4", "mxfp8"])
def test_experts(preset):
    """As each expert's weight alone."""
    w = jnp.asarray(np.stack([random((40, 256), seed) * 4.0**seed for seed in range(3)]))
    q = qjax.quantize({"experts": {"weight": w}}, qjax.preset(preset))["experts"]["weight"]
    x, sizes = jnp.asarray(random((6, 256), seed=9)), [3, 0, 3]
    y = ops.grouped_linear(x, q, jnp.array(sizes, jnp.int32))
    for expert, rows in ((0, slice(0, 3)), (2, slice(3, 6))):
        alone = jax.tree.map(lambda leaf, expert=expert: leaf[expert], q)
        expected = np.asarray(linear(x[rows], alone))
        size = np.abs(np.asarray(x[rows])) @ np.abs(np.asarray(dequantize(alone, "float32"))).T
        # Activations twice as large as x at most, once they are rounded.
        assert (np.abs(np.asarray(y[rows]) - expected) <= 2 * 2 * 257 * U * size).all()


@pytest.mark.parametrize("preset", NEW)
def test_embeddings_and_heads_by_rule(preset):
    """Rows of the table that the rule quantized, and the product with it."""
    rule = dataclasses.replace(qjax.preset(preset).rules[0], path="embed|lm_head")
    table = random((40, 256), seed=4)
    tree = {"embed": {"embedding": jnp.asarray(table)}, "lm_head": {"weight": jnp.asarray(table)}}
    tree = qjax.quantize(tree, qjax.QuantConfig(rules=[rule]))
    q = tree["embed"]["embedding"]
    ids = jnp.array([[3, 39], [0, 3]])
    np.testing.assert_array_equal(ops.embed(ids, q), dequantized(q)[ids])
    assert trees_equal(tree["lm_head"]["weight"], q)


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [p for p in NEW if p != "fp8_block"])
def test_groups_that_do_not_divide_name_the_weight(preset):
    cfg = qjax.preset(preset)
    size = cfg.rules[0].group_size
    with pytest.raises(ConfigError, match=rf"up\.weight: group size {size} does not divide .* 40"):
        qjax.quantize({"up": {"weight": jnp.ones((8, 40))}}, cfg)


@pytest.mark.parametrize("preset", GROUPED_INPUT)
def test_activations_that_are_not_finite_are_seen(preset):
    """e2m1 has no NaN: its scale has."""
    x = random((3, 256))
    x[1, 5] = np.nan
    y = np.asarray(linear(jnp.asarray(x), weight_in(preset)))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_input_specs_are_checked():
    how = SETTINGS["mxfp8-rceil"]
    for spec in (
        InputSpec(format="fp8_e4m3"),
        InputSpec(format="fp8_e4m3", granularity="per_group", group_size=16),
        InputSpec(format="fp8_e4m3", granularity="per_group"),
        InputSpec(format="fp4_e2m1", granularity="per_group", group_size=32),
    ):
        with pytest.raises(qjax.DataError, match="activations"):
            quantize_array(jnp.ones((8, 64)), **how, input=spec)
