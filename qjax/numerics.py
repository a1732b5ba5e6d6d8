"""Number formats: their ranges, how to round to them, and how a scale follows from a range.

Elementwise arithmetic only. Which elements share a scale is `qarray`'s business.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from qjax.errors import ConfigError, one_of

ScaleRule = Literal["absmax", "absmax_half", "floor", "rceil", "even"]
# What scales are stored in. Two of them say more than a type: e4m3 has too short a range to stand
# alone, so a float32 scale of the whole matrix stands beside it (nvfp4); e8m0 holds powers of 2
# (mxfp4, mxfp8; OCP Microscaling Formats 1.0).
SCALE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu")
TWO_LEVELS, POWERS_OF_TWO = "float8_e4m3fn", "float8_e8m0fnu"
_UNIFORM_RULES, POWER_RULES = ("absmax", "absmax_half"), ("floor", "rceil", "even")
SCALE_RULES = _UNIFORM_RULES + POWER_RULES
_LARGEST_E4M3, _SMALLEST_E4M3 = 448.0, 2.0**-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One low-precision number format.

    Attributes:
      name: what rules, checkpoints and error messages call it.
      dtype: the JAX dtype that stores one number in memory: one byte for 3, 5, 6 and 7 bits.
      bits: bits one number takes on disk.
      min, max: the smallest and the largest number there is.
      is_integer: integers round half to even on a uniform grid; floats round in their own type.
    """

    name: str
    dtype: jnp.dtype
    bits: int
    min: float
    max: float
    is_integer: bool


def _integer(bits: int) -> Format:
    dtype = jnp.dtype(f"int{bits}") if bits in (2, 4, 8) else jnp.dtype(jnp.int8)
    high = 2 ** (bits - 1) - 1
    return Format(
        name=f"int{bits}", dtype=dtype, bits=bits, min=-high - 1, max=high, is_integer=True
    )


def _float(name: str, dtype: jnp.dtype) -> Format:
    high, bits = float(jnp.finfo(dtype).max), jnp.finfo(dtype).bits
    return Format(name=name, dtype=dtype, bits=bits, min=-high, max=high, is_integer=False)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *map(_integer, range(2, 9)),
        _float("fp4_e2m1", jnp.dtype(jnp.float4_e2m1fn)),
        # E4M3 is the "fn" variant everywhere in inference: no infinities, largest number 448.
        _float("fp8_e4m3", jnp.dtype(jnp.float8_e4m3fn)),
        _float("fp8_e5m2", jnp.dtype(jnp.float8_e5m2)),
    )
}


# (weight, activations) that one product takes -> whether the weight may have several scales along
# the axis that contracts while the activations of a token have one. Operands of one format meet as
# they are, so that one scale leaves each row of the sum; others are decoded first, group by group.
# Groups on both sides, of one length, are summed group by group.
PRODUCTS: dict[tuple[str, str], bool] = {
    ("int4", "fp8_e4m3"): True,
    ("int8", "int8"): False,
    ("fp8_e4m3", "fp8_e4m3"): False,
    ("fp8_e5m2", "fp8_e5m2"): False,
    ("fp4_e2m1", "fp4_e2m1"): True,
    ("fp4_e2m1", "fp8_e4m3"): True,
}


def known_products() -> str:
    """PRODUCTS in words, for messages."""
    return ", ".join(f"{weight} with {act}" for weight, act in PRODUCTS)


def get_format(name: str) -> Format:
    """The format called `name`; raises ConfigError, listing the names there are."""
    return FORMATS[one_of("format", name, FORMATS)]


def scale_from_amax(amax: jax.Array, fmt: Format, rule: str = "absmax") -> jax.Array:
    """The step s for which a symmetric grid of `fmt` covers [-amax, amax].

    `absmax`: s = amax / max, so that amax is exactly representable (ModelOpt, SmoothQuant).
    `absmax_half`: s = amax / (max + 1/2), integers only, so that all 2**bits levels are used and
    +amax is clipped by half a step (compressed-tensors, GPTQ: amax / 7.5, amax / 127.5).

    Powers of 2, of floats (e2m1 has max = 6 and one bit of mantissa, e4m3 448 and three):
    `floor`: s = 2^floor(log2 amax) / 2^floor(log2 max); what lies over max * s is clipped (OCP
    Microscaling Formats 1.0, section 6.3).
    `rceil`: the smallest s >= amax / max, so that nothing is clipped (ModelOpt, torchao).
    `even`: floor of amax rounded to the format's bits of mantissa (compressed-tensors).

    Where amax is 0 every value is 0 whatever the scale, and s = 1 keeps the division finite.

    Args:
      amax: largest magnitudes, float32, any shape.
      fmt: the target format.
      rule: a ScaleRule.

    Returns:
      float32 scales of the shape of amax, NaN where it is.

    Raises:
      ConfigError: an unknown rule, `absmax_half` with a float, a power of 2 with an integer.

    >>> [float(scale_from_amax(jnp.float32(7), FORMATS["fp4_e2m1"], rule)) for rule in POWER_RULES]
    [1.0, 2.0, 2.0]
    """
    check_scale_rule(rule, fmt)
    if rule in POWER_RULES:
        scale = _power_of_two(amax, fmt, rule)
    else:
        scale = divide(amax, jnp.float32(fmt.max + 0.5 if rule == "absmax_half" else fmt.max))
        # A subnormal scale would be flushed to 0, and 0 / 0 is NaN: the smallest normal is near
        # enough.
        scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    return jnp.where(amax == 0, jnp.float32(1), scale)


