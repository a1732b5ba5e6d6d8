"""The Hopper kernels behind one name: the configuration decides which."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.target import require_hopper
from qjax_kernels.weight_only_gemm.config import Config, candidates
from qjax_kernels.weight_only_gemm.layout import Prepared
from qjax_kernels.weight_only_gemm.stream import stream
from qjax_kernels.weight_only_gemm.tiled import tiled


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
    for name, size in (("in", weight.in_features), ("out", weight.out_features)):
        if size % 8:
            raise NotImplementedError(f"{size} {name} features; a multiple of 8 is needed")
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return jnp.zeros((*x.shape[:-1], weight.out_features), out_dtype)
    if config is None:
        config = candidates(rows.shape[0], weight, cores=cores)[0]
    y = _run(rows, weight, bias, jnp.dtype(out_dtype).name, config, cores, interpret)
    return y.reshape(*x.shape[:-1], weight.out_features)


@partial(jax.jit, static_argnames=("out_dtype", "config", "cores", "interpret"))
def _run(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
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
    kernel = stream if config.kernel == "stream" else partial(tiled, cores=cores)
    y = kernel(x, weight, bias, out_dtype=jnp.dtype(out_dtype), config=config, interpret=interpret)
    return y if y.shape == (tokens, out) else y[:tokens, :out]
