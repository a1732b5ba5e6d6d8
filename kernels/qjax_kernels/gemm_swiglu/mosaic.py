"""The kernel of `scaled_gemm`, whose tiles end with the activation (Mosaic GPU, Hopper)."""

import jax
import jax.numpy as jnp

from qjax_kernels.row_quant import RANGES
from qjax_kernels.scaled_gemm import choice
from qjax_kernels.scaled_gemm.config import Config
from qjax_kernels.scaled_gemm.mosaic import INTERPRETED_CORES, run
from qjax_kernels.target import require_hopper

_DTYPES = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16)


def gemm_swiglu(
    x: jax.Array,
    x_scale: jax.Array | None,
    weight: jax.Array,
    scale: jax.Array | None,
    out_scale: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    activation: str,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.gemm_swiglu`.

    `in` must be a multiple of 32, and features one of 16 where the result is int8 or e4m3. A number
    of rows over 8 that is no multiple of 8 costs a copy of x. The result is multiplied by
    1 / out_scale: it may differ from the reference's where that lies next to the middle of two
    numbers of out_dtype.

    Args:
      config: the tiles; None: those of the tuned table, or the best guess for the shape.
      interpret: run in Mosaic GPU's interpreter, on any machine.

    Raises:
      NotImplementedError: no Hopper GPU, or what the kernel cannot take.
    """
    cores = INTERPRETED_CORES if interpret else require_hopper().cores
    from qjax_kernels.scaled_gemm.memory import refusal
    from qjax_kernels.scaled_gemm.tiling import Tiling

    _check(x, x_scale, weight, scale, out_dtype)
    m, (n, k) = x.size // x.shape[-1], weight.shape
    if config is None:
        config = choice.choose(
            m, n, k, dtype=x.dtype, out_dtype=out_dtype, activation=activation, cores=cores
        )
    tiling = Tiling(
        m=m,
        n=n,
        k=k,
        config=config,
        dtype=x.dtype,
        out_dtype=jnp.dtype(out_dtype),
        token_scales=x_scale is not None and x_scale.size > 1,
        output_scales=scale is not None and scale.size > 1,
        activation=activation,
        requantized=out_scale is not None,
        cores=cores,
        interpret=interpret,
    )
    if reason := refusal(tiling):
        raise NotImplementedError(reason)
    return run(x, x_scale, weight, scale, out_scale=out_scale, tiling=tiling)


def _check(
    x: jax.Array,
    x_scale: jax.Array | None,
    weight: jax.Array,
    scale: jax.Array | None,
    out_dtype: jnp.dtype,
) -> None:
    n, k = weight.shape
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"it takes int8, fp8, bfloat16 and float16, not {x.dtype}")
    if k % 32:
        raise NotImplementedError(f"K = {k} is no multiple of 32")
    if jnp.dtype(out_dtype) in RANGES and n % 32:
        raise NotImplementedError(f"{n // 2} features of 8 bits are no multiple of 16")
    if x.size == 0 or n == 0:
        raise NotImplementedError("the product is empty")
    for array in (x_scale, scale):
        if array is not None and array.dtype != jnp.float32:
            raise NotImplementedError(f"a scale is {array.dtype}, not float32")
