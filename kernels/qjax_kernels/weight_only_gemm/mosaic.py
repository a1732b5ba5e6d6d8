"""The Hopper kernels behind one name: the configuration decides which."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.target import require_hopper
from qjax_kernels.weight_only_gemm.choice import choose
from qjax_kernels.weight_only_gemm.config import Config
from qjax_kernels.weight_only_gemm.layout import Prepared
from qjax_kernels.weight_only_gemm.stream import stream
from qjax_kernels.weight_only_gemm.tiled import tiled
from qjax_kernels.weight_only_gemm.tiled_fp8 import tiled_fp8


def prepared_gemm(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    activation: str | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.prepared_gemm`.

    Raises:
      NotImplementedError: not a Hopper GPU; activations that are not bfloat16 or float16; rows
        of x or of the result that are no multiple of 16 bytes, as the copy engine needs; a residual
        that is not of the type of the result.
    """
    cores = 132 if interpret else require_hopper().cores
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"activations in {x.dtype}; bfloat16 or float16 is needed")
    _check(weight, residual, out_dtype, activation)
    return _shaped(x, weight, None, bias, residual, activation, out_dtype, config, cores, interpret)


def fp8_prepared_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    weight: Prepared,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    activation: str | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.w4a8_gemm`.

    Raises:
      NotImplementedError: not a Hopper GPU; activations that are not e4m3; rows of the result that
        are no multiple of 16 bytes; in features that are no multiple of 128; a residual that is not
        of the type of the result.
    """
    cores = 132 if interpret else require_hopper().cores
    if x.dtype != jnp.float8_e4m3fn:
        raise NotImplementedError(f"activations in {x.dtype}; float8_e4m3fn is needed")
    _check(weight, residual, out_dtype, activation)
    if weight.in_features % 128:
        raise NotImplementedError(f"{weight.in_features} in features; a multiple of 128 is needed")
    x_scale = x_scale.astype(jnp.float32).reshape(-1)
    return _shaped(
        x, weight, x_scale, bias, residual, activation, out_dtype, config, cores, interpret
    )


def _check(
    weight: Prepared,
    residual: jax.Array | None,
    out_dtype: jnp.dtype,
    activation: str | None,
) -> None:
    for name, size in (("in", weight.in_features), ("out", weight.out_features)):
        if size % 8:
            raise NotImplementedError(f"{size} {name} features; a multiple of 8 is needed")
    if residual is not None and residual.dtype != out_dtype:
        raise NotImplementedError(f"the residual is {residual.dtype}, the result {out_dtype}")
    if activation is not None and jnp.dtype(out_dtype).itemsize != 2:
        raise NotImplementedError(f"an activation with a result in {jnp.dtype(out_dtype).name}")


def _shaped(
    x: jax.Array,
    weight: Prepared,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: Config | None,
    cores: int,
    interpret: bool,
) -> jax.Array:
    """`_run` for x with any leading axes, with a configuration for its shape."""
    shape = (*x.shape[:-1], weight.out_features // (1 if activation is None else 2))
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return jnp.zeros(shape, out_dtype)
    if residual is not None:
        residual = residual.reshape(-1, weight.out_features)
    if config is None:
        config = choose(rows.shape[0], weight, cores=cores)
    name = jnp.dtype(out_dtype).name
    y = _run(rows, weight, x_scale, bias, residual, activation, name, config, cores, interpret)
    return y.reshape(shape)


@partial(jax.jit, static_argnames=("activation", "out_dtype", "config", "cores", "interpret"))
def _run(
    x: jax.Array,
    weight: Prepared,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: str | None,
    out_dtype: str,
    config: Config,
    cores: int,
    interpret: bool,
) -> jax.Array:
    """The kernel on sizes that the copy engine can tile: XLA pads the others, and only those."""
    tokens, out = x.shape[0], weight.out_features // (1 if activation is None else 2)
    more_tokens = -tokens % 8 if tokens > 8 else 0
    more_features = -weight.in_features % 64 if weight.in_features > 64 else 0
    if more_tokens or more_features:
        x = jnp.pad(x, ((0, more_tokens), (0, more_features)))
    if residual is not None and more_tokens:
        residual = jnp.pad(residual, ((0, more_tokens), (0, 0)))
    if bias is not None and weight.out_features % 64:
        bias = jnp.pad(bias, (0, -weight.out_features % 64))
    static: dict[str, Any] = {"activation": activation, "out_dtype": jnp.dtype(out_dtype)}
    static |= {"config": config, "interpret": interpret}
    if config.kernel == "stream":
        y = stream(x, weight, x_scale, bias, residual, **static)
    elif x_scale is None:
        y = tiled(x, weight, bias, residual, cores=cores, **static)
    else:
        y = tiled_fp8(x, weight, x_scale, bias, residual, cores=cores, **static)
    return y if y.shape == (tokens, out) else y[:tokens, :out]
