"""y = x @ weight.T of 16-bit operands, by the same kernel."""

import jax
import jax.numpy as jnp

from qjax_kernels.scaled_gemm import choice
from qjax_kernels.scaled_gemm.config import Config
from qjax_kernels.scaled_gemm.mosaic import FLOATS, INTERPRETED_CORES, run
from qjax_kernels.target import require_hopper

DTYPES = (jnp.bfloat16, jnp.float16)


def plain_gemm(
    x: jax.Array,
    weight: jax.Array,
    out_dtype: jnp.dtype,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x @ weight.T + bias + residual, in float32 and rounded once.

    Args:
      x: [..., in], bfloat16 or float16.
      weight: [out, in], of the dtype of x; out is a multiple of 8 and in of 32.
      out_dtype: of the result: bfloat16, float16 or float32.
      bias: [out], floating point, or None.
      residual: [..., out], of out_dtype, or None.
      config: the tiles; None: those of the tuned table, or the best guess for the shape.
      interpret: run in Mosaic GPU's interpreter, on any machine.

    Raises:
      NotImplementedError: no Hopper GPU, or what the kernel cannot take.
    """
    cores = INTERPRETED_CORES if interpret else require_hopper().cores
    from qjax_kernels.scaled_gemm.memory import refusal
    from qjax_kernels.scaled_gemm.tiling import Tiling

    check_operands(x, weight)
    if out_dtype not in FLOATS:
        raise NotImplementedError(f"it writes bfloat16, float16 and float32, not {out_dtype}")
    if bias is not None and bias.dtype not in FLOATS:
        raise NotImplementedError(f"the bias is {bias.dtype}")
    if residual is not None and residual.dtype != out_dtype:
        raise NotImplementedError(f"the residual is {residual.dtype}, the result {out_dtype}")
    m, (n, k) = x.size // x.shape[-1], weight.shape
    if config is None:
        config = choice.choose(
            m,
            n,
            k,
            dtype=x.dtype,
            out_dtype=out_dtype,
            residual=residual is not None,
            bias=bias is not None,
            cores=cores,
        )
    tiling = Tiling(
        m=m,
        n=n,
        k=k,
        config=config,
        dtype=x.dtype,
        out_dtype=jnp.dtype(out_dtype),
        token_scales=False,
        output_scales=False,
        bias=None if bias is None else bias.dtype,
        residual=residual is not None,
        cores=cores,
        interpret=interpret,
    )
    if reason := refusal(tiling):
        raise NotImplementedError(reason)
    return run(x, None, weight, None, bias, residual, tiling=tiling)


def check_operands(x: jax.Array, weight: jax.Array) -> None:
    """Raise NotImplementedError unless the kernel takes them."""
    n, k = weight.shape
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise NotImplementedError(
            f"it takes bfloat16 or float16 on both sides, not {x.dtype} and {weight.dtype}"
        )
    if n % 8 or k % 32:
        raise NotImplementedError(f"N = {n} is no multiple of 8, or K = {k} of 32")
    if x.size == 0 or n == 0:
        raise NotImplementedError("the product is empty")
