"""Which tiles a call takes: those measured at the nearest size, or the cost model's first guess."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax_kernels.scaled_gemm.config import BLOCK, Config
from qjax_kernels.tuned import lookup

XLA_IS_FASTER = "the tuned table has XLA faster here"


def passed_over(m: int, n: int, k: int, dtype: Any, blocked: bool) -> dict[str, str]:
    """Implementations that are not to be taken unless they are named, and why.

    Args:
      m, n, k: of the product.
      dtype: of the operands.
      blocked: there are scales for blocks.
    """
    if min(m, n, k) == 0:
        return {}
    entry = lookup.lookup(*_key(dtype, blocked), m, n, k)
    if entry is None or entry.implementation != "xla":
        return {}
    return dict.fromkeys(("mosaic", "triton"), XLA_IS_FASTER)


def choose(
    m: int,
    n: int,
    k: int,
    *,
    dtype: Any,
    out_dtype: Any,
    blocked: bool = False,
    residual: bool = False,
    bias: bool = False,
    activation: str | None = None,
    cores: int = 132,
) -> Config:
    """The configuration for a call; arguments as of `plan.candidates`.

    Raises:
      NotImplementedError: no configuration takes the call.
    """
    from qjax_kernels.scaled_gemm.plan import candidates  # imports Mosaic

    given: dict[str, Any] = {"dtype": dtype, "out_dtype": out_dtype, "blocked": blocked}
    given |= {"residual": residual, "bias": bias, "activation": activation, "cores": cores}
    for entry in lookup.nearest(*_key(dtype, blocked, activation), m, n, k):
        if entry.implementation == "mosaic":
            config = fitted(Config(**entry.config), m)
            if valid(config, m, n, k, **given):
                return config
    return candidates(m, n, k, **given)[0]


def fitted(config: Config, m: int) -> Config:
    """Without columns for tokens that are not there."""
    if not config.swap or m >= config.columns:
        return config
    granule = 8 * config.multicast
    columns = next(c for c in (8, 16, 32, 64, 128, 256) if c >= m and c % granule == 0)
    return dataclasses.replace(config, columns=min(columns, config.columns))


def valid(
    config: Config,
    m: int,
    n: int,
    k: int,
    *,
    dtype: Any,
    out_dtype: Any,
    blocked: bool = False,
    residual: bool = False,
    bias: bool = False,
    activation: str | None = None,
    cores: int = 132,
) -> bool:
    """Whether a configuration takes a call, and is not one that must be asked for."""
    from qjax_kernels.scaled_gemm.memory import refusal
    from qjax_kernels.scaled_gemm.tiling import Tiling

    tiling = Tiling(
        m=m,
        n=n,
        k=k,
        config=config,
        dtype=jnp.dtype(dtype),
        out_dtype=jnp.dtype(out_dtype),
        blocked=blocked,
        bias=jnp.dtype(jnp.float32) if bias else None,
        residual=residual,
        activation=activation,
        cores=cores,
    )
    # See `plan`: clusters that share K and walk over several tiles are not chosen.
    return refusal(tiling) is None and (config.splits == 1 or tiling.once)


def _key(dtype: Any, blocked: bool, activation: str | None = None) -> tuple[str, str, int | None]:
    dtype = jnp.dtype(dtype)
    product = "scaled_gemm" if dtype.itemsize == 1 else "plain_gemm"
    return "gemm_swiglu" if activation else product, dtype.name, BLOCK if blocked else None
