"""Rotary embedding of a fused projection, and its keys and values into the pages of the cache."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.rope_cache import triton, xla
from qjax_kernels.rope_cache.result import RopeCache
from qjax_kernels.row_quant import FLOATS, RANGES

IMPLEMENTATIONS = {"triton": triton.rope_cache, "xla": xla.rope_cache}


def rope_cache(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    heads: int | None = None,
    interleaved: bool = False,
    with_kv: bool = False,
    implementation: str | None = None,
) -> RopeCache:
    """Rotate queries and keys, and write keys and values into the pages, in place if donated.

    With norms, arXiv:1910.07467 of each head of queries and keys comes first:
    x[i] = h[i] / sqrt(mean(h^2) + eps) * (weight_offset + norm[i])
    y[i] = x[i] cos[i] - x[i + r/2] sin[i],  y[i + r/2] = x[i + r/2] cos[i] + x[i] sin[i]
    for i < r/2, or, interleaved, the same of x[2i] and x[2i + 1]; arXiv:2104.09864
    k_pages[page[t], h, slot[t]] = round(k[t, h] / k_scale), half to even, clipped; likewise v

    with r = 2 * cos.shape[-1]; dims from r on are not rotated. Arithmetic is float32 and rounded
    once: a quantized key is not rounded to the dtype of qkv before.

    Args:
      qkv: [tokens, (heads + 2 * kv_heads) * head_dim], bfloat16, float16 or float32: all query
        heads, then all key heads, then all value heads; with `heads`, then anything.
      cos, sin: float32 [tokens, r/2], of the angle of each token's position; r may be 0.
      k_pages, v_pages: [pages, kv_heads, page_size, head_dim], floats, float8_e4m3fn or int8.
      page, slot: int32 [tokens], where each token goes: no two tokens to one place, slot below
        page_size. A page of -1, or past the last, is not written.
      k_scale, v_scale: float32 [] or [kv_heads], for pages in 8 bits and only for those.
      q_norm, k_norm: [head_dim], the weights of the norms, or None for both: there are no norms.
      eps, weight_offset: of the norms; see `norm_quant`.
      heads: of queries, where qkv has columns that are not read behind the values; None: it has
        none.
      interleaved: rotate neighbours (GPT-J) instead of halves (Llama).
      with_kv: also return the new keys and values, for attention over a prompt.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    heads = _check(qkv, cos, sin, k_pages, v_pages, page, slot, heads)
    for name, scale, pages in (("k", k_scale, k_pages), ("v", v_scale, v_pages)):
        if (scale is not None) != (pages.dtype in RANGES):
            raise ValueError(
                f"{name}_scale is {'missing' if scale is None else 'given'} for "
                f"{pages.dtype} pages; 8-bit pages need one, others have none"
            )
        if scale is not None and scale.shape not in ((), pages.shape[1:2]):
            raise ValueError(f"{name}_scale is {scale.shape}; it must be () or {pages.shape[1:2]}")
    norms = [None if w is None else w.shape for w in (q_norm, k_norm)]
    if norms not in ([None, None], [k_pages.shape[3:]] * 2):
        raise ValueError(f"q_norm, k_norm: {norms}; both must be {k_pages.shape[3:]}, or None")
    result: Any = dispatch(
        "rope_cache",
        cast(Any, IMPLEMENTATIONS),
        implementation,
        qkv,
        cos,
        sin,
        k_pages,
        v_pages,
        page,
        slot,
        k_scale,
        v_scale,
        q_norm,
        k_norm,
        eps=float(eps),
        weight_offset=float(weight_offset),
        heads=heads,
        interleaved=interleaved,
        with_kv=with_kv,
    )
    return result


def _check(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    heads: int | None,
) -> int:
    """The number of query heads, or a ValueError."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"pages are {k_pages.shape} and {v_pages.shape}; they must be alike, 4-D")
    for pages in (k_pages, v_pages):
        if pages.dtype not in RANGES and pages.dtype not in FLOATS:
            raise ValueError(f"pages are {pages.dtype}; rope_cache writes floats, fp8 e4m3 or int8")
    _, kv_heads, _, head_dim = k_pages.shape
    width, known = qkv.shape[-1], heads is not None
    heads = width // head_dim - 2 * kv_heads if heads is None else heads
    fits = (heads + 2 * kv_heads) * head_dim <= width and (known or width % head_dim == 0)
    if qkv.dtype not in FLOATS or not fits or heads < 1:
        raise ValueError(
            f"qkv is {qkv.dtype}{qkv.shape}; with {kv_heads} key heads of {head_dim} it must be "
            f"floats [tokens, (heads + {2 * kv_heads}) * {head_dim}]"
        )
    tokens = qkv.shape[:1]
    angles = (*tokens, cos.shape[-1])
    if qkv.ndim != 2 or not (cos.shape == sin.shape == angles) or 2 * angles[1] > head_dim:
        raise ValueError(
            f"cos {cos.shape} and sin {sin.shape} must be [tokens, up to {head_dim // 2}] for qkv "
            f"{qkv.shape}"
        )
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        raise ValueError(f"cos and sin are {cos.dtype} and {sin.dtype}; they must be float32")
    for name, index in (("page", page), ("slot", slot)):
        if index.shape != tokens or index.dtype != jnp.int32:
            raise ValueError(f"{name} is {index.dtype}{index.shape}; it must be int32{tokens}")
    return heads