def check_scale_rule(rule: str, fmt: Format) -> None:
    """Raise ConfigError if no scale of numbers in `fmt` follows by `rule`."""
    one_of("scale rule", rule, SCALE_RULES)
    if rule == "absmax_half" and not fmt.is_integer:
        raise ConfigError(
            f"scale rule 'absmax_half' is for integer formats, not {fmt.name!r}; use 'absmax'"
        )
    if rule in POWER_RULES and fmt.is_integer:
        raise ConfigError(
            f"scale rule {rule!r} is for float formats, not {fmt.name!r}; use 'absmax'"
        )


def _power_of_two(amax: jax.Array, fmt: Format, rule: str) -> jax.Array:
    """Exact, by the bits of float32: a logarithm would round at powers of 2."""
    if rule == "rceil":
        bits = _bits(divide(amax, jnp.float32(fmt.max)))
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    else:
        half = 0 if rule == "floor" else 1 << (22 - jnp.finfo(fmt.dtype).nmant)
        exponent = ((_bits(amax) + half) >> 23) - (math.frexp(fmt.max)[1] - 1)
    # From 2^-126, the smallest normal, to 2^127; those of infinity and NaN stay above.
    exponent = jnp.where(jnp.isfinite(amax), jnp.clip(exponent, 1, 254), 255)
    scale = jax.lax.bitcast_convert_type(exponent.astype(jnp.int32) << 23, jnp.float32)
    return jnp.where(exponent == 255, jnp.float32(jnp.nan), scale)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def global_scale(amax: jax.Array, fmt: Format) -> jax.Array:
    """The float32 scale of a whole matrix that stands beside e4m3 scales: amax / (max * 448).

    It gives the block with the largest magnitude the largest scale (ModelOpt, which calls it
    weight_scale_2; compressed-tensors stores its reciprocal).
    """
    top = jnp.float32(fmt.max * _LARGEST_E4M3)
    scale = jnp.maximum(divide(amax, top), jnp.finfo(jnp.float32).tiny)
    return jnp.where(amax == 0, jnp.float32(1), scale)


def scale_beside(global_scale: jax.Array, amax: jax.Array, fmt: Format) -> jax.Array:
    """Scales of blocks beside a global one: amax / (max * global_scale), float32 numbers of e4m3.

    Args:
      global_scale: broadcasts against amax.
      amax: largest magnitude of each block.
    """
    scale = divide(amax, jnp.float32(fmt.max) * global_scale)
    return representable(jnp.where(amax == 0, jnp.float32(1), scale), TWO_LEVELS)


def divide(x: jax.Array, positive: jax.Array) -> jax.Array:
    """x / positive, correctly rounded, for a positive divisor that broadcasts against x.

    XLA compiles x / s with s broadcast as x * (1 / s), which rounds twice: scales come out one bit
    off those of other toolkits, and exact ties go to the wrong side. A divisor that depends on each
    x (though max(s, -|x|) is always s) is divided by as written. On GPUs XLA's own division is only
    within 2 ulps: there a tie may still go to either side.
    """
    return x / jnp.maximum(positive, -jnp.abs(x))


def representable(scale: jax.Array, dtype: str) -> jax.Array:
    """float32 scales, each rounded to a positive number that `dtype`, one of SCALE_DTYPES, holds.

    Not scale.astype(dtype).astype(float32): XLA may drop that pair as excess precision, and the
    numbers would be rounded against another scale than the one that is stored.

    e8m0 is left as it is: its rules give powers of 2.
    """
    if dtype in ("float32", POWERS_OF_TWO):
        return scale
    if dtype == "bfloat16":
        return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    normal = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=3)
    subnormal = jnp.round(scale / _SMALLEST_E4M3) * _SMALLEST_E4M3
    rounded = jnp.where(scale < 2.0**-6, subnormal, normal)
    return jnp.clip(rounded, _SMALLEST_E4M3, _LARGEST_E4M3)


def round_to_format(x: jax.Array, fmt: Format) -> jax.Array:
    """Round x to the nearest number of `fmt` (half to even), saturating at its range.

    The clip comes first for floats: casting 449 to e4m3fn gives NaN, not 448.

    Args:
      x: already divided by its scale, floating point, any shape.

    Returns:
      an array of dtype `fmt.dtype` and the shape of x. NaN stays NaN in 8-bit floats; e2m1 and
      integers have none.
    """
    clipped = jnp.clip(x, fmt.min, fmt.max)
    if not fmt.is_integer:
        return clipped.astype(fmt.dtype)
    # Through int8: some backends cannot convert floats to int4 and int2 directly.
    return jnp.round(clipped).astype(jnp.int8).astype(fmt.dtype)
