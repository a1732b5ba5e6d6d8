"""Bit order of packed numbers, against a bit string written by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.numerics import FORMATS
from qjax.packing import pack, packed_shape, unpack

NARROW = [name for name, fmt in FORMATS.items() if fmt.bits < 8]
every_format = pytest.mark.parametrize("name", NARROW)


def codes_of(values):
    """The bit patterns of numbers, in two's complement or as e2m1."""
    values = np.asarray(values)
    if values.dtype.name == "float4_e2m1fn":
        return values.view(np.uint8).astype(np.int64)
    return values.astype(np.int64)


def packed_by_hand(values, bits):
    """A row as one string of bits, the lowest of each number first; 8 of them are a byte."""
    codes = codes_of(values) & (2**bits - 1)
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]) if codes.size else []:
        stream = [(number >> i) & 1 for number in row for i in range(bits)]
        stream += [0] * (-len(stream) % 8)
        byte_bits = np.array(stream, int).reshape(-1, 8)
        rows.append((byte_bits * 2 ** np.arange(8)).sum(axis=1))
    shape = (*codes.shape[:-1], -(-codes.shape[-1] * bits // 8))
    return np.array(rows, np.uint8).reshape(shape)


def random(name, shape, seed=0):
    codes = np.random.default_rng(seed).integers(0, 2 ** FORMATS[name].bits, shape)
    return numbers_of(name, codes)


def numbers_of(name, codes):
    """The numbers that have these bit patterns."""
    fmt, codes = FORMATS[name], np.asarray(codes)
    if not fmt.is_integer:
        return jnp.asarray(codes.astype(np.uint8).view(fmt.dtype))
    wide = np.where(codes >= 2 ** (fmt.bits - 1), codes - 2**fmt.bits, codes)
    return jnp.asarray(wide.astype(np.int8)).astype(fmt.dtype)


def assert_same(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(codes_of(a), codes_of(b))


def check(name, values):
    bits = FORMATS[name].bits
    packed = pack(values, FORMATS[name])
    assert packed.dtype == jnp.uint8
    assert packed.shape == packed_shape(values.shape, bits)
    np.testing.assert_array_equal(np.asarray(packed), packed_by_hand(values, bits))
    assert_same(unpack(packed, FORMATS[name], values.shape[-1]), values)


@every_format
def test_every_number_beside_every_other(name):
    count = 2 ** FORMATS[name].bits
    low, high = np.meshgrid(np.arange(count), np.arange(count))
    check(name, numbers_of(name, np.stack([low, high], axis=-1).reshape(count, 2 * count)))


def test_int4_has_the_even_column_in_the_low_nibble():
    """As compressed-tensors and ModelOpt have e2m1, and all checkpoints of qjax int4."""
    assert pack(jnp.array([1, -2, 7, -8], jnp.int4), FORMATS["int4"]).tolist() == [0xE1, 0x87]
    e2m1 = jnp.array([0.5, -1, 6, -0.0], jnp.float4_e2m1fn)  # codes 1, 10, 7, 8
    assert pack(e2m1, FORMATS["fp4_e2m1"]).tolist() == [0xA1, 0x87]


@pytest.mark.parametrize("name", ["int4", "fp4_e2m1"])
def test_every_byte_unpacks(name):
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    values = unpack(jnp.asarray(packed), FORMATS[name], 128)
    assert values.dtype == FORMATS[name].dtype
    np.testing.assert_array_equal(packed_by_hand(values, 4), packed)


@pytest.mark.parametrize("name", ["int3", "int4"])
@pytest.mark.parametrize(
    "shape", [(1,), (2,), (3, 64), (3, 7), (2, 3, 10), (2, 3, 9), (2, 1, 3, 4), (0, 4), (3, 0)]
)
def test_shapes(name, shape):
    check(name, random(name, shape))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    name=st.sampled_from(NARROW),
    lead=st.lists(st.integers(1, 4), max_size=3),
    length=st.integers(1, 18),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(name, lead, length, seed):
    check(name, random(name, (*lead, length), seed))


def test_packing_another_type_raises():
    with pytest.raises(TypeError, match="int8 is not packed as int4, which is int4"):
        pack(jnp.zeros((2, 4), jnp.int8), FORMATS["int4"])
    with pytest.raises(TypeError, match="int8 is not packed as int8"):
        pack(jnp.zeros((2, 4), jnp.int8), FORMATS["int8"])


@pytest.mark.parametrize("name", ["int4", "fp4_e2m1", "int3"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P(None, ("x", "y"))])
def test_sharding_is_kept_without_communication(spec, name):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))
    sharding, fmt = NamedSharding(mesh, spec), FORMATS[name]
    values = random(name, (4, 32))
    sharded = jax.device_put(values, sharding)
    packed = pack(sharded, fmt)
    assert len(packed.sharding.device_set) == 4
    assert packed.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(np.asarray(packed), packed_by_hand(values, fmt.bits))
    back = unpack(packed, fmt, 32)
    assert back.sharding.is_equivalent_to(sharding, 2)
    assert_same(back, values)
    for lowered in (pack.lower(sharded, fmt), unpack.lower(packed, fmt, 32)):
        program = lowered.compile().as_text()
        for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
            assert collective not in program
