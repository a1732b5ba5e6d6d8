"""MPT (model_type 'mpt'): ALiBi in the place of positions, LayerNorm without a bias.

https://www.databricks.com/blog/mpt-7b; https://www.databricks.com/blog/mpt-30b
"""

from typing import Any

import numpy as np

from qjax.errors import CheckpointError
from qjax.models.alibi import interleaved_slopes
from qjax.models.decoder import DecoderConfig
from qjax.models.fields import Fields, reading
from qjax.models.tensors import QKV, Split, heads_in_blocks
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "mpt") as fields:
        fields.ignore("resid_pdrop", "emb_pdrop", "embedding_fraction", "init_device", "verbose")
        fields.ignore("init_config", "tokenizer_name", "fc_type", "use_pad_tok_in_ffn")
        fields.ignore("learned_pos_emb")  # there are none where there is ALiBi
        fields.ignore("expansion_ratio")  # 4, whatever it says, in transformers
        fields.only("no_bias", True)
        fields.only("logit_scale", None)
        fields.only("norm_type", "low_precision_layernorm", "layernorm")
        hidden, heads = fields.size("d_model"), fields.size("n_heads")
        if hidden % heads:
            raise CheckpointError(f"n_heads is {heads}; it must divide d_model, {hidden}")
        norm = NormConfig(kind="layer", eps=fields.epsilon("layer_norm_epsilon", 1e-5))
        layer = LayerConfig(
            attention=_attention(fields.value("attn_config", {}), heads, hidden // heads),
            mlp=MLPConfig(features=4 * hidden, activation="gelu", gated=False),
            norm=norm,
        )
        return DecoderConfig(
            model_type="mpt",
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            embedding_size=hidden,
            max_position_embeddings=fields.size("max_seq_len", 2048),
            layers=(layer,) * fields.size("n_layers"),
            norm=norm,
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            eos_token_id=fields.end_tokens(),
        )


def _attention(config: dict[str, Any], heads: int, head_dim: int) -> AttentionConfig:
    """Of the attn_config in a config.json."""
    fields = Fields(config, "mpt")
    fields.ignore("attn_pdrop", "attn_impl", "kv_n_heads")
    fields.only("attn_type", "multihead_attention")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        fields.only(name, False)
    fields.only("alibi", True)
    fields.only("alibi_bias_max", 8)  # which transformers takes for 8, and the original does not
    attention = AttentionConfig(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        alibi_slopes=interleaved_slopes(heads),
        scale=fields.maybe_number("softmax_scale"),
        clip_qkv=fields.maybe_number("clip_qkv"),
    )
    fields.finish()
    return attention


def _split_heads(tensor: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    return heads_in_blocks(tensor, config)


_BLOCK = r"transformer\.blocks\.(\d+)\."

TENSORS = (
    (r"transformer\.wte\.weight", "embed_tokens.embedding"),
    (r"transformer\.norm_f\.weight", "norm.scale"),
    (_BLOCK + r"norm_1\.weight", r"layers.\1.input_layernorm.scale"),
    (_BLOCK + r"norm_2\.weight", r"layers.\1.post_attention_layernorm.scale"),
    Split(pattern=_BLOCK + r"attn\.Wqkv\.(weight)", names=QKV, split=_split_heads),
    (_BLOCK + r"attn\.out_proj\.weight", r"layers.\1.self_attn.o_proj.weight"),
    (_BLOCK + r"ffn\.(up_proj|down_proj)\.weight", r"layers.\1.mlp.\2.weight"),
    (r"lm_head\.weight", "lm_head.weight"),
)
