"""Prompts and chunks of them by the Triton kernels, on every GPU from compute capability 8.0 on."""

from functools import partial

import jax

from qjax_kernels import triton_launch
from qjax_kernels.prefill_attention.config import Config, candidates
from qjax_kernels.prefill_attention.launch import attend, most_seen, refuse
from qjax_kernels.target import target

MOST_ROWS = 128  # of a tile


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.prefill_attention`.

    Args:
      config: None: the first of `config.candidates`.
      interpret: run in Triton's interpreter, on any machine.

    Raises:
      NotImplementedError: a scale that is not positive, float32 keys, no queries; no GPU that
        Triton compiles for.
    """
    refuse(q, k, scale)
    if config is None:
        plain = window is None and soft_cap is None and alibi_slopes is None
        config = choose(q, k, k.shape[2], k.shape[1], 0, window, plain, interpret)
    return attend(
        q,
        k,
        v,
        None,
        None,
        lengths,
        None,
        None,
        alibi_slopes,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        config=config,
        by_page=False,
        interpret=interpret,
    )


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "interpret"))
def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_table: jax.Array | None,
    context: jax.Array,
    lengths: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    alibi_slopes: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.paged_prefill_attention`; scales are [1] or [kv_heads] here.

    Args:
      config: None: the first of `config.candidates`.
      interpret: run in Triton's interpreter, on any machine.

    Raises:
      NotImplementedError: a scale that is not positive, a float32 cache, one of 8 bits with an odd
        head_dim, no queries; no GPU that Triton compiles for.
    """
    refuse(q, k_pages, scale)
    _, kv_heads, page_size, _ = k_pages.shape
    if config is None:
        pages = 0 if block_table is None else block_table.shape[1]
        length, page = max(pages, 1) * page_size, page_size if pages else 0
        plain = window is None and soft_cap is None and alibi_slopes is None
        config = choose(q, k_pages, kv_heads, length, page, window, plain, interpret)
    return attend(
        q,
        k_pages,
        v_pages,
        block_table,
        context,
        lengths,
        k_scale,
        v_scale,
        alibi_slopes,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        config=config,
        interpret=interpret,
    )


def choose(
    q: jax.Array,
    cache: jax.Array,
    kv_heads: int,
    length: int,
    page_size: int,
    window: int | None,
    plain: bool,
    interpret: bool,
) -> Config:
    """The first candidate for the GPU that the trace is for; the interpreter has an H200's.

    Raises:
      NotImplementedError: there is none; no GPU that Triton compiles for.
    """
    capability, cores = 90, 132
    if not interpret:
        capability, cores = triton_launch.require_capability(), target().cores
    batch, tokens, heads, head_dim = q.shape
    group = heads // kv_heads
    found = candidates(
        tokens * group,
        batch * kv_heads,
        most_seen(length, window, min(tokens * group, MOST_ROWS), group),
        head_dim,
        cache.dtype.itemsize,
        capability,
        cores,
        page_size,
        plain,
    )
    if not found:
        raise NotImplementedError(f"no tile of head_dim {head_dim} fits into shared memory")
    return found[0]
