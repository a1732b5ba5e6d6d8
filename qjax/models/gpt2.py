"""GPT-2 (model_type 'gpt2'): learned positions, LayerNorm, biases everywhere.

Radford et al. 2019, "Language models are unsupervised multitask learners". Its weights are stored
[in, out].
"""

import dataclasses
from typing import Any

import numpy as np

from qjax.errors import CheckpointError
from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.tensors import QKV, Split, heads_in_blocks
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "gpt2") as fields:
        fields.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx")
        fields.ignore("reorder_and_upcast_attn")  # scores are float32 here in any case
        fields.ignore(*(f"summary_{what}" for what in ("type", "use_proj", "activation")))
        fields.ignore("summary_proj_to_labels", "summary_first_dropout")
        hidden, heads = fields.size("n_embd"), fields.size("n_head")
        head_dim = hidden // heads
        if head_dim * heads != hidden:
            raise CheckpointError(f"n_head is {heads}; it must divide n_embd, {hidden}")
        scaled = fields.flag("scale_attn_weights", True)
        norm = NormConfig(kind="layer", eps=fields.epsilon("layer_norm_epsilon", 1e-5), bias=True)
        layer = LayerConfig(
            attention=AttentionConfig(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                qkv_bias=True,
                o_bias=True,
                scale=None if scaled else 1.0,
            ),
            mlp=MLPConfig(
                features=fields.size("n_inner", 4 * hidden),
                activation=fields.activation("activation_function", "gelu_new"),
                gated=False,
                bias=True,
            ),
            norm=norm,
        )
        layers = [layer] * fields.size("n_layer")
        if fields.flag("scale_attn_by_inverse_layer_idx", False):
            layers = [_scaled(layer, index) for index, layer in enumerate(layers)]
        positions = fields.size("n_positions")
        return DecoderConfig(
            model_type="gpt2",
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            embedding_size=hidden,
            max_position_embeddings=positions,
            learned_positions=positions,
            layers=tuple(layers),
            norm=norm,
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            eos_token_id=fields.end_tokens(),
        )


def _scaled(layer: LayerConfig, index: int) -> LayerConfig:
    """Layer number `index` where scores are divided by index + 1."""
    a = layer.attention
    scale = a.head_dim**-0.5 if a.scale is None else a.scale
    return dataclasses.replace(layer, attention=dataclasses.replace(a, scale=scale / (index + 1)))


def _split_heads(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    return heads_in_blocks(tensor.T, config)


def _transposed(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    return [tensor.T]


# The original checkpoint has no 'transformer.' in front.
_MODEL = r"(?:transformer\.)?"
_BLOCK = _MODEL + r"h\.(\d+)\."
_OURS = {
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}

TENSORS = (
    (_MODEL + r"wte\.weight", "embed_tokens.embedding"),
    (_MODEL + r"wpe\.weight", "embed_positions.embedding"),
    (_MODEL + r"ln_f\.weight", "norm.scale"),
    (_MODEL + r"ln_f\.bias", "norm.bias"),
    (_BLOCK + r"ln_1\.weight", r"layers.\1.input_layernorm.scale"),
    (_BLOCK + r"ln_1\.bias", r"layers.\1.input_layernorm.bias"),
    (_BLOCK + r"ln_2\.weight", r"layers.\1.post_attention_layernorm.scale"),
    (_BLOCK + r"ln_2\.bias", r"layers.\1.post_attention_layernorm.bias"),
    Split(pattern=_BLOCK + r"attn\.c_attn\.(weight|bias)", names=QKV, split=_split_heads),
    *(
        Split(
            pattern=_BLOCK + theirs.replace(".", r"\.") + r"\.(weight|bias)",
            names=(rf"layers.\1.{ours}.\2",),
            split=_transposed,
        )
        for theirs, ours in _OURS.items()
    ),
    (r"lm_head\.weight", "lm_head.weight"),
)
COMPUTED = (_BLOCK + r"attn\.(bias|masked_bias)",)
