"""The Hopper kernels behind one name: the configuration decides which."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.target import require_hopper
from qjax_kernels.weight_only_gemm.config import Config, candidates, fp8_candidates
from qjax_kernels.weight_only_gemm.fp8 import Fp8, describe
from qjax_kernels.weight_only_gemm.layout import Prepared
from qjax_kernels.weight_only_gemm.stream import stream
from qjax_kernels.weight_only_gemm.tiled import tiled
from qjax_kernels.weight_only_gemm.tiled_fp8 import tiled_fp8


def prepared_gemm(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.prepared_gemm`.

    Raises:
      NotImplementedError: not a Hopper GPU; activations that are not bfloat16 or float16; rows
        of x or of the result that are no multiple of 16 bytes, as the copy engine needs.
    """
    cores = 132 if interpret else require_hopper().cores
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"activations in {x.dtype}; bfloat16 or float16 is needed")
    _check_sizes(weight)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return jnp.zeros((*x.shape[:-1], weight.out_features), out_dtype)
    if config is None:
        config = candidates(rows.shape[0], weight, cores=cores)[0]
    y = _run(rows, weight, bias, None, jnp.dtype(out_dtype).name, config, cores, interpret)
    return y.reshape(*x.shape[:-1], weight.out_features)


def fp8_prepared_gemm(
    x: jax.Array,
    x_scale: jax.Array,
    weight: Prepared,
    bias: jax.Array | None = None,
    described: Fp8 | None = None,
    *,
    out_dtype: jnp.dtype,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.w4a8_gemm`.

    Raises:
      NotImplementedError: not a Hopper GPU; activations that are not e4m3; rows of the result that
        are no multiple of 16 bytes; in features that are no multiple of 128.
    """
    cores = 132 if interpret else require_hopper().cores
    if x.dtype != jnp.float8_e4m3fn:
        raise NotImplementedError(f"activations in {x.dtype}; float8_e4m3fn is needed")
    _check_sizes(weight)
    if weight.in_features % 128:
        raise NotImplementedError(f"{weight.in_features} in features; a multiple of 128 is needed")
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return jnp.zeros((*x.shape[:-1], weight.out_features), out_dtype)
    if described is None:
        described = describe(rows, x_scale, weight)
    if config is None:
        config = fp8_candidates(rows.shape[0], weight, cores=cores)[0]
    y = _run(rows, weight, bias, described, jnp.dtype(out_dtype).name, config, cores, interpret)
    return y.reshape(*x.shape[:-1], weight.out_features)


def _check_sizes(weight: Prepared) -> None:
    for name, size in (("in", weight.in_features), ("out", weight.out_features)):
        if size % 8:
            raise NotImplementedError(f"{size} {name} features; a multiple of 8 is needed")


@partial(jax.jit, static_argnames=("out_dtype", "config", "cores", "interpret"))
def _run(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    fp8: Fp8 | None,
    out_dtype: str,
    config: Config,
    cores: int,
    interpret: bool,
) -> jax.Array:
    """The kernel on sizes that the copy engine can tile: XLA pads the others, and only those."""
    tokens, out = x.shape[0], weight.out_features
    more_tokens = -tokens % 8 if tokens > 8 else 0
    more_features = -weight.in_features % 64 if weight.in_features > 64 else 0
    if more_tokens or more_features:
        x = jnp.pad(x, ((0, more_tokens), (0, more_features)))
    if bias is not None and out % 64:
        bias = jnp.pad(bias, (0, -out % 64))
    static: dict[str, Any] = {"out_dtype": jnp.dtype(out_dtype), "config": config}
    static["interpret"] = interpret
    if config.kernel == "stream":
        y = stream(x, weight, bias, fp8, **static)
    elif fp8 is None:
        y = tiled(x, weight, bias, cores=cores, **static)
    else:
        y = tiled_fp8(x, weight, bias, fp8, cores=cores, **static)
    return y if y.shape == (tokens, out) else y[:tokens, :out]
