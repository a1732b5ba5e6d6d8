"""The weights of experts, [experts, out, in], as grouped products read them, and these products."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax import ops
from qjax.qarray import QArray, full_scale, is_cut, per_row
from qjax.runtime.fuse import transforms
from qjax.runtime.products import Rows
from qjax.runtime.weights import Projection


def is_packed(weight: Any) -> bool:
    """Whether the kernels want a weight packed: in at most 4 bits, as integers."""
    return isinstance(weight, QArray) and weight.format in ("int2", "int3", "int4")


def refusal(part: Projection) -> str | None:
    """Why no kernel reads the experts' weights as they lie, or packed; None: one does."""
    q = part.weight
    if not isinstance(q, QArray) or ops.numbers_meet(q):
        return None
    if q.axis != -1:
        return "it is stored [in, out]"
    if q.input is not None and transforms(q.input):
        return "its input is rescaled or permuted"
    if is_packed(q):
        try:
            jax.eval_shape(ops.prepare_experts, q)
        except NotImplementedError as reason:
            return str(reason)
        return None
    if q.input is not None and q.input.format is not None:
        return f"no kernel multiplies experts in {q.format} by {q.input.format}"
    one_scale = q.scale.shape[-1] == 1 and q.zero_point is None and not is_cut(q)
    eight_bits = q.values.dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
    return None if one_scale and eight_bits else f"{q.format} with more than a scale an output"


def pack(part: Projection) -> Projection:
    """A Projection that `is_packed`, as the kernels read it.

    Raises:
      NotImplementedError: they do not.
    """
    q = part.weight
    spec = None if q.input is None or q.input.format is None else q.input
    return Projection(weight=ops.prepare_experts(q), input=spec)


def product(
    rows: Rows,
    part: Projection,
    group_sizes: jax.Array,
    dtype: jnp.dtype,
    *,
    row_ids: jax.Array | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """[tokens, in] -> [rows, out] of `dtype`; see `ops.grouped_gemm`."""
    how: dict[str, Any] = {"row_ids": row_ids}
    if isinstance(part.weight, ops.PreparedExperts):
        x, scale = _rounded(rows, part, dtype)
        if scale is not None:
            scale = scale if row_ids is None else scale[row_ids]
            row_scale = scale if row_scale is None else scale * row_scale
        how |= {"row_scale": row_scale, "out_dtype": dtype}
        return ops.prepared_grouped_gemm(x, part.weight, group_sizes, **how)
    how["row_scale"] = row_scale
    if rows.scale is None:
        return ops.grouped_linear(rows.values, part.weight, group_sizes, **how)
    q = part.weight
    how |= {"scale": per_row(full_scale(q), q), "out_dtype": dtype}
    x_scale = jnp.broadcast_to(rows.scale, (len(rows.values), 1))
    return ops.grouped_gemm(rows.values, q.values, group_sizes, x_scale=x_scale, **how)


def _rounded(rows: Rows, part: Projection, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Activations of a packed product in `dtype`, which holds numbers of 8 bits exactly, and, where
    they are rounded, what each token is multiplied by, float32 [tokens]; else None."""
    x, scale, spec = rows.values, rows.scale, part.input
    if spec is None:
        return x, None
    if spec.granularity == "per_group":
        return ops.rounded(x, spec), None
    if scale is None:
        x, scale = ops.quantize_activations(x, spec)
    return x.astype(dtype), jnp.broadcast_to(scale, (len(x), 1))[:, 0]
