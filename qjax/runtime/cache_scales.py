"""What a cache of keys and values may hold, and its scales."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import ConfigError, one_of
from qjax.models.decoder import DecoderConfig

# By the names of formats; None is the type of the activations.
CACHE_DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8_e4m3": "float8_e4m3fn",
    "int8": "int8",
}


def calibrated(layers: Sequence[Any]) -> tuple[str | None, list[tuple[Any, Any]] | None]:
    """What the layers of a model were calibrated to cache: format, and (k_scale, v_scale) of each.

    (None, None) if it is what their activations are. The scales are copies: their layers may be
    freed.
    """
    kinds = {layer.self_attn.kv_format for layer in layers}
    if kinds == {None}:
        return None, None
    (kind,) = kinds
    parts = [(layer.self_attn.k_scale, layer.self_attn.v_scale) for layer in layers]
    return kind, [(_copy(k.get_value()), _copy(v.get_value())) for k, v in parts]


def _copy(x: Any) -> jax.Array:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.ones(x.shape, x.dtype)
    return jnp.array(x, copy=True)


def cache_scales(
    kv_cache: str | None, scales: Sequence[tuple[Any, Any]] | None, config: DecoderConfig
) -> list[tuple[jax.Array, jax.Array]] | None:
    """(k_scale, v_scale) of each layer for a cache in 8 bits, else None; see `qjax.prepare`.

    Raises:
      ConfigError: they do not fit together or the model.
    """
    if kv_cache is not None:
        one_of("kv_cache", kv_cache, CACHE_DTYPES)
    if kv_cache not in ("fp8_e4m3", "int8"):
        if scales is not None:
            raise ConfigError(f"kv_scales are for a cache in 8 bits, not kv_cache={kv_cache!r}")
        return None
    layers = config.num_hidden_layers
    if scales is None:
        if kv_cache == "int8":
            raise ConfigError("kv_cache='int8' needs kv_scales: keys and values are not integers")
        return [(jnp.ones((), jnp.float32), jnp.ones((), jnp.float32)) for _ in range(layers)]
    if len(scales) != layers:
        raise ConfigError(f"kv_scales has {len(scales)} entries; the model has {layers} layers")
    arrays = [(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)) for k, v in scales]
    for pair in arrays:
        for scale in pair:
            if scale.shape not in ((), (config.num_key_value_heads,)):
                raise ConfigError(
                    f"a kv_scale is {scale.shape}; it must be () or "
                    f"({config.num_key_value_heads},), one for each KV head"
                )
    return arrays
