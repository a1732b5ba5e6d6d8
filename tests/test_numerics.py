"""Formats: rounding against enumerated tables, saturation, scale formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import ConfigError
from qjax.numerics import (
    FORMATS,
    get_format,
    global_scale,
    representable,
    round_to_format,
    scale_beside,
    scale_from_amax,
)

every_format = pytest.mark.parametrize("name", oracles.FORMATS)
integer_format = pytest.mark.parametrize("name", oracles.INTEGERS)
float_format = pytest.mark.parametrize("name", oracles.FLOATS)


jitted = jax.jit(round_to_format, static_argnums=1)


def rounded(x, name, dtype="float32"):
    out = jitted(jnp.asarray(x, dtype), FORMATS[name])
    assert out.dtype == FORMATS[name].dtype
    assert out.shape == np.shape(x)
    return oracles.decode(np.asarray(out))


def test_every_format_has_an_oracle():
    assert set(FORMATS) == set(oracles.FORMATS)


@every_format
def test_format_describes_its_grid(name):
    numbers, _ = oracles.grid(name)
    fmt = get_format(name)
    assert fmt.name == name
    assert (fmt.min, fmt.max) == (numbers[0], numbers[-1])
    assert fmt.is_integer == (name in oracles.INTEGERS)
    assert fmt.bits == int(name.removeprefix("int").removeprefix("fp")[0])
    assert jnp.zeros(0, fmt.dtype).dtype == fmt.dtype


def test_known_ranges():
    assert (get_format("fp8_e4m3").max, get_format("fp8_e5m2").max) == (448, 57344)
    assert (get_format("int4").min, get_format("int8").max) == (-8, 127)
    assert (get_format("int2").min, get_format("int3").max) == (-2, 3)
    assert get_format("fp4_e2m1").max == 6


@pytest.mark.parametrize("name", ["int9", "INT8", "", None, 8])
def test_unknown_format_lists_the_known(name):
    with pytest.raises(ConfigError) as error:
        get_format(name)
    assert repr(name) in str(error.value)
    for known in oracles.FORMATS:
        assert known in str(error.value)


@every_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_of_the_format_stay(name, dtype):
    # Every number has at most 8 significant bits: exact in each of these types.
    numbers, _ = oracles.grid(name)
    np.testing.assert_array_equal(rounded(numbers, name, dtype), numbers)


@every_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_midpoints_go_to_even(name, dtype):
    numbers, _ = oracles.grid(name)
    middles = (numbers[1:] + numbers[:-1]) / 2
    np.testing.assert_array_equal(oracles.narrow(middles, dtype), middles)  # still ties
    np.testing.assert_array_equal(rounded(middles, name, dtype), oracles.round_to(middles, name))


@every_format
def test_beside_midpoints_the_nearer_wins(name):
    # One float32 step off the tie: fails if the conversion rounds twice, as through float16.
    numbers, _ = oracles.grid(name)
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    below = np.nextafter(middles, np.float32(-np.inf))
    above = np.nextafter(middles, np.float32(np.inf))
    np.testing.assert_array_equal(rounded(below, name), numbers[:-1])
    np.testing.assert_array_equal(rounded(above, name), numbers[1:])


@every_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_numbers(name, dtype):
    rng = np.random.default_rng(0)
    top = get_format(name).max
    uniform = rng.uniform(-1.1 * top, 1.1 * top, 2000)
    spread = rng.normal(size=2000) * top * 2.0 ** rng.uniform(-40, 2, 2000)
    x = oracles.narrow(np.concatenate([uniform, spread]), dtype)
    np.testing.assert_array_equal(rounded(x, name, dtype), oracles.round_to(x, name))


@every_format
@settings(deadline=None, derandomize=True, max_examples=25)
@given(x=st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=16))
def test_any_number(name, x):
    x = np.resize(np.array(x), 16)  # one shape: compiled once
    np.testing.assert_array_equal(rounded(x, name), oracles.round_to(x, name))


@every_format
def test_out_of_range_saturates(name):
    fmt = get_format(name)
    x = np.array([fmt.max * 1.0001, fmt.max + 1, fmt.max * 1.5, 1e30, np.inf])
    assert set(rounded(x, name)) == {fmt.max}
    x = np.array([fmt.min * 1.0001, fmt.min - 1, fmt.min * 1.5, -1e30, -np.inf])
    assert set(rounded(x, name)) == {fmt.min}


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_nan_stays_nan_and_spoils_nothing_else(name):
    out = rounded(np.array([np.nan, 1.0, -np.nan]), name)
    np.testing.assert_array_equal(out, [np.nan, 1.0, np.nan])


@float_format
def test_negative_zero_keeps_its_sign(name):
    assert np.signbit(rounded(np.array([-0.0, -1e-20]), name)).all()


@every_format
def test_eager_and_jitted_agree(name):
    x = np.linspace(-2, 2, 501, dtype=np.float32) * np.float32(get_format(name).max)
    eager = round_to_format(jnp.asarray(x), get_format(name))
    np.testing.assert_array_equal(oracles.decode(np.asarray(eager)), rounded(x, name))


# Scales ------------------------------------------------------------------------------------------


def scale_of(amax, name, rule="absmax"):
    scale = scale_from_amax(jnp.asarray(amax, jnp.float32), get_format(name), rule)
    assert scale.dtype == jnp.float32
    assert scale.shape == np.shape(amax)
    return np.asarray(scale, np.float64)


# Dividing by a constant may be done as a product with its rounded reciprocal: two roundings.
SCALE_ERROR = 2 * oracles.UNIT["float32"]


@every_format
def test_absmax_divides_by_the_largest_number(name):
    amax = np.random.default_rng(1).uniform(0.01, 100, (3, 50)).astype(np.float32)
    expected = amax.astype(np.float64) / oracles.grid(name)[0][-1]
    error = np.abs(scale_of(amax, name) / expected - 1)
    assert error.max() <= SCALE_ERROR


@integer_format
def test_absmax_half_divides_by_half_a_step_more(name):
    amax = np.random.default_rng(2).uniform(0.01, 100, (3, 50)).astype(np.float32)
    expected = amax.astype(np.float64) / ((2 ** int(name[3:]) - 1) / 2)
    error = np.abs(scale_of(amax, name, "absmax_half") / expected - 1)
    assert error.max() <= SCALE_ERROR


@every_format
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_scale_is_the_nearest_float32(name, wrap):
    amax = np.random.default_rng(4).uniform(0.01, 100, 4000).astype(np.float32)
    scale = wrap(lambda amax: scale_from_amax(amax, FORMATS[name]))(jnp.asarray(amax))
    # A float64 quotient of float32 numbers rounds to the correctly rounded float32 one.
    expected = oracles.narrow(amax.astype(np.float64) / FORMATS[name].max, "float32")
    np.testing.assert_array_equal(oracles.decode(scale), expected)


@every_format
def test_amax_lands_on_the_largest_number(name):
    amax = np.random.default_rng(3).uniform(1e-3, 1e3, 500).astype(np.float32)
    quotient = (amax / scale_of(amax, name)).astype(np.float32)
    assert set(rounded(quotient, name)) == {get_format(name).max}


@every_format
def test_zero_amax_has_scale_one(name):
    np.testing.assert_array_equal(scale_of([0.0, 0.0], name), [1.0, 1.0])
    assert scale_of([0.0, 2.0], name)[1] == scale_of([2.0], name)[0]


@every_format
@pytest.mark.parametrize("amax", [1e-30, 1e-20, 1e20, 3e38])
def test_scales_of_extreme_amax_are_accurate(name, amax):
    expected = np.float64(np.float32(amax)) / oracles.grid(name)[0][-1]
    assert abs(scale_of(amax, name) / expected - 1) <= SCALE_ERROR


@every_format
def test_scale_is_never_zero(name):
    smallest_normal = 2.0**-126
    assert (scale_of([smallest_normal, 3 * smallest_normal], name) > 0).all()


@float_format
def test_absmax_half_is_for_integers(name):
    with pytest.raises(ConfigError, match=f"'absmax_half' is for integer formats, not '{name}'"):
        scale_of(1.0, name, "absmax_half")


def test_unknown_rule_lists_the_known():
    with pytest.raises(ConfigError, match=r"'mse'.*absmax, absmax_half, even, floor, rceil"):
        scale_of(1.0, "int8", "mse")


@pytest.mark.parametrize("rule", ["absmax", "rceil"])
def test_a_range_of_nan_has_a_scale_of_nan(rule):
    """So that activations that are NaN make a product NaN in formats that have none."""
    np.testing.assert_array_equal(np.isnan(scale_of([np.nan, 1.0], "fp4_e2m1", rule)), [1, 0])


# Powers of 2 -------------------------------------------------------------------------------------


def exponents(amax, name, rule):
    scale = scale_of(amax, name, rule)
    mantissa, exponent = np.frexp(scale)
    np.testing.assert_array_equal(mantissa, 0.5)
    return exponent - 1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("even", [-2, -2, -2, -2, -1, -1, 0, 1]),  # compressed-tensors
        ("rceil", [-2, -2, -1, -1, -1, -1, 0, 1]),  # ModelOpt, torchao
        ("floor", [-2, -2, -2, -2, -2, -1, 0, 0]),  # OCP Microscaling Formats 1.0
    ],
)
def test_powers_of_two_are_those_of_the_toolkits(rule, expected):
    """What their packers gave for mxfp4 blocks of these magnitudes."""
    amax = [1.0, 1.5, 1.51, 1.74, 1.75, 3, 6, 7]
    np.testing.assert_array_equal(exponents(amax, "fp4_e2m1", rule), expected)


# Largest number, its exponent, and the significant bits that `even` rounds to.
ELEMENTS = {"fp4_e2m1": (6, 2, 2), "fp8_e4m3": (448, 8, 4), "fp8_e5m2": (57344, 15, 3)}


@pytest.mark.parametrize("name", ELEMENTS)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    mantissas=st.lists(st.integers(2**23, 2**24 - 1), min_size=8, max_size=8),
    exponent=st.integers(-90, 80),
)
def test_powers_of_two_by_exact_arithmetic(name, mantissas, exponent):
    top, top_exponent, significant = ELEMENTS[name]
    edges = [2**23, 2**23 + 2**22, 2**23 + 2**22 + 1, 2**24 - 2**21, 2**24 - 2**21 - 1]
    mantissas = np.array(mantissas + edges)
    amax = mantissas * 2.0**exponent
    # 2^e >= amax / top, in integers: 2^e * top >= amax.
    rceil = np.array([next(e for e in range(-200, 200) if top * 2.0**e >= a) for a in amax])
    np.testing.assert_array_equal(exponents(amax, name, "rceil"), rceil)
    floor = np.floor(np.log2(mantissas)).astype(int) + exponent - top_exponent
    np.testing.assert_array_equal(exponents(amax, name, "floor"), floor)
    rounded_up = mantissas + 2 ** (23 - significant) >= 2**24
    np.testing.assert_array_equal(exponents(amax, name, "even"), floor + rounded_up)


def test_powers_of_two_are_for_floats():
    with pytest.raises(ConfigError, match="'rceil' is for float formats, not 'int4'"):
        scale_of(1.0, "int4", "rceil")


# Two levels --------------------------------------------------------------------------------------


def test_scales_are_rounded_to_what_e4m3_holds():
    """To nearest, ties to even, also where e4m3 is subnormal; never to 0, nor past 448."""
    numbers = oracles.float_table("fp8_e4m3")[1:]
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, middles, middles * 1.0001, middles * 0.9999, [1e-9, 449, 1e9]])
    x = oracles.narrow(x, "float32")
    expected = np.maximum(oracles.round_to(x, "fp8_e4m3"), 2.0**-9)
    for f in (representable, jax.jit(representable, static_argnums=1)):
        np.testing.assert_array_equal(f(jnp.asarray(x, jnp.float32), "float8_e4m3fn"), expected)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(amax=st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=6, max_size=6))
def test_two_levels_are_those_of_the_formula(amax):
    """ModelOpt: scale_2 = amax / (6 * 448), scale = e4m3(amax_b / (6 * scale_2)), 1 for zeros."""
    amax = np.array([0, 1e-3, *amax]).astype(np.float32)
    fmt = FORMATS["fp4_e2m1"]
    total = np.float32(amax.max()) / np.float32(2688)
    exact = amax / (np.float32(6) * total)
    expected = np.where(amax == 0, 1, np.maximum(oracles.round_to(exact, "fp8_e4m3"), 2.0**-9))
    found = global_scale(jnp.max(jnp.asarray(amax)), fmt)
    assert oracles.decode(found) == total
    np.testing.assert_array_equal(scale_beside(found, jnp.asarray(amax), fmt), expected)
