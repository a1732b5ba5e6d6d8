"""Weights repacked for Hopper, once, at load.

A warpgroup multiplies 64 rows by 16 columns at a time (`wgmma`, m64k16), with the weights in
registers: thread (warp, g, c) of the four warps holds the columns 8p + 2c + e of the rows
16 warp + 8h + g, for p, h, e in 0..1. Here its words lie together in that order, 16 bytes at a
time, so that a tile of 64 x 64 weights is one contiguous block that is read without bank conflicts
and without a shuffle.
"""

import dataclasses
from functools import partial, reduce

import jax
import jax.numpy as jnp

ROWS, TILE = 64, 64  # of a tile: rows, columns
LANES = 128  # threads of a warpgroup; also words of a row of the packed array
GROUP_SIZES = (16, 32, 64, 128, 256)
BITS = {"int4": 4, "float4_e2m1fn": 4, "int8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale", "zero_point", "factor"],
    meta_fields=["format", "operand", "out_features", "in_features"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A weight [out, in] as the Hopper kernels read it.

    Attributes:
      words: int32 [out/64, in/16 (4 bits) or in/8 (8 bits), 128], out and in rounded up to 64 with
        zeros.
      scale: [out/64, groups, 64]; groups is 1 (per channel) or in/group_size.
      zero_point: like scale, in bfloat16 (exact: integers up to 256); or None.
      factor: float32 [1], of all weights, beside their scales; or None.
      format: dtype of the weights, one of BITS.
      operand: what the tensor cores multiply: 'float16' (or bfloat16: of 16 bits), or
        'float8_e4m3fn', whose registers hold columns in another order.
      out_features, in_features: of the weight, before rounding up.
    """

    words: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    factor: jax.Array | None
    format: str
    operand: str
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


@partial(jax.jit, static_argnames="operand")
def prepare(
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    factor: jax.Array | None = None,
    operand: str = "float16",
) -> Prepared:
    """Canonical arrays -> Prepared.

    Args:
      values: [out, in], int4, int8, fp8 (e4m3 or e5m2) or fp4 (e2m1).
      scale: [out/bn, in/bk], for blocks of bn x bk weights: bfloat16 or float32, or the scales of
        fp4 formats, e4m3 (nvfp4) and e8m0 (mxfp4), which bfloat16 holds exactly.
      zero_point: like scale, integer, in the range of values; or None.
      factor: [] or [1], of all weights, such as nvfp4 has beside the scales; or None.
      operand: 'float16' for activations of 16 bits, 'float8_e4m3fn' for fp8 ones (int4 weights
        without zero points, groups of 128 or more).

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
    if operand != "float16":
        _check_fp8(format, operand, groups, group_size, zero_point)
    if zero_point is not None and not format.startswith("int"):
        raise NotImplementedError(f"a zero point with {format} weights")
    if scale.dtype.itemsize == 1:
        scale = scale.astype(jnp.bfloat16)
    padded = jnp.pad(_codes(values, operand), ((0, -out % ROWS), (0, -features % TILE)))
    words = _pack(padded, _ORDERS[operand, BITS[format]])
    return Prepared(
        words=_apart(words) if format == "float4_e2m1fn" else words,
        scale=_rows_together(scale, out),
        zero_point=None
        if zero_point is None
        else _rows_together(zero_point.astype(jnp.bfloat16), out),
        factor=None if factor is None else factor.astype(jnp.float32).reshape(1),
        format=format,
        operand=operand,
        out_features=out,
        in_features=features,
    )


def unprepare(weight: Prepared) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The inverse of `prepare`: values [out, in], scale [out, groups] and zero_point."""
    out, features = weight.shape
    values = unpack(weight.words, weight.format, weight.operand)[:out, :features]

    def rows_apart(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(-1, weight.groups)[:out]

    zero_point = weight.zero_point
    return (
        values,
        rows_apart(weight.scale),
        None if zero_point is None else rows_apart(zero_point).astype(jnp.int32),
    )


def unpack(words: jax.Array, format: str, operand: str) -> jax.Array:
    """int32 [out/64, in * bits / 64, 128] -> the weights [out, in], without scales."""
    if format == "float4_e2m1fn":
        words = _together(words)
    codes = _unpack(words, _ORDERS[operand, BITS[format]])
    if format == "int4":
        codes = codes.astype(jnp.int8)
        if operand == "float16":
            return (codes - 8).astype(jnp.int4)
        return jnp.where(codes < 8, codes, 7 - codes).astype(jnp.int4)
    narrow = jnp.uint8 if BITS[format] == 8 else jnp.uint4
    return jax.lax.bitcast_convert_type(codes.astype(narrow), jnp.dtype(format))


def _codes(values: jax.Array, operand: str) -> jax.Array:
    """uint32 codes. An int4 is biased by 8, so that it becomes a mantissa; for fp8, a negative one
    is its sign and its absolute value less 1. Others stay as they are."""
    if values.dtype == jnp.int4:
        wide = values.astype(jnp.int32)
        codes = wide + 8 if operand == "float16" else jnp.where(wide < 0, 7 - wide, wide)
        return codes.astype(jnp.uint32)
    narrow = jnp.uint8 if values.dtype.itemsize == 1 and BITS[values.dtype.name] == 8 else jnp.uint4
    return jax.lax.bitcast_convert_type(values, narrow).astype(jnp.uint32)


# Where number i of the four in half a word has its sign and its other three bits. Two of the four
# are then an fp4 number in the place of a bfloat16's after one shift at most (see `convert`).
SIGNS, REST = (13, 12, 15, 14), (0, 3, 6, 9)


def _apart(words: jax.Array) -> jax.Array:
    """Words of fp4 codes -> their signs, then the rest, in each half."""
    bits = jax.lax.bitcast_convert_type(words, jnp.uint32)
    parts = [
        ((bits >> 4 * i + 3) & 0x00010001) << SIGNS[i] | ((bits >> 4 * i) & 0x00070007) << REST[i]
        for i in range(4)
    ]
    return jax.lax.bitcast_convert_type(reduce(jnp.bitwise_or, parts), jnp.int32)


def _together(words: jax.Array) -> jax.Array:
    """The inverse of `_apart`."""
    bits = jax.lax.bitcast_convert_type(words, jnp.uint32)
    parts = [
        ((bits >> SIGNS[i]) & 0x00010001) << 4 * i + 3 | ((bits >> REST[i]) & 0x00070007) << 4 * i
        for i in range(4)
    ]
    return jax.lax.bitcast_convert_type(reduce(jnp.bitwise_or, parts), jnp.int32)


def _rows_together(x: jax.Array, out: int) -> jax.Array:
    """[out/bn, groups] -> [out/64, groups, 64]."""
    rows = jnp.pad(jnp.repeat(x, out // x.shape[0], axis=0), ((0, -out % ROWS), (0, 0)))
    return rows.reshape(-1, ROWS, x.shape[1]).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class _Order:
    """Where the weights of a tile go.

    Axes: a, t: the tile; w, h, g: the row 16w + 8h + g; s, p, c, e: the column, from the slowest
    (r and q are the halves of s).

    Attributes:
      bits: of a weight.
      columns: axes of the columns, as they are in the weight.
      threads: axes of the words; 16 bytes of one thread are the last ones, of size 4.
      word: axes inside a word, down to the lowest bits.
      sizes: of axes that differ from _SIZES.
    """

    bits: int
    columns: str
    threads: str
    word: str
    sizes: tuple[tuple[str, int], ...] = ()

    def shape(self, names: str, blocks: int, tiles: int) -> list[int]:
        sizes = _SIZES | dict(self.sizes) | {"a": blocks, "t": tiles}
        return [sizes[name] for name in names]


_SIZES = {"w": 4, "h": 2, "g": 8, "s": 4, "r": 2, "q": 2, "p": 2, "c": 4, "e": 2}
# Pairs of neighbours go to the two halves of a word, for conversion to 16 bits; four neighbours go
# to its bytes, for conversion to fp8.
_ORDERS = {
    ("float16", 4): _Order(4, "tspce", "atwgcs", "eph"),
    ("float16", 8): _Order(8, "trqpce", "atrwgcqp", "eh"),
    ("float8_e4m3fn", 4): _Order(4, "tspce", "atwgcsp", "eh", (("s", 2), ("e", 4))),
}


def _pack(codes: jax.Array, order: _Order) -> jax.Array:
    """uint32 [out, in] -> int32 [out/64, in * bits / 64, 128]."""
    blocks, tiles = codes.shape[0] // ROWS, codes.shape[1] // TILE
    canonical, packed = "awhg" + order.columns, order.threads + order.word
    codes = codes.reshape(order.shape(canonical, blocks, tiles))
    codes = codes.transpose([canonical.index(name) for name in packed])
    words = jnp.sum(
        codes << _shifts(order), axis=tuple(range(-len(order.word), 0)), dtype=jnp.uint32
    )
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    return words.reshape(blocks, tiles * order.bits, LANES)


def _unpack(words: jax.Array, order: _Order) -> jax.Array:
    """int32 [out/64, in * bits / 64, 128] -> uint32 codes [out, in]; the inverse of `_pack`."""
    blocks, tiles = words.shape[0], words.shape[1] // order.bits
    canonical, packed = "awhg" + order.columns, order.threads + order.word
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    words = words.reshape(order.shape(order.threads, blocks, tiles) + [1] * len(order.word))
    codes = (words >> _shifts(order)) & jnp.uint32(2**order.bits - 1)
    codes = codes.transpose([packed.index(name) for name in canonical])
    return codes.reshape(blocks * ROWS, tiles * TILE)


def _shifts(order: _Order) -> jax.Array:
    count = jnp.arange(32 // order.bits, dtype=jnp.uint32)
    return count.reshape(order.shape(order.word, 1, 1)) * order.bits


def _check_fp8(
    format: str, operand: str, groups: int, group_size: int, zero_point: jax.Array | None
) -> None:
    if (format, operand) != ("int4", "float8_e4m3fn"):
        raise NotImplementedError(f"{format} weights for activations in {operand}")
    if groups > 1 and group_size % 128:
        raise NotImplementedError(f"groups of {group_size} with fp8 activations; 128 or 256")
    if zero_point is not None:
        raise NotImplementedError("a zero point with fp8 activations")
