"""The kernel of `scaled_gemm` without scales (Mosaic GPU, Hopper)."""

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
    """See `api.plain_gemm`.

    `out` must be a multiple of 8 and `in` of 32. A number of rows over 8 that is no multiple of 8
    costs a copy of x. A row of the result does not depend on the other rows of x, but on their
    number: other tiles, another order of the sums.

    Args:
      config: the tiles; None: those of the tuned table, or the best guess for the shape.
      interpret: run in Mosaic GPU's interpreter, on any machine.

    Raises:
      NotImplementedError: no Hopper GPU, or what the kernel cannot take.
    """
    cores = INTERPRETED_CORES if interpret else require_hopper().cores
    from qjax_kernels.scaled_gemm.memory import refusal
    from qjax_kernels.scaled_gemm.tiling import Tiling

    _check(x, weight)
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


def _check(x: jax.Array, weight: jax.Array) -> None:
    n, k = weight.shape
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise NotImplementedError(
            f"it takes bfloat16 or float16 on both sides, not {x.dtype} and {weight.dtype}"
        )
    if n % 8 or k % 32:
        raise NotImplementedError(f"N = {n} is no multiple of 8, or K = {k} of 32")
    if x.size == 0 or n == 0:
        raise NotImplementedError("the product is empty")
