"""One Triton kernel: activation, product, scale and rounding with each row in registers."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.glu_quant.config import MOST_FEATURES, Config, candidates
from qjax_kernels.glu_quant.result import Glu
from qjax_kernels.row_quant import GROUP, RANGES

MODULE = "qjax_kernels.glu_quant.triton_kernel"
VECTORS_APART = 2  # of a thread, where blocks may share a row


@partial(
    jax.jit,
    static_argnames=(
        "activation", "gated", "features", "out_dtype", "group_sums", "config", "interpret"
    ),
)  # fmt: skip
def glu_quant(
    x: jax.Array,
    scale: jax.Array | None,
    *,
    activation: str,
    out_dtype: jnp.dtype,
    group_sums: bool,
    gated: bool = True,
    features: int | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Glu:
    """See `api.glu_quant`.

    Raises:
      NotImplementedError: rows longer than MOST_FEATURES, or none; no GPU that Triton compiles for.
    """
    read = 2 if gated else 1
    features = x.shape[-1] // read if features is None else features
    if features > MOST_FEATURES:
        raise NotImplementedError(f"rows have {features} elements; at most {MOST_FEATURES}")
    if not interpret:
        triton_launch.require_capability(fp8=out_dtype == jnp.float8_e4m3fn)
    if x.size == 0:
        raise NotImplementedError("there are no rows")
    rows = x.size // x.shape[-1]
    dynamic = out_dtype in RANGES and scale is None
    if config is None:
        config = candidates(rows, features)[0]
    chunks = config.vectors(features)
    parts = 1
    if not dynamic:
        chunks = min(chunks, VECTORS_APART)
        parts = -(-config.vectors(features) // chunks)

    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    leading = x.shape[:-1]
    outputs = [
        jax.ShapeDtypeStruct((*leading, features), out_dtype),
        jax.ShapeDtypeStruct((*leading, 1), jnp.float32) if dynamic else unused,
        jax.ShapeDtypeStruct((*leading, features // GROUP), jnp.float32) if group_sums else unused,
    ]
    values, step, sums = triton_launch.call(
        MODULE,
        "glu",
        x,
        x if scale is None else scale,
        rows,
        outputs=outputs,
        grid=(-(-rows // config.rows), parts),
        num_warps=config.warps,
        interpret=interpret,
        FEATURES=features,
        WIDTH=x.shape[-1],
        FIRST=x.shape[-1] - features * read,
        GATED=gated,
        ROWS=config.rows,
        CHUNK=config.chunk,
        CHUNKS=chunks,
        ACTIVATION=activation,
        HAS_SUMS=group_sums,
        QUANTIZE="per_token" if dynamic else "none" if scale is None else "static",
    )
    return Glu(values, step if dynamic else scale, sums if group_sums else None)
