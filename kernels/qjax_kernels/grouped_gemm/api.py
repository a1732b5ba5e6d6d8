"""y[i] = x[i] @ w[expert of i].T for rows sorted by expert, as mixtures of experts have them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.grouped_gemm import triton, xla
from qjax_kernels.grouped_gemm.layout import Prepared
from qjax_kernels.grouped_gemm.layout import prepare as prepare
from qjax_kernels.grouped_gemm.layout import unprepare as unprepare

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "triton": triton.grouped_gemm,
    "xla": xla.grouped_gemm,
}
PREPARED_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "triton": triton.prepared_grouped_gemm,
    "xla": xla.prepared_grouped_gemm,
}
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn)


def grouped_gemm(
    x: jax.Array,
    values: jax.Array,
    group_sizes: jax.Array,
    *,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    x_scale: jax.Array | None = None,
    row_ids: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    out_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """Product of rows, sorted by expert, with the weight of each row's expert.

    y[m, n] = row_scale[m] * x_scale[t] * sum_k x[t, k] * (values[e, n, k] - zero_point[e, n, g])
              * scale[e, n, g]

    where t = row_ids[m], or m; expert e has the rows from sum(group_sizes[:e]) on, group_sizes[e]
    of them; g = k // (in / groups). Rows after sum(group_sizes) are 0. What belongs to no row (an
    expert without rows, a token that no id names) is not read.

    Args:
      x: [tokens, in]: bfloat16, float16 or float32; or int8 or float8_e4m3fn with an x_scale.
      values: [experts, out, in]: of the dtype of x, or, with an x of 16 or 32 bits, int4, int8 or
        fp8 with a scale.
      group_sizes: int32 [experts], at least 0, together at most the number of rows.
      scale: [experts, out, groups], floating point; groups is 1 unless values are int4 or int8
        and x is floating point.
      zero_point: like scale, integer, where there may be groups; or None.
      x_scale: float32 [tokens, 1], of an x in 8 bits.
      row_ids: int32 [rows], in 0..tokens - 1; None: rows are tokens.
      row_scale: float32 [rows], such as a router's weights; or None.
      out_dtype: of the result.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [rows, out]. int8 sums are exact (int32), others float32 (of fp8 on Hopper's tensor cores:
      with 14 bits or so); scales of rows are applied in float32 before the result is rounded once.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    _check_weight(x, values, scale, zero_point, x_scale)
    _check_rows(x, values.shape[0], group_sizes, row_ids, row_scale)
    return dispatch(
        "grouped_gemm",
        IMPLEMENTATIONS,
        implementation,
        x,
        values,
        group_sizes,
        scale,
        zero_point,
        x_scale,
        row_ids,
        row_scale,
        out_dtype=jnp.dtype(out_dtype),
    )


def prepared_grouped_gemm(
    x: jax.Array,
    weight: Prepared,
    group_sizes: jax.Array,
    *,
    row_ids: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    out_dtype: jnp.dtype,
    implementation: str | None = None,
) -> jax.Array:
    """`grouped_gemm` with int4 weights that `prepare` has packed; x is floating point.

    Args:
      x: [tokens, in], bfloat16 or float16 (any float for 'xla').
      weight: [experts, out, in], prepared.
      group_sizes, row_ids, row_scale, out_dtype: see `grouped_gemm`.
      implementation: a name of PREPARED_IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      [rows, out], accumulated in float32. With many rows an expert a weight times its scale is
      rounded to the type of x, as a dequantized weight would be.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    if x.ndim != 2 or x.shape[1] != weight.in_features or x.dtype not in FLOATS:
        raise ValueError(
            f"x is {x.dtype}{x.shape}, the weight {weight.shape}: x must be floating point "
            "[tokens, in]"
        )
    _check_rows(x, weight.shape[0], group_sizes, row_ids, row_scale)
    return dispatch(
        "prepared_grouped_gemm",
        PREPARED_IMPLEMENTATIONS,
        implementation,
        x,
        weight,
        group_sizes,
        row_ids,
        row_scale,
        out_dtype=jnp.dtype(out_dtype),
    )


def _check_weight(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    x_scale: jax.Array | None,
) -> None:
    """Raises: ValueError, where x and the weight do not fit together."""
    if x.ndim != 2 or values.ndim != 3 or x.shape[1] != values.shape[2]:
        raise ValueError(
            f"x is {x.shape} and values {values.shape}; they must be [tokens, in] and "
            "[experts, out, in]"
        )
    eight = x.dtype in EIGHT_BITS
    narrow = values.dtype in (jnp.int4, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
    if not (x.dtype == values.dtype if eight or not narrow else x.dtype in FLOATS):
        raise ValueError(
            f"x is {x.dtype} and values {values.dtype}; they must be of one type, or x floating "
            "point and values int4, int8 or fp8"
        )
    if eight != (x_scale is not None) or (x_scale is not None and x_scale.shape != (len(x), 1)):
        raise ValueError(f"x_scale is [{len(x)}, 1] for an x of 8 bits and None for any other")
    if narrow != (scale is not None):
        raise ValueError("a scale is for values of 4 or 8 bits, which must have one")
    if scale is None:
        return
    groups = scale.shape[-1]
    grouped = not eight and jnp.issubdtype(values.dtype, jnp.integer)
    if scale.shape[:-1] != values.shape[:-1] or groups == 0 or values.shape[2] % groups:
        raise ValueError(
            f"scale is {scale.shape}; it must be {(*values.shape[:-1], 'groups')}, with groups "
            f"dividing {values.shape[2]}"
        )
    if (groups > 1 or zero_point is not None) and not grouped:
        raise ValueError(
            "more than one group, or a zero point, is for int4 or int8 values and floating point x"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"zero_point is {zero_point.shape}; it must be {scale.shape}")


def _check_rows(
    x: jax.Array,
    experts: int,
    group_sizes: jax.Array,
    row_ids: jax.Array | None,
    row_scale: jax.Array | None,
) -> None:
    """Raises: ValueError, where what describes the rows does not fit."""
    if group_sizes.shape != (experts,) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{group_sizes.shape}; it must be int32({experts},)"
        )
    if row_ids is not None and (row_ids.ndim != 1 or row_ids.dtype != jnp.int32):
        raise ValueError(f"row_ids is {row_ids.dtype}{row_ids.shape}; it must be int32(rows,)")
    rows = len(x) if row_ids is None else len(row_ids)
    if row_scale is not None and (row_scale.shape != (rows,) or row_scale.dtype != jnp.float32):
        raise ValueError(
            f"row_scale is {row_scale.dtype}{row_scale.shape}; it must be float32({rows},)"
        )
