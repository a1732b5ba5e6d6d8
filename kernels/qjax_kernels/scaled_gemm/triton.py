"""The product on any NVIDIA GPU: one Triton kernel, and for few tokens a sum over its parts."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.scaled_gemm.config import blocks_of
from qjax_kernels.scaled_gemm.triton_config import Config, candidates
from qjax_kernels.target import target

MODULE = "qjax_kernels.scaled_gemm.triton_kernel"
_FP8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
_INTERPRETED = 80, 4  # capability and multiprocessors


@partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def scaled_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    out_dtype: jnp.dtype,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.scaled_gemm`.

    Args:
      config: the tiles; None: the best guess for the shape.
      interpret: run in Triton's interpreter, on any machine.

    Raises:
      NotImplementedError: a GPU of compute capability below 8.0, or 8.9 for fp8; no GPU; or what
        the kernel cannot take.
    """
    n, k = values.shape
    _check(x, x_scale, scale, out_dtype, bias, residual)
    if interpret:
        capability, cores = _INTERPRETED
    else:
        capability = triton_launch.require_capability(fp8=x.dtype in _FP8)
        cores = target().cores
    if x.size == 0 or n == 0:
        raise NotImplementedError("the product is empty")
    blocked = blocks_of(x_scale, scale, values)
    if not blocked and x_scale.shape != (*x.shape[:-1], 1) and x_scale.size != 1:
        raise NotImplementedError(f"it takes one scale or one for each row, not {x_scale.shape}")
    m = x.size // k
    if config is None:
        config = candidates(
            m, n, k, dtype=x.dtype, blocked=blocked, capability=capability, cores=cores
        )[0]

    split = config.splits > 1
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    tiles = -(-n // config.outs) * -(-m // config.tokens)
    (y,) = triton_launch.call(
        MODULE,
        "product",
        x,
        x_scale,
        values,
        scale,
        scale if bias is None else bias,
        scale if residual is None else residual,
        m,
        outputs=[
            jax.ShapeDtypeStruct((config.splits, m, n), sums)
            if split
            else jax.ShapeDtypeStruct((m, n), out_dtype)
        ],
        grid=(tiles, config.splits),
        num_warps=config.warps,
        num_stages=config.stages,
        interpret=interpret,
        OUT=n,
        FEATURES=k,
        OUTS=config.outs,
        TOKENS=config.tokens,
        STEP=config.step,
        SPLITS=config.splits,
        BAND=config.band,
        BLOCKED=blocked,
        TOKEN_SCALES=x_scale.size > 1,
        OUT_SCALES=scale.size > 1,
        HAS_BIAS=bias is not None and not split,
        HAS_RESIDUAL=residual is not None and not split,
    )
    y = y if not split else y.sum(axis=0)
    y = y.reshape(*x.shape[:-1], n)
    if split:
        y = y.astype(jnp.float32)
        if not blocked:
            y = y * x_scale * scale[:, 0]
        for array in (bias, residual):
            if array is not None:
                y = y + array.astype(jnp.float32)
    return y.astype(out_dtype)


def _check(
    x: jax.Array,
    x_scale: jax.Array,
    scale: jax.Array,
    out_dtype: jnp.dtype,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> None:
    if x.dtype != jnp.int8 and x.dtype not in _FP8:
        raise NotImplementedError(f"it takes int8, e4m3 and e5m2, not {x.dtype}")
    for name, dtype in (
        ("result", jnp.dtype(out_dtype)),
        ("bias", None if bias is None else bias.dtype),
        ("residual", None if residual is None else residual.dtype),
    ):
        if dtype is not None and dtype not in _FLOATS:
            raise NotImplementedError(f"the {name} is {dtype}, not bfloat16, float16 or float32")
    if x_scale.dtype != jnp.float32 or scale.dtype != jnp.float32:
        raise NotImplementedError(f"scales are {x_scale.dtype} and {scale.dtype}, not float32")
