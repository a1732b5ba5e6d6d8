"""The attention of a decoder layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax import numerics, ops
from qjax.nn.linear import Linear
from qjax.nn.norm import NormConfig, make_norm

# cos and sin, float32 [batch, tokens, rotated dims / 2].
RopeTable = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which attention. Names are those of the kernels' arguments.

    Attributes:
      heads, kv_heads, head_dim: sizes; kv_heads divides heads.
      qkv_bias, o_bias: whether the projections have biases.
      qk_norm: of the dims of each head of queries and keys, before the rotation; None: none.
      rope: which of the model's tables rotates queries and keys; None: nothing does.
      rotary_dim: dims of a head that are rotated, the first ones; 0 without rope.
      interleaved: neighbouring dims are a pair (GPT-J), instead of halves (Llama).
      alibi_slopes: a number a head, what a score loses for each position of distance
        (arXiv:2108.12409); None: nothing.
      scale: of the scores; None: head_dim ** -0.5.
      window: positions that a query sees, the last ones; None: all.
      soft_cap: bounds the scores by tanh; None: not.
      clip_qkv: bounds queries, keys and values, as the projections give them; None: not.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: NormConfig | None = None
    rope: int | None = None
    rotary_dim: int = 0
    interleaved: bool = False
    alibi_slopes: tuple[float, ...] | None = None
    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    clip_qkv: float | None = None


class Attention(nnx.Module):
    """Grouped-query attention: q_proj, k_proj, v_proj, o_proj, and q_norm and k_norm or None.

    Attributes:
      kv_format: static; what keys and values are rounded to before they are cached, a name of
        numerics.FORMATS; None: nothing. `quantize_cache` sets it.
      k_scale, v_scale: Params, float32 [] or [kv_heads], of these; or None.
      observe_kv: static; while True, each call sows the largest magnitudes of keys and values,
        float32 [kv_heads], as Intermediates named 'k_amax' and 'v_amax'.
    """

    kv_format: str | None = None
    observe_kv = False

    def __init__(
        self, hidden_size: int, cfg: AttentionConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        def linear(inputs: int, outputs: int, use_bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)

        q_features, kv_features = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q_proj = linear(hidden_size, q_features, cfg.qkv_bias)
        self.k_proj = linear(hidden_size, kv_features, cfg.qkv_bias)
        self.v_proj = linear(hidden_size, kv_features, cfg.qkv_bias)
        self.o_proj = linear(q_features, hidden_size, cfg.o_bias)
        self.q_norm, self.k_norm = (
            nnx.data(None)
            if cfg.qk_norm is None
            else make_norm(cfg.head_dim, cfg.qk_norm, param_dtype)
            for _ in range(2)
        )
        self.k_scale: Any = nnx.data(None)
        self.v_scale: Any = nnx.data(None)
        self.config = cfg

    def quantize_cache(self, format: str, per_head: bool) -> None:
        """From now on keys and values are rounded to `format`, by scales that are 1 so far."""
        shape = (self.config.kv_heads,) if per_head else ()
        self.kv_format = format
        self.k_scale = nnx.Param(jnp.ones(shape, jnp.float32))
        self.v_scale = nnx.Param(jnp.ones(shape, jnp.float32))

    def __call__(
        self,
        x: jax.Array,
        rope: RopeTable | None,
        positions: jax.Array,
        cache: kv.KVCache | None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        """Mix x [batch, tokens, hidden_size] with what came before it.

        Args:
          rope: of the positions; None: no rotation.
          positions: int32 [batch, tokens], consecutive in each row.
          cache: of this layer, extended at `positions`; None: the tokens are all there is.

        Returns:
          [batch, tokens, hidden_size], and the extended cache or None.
        """
        cfg = self.config
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cfg.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -cfg.clip_qkv, cfg.clip_qkv) for y in (q, k, v))
        q, k, v = (y.reshape(*x.shape[:2], -1, cfg.head_dim) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (ops.apply_rope(y, *rope, interleaved=cfg.interleaved) for y in (q, k))
        if self.observe_kv:
            self.sow(nnx.Intermediate, "k_amax", _amax(k))
            self.sow(nnx.Intermediate, "v_amax", _amax(v))
        if self.kv_format is not None:
            k, v = (
                _rounded(k, self.k_scale, self.kv_format),
                _rounded(v, self.v_scale, self.kv_format),
            )
        if cache is None:
            keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            cache = kv.write(cache, k, v, positions[:, 0])
            keys, values = cache.k, cache.v
        if self.kv_format is not None:
            keys, values = _restored(keys, self.k_scale, x), _restored(values, self.v_scale, x)
        slopes = cfg.alibi_slopes
        mixed = ops.attention(
            q,
            keys,
            values,
            positions,
            alibi_slopes=None if slopes is None else jnp.asarray(slopes, jnp.float32),
            scale=cfg.scale,
            window=cfg.window,
            soft_cap=cfg.soft_cap,
        )
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache


def _amax(x: jax.Array) -> jax.Array:
    """float32 [heads] of x [batch, tokens, heads, head_dim]; NaN where x is not finite."""
    x = jnp.abs(x.astype(jnp.float32))
    largest = jnp.max(x, axis=(0, 1, 3), initial=0.0)
    return jnp.where(jnp.isfinite(x).all(axis=(0, 1, 3)), largest, jnp.nan)


def _rounded(x: jax.Array, scale: nnx.Param, format: str) -> jax.Array:
    """[batch, tokens, heads, head_dim] -> the same in `format`."""
    step = scale.get_value()[..., None]
    return numerics.round_to_format(
        numerics.divide(x.astype(jnp.float32), step), numerics.get_format(format)
    )


def _restored(x: jax.Array, scale: nnx.Param, like: jax.Array) -> jax.Array:
    """[batch, heads, length, head_dim] in a narrow format -> numbers of the dtype of `like`."""
    return (x.astype(jnp.float32) * scale.get_value()[..., None, None]).astype(like.dtype)
