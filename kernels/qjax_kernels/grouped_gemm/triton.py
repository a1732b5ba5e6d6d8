"""One Triton kernel a call: every block finds its tile's expert from the group sizes itself."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.grouped_gemm.config import (
    Config,
    Problem,
    candidates,
    k_part,
    k_tile,
    row_tiles,
)
from qjax_kernels.grouped_gemm.layout import Prepared

MODULE = "qjax_kernels.grouped_gemm.triton_kernel"
INT4_MODULE = "qjax_kernels.grouped_gemm.triton_int4"
INTERPRETED = 90  # the capability whose configurations the interpreter runs


@partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def grouped_gemm(
    x: jax.Array,
    values: jax.Array,
    group_sizes: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    x_scale: jax.Array | None,
    row_ids: jax.Array | None,
    row_scale: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.grouped_gemm`.

    Raises:
      NotImplementedError: int4 (which `prepare` packs), groups, zero points, or a float32 x; no GPU
        that Triton compiles for.
    """
    if values.dtype == jnp.int4:
        raise NotImplementedError("int4 weights must be packed by `prepare`")
    if zero_point is not None or (scale is not None and scale.shape[2] > 1):
        raise NotImplementedError("8-bit weights with groups or zero points")
    convert = values.dtype != x.dtype
    fp8 = any(d.name.startswith("float8") for d in (values.dtype, out_dtype))
    problem = _problem(x, values.shape, row_ids, values.dtype.itemsize * 8, values.shape[2],
                       fp8=fp8, interpret=interpret)  # fmt: skip
    if config is None:
        config = candidates(problem)[0]
    unused = group_sizes
    return _launch(
        (MODULE, "grouped"),
        [x, values, group_sizes, *(unused if a is None else a for a in (x_scale, scale))],
        row_ids,
        row_scale,
        problem,
        config,
        out_dtype,
        interpret,
        BK=k_tile(config, problem),
        SWAP=config.swap or convert,
        CONVERT=values.dtype.name if convert else "",
        HAS_X_SCALE=x_scale is not None,
        HAS_SCALE=scale is not None,
    )


@partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def prepared_grouped_gemm(
    x: jax.Array,
    weight: Prepared,
    group_sizes: jax.Array,
    row_ids: jax.Array | None,
    row_scale: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.prepared_grouped_gemm`.

    Raises:
      NotImplementedError: a float32 x; no GPU that Triton compiles for.
    """
    problem = _problem(x, weight.shape, row_ids, 4, weight.group_size,
                       fp8=out_dtype.name.startswith("float8"), interpret=interpret)  # fmt: skip
    if config is None:
        config = candidates(problem)[0]
    return _launch(
        (INT4_MODULE, "grouped_int4"),
        [x, weight.words, group_sizes, weight.scale],
        row_ids,
        row_scale,
        problem,
        config,
        out_dtype,
        interpret,
        BK=(part := k_part(config, problem)),
        PARTS=k_tile(config, problem) // part,
        GROUP=weight.group_size,
        SCALE_SUMS=config.scale_sums,
        STAGES=config.stages,
        HAS_ZERO=weight.has_zero_point,
    )


def _problem(
    x: jax.Array,
    shape: tuple[int, ...],
    row_ids: jax.Array | None,
    bits: int,
    group: int,
    *,
    fp8: bool,
    interpret: bool,
) -> Problem:
    """Raises: NotImplementedError, for what the kernels cannot take."""
    experts, out, features = shape
    rows = len(x if row_ids is None else row_ids)
    if x.dtype == jnp.float32:
        raise NotImplementedError("activations in float32")
    if rows == 0 or out * features == 0:
        raise NotImplementedError("there is nothing to multiply")
    if out * features >= 2**31:
        raise NotImplementedError(f"an expert of {out} x {features}; offsets have 31 bits")
    capability = INTERPRETED if interpret else triton_launch.require_capability(fp8=fp8)
    return Problem(
        rows=rows,
        experts=experts,
        out=out,
        features=features,
        x_bits=x.dtype.itemsize * 8,
        bits=bits,
        group=group,
        capability=capability,
        integer=x.dtype == jnp.int8,
    )


def _launch(
    kernel: tuple[str, str],
    operands: list[jax.Array],
    row_ids: jax.Array | None,
    row_scale: jax.Array | None,
    problem: Problem,
    config: Config,
    out_dtype: jnp.dtype,
    interpret: bool,
    **constants: Any,
) -> jax.Array:
    """A block for each tile that there may be, whatever the group sizes."""
    tiles = row_tiles(problem.rows, problem.experts, config.rows)
    unused = operands[2]
    (y,) = triton_launch.call(
        *kernel,
        *operands,
        unused if row_ids is None else row_ids,
        unused if row_scale is None else row_scale,
        outputs=[jax.ShapeDtypeStruct((problem.rows, problem.out), out_dtype)],
        grid=(tiles * -(-problem.out // config.columns),),
        num_warps=config.warps,
        num_stages=config.stages,
        interpret=interpret,
        ROWS=problem.rows,
        OUT=problem.out,
        IN=problem.features,
        EXPERTS=problem.experts,
        ROW_TILES=tiles,
        BM=config.rows,
        BN=config.columns,
        BAND=config.band,
        HAS_IDS=row_ids is not None,
        HAS_ROW_SCALE=row_scale is not None,
        **constants,
    )
    return y
