"""y = x @ dequantize(w).T on any NVIDIA GPU with tensor cores, for weights repacked for that.

The kernels of `api.prepared_gemm` are for Hopper; these are for compute capability 8.0 and up.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.weight_only_gemm import xla

BYTES = 32  # of an output that lie together; `triton_weights` describes the order
# dtype -> columns of such a chunk.
WIDTHS = {"int4": 64, "int8": 32, "float8_e4m3fn": 32, "float8_e5m2": 32}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "row_scale", "table"],
    meta_fields=[
        "format", "scale_dtype", "has_zero", "out_features", "in_features", "group_size"
    ],
)  # fmt: skip
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight [out, in] as the portable kernel reads it.

    Attributes:
      words: uint8 [chunks, out, 32], in the order of `triton_weights`; in is rounded up to whole
        chunks with zeros.
      row_scale: float32 [out], the scale of each row; if there are groups, the power of two next to
        the largest of theirs, so that the others, over it, are in the range of float16.
      table: [groups, out], scales over row_scale, bfloat16 or float32; with zero points int32, the
        upper 24 bits of a float32 scale and the zero point in the lower 8; None: one scale a row
        and no zero points.
      format: dtype of the weights: 'int4', 'int8', 'float8_e4m3fn' or 'float8_e5m2'.
      scale_dtype: as given.
      has_zero: whether there are zero points.
      out_features, in_features: of the weight.
      group_size: columns that share a scale; in_features if there are no groups.
    """

    words: jax.Array
    row_scale: jax.Array
    table: jax.Array | None
    format: str
    scale_dtype: str
    has_zero: bool
    out_features: int
    in_features: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size


