"""Number formats: their ranges, how to round to them, and how a scale follows from a range.

Elementwise arithmetic only. Which elements share a scale is `qarray`'s business.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from qjax.errors import ConfigError, one_of

ScaleRule = Literal["absmax", "absmax_half"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One low-precision number format.

    Attributes:
      name: what rules, checkpoints and error messages call it.
      dtype: the JAX dtype that stores one number in memory.
      bits: bits one number takes, in memory and on disk.
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
    dtype = jnp.dtype(f"int{bits}")
    high = 2 ** (bits - 1) - 1
    return Format(name=dtype.name, dtype=dtype, bits=bits, min=-high - 1, max=high, is_integer=True)


def _float8(name: str, dtype: jnp.dtype) -> Format:
    high = float(jnp.finfo(dtype).max)
    return Format(name=name, dtype=dtype, bits=8, min=-high, max=high, is_integer=False)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _integer(4),
        _integer(8),
        # E4M3 is the "fn" variant everywhere in inference: no infinities, largest number 448.
        _float8("fp8_e4m3", jnp.dtype(jnp.float8_e4m3fn)),
        _float8("fp8_e5m2", jnp.dtype(jnp.float8_e5m2)),
    )
}


# (weight, activations) that one product takes -> whether the weight may have several scales along
# the axis that contracts. Operands of one format meet as they are, so that one scale leaves each
# row of the sum; int4 is decoded first, group by group.
PRODUCTS: dict[tuple[str, str], bool] = {
    ("int4", "fp8_e4m3"): True,
    ("int8", "int8"): False,
    ("fp8_e4m3", "fp8_e4m3"): False,
    ("fp8_e5m2", "fp8_e5m2"): False,
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

    Where amax is 0 every value is 0 whatever the scale, and s = 1 keeps the division finite.

    Args:
      amax: largest magnitudes, float32, any shape.
      fmt: the target format.
      rule: a ScaleRule.

    Returns:
      float32 scales of the shape of amax.

    Raises:
      ConfigError: on an unknown rule, or `absmax_half` with a floating-point format.
    """
    one_of("scale rule", rule, ("absmax", "absmax_half"))
    if rule == "absmax_half" and not fmt.is_integer:
        raise ConfigError(
            f"scale rule 'absmax_half' is for integer formats, not {fmt.name!r}; use 'absmax'"
        )
    top = fmt.max + 0.5 if rule == "absmax_half" else fmt.max
    # A subnormal scale would be flushed to 0, and 0 / 0 is NaN: the smallest normal is near enough.
    scale = jnp.maximum(divide(amax, jnp.float32(top)), jnp.finfo(jnp.float32).tiny)
    return jnp.where(amax > 0, scale, jnp.float32(1))


def divide(x: jax.Array, positive: jax.Array) -> jax.Array:
    """x / positive, correctly rounded, for a positive divisor that broadcasts against x.

    XLA compiles x / s with s broadcast as x * (1 / s), which rounds twice: scales come out one bit
    off those of other toolkits, and exact ties go to the wrong side. A divisor that depends on each
    x (though max(s, -|x|) is always s) is divided by as written. On GPUs XLA's own division is only
    within 2 ulps: there a tie may still go to either side.
    """
    return x / jnp.maximum(positive, -jnp.abs(x))


def representable(scale: jax.Array, dtype: str) -> jax.Array:
    """float32 scales, each rounded to a number that `dtype` ('float32', 'bfloat16') can hold.

    Not scale.astype(dtype).astype(float32): XLA may drop that pair as excess precision, and the
    numbers would be rounded against another scale than the one that is stored.
    """
    if dtype == "float32":
        return scale
    return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)


def round_to_format(x: jax.Array, fmt: Format) -> jax.Array:
    """Round x to the nearest number of `fmt` (half to even), saturating at its range.

    The clip comes first for floats: casting 449 to e4m3fn gives NaN, not 448.

    Args:
      x: already divided by its scale, floating point, any shape.

    Returns:
      an array of dtype `fmt.dtype` and the shape of x. NaN stays NaN in float formats.
    """
    clipped = jnp.clip(x, fmt.min, fmt.max)
    if not fmt.is_integer:
        return clipped.astype(fmt.dtype)
    # int4 goes through int8: some backends cannot convert float to int4 directly.
    return jnp.round(clipped).astype(jnp.int8).astype(fmt.dtype)
