"""Qwen 3, dense (model_type 'qwen3'): Llama with norms of each head's q and k.

arXiv:2505.09388.
"""

from typing import Any

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.qwen2 import with_windows
from qjax.models.tensors import LLAMA_NAMES, QK_NORM_NAMES
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "qwen3") as fields:
        heads = fields.heads(128)
        bias = fields.flag("attention_bias", False)
        norm = NormConfig(eps=fields.epsilon("rms_norm_eps", 1e-6))
        rope, rotary_dim = fields.rope(heads["head_dim"])
        layer = LayerConfig(
            attention=AttentionConfig(
                **heads, qkv_bias=bias, o_bias=bias, qk_norm=norm, rope=0, rotary_dim=rotary_dim
            ),
            mlp=MLPConfig(
                features=fields.size("intermediate_size"),
                activation=fields.activation("hidden_act", "silu"),
            ),
            norm=norm,
        )
        return DecoderConfig(
            model_type="qwen3",
            **fields.sizes(),
            layers=with_windows(fields, layer),
            norm=norm,
            ropes=(rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


TENSORS = (*QK_NORM_NAMES, *LLAMA_NAMES)
