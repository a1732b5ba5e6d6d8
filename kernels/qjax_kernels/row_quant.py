"""Quantization of whole rows, as every row kernel means it, and its reference."""

import jax
import jax.numpy as jnp

GROUP = 128  # neighbours that are added up for `group_sums`

# dtype -> smallest and largest number, and what a scale makes the largest magnitude.
RANGES = {
    jnp.dtype(jnp.int8): (-128.0, 127.0),
    jnp.dtype(jnp.float8_e4m3fn): (-448.0, 448.0),
}
FLOATS = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


def check_output(
    op: str, features: int, out_dtype: jnp.dtype, scale: jax.Array | None, group_sums: bool
) -> None:
    """Raise ValueError unless rows of `features` can be written as asked."""
    if out_dtype not in RANGES and out_dtype not in FLOATS:
        names = ", ".join(dtype.name for dtype in (*RANGES, *FLOATS))
        raise ValueError(f"{op} writes {names}, not {out_dtype.name}")
    if scale is not None and (out_dtype not in RANGES or scale.shape not in ((), (1, 1))):
        raise ValueError(
            f"scale {scale.dtype}{scale.shape} must be float32 [] or [1, 1], and the result int8 "
            f"or fp8, not {out_dtype.name}"
        )
    if group_sums and features % GROUP:
        raise ValueError(f"group_sums needs a multiple of {GROUP} features, not {features}")


def quantize_rows(
    y: jax.Array, out_dtype: jnp.dtype, scale: jax.Array | None, group_sums: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Round rows to `out_dtype`.

    values = round(y / scale), half to even, clipped to the range of the dtype;
    scale[row] = max|y[row]| / 127 or 448, and 1 for a row of zeros, unless it is given.

    Args:
      y: float32 [..., features].
      out_dtype: int8, float8_e4m3fn, or a float dtype, which is rounded to without a scale.
      scale: float32 [] or [1, 1]; None: from each row.
      group_sums: also the sums over each GROUP of neighbours.

    Returns:
      values [..., features]; scale, as given, or float32 [..., 1], or None for float dtypes; and
      float32 sums of the values [..., features / GROUP] or None.
    """
    if out_dtype in RANGES:
        low, high = RANGES[out_dtype]
        if scale is None:
            amax = jnp.max(jnp.abs(y), axis=-1, keepdims=True)
            step = jnp.maximum(_divide(amax, jnp.float32(high)), jnp.finfo(jnp.float32).tiny)
            scale = jnp.where(amax > 0, step, jnp.float32(1))
        y = jnp.clip(_divide(y, scale), low, high)
        y = jnp.round(y) if out_dtype == jnp.int8 else y
    values = y.astype(out_dtype)
    if not group_sums:
        return values, scale, None
    groups = values.reshape(*values.shape[:-1], -1, GROUP).astype(jnp.float32)
    return values, scale, groups.sum(axis=-1)


def _divide(x: jax.Array, positive: jax.Array) -> jax.Array:
    """Correctly rounded. XLA makes x / s of a broadcast s into x * (1 / s), which rounds twice,
    unless the divisor depends on each x: max(s, -|x|) is s."""
    return x / jnp.maximum(positive, -jnp.abs(x))
