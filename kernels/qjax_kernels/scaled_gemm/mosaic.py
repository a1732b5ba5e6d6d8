"""The product on Hopper's tensor cores (Mosaic GPU), from one token to whole prompts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.scaled_gemm import choice
from qjax_kernels.scaled_gemm.config import BLOCK, Config, blocks_of
from qjax_kernels.target import require_hopper

_DTYPES = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
INTERPRETED_CORES = 4  # so few that blocks have several tiles


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

    N must be a multiple of 8 and K of 32. A number of rows over 8 that is no multiple of 8 costs a
    copy of x. A row of the result does not depend on the other rows of x, but on their number:
    other tiles, another order of the sums. Hopper's tensor cores keep about 14 bits of fp8 sums
    (arXiv:2412.19437, section 3.3.2); `Config.promote` adds them up in float32 every so often.

    Args:
      config: the tiles; None: those of the tuned table, or the best guess for the shape.
      interpret: run in Mosaic GPU's interpreter, on any machine.

    Raises:
      NotImplementedError: no Hopper GPU, or what the kernel cannot take.
    """
    cores = INTERPRETED_CORES if interpret else require_hopper().cores
    # Mosaic takes half as long to import as all of JAX: only machines that use it do.
    from qjax_kernels.scaled_gemm.memory import refusal
    from qjax_kernels.scaled_gemm.tiling import Tiling

    blocked = blocks_of(x_scale, scale, values)
    _check(x, x_scale, values, scale, out_dtype, bias, residual, blocked)
    m, (n, k) = x.size // x.shape[-1], values.shape
    if config is None:
        config = choice.choose(
            m,
            n,
            k,
            dtype=x.dtype,
            out_dtype=out_dtype,
            blocked=blocked,
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
        token_scales=not blocked and x_scale.size > 1,
        output_scales=not blocked and scale.size > 1,
        blocked=blocked,
        bias=None if bias is None else bias.dtype,
        residual=residual is not None,
        cores=cores,
        interpret=interpret,
    )
    if reason := refusal(tiling):
        raise NotImplementedError(reason)
    return run(x, x_scale, values, scale, bias, residual, tiling=tiling)


def _check(
    x: jax.Array,
    x_scale: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    out_dtype: Any,
    bias: jax.Array | None,
    residual: jax.Array | None,
    blocked: bool,
) -> None:
    n, k = values.shape
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"it takes int8, e4m3 and e5m2, not {x.dtype}")
    if out_dtype not in FLOATS:
        raise NotImplementedError(f"it writes bfloat16, float16 and float32, not {out_dtype}")
    if n % 8 or k % 32:
        raise NotImplementedError(f"N = {n} is no multiple of 8, or K = {k} of 32")
    if x.size == 0 or n == 0:
        raise NotImplementedError("the product is empty")
    if x_scale.dtype != jnp.float32 or scale.dtype != jnp.float32:
        raise NotImplementedError(f"scales are {x_scale.dtype} and {scale.dtype}, not float32")
    if not blocked and x_scale.shape != (*x.shape[:-1], 1) and x_scale.size != 1:
        raise NotImplementedError(f"it takes one scale or one for each row, not {x_scale.shape}")
    if blocked and k > 256 * BLOCK:
        raise NotImplementedError(f"K = {k} has more than 256 scales of blocks")
    if bias is not None and bias.dtype not in FLOATS:
        raise NotImplementedError(f"the bias is {bias.dtype}")
    if residual is not None and residual.dtype != out_dtype:
        raise NotImplementedError(f"the residual is {residual.dtype}, the result {out_dtype}")


@partial(jax.jit, static_argnames="tiling")
def run(
    x: jax.Array,
    x_scale: jax.Array | None,
    values: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_scale: jax.Array | None = None,
    *,
    tiling: Any,
) -> jax.Array:
    """The call that a `Tiling` describes. Other ops use it too."""
    from qjax_kernels.scaled_gemm import kernel

    t = tiling
    shape = x.shape[:-1]
    x = x.reshape(t.m, t.k)
    if t.m > 8 and t.m % 8:
        # Swizzled copies move whole tiles of 8 rows (or one that is cut off).
        x = jnp.pad(x, ((0, -t.m % 8), (0, 0)))
    operands = {"a": values, "b": x} if t.config.swap else {"a": x, "b": values}
    if x_scale is None or scale is None:
        pass
    elif t.blocked:
        operands["x_scale"] = _padded(x_scale.reshape(t.m, -1).T)
        operands["w_scale"] = _padded(scale)
    else:
        operands["x_scale"] = x_scale.reshape(-1)
        operands["w_scale"] = scale.reshape(-1)
    if bias is not None:
        operands["bias_in"] = bias
    if residual is not None:
        operands["residual_in"] = residual.reshape(t.m, t.n)
    if out_scale is not None:
        operands["out_scale"] = out_scale.reshape(1)
    return kernel.build(t)(operands).reshape(*shape, t.outputs)


def _padded(scales: jax.Array) -> jax.Array:
    """Rows of whole 16 bytes, which copies need."""
    return jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % 4)))
