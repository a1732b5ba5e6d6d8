"""One Triton kernel: scale and rounding with each row in registers."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.quantize_rows.config import MOST_FEATURES, Config, candidates
from qjax_kernels.quantize_rows.result import Quantized

MODULE = "qjax_kernels.quantize_rows.triton_kernel"


@partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def quantize_rows(
    x: jax.Array,
    scale: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    interpret: bool = False,
) -> Quantized:
    """See `api.quantize_rows`.

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
    steps = (1,) if scale is not None else (*x.shape[:-1], 1)
    values, step = triton_launch.call(
        MODULE,
        "quantize",
        x,
        x if scale is None else scale,
        rows,
        outputs=[
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            jax.ShapeDtypeStruct(steps, jnp.float32),
        ],
        grid=(-(-rows // config.rows),),
        num_warps=config.warps,
        interpret=interpret,
        FEATURES=features,
        ROWS=config.rows,
        CHUNK=config.chunk,
        STATIC=scale is not None,
    )
    return Quantized(values, step if scale is None else scale)
