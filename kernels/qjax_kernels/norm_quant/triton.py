"""One Triton kernel: sum, norm, scale and rounding with each row in registers."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.norm_quant.config import MOST_FEATURES, Config, candidates
from qjax_kernels.norm_quant.result import Norm
from qjax_kernels.row_quant import GROUP, RANGES

MODULE = "qjax_kernels.norm_quant.triton_kernel"


@partial(
    jax.jit,
    static_argnames=(
        "kind", "eps", "weight_offset", "out_dtype", "group_sums", "config", "interpret"
    ),
)  # fmt: skip
def norm_quant(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    scale: jax.Array | None,
    *,
    kind: str,
    eps: float,
    weight_offset: float,
    out_dtype: jnp.dtype,
    group_sums: bool,
    config: Config | None = None,
    interpret: bool = False,
) -> Norm:
    """See `api.norm_quant`.

    Raises:
      NotImplementedError: rows longer than MOST_FEATURES, or none; no GPU that Triton compiles for.
    """
    features = x.shape[-1]
    if features > MOST_FEATURES:
        raise NotImplementedError(f"rows have {features} elements; at most {MOST_FEATURES}")
    if not interpret:
        triton_launch.require_capability(fp8=out_dtype == jnp.float8_e4m3fn)
    if x.size == 0:
        raise NotImplementedError("there are no rows")
    rows = x.size // features
    config = candidates(rows, features)[0] if config is None else config

    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    dynamic = out_dtype in RANGES and scale is None
    leading = x.shape[:-1]
    outputs = [
        jax.ShapeDtypeStruct(x.shape, out_dtype),
        jax.ShapeDtypeStruct((*leading, 1), jnp.float32) if dynamic else unused,
        unused if residual is None else jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((*leading, features // GROUP), jnp.float32) if group_sums else unused,
    ]
    values, step, new_residual, sums = triton_launch.call(
        MODULE,
        kind,
        x,
        weight,
        x if bias is None else bias,
        x if residual is None else residual,
        x if scale is None else scale,
        rows,
        outputs=outputs,
        grid=(-(-rows // config.rows),),
        num_warps=config.warps,
        interpret=interpret,
        FEATURES=features,
        ROWS=config.rows,
        CHUNK=config.chunk,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_SUMS=group_sums,
        QUANTIZE="per_token" if dynamic else "none" if scale is None else "static",
        EPS=eps,
        OFFSET=weight_offset,
    )
    return Norm(
        values,
        step if dynamic else scale,
        None if residual is None else new_residual,
        sums if group_sums else None,
    )
