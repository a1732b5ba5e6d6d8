"""Phi-3 and Phi-4 (model_type 'phi3'): Llama with fused weights and longrope; arXiv:2404.14219."""

from typing import Any

import numpy as np

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.tensors import LLAMA_NAMES, QKV, Split, heads_in_blocks
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "phi3") as fields:
        fields.ignore("resid_pdrop", "embd_pdrop")
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            fields.only(name, False)
        for name in ("full_attn_mod", "interpolate_factor"):
            fields.only(name, 1)
        heads = fields.heads(same=True)
        rope, rotary_dim = fields.rope(
            heads["head_dim"], partial=True, parameters=_rope_parameters(config)
        )
        layer = LayerConfig(
            attention=AttentionConfig(
                **heads, rope=0, rotary_dim=rotary_dim, window=fields.window("sliding_window")
            ),
            mlp=MLPConfig(
                features=fields.size("intermediate_size"),
                activation=fields.activation("hidden_act", "silu"),
            ),
            norm=NormConfig(eps=fields.epsilon("rms_norm_eps", 1e-5)),
        )
        return DecoderConfig(
            model_type="phi3",
            **fields.sizes(),
            layers=(layer,) * fields.size("num_hidden_layers"),
            norm=layer.norm,
            ropes=(rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Those of the config, its older names of 'longrope' replaced."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("type", None)
    kind = rope.get("rope_type", kind or "default")
    return rope | {"rope_type": "longrope" if kind in ("su", "yarn") else kind}


def _split_heads(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    return heads_in_blocks(tensor, config)


def _halves(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    return np.split(tensor, 2)


_LAYER = r"model\.layers\.(\d+)\."

TENSORS = (
    Split(pattern=_LAYER + r"self_attn\.qkv_proj\.(weight)", names=QKV, split=_split_heads),
    Split(
        pattern=_LAYER + r"mlp\.gate_up_proj\.weight",
        names=(r"layers.\1.mlp.gate_proj.weight", r"layers.\1.mlp.up_proj.weight"),
        split=_halves,
    ),
    *LLAMA_NAMES,
)
