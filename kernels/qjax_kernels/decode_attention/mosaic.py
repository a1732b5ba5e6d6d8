"""Decode attention on Hopper: warpgroups that stream pages through the tensor cores.

Two kernels share what a warpgroup does (`attend`) and differ in who does what: `blocks` needs one
launch, `persistent` is balanced for any lengths. The configuration says which.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax_kernels import target
from qjax_kernels.decode_attention.blocks import blocks
from qjax_kernels.decode_attention.choice import choose
from qjax_kernels.decode_attention.config import Config
from qjax_kernels.decode_attention.operands import Operands
from qjax_kernels.decode_attention.persistent import persistent
from qjax_kernels.decode_attention.problem import Inputs, Problem

INTERPRETED_CORES = 1
MOST_REGISTERS = 150  # of a thread, for accumulators


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_table: jax.Array | None,
    lengths: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    out_scale: jax.Array | None = None,
    out_dtype: np.dtype | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.decode_attention`; scales are [1] or [kv_heads] here, out_scale [1].

    Args:
      config: None: that of the tuned table, or the first of `candidates`.
      interpret: run in Mosaic GPU's interpreter, on any machine.

    Raises:
      NotImplementedError: the GPU, a dtype or a shape is not one that it takes.
    """
    cores = INTERPRETED_CORES if interpret else target.require_hopper().cores
    _check(q, k_pages)
    batch, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    pages = 1 if block_table is None else block_table.shape[1]
    if config is None:
        if head_dim % 64 and not interpret:
            # Others are swizzled by 32 or 64 bytes: with 112 an H200 met an illegal instruction.
            raise NotImplementedError(f"head_dim must be 64, 128, 192 or 256, not {head_dim}")
        shape = (batch, kv_heads, heads // kv_heads, head_dim, page_size, pages)
        config = choose(*shape, np.dtype(k_pages.dtype), cores)
    if not config.fits(page_size, pages):
        raise NotImplementedError(
            f"steps of {config.tokens} tokens and pages of {page_size}: a page must have 8, 16, 32 "
            f"or a multiple of {config.tokens} tokens, or a multiple of 8 if it is the only one"
        )
    scales = (k_scale, v_scale, alibi_slopes, out_scale)
    arrays = (q, k_pages, v_pages, block_table, lengths, *scales)
    static = Static(
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        out=np.dtype(q.dtype if out_dtype is None else out_dtype),
    )
    return _run(arrays, static, config, cores, interpret)


@dataclasses.dataclass(frozen=True)
class Static:
    """What `Problem` has of the same names."""

    scale: float
    window: int | None
    soft_cap: float | None
    out: np.dtype


def _check(q: jax.Array, k_pages: jax.Array) -> None:
    head_dim, group = q.shape[2], q.shape[1] // k_pages.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries must be bfloat16 or float16, not {q.dtype}")
    if k_pages.dtype not in (q.dtype, jnp.int8, jnp.float8_e4m3fn):
        raise NotImplementedError(
            f"a cache of {k_pages.dtype} with queries of {q.dtype}: it must be of their dtype, "
            "int8 or float8_e4m3fn"
        )
    if head_dim % 16 or not 32 <= head_dim <= 256:
        raise NotImplementedError(f"head_dim must be 32, 48 ... 256, not {head_dim}")
    # Scores and sums of 64 tokens, the mix and what is added to it.
    columns, features = -(-group // 8) * 8, -(-head_dim // 64) * 64
    if columns * 2 * (64 + features) > MOST_REGISTERS * 128:
        raise NotImplementedError(
            f"{group} query heads of {head_dim} features for each KV head: accumulators would not "
            "fit into registers"
        )


@partial(jax.jit, static_argnums=range(1, 5))
def _run(
    arrays: tuple[Any, ...],
    static: Static,
    config: Config,
    cores: int,
    interpret: bool,
) -> jax.Array:
    inputs = Inputs(*arrays)
    (batch, heads, head_dim), (_, kv_heads, page_size, _) = inputs.queries.shape, inputs.keys.shape
    operands = Operands(
        tokens=config.tokens,
        head_dim=head_dim,
        columns=-(-heads // kv_heads // 8) * 8,
        cache=np.dtype(inputs.keys.dtype),
        query=np.dtype(inputs.queries.dtype),
        interpret=interpret,
    )
    problem = Problem(
        operands=operands,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        page_size=page_size,
        pages=1 if inputs.table is None else inputs.table.shape[1],
        **vars(static),
    )
    if config.persistent:
        return persistent(inputs, problem, config, cores)
    return blocks(inputs, problem, config)
