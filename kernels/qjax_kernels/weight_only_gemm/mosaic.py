"""The Hopper kernels behind one name: the configuration decides which."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.target import require_hopper
from qjax_kernels.weight_only_gemm.choice import choose
from qjax_kernels.weight_only_gemm.config import (
    SHARED_MEMORY,
    Config,
    stream_candidates,
    stream_shared_memory,
)
from qjax_kernels.weight_only_gemm.epilogue import norm_shared_memory
from qjax_kernels.weight_only_gemm.layout import Prepared
from qjax_kernels.weight_only_gemm.operands import Added
from qjax_kernels.weight_only_gemm.stream import stream
from qjax_kernels.weight_only_gemm.tiled import tiled
from qjax_kernels.weight_only_gemm.tiled_fp8 import tiled_fp8


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """The static part of a call: see `api` and `Config`."""

    out_dtype: str
    activation: str | None = None
    eps: float = 0.0
    config: Config
    cores: int
    interpret: bool

    def named(self, *names: str) -> dict[str, Any]:
        """Some of it as keyword arguments."""
        of = vars(self) | {"out_dtype": jnp.dtype(self.out_dtype)}
        return {name: of[name] for name in ("out_dtype", "activation", "config", *names)}


def prepared_gemm(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    activation: str | None = None,
    squares: jax.Array | None = None,
    eps: float = 0.0,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.prepared_gemm`.

    Raises:
      NotImplementedError: not a Hopper GPU; activations that are not bfloat16 or float16; rows
        of x or of the result that are no multiple of 16 bytes, as the copy engine needs; a residual
        that is not of the type of the result; more than 64 tokens with sums of squares.
    """
    cores = 132 if interpret else require_hopper().cores
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"activations in {x.dtype}; bfloat16 or float16 is needed")
    _check(weight, residual, out_dtype, activation)
    added = Added(bias, residual, squares)
    config = _config(x, weight, added, cores) if config is None else config
    how = How(
        out_dtype=jnp.dtype(out_dtype).name, activation=activation, eps=eps,
        config=config, cores=cores, interpret=interpret,
    )  # fmt: skip
    return _shaped(x, weight, None, added, how)[0]


def residual_gemm(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    residual: jax.Array,
    gain: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.residual_gemm`.

    Raises:
      NotImplementedError: as `prepared_gemm`; out features that are no multiple of 64; more than
        64 tokens.
    """
    cores = 132 if interpret else require_hopper().cores
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"activations in {x.dtype}; bfloat16 or float16 is needed")
    _check(weight, residual, residual.dtype, None)
    if weight.out_features % 64:
        raise NotImplementedError(f"{weight.out_features} out features; a multiple of 64 is needed")
    added = Added(bias, residual, None, gain)
    config = _config(x, weight, added, cores) if config is None else config
    if config.tokens > 16 and config.tokens % 32:
        raise NotImplementedError(f"tiles of {config.tokens} tokens; 8, 16, 32 or 64 are taken")
    dtype = residual.dtype.name
    how = How(out_dtype=dtype, config=config, cores=cores, interpret=interpret)
    total, scaled, squares = _shaped(x, weight, None, added, how)
    return total, scaled, squares


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
    added = Added(bias, residual)
    config = _config(x, weight, added, cores) if config is None else config
    how = How(
        out_dtype=jnp.dtype(out_dtype).name, activation=activation,
        config=config, cores=cores, interpret=interpret,
    )  # fmt: skip
    return _shaped(x, weight, x_scale.astype(jnp.float32).reshape(-1), added, how)[0]


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


def _config(x: jax.Array, weight: Prepared, added: Added, cores: int) -> Config:
    """The measured one; with a norm, which only streams have a part of, a stream with its room."""
    tokens = x.size // x.shape[-1]
    config = choose(tokens, weight, cores=cores)
    if added.squares is None and added.gain is None:
        return config
    if tokens > 64:
        raise NotImplementedError(f"{tokens} tokens with a norm; at most 64 are taken")
    parts = 0 if added.squares is None else added.squares.shape[0]
    if added.gain is not None and config.tokens > 16:
        # Sums of squares leave 32 tokens at a time: the copy engine begins at 128 bytes.
        config = dataclasses.replace(config, tokens=-(-config.tokens // 32) * 32)
    for one in (config, *stream_candidates(config.tokens, weight, cores)):
        room = norm_shared_memory(parts, added.gain is not None, one.tokens)
        if one.kernel == "stream" and stream_shared_memory(one, weight) + room <= SHARED_MEMORY:
            return one
    raise NotImplementedError(f"a norm's sums of squares in {parts} parts: no tile has room")


def _shaped(
    x: jax.Array, weight: Prepared, x_scale: jax.Array | None, added: Added, how: How
) -> list[jax.Array]:
    """`_run` for x with any leading axes: results with the same ones, and sums of squares."""
    out = weight.out_features // (1 if how.activation is None else 2)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        empty = jnp.zeros((*x.shape[:-1], out), how.out_dtype)
        return [empty, empty, jnp.zeros((weight.words.shape[0], 0), jnp.float32)]
    if added.residual is not None:
        added = added._replace(residual=added.residual.reshape(-1, weight.out_features))
    results = _run(rows, weight, x_scale, added, how)
    features, squares = results[:2], results[2:]
    return [y.reshape(*x.shape[:-1], out) for y in features] + squares


@partial(jax.jit, static_argnames=("how",))
def _run(
    x: jax.Array, weight: Prepared, x_scale: jax.Array | None, added: Added, how: How
) -> list[jax.Array]:
    """The kernel on sizes that the copy engine can tile: XLA pads the others, and only those."""
    tokens, out = x.shape[0], weight.out_features // (1 if how.activation is None else 2)
    more_tokens = -tokens % 8 if tokens > 8 else 0
    more_features = -weight.in_features % 64 if weight.in_features > 64 else 0
    if more_tokens or more_features:
        x = jnp.pad(x, ((0, more_tokens), (0, more_features)))
    if added.residual is not None and more_tokens:
        added = added._replace(residual=jnp.pad(added.residual, ((0, more_tokens), (0, 0))))
    if added.bias is not None and weight.out_features % 64:
        added = added._replace(bias=jnp.pad(added.bias, (0, -weight.out_features % 64)))
    if how.config.kernel == "stream":
        results = stream(x, weight, x_scale, added, **how.named("eps", "interpret"))
    elif x_scale is None:
        results = [tiled(x, weight, added, **how.named("cores", "interpret"))]
    else:
        results = [tiled_fp8(x, weight, x_scale, added, **how.named("cores", "interpret"))]
    features, squares = results[:2], results[2:]  # one or two, and with the second also squares
    return [y if y.shape == (tokens, out) else y[:tokens, :out] for y in features] + squares
