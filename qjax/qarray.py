"""QArray: the one quantized-array type, and the arithmetic between it and plain arrays."""

import dataclasses
from functools import partial
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.blocks import block_for as block_for
from qjax.blocks import blocked, spread, unblocked
from qjax.blocks import scale_shape as scale_shape
from qjax.errors import ConfigError, DataError
from qjax.invariants import ACT_GRANULARITIES as ACT_GRANULARITIES
from qjax.invariants import check_scale_dtype
from qjax.invariants import validate as validate


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "pre_scale", "perm"],
    meta_fields=["format", "granularity", "group_size", "scale_dtype", "scale_rule"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InputSpec:
    """What a product does to its activations x [..., in] before they meet the weight.

    In this order: x = x[..., perm]; x = x * pre_scale; x is quantized to `format`.

    Attributes:
      scale: static scale, float32 scalar; None: computed from x at run time (dynamic). Beside
        scales in e4m3 it is the global one; None: each token has its own.
      pre_scale: [in], what AWQ and SmoothQuant move between activations and weights; None: ones.
      perm: int32 [in], the activation order of GPTQ; None: identity.
      format: a name of numerics.FORMATS; None: x stays in its own type (weight-only).
      granularity: 'per_tensor' (one scale for all of x), 'per_token' (one for each row of x) or
        'per_group' (one for `group_size` features of a row, the last ones fewer).
      group_size: for per_group, else -1.
      scale_dtype: what scales are rounded to, one of numerics.SCALE_DTYPES.
      scale_rule: see numerics.scale_from_amax.
    """

    scale: Any = None
    pre_scale: Any = None
    perm: Any = None
    format: str | None = None
    granularity: str = "per_token"
    group_size: int = -1
    scale_dtype: str = "float32"
    scale_rule: str = "absmax"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "zero_point", "global_scale", "input"],
    meta_fields=["format", "block", "dtype", "axis", "layout"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QArray:
    """A quantized array: original ~= (values - zero_point) * scale [* global_scale].

    Invariants (`validate` checks them; nothing is checked on construction, because tree.map may
    put specs or shapes in the place of arrays):
      - values has the logical shape; rank >= 2; the last two axes are matrix axes, any before
        them are stacked matrices.
      - one scale covers a block of `block` = (rows, columns) of the last two axes, -1 meaning
        the whole axis, so scale.shape[-2:] == values.shape[-2:] / block, leading axes equal.
        Blocks of several rows and several columns may be cut at the edges (rounded up), others
        divide their axes.
      - zero_point, if any, has the shape of scale, and a format's storage dtype.
      - static fields are strings and integers only: they take part in jit's cache key.

    The shape is read from `values`, never stored: it would go stale under vmap and shard_map.

    Attributes:
      values: [..., out, in] (axis -1) or [..., in, out] (axis -2), dtype of `format`.
      scale: in a dtype of numerics.SCALE_DTYPES.
      zero_point: for asymmetric formats.
      global_scale: float32, one for each matrix ([] or the leading axes), a second level of scale
        (nvfp4).
      input: what a product with this weight does to its activations; None: nothing.
      format: name in numerics.FORMATS.
      block: (rows, columns) one scale covers; -1: the whole axis. (1, -1) is per-channel,
        (1, 128) group-wise with group_size 128, (128, 128) block-wise, (-1, -1) per-tensor.
      dtype: name of the dtype that `dequantize` gives, the array's dtype before.
      axis: the contracting axis, -1 ([out, in], ours and Hugging Face's) or -2 ([in, out]).
      layout: 'canonical'; prepared device layouts have other names.
    """

    values: Any
    scale: Any
    zero_point: Any = None
    global_scale: Any = None
    input: InputSpec | None = None
    format: str
    block: tuple[int, int]
    dtype: str = "bfloat16"
    axis: int = -1
    layout: str = "canonical"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """Number of logical weights."""
        return self.values.size

    @property
    def group_size(self) -> int:
        """Weights along the contracting axis that share a scale; -1: all of them."""
        return self.block[self.axis]


def is_qarray(x: object) -> TypeGuard[QArray]:
    """True for a QArray. Every traversal of a tree uses `is_leaf=is_qarray`."""
    return isinstance(x, QArray)


def is_cut(q: QArray) -> bool:
    """Whether blocks at the edges are smaller than the others."""
    return any(n > 1 and size % n for size, n in zip(q.shape[-2:], q.block, strict=True))


def per_row(x: jax.Array, q: QArray) -> jax.Array:
    """Scales or zero points of q, one for each row: [..., r, c] -> [..., R, c]."""
    rows = q.shape[-2]
    each = rows if q.block[0] == -1 else q.block[0]
    return jnp.repeat(x, each, axis=-2)[..., :rows, :]


def quantize_array(
    x: jax.Array,
    format: str,
    *,
    block: tuple[int, int] = (1, -1),
    axis: int = -1,
    symmetric: bool = True,
    scale_rule: str = "absmax",
    scale_dtype: str = "float32",
    input: InputSpec | None = None,
    global_amax: jax.Array | None = None,
) -> QArray:
    """Quantize an array, every number rounded to nearest.

    symmetric:  s = scale_rule(max |x|),      q = round(x / s)
    asymmetric: s = (max - min) / (2^b - 1),  z = round(qmin - min / s),  q = round(x / s) + z,
    with the range widened to contain 0, so that 0 is exact. The scale is rounded to its storage
    dtype before it divides, so that what is stored is what was rounded against. Beside scales in
    e4m3 there is a global one, and s is the product of both (numerics.global_scale).

    Args:
      x: floating point [..., R, C].
      format: name in numerics.FORMATS.
      block: (rows, columns) one scale covers; -1 is the whole axis.
      axis: the contracting axis of x as a weight, -1 or -2; recorded, not used here.
      scale_dtype: one of numerics.SCALE_DTYPES: float32, bfloat16; with float formats also
        float8_e4m3fn and float8_e8m0fnu, which wants a scale_rule that gives powers of 2.
      input: recorded in the result.
      global_amax: float32 [...], the largest magnitude that the global scale covers, for matrices
        that share it; None: that of each matrix.

    Returns:
      a QArray whose `dequantize` has the shape and dtype of x.

    Raises:
      ConfigError: unknown format or rule, a block that does not divide, an asymmetric float, a
        scale_dtype that does not go with the format or the rule.
      DataError: x is not floating point.

    >>> q = quantize_array(jnp.array([[0.0, 0.5, -1.0, 7.0]]), "int4")
    >>> q.values.tolist(), q.scale.tolist()
    ([[0, 0, -1, 7]], [[1.0]])
    """
    fmt = numerics.get_format(format)
    check_scale_dtype(scale_dtype, scale_rule, fmt, symmetric)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DataError(f"an array of {x.dtype} cannot be quantized; it must be floating point")
    if axis not in (-1, -2):
        raise ConfigError(f"axis {axis} cannot contract; choose -1 ([out, in]) or -2 ([in, out])")
    scale_shape(x.shape, block)
    blocks = blocked(x.astype(jnp.float32), block)
    zero_point = total = None
    if symmetric:
        amax = jnp.max(jnp.abs(blocks), axis=(-3, -1))
        scale, total = _symmetric_scales(amax, fmt, scale_rule, scale_dtype, global_amax)
        step = scale if total is None else scale * total[..., None, None]
        scaled = numerics.divide(blocks, spread(step))
    else:
        scale, zero_point = _asymmetric_grid(blocks, fmt, scale_dtype)
        zero = spread(zero_point.astype(jnp.float32))
        # Round before the shift: the zero point is exact, and ties stay half to even in x / s.
        scaled = jnp.round(numerics.divide(blocks, spread(scale))) + zero
    q = QArray(
        values=unblocked(numerics.round_to_format(scaled, fmt), x.shape),
        scale=scale.astype(scale_dtype),
        zero_point=zero_point,
        global_scale=total,
        input=input,
        format=format,
        block=block,
        dtype=x.dtype.name,
        axis=axis,
    )
    validate(q)
    return q


def _symmetric_scales(
    amax: jax.Array,
    fmt: numerics.Format,
    rule: str,
    scale_dtype: str,
    global_amax: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Scales, float32 but representable in scale_dtype, and the global ones beside them."""
    if scale_dtype != numerics.TWO_LEVELS:
        scale = numerics.scale_from_amax(amax, fmt, rule)
        return numerics.representable(scale, scale_dtype), None
    covered = jnp.max(amax, axis=(-2, -1)) if global_amax is None else global_amax
    total = numerics.global_scale(covered, fmt)
    return numerics.scale_beside(total[..., None, None], amax, fmt), total


def _asymmetric_grid(
    blocks: jax.Array, fmt: numerics.Format, scale_dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Steps, float32 but representable in scale_dtype, and zero points."""
    if not fmt.is_integer:
        raise ConfigError(f"format {fmt.name!r} has no zero point; use symmetric=True")
    low = jnp.minimum(jnp.min(blocks, axis=(-3, -1)), 0)
    high = jnp.maximum(jnp.max(blocks, axis=(-3, -1)), 0)
    levels = jnp.float32(fmt.max - fmt.min)
    # In halves, which is exact: high - low can pass the largest float32.
    step = numerics.divide(high / 2 - low / 2, levels / 2)
    step = jnp.maximum(step, jnp.finfo(jnp.float32).tiny)
    step = jnp.where(high > low, step, jnp.float32(1))
    step = numerics.representable(step, scale_dtype)
    zero = numerics.round_to_format(fmt.min - numerics.divide(low, step), fmt)
    return step, zero


def dequantize(q: QArray, dtype: str | None = None) -> jax.Array:
    """The array a QArray stands for: (values - zero_point) * scale * global_scale.

    It is the weight that products use: what `q.input` does to activations first (perm, pre_scale)
    is not folded in.

    Args:
      q: canonical layout.
      dtype: of the result; None: the dtype the array had before. Arithmetic is float32.

    Returns:
      [..., R, C], the shape of q.values.
    """
    if q.layout != "canonical":
        raise ConfigError(f"layout {q.layout!r} is a device layout; dequantize needs 'canonical'")
    blocks = blocked(q.values.astype(jnp.float32), q.block)
    if q.zero_point is not None:
        blocks = blocks - spread(q.zero_point.astype(jnp.float32))
    return unblocked(blocks * spread(full_scale(q)), q.shape).astype(dtype or q.dtype)


def full_scale(q: QArray) -> jax.Array:
    """scale * global_scale, float32, of the shape of q.scale."""
    scale = q.scale.astype(jnp.float32)
    return scale if q.global_scale is None else scale * q.global_scale[..., None, None]


def bits_of(x: Any) -> int:
    """Bits that the leaves of x (arrays, abstract arrays, QArrays) take in memory.

    Counted from the dtype: `.nbytes` says one byte for an int4.
    """
    return sum(leaf.size * _bits_each(leaf.dtype) for leaf in jax.tree.leaves(x))


def _bits_each(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize  # bool, complex, PRNG keys
