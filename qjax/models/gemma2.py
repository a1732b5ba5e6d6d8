"""Gemma 2 (model_type 'gemma2'): norms before and after each part, soft caps, windows in turns.

arXiv:2408.00118. Norms store their scale minus one; embeddings are scaled.
"""

from typing import Any

import jax.numpy as jnp

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import Fields, reading
from qjax.models.tensors import LLAMA_NAMES
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import SANDWICH, LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "gemma2") as fields:
        fields.ignore("cache_implementation", "sliding_window_size")
        heads = fields.heads(256)
        rope, rotary_dim = fields.rope(heads["head_dim"])
        count = fields.size("num_hidden_layers")
        window = fields.window("sliding_window", 4096)
        default = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
        short, long = (
            gemma_layer(fields, heads, rotary_dim, window=width, soft_cap=50.0)
            for width in (window, None)
        )
        return DecoderConfig(
            model_type="gemma2",
            **fields.sizes(),
            layers=tuple(short if s else long for s in fields.layer_windows(count, default)),
            norm=short.norm,
            ropes=(rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            embedding_scale=embedding_scale(fields),
            soft_cap=fields.maybe_number("final_logit_softcapping", 30.0),
        )


def gemma_layer(
    fields: Fields,
    heads: dict[str, Any],
    rotary_dim: int,
    *,
    window: int | None,
    soft_cap: float | None = None,
    qk_norm: bool = False,
    rope: int = 0,
) -> LayerConfig:
    """A layer of Gemma 2 or 3.

    Args:
      heads: of `Fields.heads`.
      soft_cap: where the config does not say.
      qk_norm: whether queries and keys are normalized.
      rope: which rotary embedding.
    """
    fields.only("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias", False)
    norm = NormConfig(eps=fields.epsilon("rms_norm_eps", 1e-6), plus_one=True)
    return LayerConfig(
        attention=AttentionConfig(
            **heads,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=norm if qk_norm else None,
            rope=rope,
            rotary_dim=rotary_dim,
            scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            window=window,
            soft_cap=fields.maybe_number("attn_logit_softcapping", soft_cap),
        ),
        mlp=MLPConfig(
            features=fields.size("intermediate_size"),
            activation=_activation(fields),
        ),
        norm=norm,
        arrangement=SANDWICH,
    )


def _activation(fields: Fields) -> str:
    # Configs of the first Gemmas say 'gelu' in hidden_act, and mean its tanh formula.
    fields.ignore("hidden_act")
    return fields.activation("hidden_activation", "gelu_pytorch_tanh")


def embedding_scale(fields: Fields) -> float:
    """The square root of hidden_size, which a model cast to bfloat16 as a whole has rounded."""
    root = fields.size("hidden_size") ** 0.5
    return float(jnp.asarray(root, fields.value("rope_dtype", "float32")))


# Hugging Face's name -> ours, by what a norm does: input_layernorm and post_attention_layernorm are
# read by attention and by the MLP, whatever the family.
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_output_norm",
}

TENSORS = (
    *(
        (rf"model\.layers\.(\d+)\.{theirs}\.weight", rf"layers.\1.{ours}.scale")
        for theirs, ours in _NORMS.items()
    ),
    *LLAMA_NAMES,
)
