"""Qwen 3 with mixtures of experts (model_type 'qwen3_moe'); arXiv:2505.09388."""

from typing import Any

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.tensors import LLAMA_NAMES, QK_NORM_NAMES
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.moe import MoEConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "qwen3_moe") as fields:
        fields.ignore("output_router_logits", "router_aux_loss_coef", "max_window_layers")
        heads = fields.heads()
        bias = fields.flag("attention_bias", False)
        window = fields.window("sliding_window", 4096)
        norm = NormConfig(eps=fields.epsilon("rms_norm_eps", 1e-6))
        rope, rotary_dim = fields.rope(heads["head_dim"])
        attention = AttentionConfig(
            **heads,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=norm,
            rope=0,
            rotary_dim=rotary_dim,
            window=window if fields.flag("use_sliding_window", False) else None,
        )
        activation = fields.activation("hidden_act", "silu")
        # transformers 5 writes the number of experts under another name than its models read.
        experts = fields.value("num_local_experts", 128)
        mixture = MoEConfig(
            experts=fields.size("num_experts", experts),
            experts_per_token=fields.size("num_experts_per_tok", 8),
            features=fields.size("moe_intermediate_size", 768),
            activation=activation,
            normalize=fields.flag("norm_topk_prob", False),
        )
        dense = MLPConfig(features=fields.size("intermediate_size", 6144), activation=activation)
        count = fields.size("num_hidden_layers")
        step = fields.size("decoder_sparse_step", 1)
        without = fields.value("mlp_only_layers", [])
        sparse = [i not in without and (i + 1) % step == 0 for i in range(count)]
        return DecoderConfig(
            model_type="qwen3_moe",
            **fields.sizes(),
            layers=tuple(
                LayerConfig(attention=attention, mlp=mixture if many else dense, norm=norm)
                for many in sparse
            ),
            norm=norm,
            ropes=(rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


TENSORS = (
    (r"model\.layers\.(\d+)\.mlp\.gate\.weight", r"layers.\1.mlp.router.weight"),
    (
        r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight",
        r"layers.\1.mlp.experts.\3.weight[\2]",
    ),
    *QK_NORM_NAMES,
    *LLAMA_NAMES,
)
