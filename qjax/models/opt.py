"""OPT (model_type 'opt'): learned positions, LayerNorm, ReLU; arXiv:2205.01068.

The 350M form normalizes after each part, and its embeddings are narrower than its layers.
"""

from typing import Any

from qjax.errors import CheckpointError
from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import POST, SERIAL, LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig

_OFFSET = 2  # rows of the table of positions that stand before position 0


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "opt") as fields:
        fields.ignore("dropout", "layerdrop", "activation_dropout")
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        if hidden % heads:
            raise CheckpointError(f"num_attention_heads is {heads}; it must divide {hidden}")
        bias = fields.flag("enable_bias", True)
        affine = fields.flag("layer_norm_elementwise_affine", True)
        before = fields.flag("do_layer_norm_before", True)
        without_last = fields.flag("_remove_final_layer_norm", False)
        norm = NormConfig(kind="layer", eps=1e-5, scale=affine, bias=affine)
        layer = LayerConfig(
            attention=AttentionConfig(
                heads=heads,
                kv_heads=heads,
                head_dim=hidden // heads,
                qkv_bias=bias,
                o_bias=bias,
            ),
            mlp=MLPConfig(
                features=fields.size("ffn_dim"),
                activation=fields.activation("activation_function", "relu"),
                gated=False,
                bias=bias,
            ),
            norm=norm,
            arrangement=SERIAL if before else POST,
        )
        positions = fields.size("max_position_embeddings", 2048)
        return DecoderConfig(
            model_type="opt",
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            embedding_size=fields.size("word_embed_proj_dim", hidden),
            max_position_embeddings=positions,
            learned_positions=positions + _OFFSET,
            position_offset=_OFFSET,
            layers=(layer,) * fields.size("num_hidden_layers"),
            norm=norm if before and not without_last else None,
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            eos_token_id=fields.end_tokens(),
        )


_MODEL = r"(?:model\.)?decoder\."
_LAYER = _MODEL + r"layers\.(\d+)\."

TENSORS = (
    (_MODEL + r"embed_tokens\.weight", "embed_tokens.embedding"),
    (_MODEL + r"embed_positions\.weight", "embed_positions.embedding"),
    (_MODEL + r"project_in\.weight", "embed_in.weight"),
    (_MODEL + r"project_out\.weight", "embed_out.weight"),
    (_MODEL + r"final_layer_norm\.weight", "norm.scale"),
    (_MODEL + r"final_layer_norm\.bias", "norm.bias"),
    (_LAYER + r"self_attn_layer_norm\.weight", r"layers.\1.input_layernorm.scale"),
    (_LAYER + r"self_attn_layer_norm\.bias", r"layers.\1.input_layernorm.bias"),
    (_LAYER + r"final_layer_norm\.weight", r"layers.\1.post_attention_layernorm.scale"),
    (_LAYER + r"final_layer_norm\.bias", r"layers.\1.post_attention_layernorm.bias"),
    (_LAYER + r"self_attn\.([qkv]_proj)\.(weight|bias)", r"layers.\1.self_attn.\2.\3"),
    (_LAYER + r"self_attn\.out_proj\.(weight|bias)", r"layers.\1.self_attn.o_proj.\2"),
    (_LAYER + r"fc1\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    (_LAYER + r"fc2\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    (r"lm_head\.weight", "lm_head.weight"),
)
