"""What every method shares: the grid that a rule describes, scales on it, rounding against them.

`numerics` and `qarray` know the formats; here a scale can come from somewhere else than the
largest magnitude of its block.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.blocks import block_for, blocked
from qjax.config import Rule
from qjax.qarray import QArray, quantize_array

# Step and zero point of each element, float32; the second is None for symmetric grids.
type Grid = tuple[jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """The grid of a weight [..., out, in]: the settings of `quantize_array`, hashable.

    Attributes:
      format: a name of numerics.FORMATS.
      block: (rows, columns) that share a scale; -1: the whole axis.
      symmetric: False adds zero points.
      scale_rule, scale_dtype: as in `quantize_array`.
    """

    format: str
    block: tuple[int, int] = (1, -1)
    symmetric: bool = True
    scale_rule: str = "absmax"
    scale_dtype: str = "float32"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero_point", "global_scale"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scales:
    """One scale, and for asymmetric grids one zero point, for each block of a weight.

    All float32 here, but numbers that the types they will be stored in can hold.

    Attributes:
      scale: [..., out/rows, in/columns].
      zero_point: of the same shape, or None.
      global_scale: [...], multiplies all scales of its matrix, or None.
    """

    scale: Any
    zero_point: Any = None
    global_scale: Any = None


def spec_of(rule: Rule) -> WeightSpec:
    """The grid that `rule` describes, for a weight [..., out, in]."""
    assert rule.weight is not None
    default_scale = "bfloat16" if rule.granularity == "per_group" else "float32"
    return WeightSpec(
        format=rule.weight,
        block=block_for(rule.granularity, rule.group_size, axis=-1),
        symmetric=rule.symmetric,
        scale_rule=rule.scale_rule,
        scale_dtype=rule.scale_dtype or default_scale,
    )


@partial(jax.jit, static_argnames="spec")
def find_scales(
    weight: jax.Array, spec: WeightSpec, global_amax: jax.Array | None = None
) -> Scales:
    """The scales of round-to-nearest: each covers the range of its block.

    Args:
      weight: floating point [..., out, in].
      global_amax: float32 [...], what a global scale covers, if `weight` is a part or a multiple
        of something else; None: the weight. Without meaning for grids of one level.
    """
    q = quantize_array(
        weight.astype(jnp.float32),
        spec.format,
        block=spec.block,
        symmetric=spec.symmetric,
        scale_rule=spec.scale_rule,
        scale_dtype=spec.scale_dtype,
        global_amax=global_amax,
    )
    return scales_in(q)


@partial(jax.jit, static_argnames="spec")
def round_to_scales(weight: jax.Array, spec: WeightSpec, scales: Scales) -> QArray:
    """Round every weight to the nearest number of its block's grid.

    Args:
      weight: floating point [..., out, in].
      scales: for the blocks of `spec`.

    Returns:
      a QArray without an input spec. With `find_scales(weight, spec)` it is round-to-nearest.
    """
    fmt = numerics.get_format(spec.format)
    step, zero = expand(scales, spec, weight.shape)
    codes = encode(weight.astype(jnp.float32), step, zero, fmt)
    return as_qarray(codes, spec, scales, weight.dtype)


def as_qarray(codes: jax.Array, spec: WeightSpec, scales: Scales, dtype: jnp.dtype) -> QArray:
    """The QArray of `codes`, float32 [..., out, in], which are numbers of the format already.

    Args:
      dtype: of the weight that they stand for.
    """
    fmt, zero = numerics.get_format(spec.format), scales.zero_point
    return QArray(
        values=numerics.round_to_format(codes, fmt),
        scale=scales.scale.astype(spec.scale_dtype),
        zero_point=None if zero is None else numerics.round_to_format(zero, fmt),
        global_scale=scales.global_scale,
        format=spec.format,
        block=spec.block,
        dtype=dtype.name,
    )


@partial(jax.jit, static_argnames="spec")
def fake_quantize(weight: jax.Array, spec: WeightSpec, scales: Scales | None = None) -> jax.Array:
    """float32 weight, rounded to its grid and back; scales None: those of `find_scales`."""
    weight = weight.astype(jnp.float32)
    step, zero = expand(scales or find_scales(weight, spec), spec, weight.shape)
    return decode(encode(weight, step, zero, numerics.get_format(spec.format)), step, zero)


def scales_in(q: QArray) -> Scales:
    """The scales that a quantized weight has."""
    zero = None if q.zero_point is None else q.zero_point.astype(jnp.float32)
    scale = q.scale.astype(jnp.float32)
    return Scales(scale=scale, zero_point=zero, global_scale=q.global_scale)


def expand(scales: Scales, spec: WeightSpec, shape: tuple[int, ...]) -> Grid:
    """Step and zero point of each element of a weight of `shape`."""
    scale, zero = scales.scale, scales.zero_point
    if scales.global_scale is not None:
        scale = scale * scales.global_scale[..., None, None]
    zero = None if zero is None else fill_blocks(zero, spec.block, shape)
    return fill_blocks(scale, spec.block, shape), zero


def encode(
    x: jax.Array, step: jax.Array, zero: jax.Array | None, fmt: numerics.Format
) -> jax.Array:
    """Numbers of `fmt`, in float32, that x rounds to: as `quantize_array` does, bit for bit."""
    scaled = numerics.divide(x, step)
    return nearest(scaled if zero is None else jnp.round(scaled) + zero, fmt)


def decode(codes: jax.Array, step: jax.Array, zero: jax.Array | None) -> jax.Array:
    """What `codes` stand for."""
    return (codes if zero is None else codes - zero) * step


def nearest(x: jax.Array, fmt: numerics.Format) -> jax.Array:
    """float32 x rounded to the nearest number of `fmt`, half to even, saturating; in float32.

    `numerics.round_to_format` without the trip through the narrow type, which a compiler may take
    for excess precision and leave out.
    """
    x = jnp.clip(x, fmt.min, fmt.max)
    if fmt.is_integer:
        return jnp.round(x)
    info = jnp.finfo(fmt.dtype)
    _, exponent = jnp.frexp(x)  # |x| is in [1/2, 1) * 2**exponent
    exponent = jnp.maximum(exponent - 1, int(info.minexp)) - int(info.nmant)
    ulp = jnp.ldexp(jnp.float32(1), exponent)
    return jnp.round(x / ulp) * ulp


def block_sum(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """[..., R, C] -> [..., r, c], sums over blocks."""
    return blocked(x, block).sum(axis=(-3, -1))


def block_amax(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """[..., R, C] -> [..., r, c], largest magnitude in each block."""
    return jnp.abs(blocked(x, block)).max(axis=(-3, -1))


def fill_blocks(x: jax.Array, block: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """[..., r, c] -> [..., R, C], each number over its block."""
    lengths = [size if n == -1 else n for size, n in zip(shape[-2:], block, strict=True)]
    x = jnp.broadcast_to(
        x[..., :, None, :, None], (*x.shape[:-1], lengths[0], x.shape[-1], lengths[1])
    )
    return x.reshape(*x.shape[:-4], x.shape[-4] * lengths[0], -1)[..., : shape[-2], : shape[-1]]


def block_length(columns: int, most: int) -> int:
    """The largest divisor of `columns` up to `most`: columns that a solver takes at once."""
    return next(n for n in range(min(most, columns), 0, -1) if columns % n == 0)


def split_rows(q: QArray, rows: tuple[int, ...]) -> list[QArray]:
    """Undo a concatenation along out: weights that share an input are solved in one call.

    Args:
      rows: outputs of each part, in order; whole blocks, where blocks have several rows.
    """
    tall = q.block[0]
    assert sum(rows) == q.shape[-2], (rows, q.shape)
    assert tall == 1 or (tall > 1 and all(n % tall == 0 for n in rows[:-1])), (rows, q.block)

    def part(x: Any, start: int, stop: int) -> Any:
        return None if x is None else x[..., start:stop, :]

    parts, start = [], 0
    for count in rows:
        stop = start + count
        low, high = start // tall, -(-stop // tall)
        parts.append(
            dataclasses.replace(
                q,
                values=part(q.values, start, stop),
                scale=part(q.scale, low, high),
                zero_point=part(q.zero_point, low, high),
            )
        )
        start = stop
    return parts
