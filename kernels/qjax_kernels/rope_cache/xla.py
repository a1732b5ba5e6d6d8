"""The reference, in plain JAX."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels.rope_cache.result import RopeCache
from qjax_kernels.row_quant import quantize_rows


@partial(jax.jit, static_argnames=("heads", "interleaved", "with_kv", "eps", "weight_offset"))
def rope_cache(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    *,
    heads: int,
    interleaved: bool,
    with_kv: bool,
    eps: float = 0.0,
    weight_offset: float = 0.0,
) -> RopeCache:
    """See `api.rope_cache`."""
    pages, kv_heads, _, head_dim = k_pages.shape
    qkv = qkv[:, : (heads + 2 * kv_heads) * head_dim]
    fused = qkv.astype(jnp.float32).reshape(-1, heads + 2 * kv_heads, head_dim)
    q, k = fused[:, :heads], fused[:, heads : heads + kv_heads]
    if q_norm is not None and k_norm is not None:
        q, k = (_normed(x, w, eps, weight_offset) for x, w in ((q, q_norm), (k, k_norm)))
    q, k = (_rotate(x, cos, sin, interleaved) for x in (q, k))
    v = fused[:, heads + kv_heads :]
    # A negative index would count from the end; one past it is dropped.
    page = jnp.where(page < 0, pages, page)

    def write(old: jax.Array, new: jax.Array, scale: jax.Array | None) -> jax.Array:
        if scale is not None:
            scale = scale.reshape(-1, 1)
        values, _, _ = quantize_rows(new, old.dtype, scale, False)
        return old.at[page, :, slot].set(values, mode="drop")

    return RopeCache(
        q.astype(qkv.dtype),
        write(k_pages, k, k_scale),
        write(v_pages, v, v_scale),
        k.astype(qkv.dtype) if with_kv else None,
        v.astype(qkv.dtype) if with_kv else None,
    )


def _normed(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """RMSNorm of float32 [..., head_dim]."""
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse * (weight.astype(jnp.float32) + offset)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """float32 [tokens, heads, head_dim] -> the same, its first 2 * cos.shape[-1] dims rotated."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        rotated = jnp.stack(pair, axis=-1).reshape(rotated.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([rotated, rest], axis=-1)
