"""int4 weights of experts, packed once, at load, for the Triton kernel.

The tensor cores' left operand holds two neighbouring columns in a register. So two words of 16 bits
that are neighbours become four such registers, a nibble of both each, and no weight moves to
another place on its way there: the nibbles of a word are columns 32 apart.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

CHUNK = 128  # columns of an output that lie together, 64 bytes
SMALL_GROUPS = (32, 64)  # others are multiples of CHUNK


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale"],
    meta_fields=["in_features", "has_zero_point"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """int4 weights [experts, out, in].

    Attributes:
      words: int32 [experts, ceil(in / 128), out, 16]: two numbers of 16 bits, the lower first, of
        which number i of a chunk has column i + 32 j in nibble j, plus 8; columns that fill up the
        last chunk are zeros.
      scale: int32 [experts, groups, out]: the bits of a float32; its lowest 8 are the zero point
        if there is one.
      in_features: of the weight.
      has_zero_point: whether there is.
    """

    words: jax.Array
    scale: jax.Array
    in_features: int
    has_zero_point: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.words.shape[0], self.words.shape[2], self.in_features

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.scale.shape[1]


@jax.jit
def prepare(values: jax.Array, scale: jax.Array, zero_point: jax.Array | None = None) -> Prepared:
    """Canonical arrays -> Prepared.

    Args:
      values: int4 [experts, out, in].
      scale: [experts, out, groups], floating point; together with a zero point it is rounded to 16
        significant bits, which bfloat16 and float16 have.
      zero_point: like scale, integers in the range of int4; or None.

    Raises:
      NotImplementedError: another format, or a group size that the kernel does not take.
    """
    if values.dtype != jnp.int4:
        raise NotImplementedError(f"weights in {values.dtype}; only int4 is packed")
    experts, out, features = values.shape
    group = features // scale.shape[2]
    if scale.shape[2] > 1 and group not in SMALL_GROUPS and group % CHUNK:
        raise NotImplementedError(
            f"groups of {group}; the kernel takes 32, 64, multiples of {CHUNK}, or one scale an "
            "output"
        )
    codes = jnp.pad(values.astype(jnp.int32) + 8, ((0, 0), (0, 0), (0, -features % CHUNK)))
    # Axes: expert, out, chunk, nibble, word, half of the word.
    codes = codes.reshape(experts, out, -1, 4, 16, 2).transpose(0, 2, 1, 4, 5, 3)
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape(2, 16)[:, ::4]
    words = jnp.sum(codes.astype(jnp.uint32) << shifts, axis=(-2, -1), dtype=jnp.uint32)
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32).swapaxes(1, 2), jnp.uint32)
    if zero_point is not None:
        low = zero_point.astype(jnp.int8).swapaxes(1, 2)
        bits = (bits + jnp.uint32(128)) & jnp.uint32(0xFFFFFF00)
        bits = bits | jax.lax.bitcast_convert_type(low, jnp.uint8).astype(jnp.uint32)
    return Prepared(
        words=jax.lax.bitcast_convert_type(words, jnp.int32),
        scale=jax.lax.bitcast_convert_type(bits, jnp.int32),
        in_features=features,
        has_zero_point=zero_point is not None,
    )


def unprepare(weight: Prepared) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The inverse of `prepare`: values, scale (float32) and zero_point (int4) or None."""
    experts, out, features = weight.shape
    shifts = jnp.arange(0, 32, 4, dtype=jnp.int32).reshape(2, 4)
    codes = (weight.words[..., None, None] >> shifts) & 15
    codes = codes.transpose(0, 2, 1, 5, 3, 4).reshape(experts, out, -1)[:, :, :features]
    bits = weight.scale.swapaxes(1, 2)
    zero_point = None
    if weight.has_zero_point:
        zero_point = ((bits << 24) >> 24).astype(jnp.int4)
        bits = bits & -256
    return (
        (codes - 8).astype(jnp.int4),
        jax.lax.bitcast_convert_type(bits, jnp.float32),
        zero_point,
    )
