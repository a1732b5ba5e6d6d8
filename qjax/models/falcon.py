"""Falcon (model_type 'falcon'): attention and MLP side by side, few key-value heads.

arXiv:2311.16867. Three forms: of 7B (one key-value head, one norm for both parts), of 40B and 180B
(new_decoder_architecture: groups of heads, a norm for each part), and of 1B (ALiBi, a
key-value head for each head).
"""

import dataclasses
from typing import Any

import numpy as np

from qjax.errors import CheckpointError
from qjax.models.alibi import geometric_slopes
from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.tensors import QKV, Split
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import PARALLEL, SERIAL, SHARED, LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "falcon") as fields:
        fields.ignore("hidden_dropout", "ff_factor")  # the second: said by ffn_hidden_size
        fields.only("apply_residual_connection_post_layernorm", False)
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        head_dim = hidden // heads
        if head_dim * heads != hidden:
            raise CheckpointError(f"num_attention_heads is {heads}; it must divide {hidden}")
        grouped = fields.flag("new_decoder_architecture", False)
        single = fields.flag("multi_query", True)
        parallel = fields.flag("parallel_attn", True)
        norms = fields.size("num_ln_in_parallel_attn", 2 if grouped else 1)
        if grouped:
            fields.only("parallel_attn", True)
        if norms > 1 + grouped:
            raise CheckpointError(
                f"num_ln_in_parallel_attn is {norms}; it is 1, or 2 with new_decoder_architecture"
            )
        kv_heads = fields.size("num_kv_heads", heads)
        bias = fields.flag("bias", False)
        norm = NormConfig(kind="layer", eps=fields.epsilon("layer_norm_epsilon", 1e-5), bias=True)
        attention = AttentionConfig(
            heads=heads,
            kv_heads=1 if single and not grouped else kv_heads,
            head_dim=head_dim,
            qkv_bias=bias,
            o_bias=bias,
        )
        rope, rotary_dim = fields.rope(head_dim)
        alibi = fields.flag("alibi", False)
        if alibi:
            # Added to the scores before they are scaled. (transformers rounds slopes, and slopes
            # times positions, to bfloat16, whatever it computes in; nothing is rounded here.)
            slopes = tuple(slope * head_dim**-0.5 for slope in geometric_slopes(heads))
            attention = dataclasses.replace(attention, alibi_slopes=slopes)
        else:
            attention = dataclasses.replace(attention, rope=0, rotary_dim=rotary_dim)
        layer = LayerConfig(
            attention=attention,
            mlp=MLPConfig(
                features=fields.size("ffn_hidden_size", 4 * hidden),
                activation=fields.activation("activation", "gelu"),
                gated=False,
                bias=bias,
            ),
            norm=norm,
            arrangement=(PARALLEL if norms == 2 else SHARED) if parallel else SERIAL,
        )
        return DecoderConfig(
            model_type="falcon",
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            embedding_size=hidden,
            max_position_embeddings=fields.size("max_position_embeddings", 2048),
            layers=(layer,) * fields.size("num_hidden_layers"),
            norm=norm,
            ropes=() if alibi else (rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            eos_token_id=fields.end_tokens(),
        )


def _split_heads(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    """Rows in groups, one for each key-value head: its query heads, its key, its value."""
    kv, dim = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // kv
    blocks = tensor.reshape(kv, group + 2, dim, *tensor.shape[1:])
    parts = blocks[:, :-2], blocks[:, -2], blocks[:, -1]
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


_BLOCK = r"transformer\.h\.(\d+)\."
# Ours: the norm that attention reads, and the one that the MLP reads.
_FIRST, _SECOND = r"layers.\1.input_layernorm.", r"layers.\1.post_attention_layernorm."

TENSORS = (
    (r"transformer\.word_embeddings\.weight", "embed_tokens.embedding"),
    (r"transformer\.ln_f\.weight", "norm.scale"),
    (r"transformer\.ln_f\.bias", "norm.bias"),
    (_BLOCK + r"(?:input_layernorm|ln_attn)\.weight", _FIRST + "scale"),
    (_BLOCK + r"(?:input_layernorm|ln_attn)\.bias", _FIRST + "bias"),
    (_BLOCK + r"(?:post_attention_layernorm|ln_mlp)\.weight", _SECOND + "scale"),
    (_BLOCK + r"(?:post_attention_layernorm|ln_mlp)\.bias", _SECOND + "bias"),
    Split(
        pattern=_BLOCK + r"self_attention\.query_key_value\.(weight|bias)",
        names=QKV,
        split=_split_heads,
    ),
    (_BLOCK + r"self_attention\.dense\.(weight|bias)", r"layers.\1.self_attn.o_proj.\2"),
    (_BLOCK + r"mlp\.dense_h_to_4h\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    (_BLOCK + r"mlp\.dense_4h_to_h\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    (r"lm_head\.weight", "lm_head.weight"),
)
