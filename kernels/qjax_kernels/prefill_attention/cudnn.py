"""Prompts by cuDNN's flash attention, as JAX calls it."""

from functools import partial

import jax
import jax.numpy as jnp

from qjax_kernels import triton_launch


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
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
) -> jax.Array:
    """See `api.prefill_attention`.

    Raises:
      NotImplementedError: a soft cap, ALiBi, float32, a head_dim that is no multiple of 8 or larger
        than 128 (256 from compute capability 9.0 on), no queries; no NVIDIA GPU of compute
        capability 8.0 or more, no cuDNN.
    """
    capability, head_dim = triton_launch.capability(), q.shape[-1]
    if capability < 80:
        raise NotImplementedError(f"it needs compute capability 8.0, not {capability / 10}")
    if soft_cap is not None or alibi_slopes is not None:
        raise NotImplementedError("cuDNN has neither soft cap nor ALiBi")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        raise NotImplementedError(f"q and k are {q.dtype} and {k.dtype}; cuDNN takes 16-bit floats")
    if head_dim % 8 or head_dim > (256 if capability >= 90 else 128):
        raise NotImplementedError(f"cuDNN has no kernel for head_dim {head_dim}")
    if q.size == 0:
        raise NotImplementedError("there are no queries")
    try:
        y = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:
        raise NotImplementedError(str(error)) from error  # cuDNN is not installed
    if lengths is None:
        return y
    # What cuDNN leaves behind the end of a sequence is its own business.
    real = jnp.arange(q.shape[1], dtype=jnp.int32) < lengths[:, None]
    return jnp.where(real[:, :, None, None], y, jnp.zeros_like(y))
