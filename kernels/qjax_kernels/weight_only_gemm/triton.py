"""The portable product: one Triton kernel, and for few tokens a sum over its parts."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.target import target
from qjax_kernels.weight_only_gemm.portable import Packed
from qjax_kernels.weight_only_gemm.triton_config import FEW, Config, candidates, group_of, paired

MODULE = "qjax_kernels.weight_only_gemm.triton_kernel"
_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
_INTERPRETED = 80, 4  # capability and multiprocessors


@partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def packed_gemm(
    x: jax.Array,
    weight: Packed,
    bias: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `portable.packed_gemm`.

    Args:
      config: the tiles; None: the best guess for the shape.
      interpret: run in Triton's interpreter, on any machine.

    Raises:
      NotImplementedError: no GPU that Triton compiles for, or what the kernel cannot take.
    """
    if interpret:
        capability, cores = _INTERPRETED
    else:
        capability, cores = triton_launch.require_capability(), target().cores
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype}; the kernel takes bfloat16 and float16")
    if out_dtype not in _FLOATS or (bias is not None and bias.dtype not in _FLOATS):
        raise NotImplementedError("results and bias must be bfloat16, float16 or float32")
    out, features = weight.shape
    if x.size == 0 or out == 0:
        raise NotImplementedError("the product is empty")
    tokens = x.size // features
    if config is None:
        config = candidates(tokens, weight, capability=capability, cores=cores)[0]

    split = config.splits > 1
    few = config.tokens <= FEW
    sums = few and not paired(weight)
    shape = (config.splits, tokens, out) if split else (tokens, out)
    tiles = -(-out // config.outs) * -(-tokens // config.tokens)
    (y,) = triton_launch.call(
        MODULE,
        "product",
        x,
        weight.words,
        weight.row_scale,
        weight.row_scale if weight.table is None else weight.table,
        weight.row_scale if bias is None else bias,
        tokens,
        outputs=[jax.ShapeDtypeStruct(shape, jnp.float32 if split else out_dtype)],
        grid=(tiles, config.splits),
        num_warps=config.warps,
        num_stages=config.stages,
        interpret=interpret,
        OUT=out,
        FEATURES=features,
        GROUP=group_of(weight),
        FORMAT=weight.format,
        OUTS=config.outs,
        TOKENS=config.tokens,
        CHUNKS=config.chunks,
        SPLITS=config.splits,
        BAND=config.band,
        HAS_SCALE=weight.groups > 1,
        HAS_ZERO=weight.has_zero,
        HAS_BIAS=bias is not None and not split,
        SUMS=sums,
        AHEAD=not few or (sums and not weight.has_zero),
    )
    if split:
        y = y.sum(axis=0) * weight.row_scale
        y = (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)
    return y.reshape(*x.shape[:-1], out)
