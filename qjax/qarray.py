"""QArray: the one quantized-array type, and the arithmetic between it and plain arrays."""

import dataclasses
from functools import partial
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.errors import ConfigError, DataError, one_of

ACT_GRANULARITIES = ("per_tensor", "per_token")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "pre_scale", "perm"],
    meta_fields=["format", "granularity"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InputSpec:
    """What a product does to its activations x [..., in] before they meet the weight.

    In this order: x = x[..., perm]; x = x * pre_scale; x is quantized to `format`.

    Attributes:
      scale: static scale, float32 scalar; None: computed from x at run time (dynamic).
      pre_scale: [in], what AWQ and SmoothQuant move between activations and weights; None: ones.
      perm: int32 [in], the activation order of GPTQ; None: identity.
      format: a name of numerics.FORMATS; None: x stays in its own type (weight-only).
      granularity: 'per_tensor' (one scale for all of x) or 'per_token' (one for each row of x).
    """

    scale: Any = None
    pre_scale: Any = None
    perm: Any = None
    format: str | None = None
    granularity: str = "per_token"


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
      - zero_point, if any, has the shape of scale, and a format's storage dtype.
      - static fields are strings and integers only: they take part in jit's cache key.

    The shape is read from `values`, never stored: it would go stale under vmap and shard_map.

    Attributes:
      values: [..., out, in] (axis -1) or [..., in, out] (axis -2), dtype of `format`.
      scale: float32 or bfloat16.
      zero_point: for asymmetric formats.
      global_scale: float32 scalar, a second level of scale (nvfp4).
      input: what a product with this weight does to its activations; None: nothing.
      format: name in numerics.FORMATS.
      block: (rows, columns) one scale covers; -1: the whole axis. (1, -1) is per-channel,
        (1, 128) group-wise with group_size 128, (-1, -1) per-tensor.
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


def block_for(granularity: str, group_size: int, axis: int) -> tuple[int, int]:
    """The `block` of a granularity: 'per_tensor', 'per_channel' or 'per_group'.

    >>> block_for("per_group", 128, -1), block_for("per_channel", -1, -2)
    ((1, 128), (-1, 1))
    """
    one_of("granularity", granularity, ("per_tensor", "per_channel", "per_group"))
    if granularity == "per_tensor":
        return (-1, -1)
    along = group_size if granularity == "per_group" else -1
    return (1, along) if axis == -1 else (along, 1)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of an array of `shape`.

    Raises:
      ConfigError: if a block does not divide its axis, naming both.
    """
    if len(shape) < 2:
        raise ConfigError(f"an array of shape {shape} cannot be quantized: it needs two axes")
    blocks = []
    for size, length in zip(shape[-2:], block, strict=True):
        length = size if length == -1 else length
        if length < 1 or size % length:
            raise ConfigError(
                f"group size {length} does not divide an axis of {size} (array {shape}); choose a "
                f"divisor of {size}, or -1 for one scale per channel"
            )
        blocks.append(size // length)
    return (*shape[:-2], *blocks)


def _blocked(x: jax.Array, scales: tuple[int, ...]) -> jax.Array:
    """[..., R, C] -> [..., r, R/r, c, C/c] for a scale array of shape [..., r, c]."""
    rows, columns = scales[-2:]
    lead = x.shape[:-2]
    return x.reshape(*lead, rows, x.shape[-2] // rows, columns, x.shape[-1] // columns)


def _spread(scale: jax.Array) -> jax.Array:
    """[..., r, c] -> [..., r, 1, c, 1], to broadcast against `_blocked`."""
    return scale[..., :, None, :, None]


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
) -> QArray:
    """Quantize an array, every number rounded to nearest.

    symmetric:  s = scale_rule(max |x|),      q = round(x / s)
    asymmetric: s = (max - min) / (2^b - 1),  z = round(qmin - min / s),  q = round(x / s) + z,
    with the range widened to contain 0, so that 0 is exact. The scale is rounded to its storage
    dtype before it divides, so that what is stored is what was rounded against.

    Args:
      x: floating point [..., R, C].
      format: name in numerics.FORMATS.
      block: (rows, columns) one scale covers; -1 is the whole axis.
      axis: the contracting axis of x as a weight, -1 or -2; recorded, not used here.
      scale_dtype: 'float32' or 'bfloat16'.
      input: recorded in the result.

    Returns:
      a QArray whose `dequantize` has the shape and dtype of x.

    Raises:
      ConfigError: unknown format or rule, a block that does not divide, an asymmetric float.
      DataError: x is not floating point.

    >>> q = quantize_array(jnp.array([[0.0, 0.5, -1.0, 7.0]]), "int4")
    >>> q.values.tolist(), q.scale.tolist()
    ([[0, 0, -1, 7]], [[1.0]])
    """
    fmt = numerics.get_format(format)
    one_of("scale dtype", scale_dtype, ("float32", "bfloat16"))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DataError(f"an array of {x.dtype} cannot be quantized; it must be floating point")
    if axis not in (-1, -2):
        raise ConfigError(f"axis {axis} cannot contract; choose -1 ([out, in]) or -2 ([in, out])")
    shape = scale_shape(x.shape, block)
    blocks = _blocked(x.astype(jnp.float32), shape)
    zero_point = None
    if symmetric:
        amax = jnp.max(jnp.abs(blocks), axis=(-3, -1))
        step = numerics.scale_from_amax(amax, fmt, scale_rule)
        step = numerics.representable(step, scale_dtype)
        scaled, zero_point = numerics.divide(blocks, _spread(step)), None
    else:
        step, zero_point = _asymmetric_grid(blocks, fmt, scale_dtype)
        zero = _spread(zero_point.astype(jnp.float32))
        # Round before the shift: the zero point is exact, and ties stay half to even in x / s.
        scaled = jnp.round(numerics.divide(blocks, _spread(step))) + zero
    q = QArray(
        values=numerics.round_to_format(scaled, fmt).reshape(x.shape),
        scale=step.astype(scale_dtype),
        zero_point=zero_point,
        input=input,
        format=format,
        block=block,
        dtype=x.dtype.name,
        axis=axis,
    )
    validate(q)
    return q


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
    blocks = _blocked(q.values.astype(jnp.float32), q.scale.shape)
    if q.zero_point is not None:
        blocks = blocks - _spread(q.zero_point.astype(jnp.float32))
    scale = q.scale.astype(jnp.float32)
    if q.global_scale is not None:
        scale = scale * q.global_scale
    return (blocks * _spread(scale)).reshape(q.shape).astype(dtype or q.dtype)


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


def validate(q: QArray, name: str = "QArray") -> None:
    """Raise DataError if q breaks an invariant of its class; concrete or abstract arrays.

    Args:
      name: what the message calls q, usually its path.
    """
    try:
        fmt = numerics.get_format(q.format)
        expected = scale_shape(q.shape, q.block)
    except ConfigError as error:
        raise DataError(f"{name}: {error}") from error
    if q.axis not in (-1, -2):
        raise DataError(f"{name}: axis is {q.axis}; it must be -1 or -2")
    if q.values.dtype != fmt.dtype:
        raise DataError(f"{name}: values are {q.values.dtype}, but {q.format} needs {fmt.dtype}")
    for field, kind in (("scale", jnp.floating), ("zero_point", jnp.integer)):
        array = getattr(q, field)
        if array is None:
            continue
        if array.shape != expected:
            raise DataError(
                f"{name}: {field} has shape {array.shape}; values {q.shape} in blocks of "
                f"{q.block} need {expected}"
            )
        if not jnp.issubdtype(array.dtype, kind):
            raise DataError(f"{name}: {field} is {array.dtype}, not {kind.__name__}")
    if q.global_scale is not None and q.global_scale.shape != ():
        raise DataError(f"{name}: global_scale has shape {q.global_scale.shape}, not ()")
    if q.input is not None:
        if q.input.format is not None:
            _validate_input_format(q, name)
        features = q.shape[q.axis]
        for field in ("pre_scale", "perm"):
            array = getattr(q.input, field)
            if array is not None and array.shape != (features,):
                raise DataError(f"{name}: {field} has shape {array.shape}, not ({features},)")


def _validate_input_format(q: QArray, name: str) -> None:
    """Products of two quantized operands take no zero points, and few take groups."""
    assert q.input is not None
    groups = numerics.PRODUCTS.get((q.format, str(q.input.format)))
    if groups is None:
        raise DataError(
            f"{name}: activations in {q.input.format!r} meet a weight in {q.format!r}; no product "
            f"takes these, but {numerics.known_products()}"
        )
    per_channel = (1, -1) if q.axis == -1 else (-1, 1)
    if (not groups and q.block not in (per_channel, (-1, -1))) or q.zero_point is not None:
        raise DataError(
            f"{name}: activations in {q.input.format!r} need a symmetric {q.format} weight"
            f"{'' if groups else ' with one scale a channel or a matrix'}, not blocks of {q.block} "
            f"with zero_point {q.zero_point is not None}"
        )
    one_of("act_granularity", q.input.granularity, ACT_GRANULARITIES, DataError)
