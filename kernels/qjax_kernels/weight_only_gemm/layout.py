"""Weights repacked for Hopper, once, at load.

A warpgroup multiplies 64 rows by 16 columns at a time (`wgmma`, m64k16), with the weights in
registers: thread (warp, g, c) of the four warps holds the columns 8p + 2c + e of the rows
16 warp + 8h + g, for p, h, e in 0..1. Here its words lie together in that order, 16 bytes at a
time, so that a tile of 64 x 64 weights is one contiguous block that is read without bank conflicts
and without a shuffle.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

ROWS, TILE = 64, 64  # of a tile: rows, columns
LANES = 128  # threads of a warpgroup; also words of a row of the packed array
GROUP_SIZES = (32, 64, 128, 256)
BITS = {"int4": 4, "int8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale", "zero_point"],
    meta_fields=["format", "out_features", "in_features"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A weight [out, in] as the Hopper kernels read it.

    Attributes:
      words: int32 [out/64, in/16 (4 bits) or in/8 (8 bits), 128], out and in rounded up to 64 with
        zeros.
      scale: [out/64, groups, 64]; groups is 1 (per channel) or in/group_size.
      zero_point: like scale, in bfloat16 (exact: integers up to 256); or None.
      format: dtype of the weights: 'int4', 'int8', 'float8_e4m3fn' or 'float8_e5m2'.
      out_features, in_features: of the weight, before rounding up.
    """

    words: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    format: str
    out_features: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.groups


def words_per_tile(format: str) -> int:
    """Rows of `words` that a tile of 64 x 64 weights takes."""
    return TILE * BITS[format] // 64


@jax.jit
def prepare(values: jax.Array, scale: jax.Array, zero_point: jax.Array | None = None) -> Prepared:
    """Canonical arrays -> Prepared.

    Args:
      values: [out, in], int4, int8 or fp8.
      scale: [out/bn, in/bk], for blocks of bn x bk weights.
      zero_point: like scale, integer, in the range of values; or None.

    Raises:
      NotImplementedError: a format or a group size that the kernels do not take.
    """
    format = values.dtype.name
    if format not in BITS:
        raise NotImplementedError(f"weights in {format}; the formats are {', '.join(BITS)}")
    out, features = values.shape
    groups = scale.shape[1]
    group_size = features // groups
    if groups > 1 and group_size not in GROUP_SIZES:
        raise NotImplementedError(
            f"groups of {group_size}; the kernels take {', '.join(map(str, GROUP_SIZES))} or one "
            "scale a row"
        )
    if zero_point is not None and not format.startswith("int"):
        raise NotImplementedError(f"a zero point with {format} weights")
    padded = jnp.pad(_codes(values), ((0, -out % ROWS), (0, -features % TILE)))
    return Prepared(
        words=_pack(padded, BITS[format]),
        scale=_rows_together(scale, out),
        zero_point=None
        if zero_point is None
        else _rows_together(zero_point.astype(jnp.bfloat16), out),
        format=format,
        out_features=out,
        in_features=features,
    )


def unprepare(weight: Prepared) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The inverse of `prepare`: values [out, in], scale [out, groups] and zero_point."""
    out, features = weight.shape
    codes = unpack(weight.words, BITS[weight.format])[:out, :features]
    if weight.format == "int4":
        values = (codes.astype(jnp.int8) - 8).astype(jnp.int4)
    else:
        values = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.dtype(weight.format))

    def rows_apart(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(-1, weight.groups)[:out]

    zero_point = weight.zero_point
    return (
        values,
        rows_apart(weight.scale),
        None if zero_point is None else rows_apart(zero_point).astype(jnp.int32),
    )


def _codes(values: jax.Array) -> jax.Array:
    """uint32 codes: int4 is biased by 8, so that a nibble becomes a mantissa; 8 bits stay."""
    if values.dtype == jnp.int4:
        return (values.astype(jnp.int32) + 8).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint32)


def _rows_together(x: jax.Array, out: int) -> jax.Array:
    """[out/bn, groups] -> [out/64, groups, 64]."""
    rows = jnp.pad(jnp.repeat(x, out // x.shape[0], axis=0), ((0, -out % ROWS), (0, 0)))
    return rows.reshape(-1, ROWS, x.shape[1]).swapaxes(1, 2)


# Axes of a tile's weights: a, t: its place; rows: warp, h, g; columns: s (16 wide), p, c, e.
_CANONICAL = "awhgtspce"
_AXES = {"a": -1, "w": 4, "h": 2, "g": 8, "t": -1, "s": 4, "p": 2, "c": 4, "e": 2}
# From the slowest: 16 bytes of one thread are its four steps (4 bits), or two of them (8 bits: r
# and q are the halves of s). Inside a word, from the lowest bit.
_THREADS = {4: "atwgcs", 8: "atrwgcqp"}
_IN_WORD = {4: "eph", 8: "eh"}


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint32 [out, in] -> int32 [out/64, in * bits / 64, 128]."""
    out, features = codes.shape
    sizes = _AXES | {"a": out // ROWS, "t": features // TILE, "r": 2, "q": 2}
    names = _CANONICAL if bits == 4 else _CANONICAL.replace("s", "rq")
    order = _THREADS[bits] + _IN_WORD[bits]
    codes = codes.reshape([sizes[name] for name in names])
    codes = codes.transpose([names.index(name) for name in order])
    # Element e of a pair goes to the upper half of the word; p, h count nibbles or bytes.
    shape = [sizes[name] for name in _IN_WORD[bits]]
    shift = jnp.arange(32 // bits, dtype=jnp.uint32).reshape(shape) * bits
    inner = tuple(range(-len(shape), 0))
    words = jnp.sum(codes << shift, axis=inner, dtype=jnp.uint32)
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    return words.reshape(out // ROWS, features * bits // 64, LANES)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """int32 [out/64, in * bits / 64, 128] -> uint32 codes [out, in]; the inverse of packing."""
    blocks, rows = words.shape[:2]
    sizes = _AXES | {"a": blocks, "t": rows * 64 // bits // TILE, "r": 2, "q": 2}
    names = _CANONICAL if bits == 4 else _CANONICAL.replace("s", "rq")
    order = _THREADS[bits] + _IN_WORD[bits]
    shape = [sizes[name] for name in _IN_WORD[bits]]
    shift = jnp.arange(32 // bits, dtype=jnp.uint32).reshape(shape) * bits
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    words = words.reshape([sizes[name] for name in _THREADS[bits]] + [1] * len(shape))
    codes = (words >> shift) & jnp.uint32(2**bits - 1)
    codes = codes.transpose([order.index(name) for name in names])
    return codes.reshape(blocks * ROWS, rows * 64 // bits)
