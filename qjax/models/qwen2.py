"""Qwen 2 and 2.5 (model_type 'qwen2'): Llama with biases of q, k and v; arXiv:2407.10671.

Layers from max_window_layers on may see a sliding window only (use_sliding_window).
"""

import dataclasses
from typing import Any

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import Fields, reading
from qjax.models.tensors import LLAMA_NAMES
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "qwen2") as fields:
        heads = fields.heads()
        rope, rotary_dim = fields.rope(heads["head_dim"])
        layer = LayerConfig(
            attention=AttentionConfig(**heads, qkv_bias=True, rope=0, rotary_dim=rotary_dim),
            mlp=MLPConfig(
                features=fields.size("intermediate_size"),
                activation=fields.activation("hidden_act", "silu"),
            ),
            norm=NormConfig(eps=fields.epsilon("rms_norm_eps", 1e-6)),
        )
        return DecoderConfig(
            model_type="qwen2",
            **fields.sizes(),
            layers=with_windows(fields, layer),
            norm=layer.norm,
            ropes=(rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


def with_windows(fields: Fields, layer: LayerConfig) -> tuple[LayerConfig, ...]:
    """All layers, of which some see a sliding window, as Qwen's configs say it."""
    count = fields.size("num_hidden_layers")
    # The index of the first layer that may have one; 0 is a number here.
    first = fields.value("max_window_layers", 28)
    window = fields.window("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    limited = window is not None
    default = ["sliding_attention" if limited and i >= first else "full_attention"
               for i in range(count)]  # fmt: skip
    sliding = dataclasses.replace(
        layer, attention=dataclasses.replace(layer.attention, window=window)
    )
    return tuple(sliding if short else layer for short in fields.layer_windows(count, default))


TENSORS = LLAMA_NAMES
