"""Decode steps by the Triton kernels of `prefill_attention`: a step is a chunk of one query.

Portable, from compute capability 8.0 on. The query's heads of a KV head are the rows of a tile, and
the keys are split over blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.prefill_attention.config import Config
from qjax_kernels.prefill_attention.launch import attend, refuse
from qjax_kernels.prefill_attention.triton import choose
from qjax_kernels.quantize_rows.api import quantize_rows


@partial(
    jax.jit,
    static_argnames=(
        *("scale", "window", "soft_cap", "out_dtype"),
        *("config", "interpret"),
    ),
)
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
    out_dtype: jnp.dtype | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.decode_attention`; scales are [1] or [kv_heads] here. An out_scale takes another
    kernel.

    Args:
      config: None: the first of `prefill_attention.config.candidates`.
      interpret: run in Triton's interpreter, on any machine.

    Raises:
      NotImplementedError: a scale that is not positive, a float32 cache, one of 8 bits with an odd
        head_dim, no sequences; no GPU that Triton compiles for.
    """
    refuse(q, k_pages, scale)
    chunk = q[:, None]
    _, kv_heads, page_size, _ = k_pages.shape
    if config is None:
        pages = 0 if block_table is None else block_table.shape[1]
        length, page = max(pages, 1) * page_size, page_size if pages else 0
        plain = window is None and soft_cap is None and alibi_slopes is None
        config = choose(chunk, k_pages, kv_heads, length, page, window, plain, interpret)
    y = attend(
        chunk,
        k_pages,
        v_pages,
        block_table,
        None,
        lengths,
        k_scale,
        v_scale,
        alibi_slopes,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        config=config,
        decode=True,
        interpret=interpret,
    )
    if out_scale is None:
        return y.reshape(q.shape)
    rows, step = y.reshape(q.shape[0], -1), out_scale.reshape(())
    values = quantize_rows(rows, out_dtype=jnp.dtype(out_dtype), scale=step).values
    return values.reshape(q.shape)
