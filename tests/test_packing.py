"""Bit order of packed int4, against NumPy's bitwise operators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.packing import pack_int4, packed_shape, unpack_int4


def packed_by_hand(values):
    """Element 2j in bits 0-3 of byte j, element 2j+1 in bits 4-7, two's complement; 0 fills up."""
    nibbles = values.astype(np.int64) & 0xF
    if values.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).astype(np.uint8)


def random_int4(shape, seed=0):
    return np.random.default_rng(seed).integers(-8, 8, shape)


def test_every_pair_of_nibbles():
    low, high = np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))
    values = np.stack([low, high], axis=-1).reshape(16, 32)
    packed = pack_int4(jnp.asarray(values, jnp.int4))
    assert packed.dtype == jnp.uint8
    assert len(set(np.asarray(packed).ravel())) == 256
    np.testing.assert_array_equal(np.asarray(packed), packed_by_hand(values))


def test_every_byte_unpacks():
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    values = unpack_int4(jnp.asarray(packed), 128)
    assert values.dtype == jnp.int4
    np.testing.assert_array_equal(packed_by_hand(np.asarray(values)), packed)


@pytest.mark.parametrize(
    "shape", [(1,), (2,), (3, 64), (3, 7), (2, 3, 10), (2, 3, 9), (2, 1, 3, 4), (0, 4), (3, 0)]
)
def test_shapes(shape):
    values = random_int4(shape)
    packed = pack_int4(jnp.asarray(values, jnp.int4))
    assert packed.shape == packed_shape(shape) == (*shape[:-1], (shape[-1] + 1) // 2)
    np.testing.assert_array_equal(np.asarray(packed), packed_by_hand(values))
    unpacked = unpack_int4(packed, shape[-1])
    np.testing.assert_array_equal(np.asarray(unpacked).astype(int), values)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    length=st.integers(1, 18),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(lead, length, seed):
    values = random_int4((*lead, length), seed)
    packed = pack_int4(jnp.asarray(values, jnp.int4))
    np.testing.assert_array_equal(np.asarray(packed), packed_by_hand(values))
    unpacked = unpack_int4(packed, length)
    np.testing.assert_array_equal(np.asarray(unpacked).astype(int), values)


def test_packing_another_type_raises():
    with pytest.raises((ValueError, TypeError)):
        pack_int4(jnp.zeros((2, 4), jnp.int8))


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P(None, ("x", "y"))])
def test_sharding_is_kept_without_communication(spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))
    sharding = NamedSharding(mesh, spec)
    values = random_int4((4, 16))
    sharded = jax.device_put(jnp.asarray(values, jnp.int4), sharding)
    packed = pack_int4(sharded)
    assert len(packed.sharding.device_set) == 4
    assert packed.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(np.asarray(packed), packed_by_hand(values))
    back = unpack_int4(packed, 16)
    assert back.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(np.asarray(back).astype(int), values)
    for lowered in (pack_int4.lower(sharded), unpack_int4.lower(packed, 16)):
        program = lowered.compile().as_text()
        for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
            assert collective not in program
