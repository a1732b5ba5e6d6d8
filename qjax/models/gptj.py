"""GPT-J (model_type 'gptj'): attention and MLP side by side, rotation of neighbouring dims.

https://github.com/kingoflolz/mesh-transformer-jax; one LayerNorm feeds both.
"""

from typing import Any

from qjax.errors import CheckpointError
from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.rope import RopeConfig
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import SHARED, LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "gptj") as fields:
        fields.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop", "rotary", "n_ctx")
        fields.ignore("scale_attn_weights")  # always, as in transformers
        fields.ignore(*(f"summary_{what}" for what in ("type", "use_proj", "activation")))
        fields.ignore("summary_proj_to_labels", "summary_first_dropout")
        hidden, heads = fields.size("n_embd"), fields.size("n_head")
        head_dim = hidden // heads
        rotary_dim = fields.size("rotary_dim", 64)
        if head_dim * heads != hidden:
            raise CheckpointError(f"n_head is {heads}; it must divide n_embd, {hidden}")
        norm = NormConfig(kind="layer", eps=fields.epsilon("layer_norm_epsilon", 1e-5), bias=True)
        layer = LayerConfig(
            attention=AttentionConfig(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                rope=0,
                rotary_dim=rotary_dim,
                interleaved=True,
            ),
            mlp=MLPConfig(
                features=fields.size("n_inner", 4 * hidden),
                activation=fields.activation("activation_function", "gelu_new"),
                gated=False,
                bias=True,
            ),
            norm=norm,
            arrangement=SHARED,
        )
        # A tied head could not have the bias that it has.
        fields.only("tie_word_embeddings", False)
        return DecoderConfig(
            model_type="gptj",
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            embedding_size=hidden,
            max_position_embeddings=fields.size("n_positions"),
            layers=(layer,) * fields.size("n_layer"),
            norm=norm,
            # transformers stores cos and sin beside the weights, not frequencies.
            ropes=(RopeConfig(table_dtype=fields.value("rope_dtype", "float32")),),
            lm_head_bias=True,
            eos_token_id=fields.end_tokens(),
        )


_BLOCK = r"transformer\.h\.(\d+)\."

TENSORS = (
    (r"transformer\.wte\.weight", "embed_tokens.embedding"),
    (r"transformer\.ln_f\.weight", "norm.scale"),
    (r"transformer\.ln_f\.bias", "norm.bias"),
    (_BLOCK + r"ln_1\.weight", r"layers.\1.input_layernorm.scale"),
    (_BLOCK + r"ln_1\.bias", r"layers.\1.input_layernorm.bias"),
    (_BLOCK + r"attn\.([qkv]_proj)\.weight", r"layers.\1.self_attn.\2.weight"),
    (_BLOCK + r"attn\.out_proj\.weight", r"layers.\1.self_attn.o_proj.weight"),
    (_BLOCK + r"mlp\.fc_in\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    (_BLOCK + r"mlp\.fc_out\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    (r"lm_head\.(weight|bias)", r"lm_head.\1"),
)
COMPUTED = (_BLOCK + r"attn\.(bias|masked_bias|embed_positions)",)