@jax.jit
def prepare_portable(
    values: jax.Array, scale: jax.Array, zero_point: jax.Array | None = None
) -> Packed:
    """Canonical arrays -> Packed.

    Args:
      values: [out, in], int4, int8 or fp8.
      scale: float32, bfloat16 or float16 [out/bn, in/bk], for blocks of bn x bk weights.
      zero_point: like scale, integer, in the range of values; or None.

    Returns:
      The weight, as it was, but that float32 scales beside zero points are rounded to
      16 bits (relative error 2^-16).

    Raises:
      NotImplementedError: a format or a group size that the kernel does not take.
    """
    format = values.dtype.name
    if format not in WIDTHS:
        raise NotImplementedError(f"weights in {format}; the formats are {', '.join(WIDTHS)}")
    out, features = values.shape
    size = features // scale.shape[1]
    if scale.shape[1] > 1 and size != 32 and size % WIDTHS[format]:
        raise NotImplementedError(
            f"groups of {size}; the kernel takes 32, multiples of {WIDTHS[format]}, or one scale "
            "a row"
        )
    if zero_point is not None and not format.startswith("int"):
        raise NotImplementedError(f"a zero point with {format} weights")
    rows = jnp.repeat(scale, out // scale.shape[0], axis=0).astype(jnp.float32)
    row_scale, grouped = rows[:, 0], jnp.zeros_like(rows)
    if rows.shape[1] > 1:
        exponent = jnp.frexp(jnp.max(jnp.abs(rows), axis=1))[1]
        row_scale = jnp.ldexp(jnp.float32(1), exponent)
        grouped = rows / row_scale[:, None]
    return Packed(
        words=_pack(values),
        row_scale=row_scale,
        table=_table(grouped, scale.dtype, zero_point, paired=format == "int4" and size == 32),
        format=format,
        scale_dtype=scale.dtype.name,
        has_zero=zero_point is not None,
        out_features=out,
        in_features=features,
        group_size=size,
    )


def unpack(weight: Packed) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The inverse of `prepare_portable`: values [out, in], scale [out, groups] and zero_point."""
    codes = weight.words.swapaxes(0, 1)  # [out, chunks, 32]
    if weight.format == "int4":
        nibbles = jnp.stack([codes & 15, codes >> 4], axis=2).astype(jnp.int8)
        values = (nibbles - 8).astype(jnp.int4)
    else:
        values = jax.lax.bitcast_convert_type(codes, jnp.dtype(weight.format))
    values = values.reshape(weight.out_features, -1)[:, : weight.in_features]
    scale, zero_point = weight.row_scale[:, None], None
    if weight.table is not None:
        grouped = weight.table.T[:, : weight.groups]
        if weight.has_zero:
            zero_point = ((grouped << 24) >> 24).astype(jnp.int32)
            grouped = jax.lax.bitcast_convert_type(grouped & -256, jnp.float32)
        if weight.groups > 1:
            scale = scale * grouped.astype(jnp.float32)
    return values, scale.astype(weight.scale_dtype), zero_point


@partial(jax.jit, static_argnames="out_dtype")
def _xla(
    x: jax.Array, weight: Packed, bias: jax.Array | None, *, out_dtype: jnp.dtype
) -> jax.Array:
    values, scale, zero_point = unpack(weight)
    y = xla.weight_only_gemm(x, values, scale, zero_point, out_dtype=jnp.dtype(jnp.float32))
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)


def _triton(
    x: jax.Array, weight: Packed, bias: jax.Array | None, *, out_dtype: jnp.dtype
) -> jax.Array:
    from qjax_kernels.weight_only_gemm import triton

    return triton.packed_gemm(x, weight, bias, out_dtype=out_dtype)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"triton": _triton, "xla": _xla}


def packed_gemm(
    x: jax.Array,
    weight: Packed,
    bias: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """`api.weight_only_gemm` with a weight that `prepare_portable` has repacked, and a bias.

    y[..., n] = bias[n] + sum_k x[..., k] * (values[n, k] - zero_point[n, k/bk]) * scale[n, k/bk]

    Args:
      x: [..., in], bfloat16 or float16 (any float for 'xla').
      weight: [out, in], packed.
      bias: [out], floating point, or None.
      out_dtype: of the result, a float type.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [..., out], accumulated in float32. With groups and many tokens, a weight times its scale is
      rounded to the type of x, as a dequantized weight would be. NaN in e4m3 weights is read as
      480, and with bfloat16 x so are infinity and NaN of e5m2 as numbers from 65536 on.

    Raises:
      ValueError: the shapes do not agree.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x is {x.shape}, the weight {weight.shape}: their last axes must agree")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias is {bias.shape}; it must be ({weight.out_features},)")
    return dispatch(
        "packed_gemm", IMPLEMENTATIONS, implementation, x, weight, bias, out_dtype=out_dtype
    )


def _pack(values: jax.Array) -> jax.Array:
    """[out, in] -> uint8 [chunks, out, 32]."""
    out, features = values.shape
    width = WIDTHS[values.dtype.name]
    if values.dtype == jnp.int4:
        codes = (values.astype(jnp.int8) + 8).astype(jnp.uint8)
    else:
        codes = jax.lax.bitcast_convert_type(values, jnp.uint8)
    codes = jnp.pad(codes, ((0, 0), (0, -features % width))).reshape(out, -1, width // BYTES, BYTES)
    if values.dtype == jnp.int4:
        codes = codes[:, :, :1] | (codes[:, :, 1:] << 4)
    return codes[:, :, 0].swapaxes(0, 1)


def _table(
    grouped: jax.Array, dtype: jnp.dtype, zero_point: jax.Array | None, *, paired: bool
) -> jax.Array | None:
    """`Packed.table` of scales [out, groups].

    Entries of four bytes can be copied together with the weights; two groups to a chunk need that.
    """
    out, groups = grouped.shape
    table = grouped
    if zero_point is not None:
        zeros = jnp.repeat(zero_point.astype(jnp.int32), out // zero_point.shape[0], axis=0)
        bits = jax.lax.bitcast_convert_type(grouped, jnp.int32)
        table = ((bits + 128) & -256) | (zeros & 255)
    elif groups == 1:
        return None
    elif dtype == jnp.bfloat16 and not paired:
        table = grouped.astype(jnp.bfloat16)
    if paired:  # both groups of the last chunk are there
        table = jnp.pad(table, ((0, 0), (0, groups % 2)))
    return table.T
