"""Grids and rounding against given scales; each toolkit's scales, from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from algorithms.cases import SPECS, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.algorithms.scales import (
    Scales,
    WeightSpec,
    block_amax,
    block_sum,
    encode,
    fake_quantize,
    fill_blocks,
    find_scales,
    nearest,
    round_to_scales,
    spec_of,
    split_rows,
)
from qjax.config import Rule
from qjax.numerics import FORMATS, round_to_format
from qjax.qarray import dequantize, quantize_array, validate

every_grid = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_grid
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_found_scales_give_round_to_nearest(spec, dtype):
    weight = jnp.asarray(weights(64, 96), dtype)
    ours = round_to_scales(weight, spec, find_scales(weight, spec))
    validate(ours)
    expected = quantize_array(
        weight,
        spec.format,
        block=spec.block,
        symmetric=spec.symmetric,
        scale_rule=spec.scale_rule,
        scale_dtype=spec.scale_dtype,
    )
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(fake_quantize(weight, spec), dequantize(expected, "float32"))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=30))
def test_nearest_is_the_conversion(name, numbers):
    x = jnp.asarray(numbers, jnp.float32)
    fmt = FORMATS[name]
    through = oracles.decode(np.asarray(round_to_format(x, fmt)))
    np.testing.assert_array_equal(np.asarray(nearest(x, fmt)), through)


@pytest.mark.parametrize("name", oracles.FLOATS)
def test_nearest_rounds_ties_to_even(name):
    numbers, _ = oracles.grid(name)
    middles = (numbers[1:] + numbers[:-1]) / 2
    got = nearest(jnp.asarray(middles, jnp.float32), FORMATS[name])
    np.testing.assert_array_equal(np.asarray(got), oracles.round_to(middles, name))


AMAX = np.array([0.7, 1.0, 3.3, 1e-3, 117.25], np.float32)


@pytest.mark.parametrize(
    ("spec", "divisor"),
    [
        # compressed-tensors and torchao: absmax / 7.5, / 127.5, / 448.
        (WeightSpec(format="int4", scale_rule="absmax_half"), 7.5),
        (WeightSpec(format="int8", scale_rule="absmax_half"), 127.5),
        (WeightSpec(format="fp8_e4m3"), 448),
        # ModelOpt, SmoothQuant and AWQ: absmax / 7, / 127.
        (WeightSpec(format="int4"), 7),
        (WeightSpec(format="int8"), 127),
        # GPTQ, symmetric: (xmax - xmin) / 15 with xmin = -xmax.
        (WeightSpec(format="int4", scale_rule="absmax_half"), np.float32(15) / 2),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_scales_are_the_toolkits(spec, divisor, sign):
    weight = np.stack([AMAX * sign, AMAX / 3, AMAX / -7], axis=1)
    scale = find_scales(jnp.asarray(weight), spec).scale[:, 0]
    # Bit for bit: one correctly rounded float32 division.
    np.testing.assert_array_equal(scale, AMAX / np.float32(divisor))


@pytest.mark.parametrize(
    "row", [[-1.0, 2.0, 0.3], [0.25, 2.0, 1.0], [-3.0, -1.0, -2.0], [-1.7, 0.9, 0.0]]
)
def test_asymmetric_scales_are_the_toolkits(row):
    # compressed-tensors: (max - min) / 15 with 0 in the range, zero point clamp(round(-8 - min/s)).
    # GPTQ and AutoAWQ count from 0, so their zero point is 8 more: round(-min / s).
    low, high = min(*row, 0.0), max(*row, 0.0)
    step = np.float32(np.float32(high) - np.float32(low)) / np.float32(15)
    found = find_scales(jnp.asarray([row], jnp.float32), SPECS_ASYMMETRIC)
    assert found.scale[0, 0] == step
    zero = np.clip(np.round(-8 - np.float32(low) / step), -8, 7)
    assert found.zero_point[0, 0] == zero
    assert zero + 8 == np.clip(np.round(-np.float32(low) / step), 0, 15)


SPECS_ASYMMETRIC = WeightSpec(format="int4", symmetric=False)


def test_nvfp4_scales_are_the_toolkits():
    # ModelOpt: scale_2 = amax / (6 * 448), local = e4m3(block amax / (6 * scale_2)).
    weight = weights(8, 64)
    spec = SPECS["nvfp4"]
    found = find_scales(jnp.asarray(weight), spec)
    total = np.float32(np.abs(weight).max()) / np.float32(6 * 448)
    amax = np.abs(weight.reshape(8, 4, 16)).max(axis=-1)
    assert found.global_scale == total
    local = oracles.round_to(amax / (np.float32(6) * total), "fp8_e4m3")
    np.testing.assert_array_equal(found.scale, local)


def test_mxfp4_scales_are_the_toolkits():
    # Block maxima and exponents of compressed-tensors (even), ModelOpt (rceil), OCP (floor).
    amax = np.array([1.0, 1.5, 1.51, 1.74, 1.75, 3, 6, 7], np.float32)
    expected = {
        "even": [-2, -2, -2, -2, -1, -1, 0, 1],
        "rceil": [-2, -2, -1, -1, -1, -1, 0, 1],
        "floor": [-2, -2, -2, -2, -2, -1, 0, 0],
    }
    for rule, exponents in expected.items():
        spec = WeightSpec(format="fp4_e2m1", scale_rule=rule, scale_dtype="float8_e8m0fnu")
        scale = find_scales(jnp.asarray(np.stack([amax, -amax / 2], axis=1)), spec).scale
        np.testing.assert_array_equal(np.log2(scale[:, 0]), exponents)


def test_a_rule_gives_its_spec():
    rule = Rule(path=".*", weight="int4", granularity="per_group", group_size=32, symmetric=False)
    expected = WeightSpec(format="int4", block=(1, 32), symmetric=False, scale_dtype="bfloat16")
    assert spec_of(rule) == expected
    assert spec_of(Rule(path=".*", weight="fp8_e4m3")) == WeightSpec(format="fp8_e4m3")


def test_blocks_may_be_cut():
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    sums = block_sum(jnp.asarray(x), (2, 3))
    largest = block_amax(jnp.asarray(-x), (2, 3))
    assert sums.shape == largest.shape == (3, 3)
    filled = fill_blocks(largest, (2, 3), x.shape)
    for i in range(3):
        for j in range(3):
            part = x[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            assert sums[i, j] == part.sum()
            assert largest[i, j] == part.max()
            assert (filled[2 * i : 2 * i + 2, 3 * j : 3 * j + 3] == part.max()).all()


@pytest.mark.parametrize("spec", [SPECS["int4_asymmetric"], SPECS["nvfp4"], SPECS["fp8_block"]])
def test_split_undoes_a_concatenation(spec):
    parts = [weights(rows, 64, seed=rows) for rows in (32, 64, 20)]
    whole = jnp.asarray(np.concatenate(parts))
    scales = find_scales(whole, spec)
    q = round_to_scales(whole, spec, scales)
    for part, weight in zip(split_rows(q, (32, 64, 20)), parts, strict=True):
        validate(part)
        assert part.shape == weight.shape
        total = None if q.global_scale is None else jnp.abs(whole).max()
        alone = round_to_scales(
            jnp.asarray(weight), spec, find_scales(jnp.asarray(weight), spec, total)
        )
        np.testing.assert_array_equal(dequantize(part), dequantize(alone))


def test_encode_saturates():
    scales = Scales(scale=jnp.ones((1, 1)))
    q = round_to_scales(jnp.asarray([[100.0, -100.0]]), WeightSpec(format="int4"), scales)
    assert q.values.tolist() == [[7, -8]]
    one = jnp.float32(1)
    assert encode(jnp.float32(2.5), one, one, FORMATS["int4"]) == 3  # half to even, then shifted
