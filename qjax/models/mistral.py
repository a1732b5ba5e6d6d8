"""Mistral (model_type 'mistral'): Llama with a sliding window; arXiv:2310.06825.

Version 0.1 has the window, later ones see all of their context.
"""

from typing import Any

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.tensors import LLAMA_NAMES
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "mistral") as fields:
        heads = fields.heads()
        rope, rotary_dim = fields.rope(heads["head_dim"])
        layer = LayerConfig(
            attention=AttentionConfig(
                **heads,
                rope=0,
                rotary_dim=rotary_dim,
                window=fields.window("sliding_window", 4096),
            ),
            mlp=MLPConfig(
                features=fields.size("intermediate_size"),
                activation=fields.activation("hidden_act", "silu"),
            ),
            norm=NormConfig(eps=fields.epsilon("rms_norm_eps", 1e-6)),
        )
        return DecoderConfig(
            model_type="mistral",
            **fields.sizes(),
            layers=(layer,) * fields.size("num_hidden_layers"),
            norm=layer.norm,
            ropes=(rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


TENSORS = LLAMA_NAMES
