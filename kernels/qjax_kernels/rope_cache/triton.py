"""One Triton kernel: rotation, rounding and the write into the pages, in place."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch
from qjax_kernels.rope_cache.config import Config, candidates
from qjax_kernels.rope_cache.result import RopeCache

MODULE = "qjax_kernels.rope_cache.triton_kernel"
K_PAGES, V_PAGES = 3, 4  # arguments that outputs 1 and 2 share the memory of


@partial(
    jax.jit,
    static_argnames=(
        "heads", "interleaved", "with_kv", "eps", "weight_offset", "config", "interpret"
    ),
)  # fmt: skip
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
    config: Config | None = None,
    interpret: bool = False,
) -> RopeCache:
    """See `api.rope_cache`.

    Raises:
      NotImplementedError: no tokens; no GPU that Triton compiles for.
    """
    if not interpret:
        fp8 = jnp.float8_e4m3fn in (k_pages.dtype, v_pages.dtype)
        triton_launch.require_capability(fp8=fp8)
    tokens, half = cos.shape
    if tokens == 0:
        raise NotImplementedError("there are no tokens")
    pages, kv_heads, page_size, head_dim = k_pages.shape
    if config is None:
        config = candidates(tokens, heads, kv_heads, head_dim)[0]
    if half == 0:
        cos = sin = page  # which are not read; an array without elements has no address
    blocks = (heads + 2 * kv_heads) // config.heads

    shape = jax.ShapeDtypeStruct
    new = shape((tokens, kv_heads, head_dim), qkv.dtype) if with_kv else shape((1,), qkv.dtype)
    q, k_pages, v_pages, k, v = triton_launch.call(
        MODULE,
        "rope_cache",
        qkv,
        cos,
        sin,
        k_pages,
        v_pages,
        page,
        slot,
        cos if k_scale is None else k_scale,
        cos if v_scale is None else v_scale,
        page if q_norm is None else q_norm,
        page if k_norm is None else k_norm,
        tokens,
        pages,
        outputs=[
            shape((tokens, heads, head_dim), qkv.dtype),
            shape(k_pages.shape, k_pages.dtype),
            shape(v_pages.shape, v_pages.dtype),
            new,
            new,
        ],
        grid=(blocks * -(-tokens // config.tokens),),
        num_warps=config.warps,
        aliases={K_PAGES: 1, V_PAGES: 2},
        interpret=interpret,
        WIDTH=qkv.shape[-1],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        ROTARY=2 * half,
        TURNED=_power_of_two(half),
        REST=_power_of_two(head_dim - 2 * half),
        BLOCK_HEADS=config.heads,
        BLOCK_TOKENS=config.tokens,
        INTERLEAVED=interleaved,
        WITH_KV=with_kv,
        HAS_NORMS=q_norm is not None,
        EPS=eps,
        OFFSET=weight_offset,
        K_SCALES=1 if k_scale is None else k_scale.size,
        V_SCALES=1 if v_scale is None else v_scale.size,
    )
    return RopeCache(q, k_pages, v_pages, k if with_kv else None, v if with_kv else None)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and 1."""
    return 1 << max(n - 1, 0).bit_length()
