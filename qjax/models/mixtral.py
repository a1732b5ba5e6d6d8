"""Mixtral (model_type 'mixtral'): Mistral with a mixture of experts; arXiv:2401.04088."""

from typing import Any

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import reading
from qjax.models.tensors import LLAMA_NAMES
from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import LayerConfig
from qjax.nn.moe import MoEConfig
from qjax.nn.norm import NormConfig


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "mixtral") as fields:
        fields.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
        heads = fields.heads()
        rope, rotary_dim = fields.rope(heads["head_dim"], theta=1e6)
        layer = LayerConfig(
            attention=AttentionConfig(
                **heads, rope=0, rotary_dim=rotary_dim, window=fields.window("sliding_window")
            ),
            mlp=MoEConfig(
                experts=fields.size("num_local_experts", 8),
                experts_per_token=fields.size("num_experts_per_tok", 2),
                features=fields.size("intermediate_size"),
                activation=fields.activation("hidden_act", "silu"),
            ),
            norm=NormConfig(eps=fields.epsilon("rms_norm_eps", 1e-5)),
        )
        return DecoderConfig(
            model_type="mixtral",
            **fields.sizes(),
            layers=(layer,) * fields.size("num_hidden_layers"),
            norm=layer.norm,
            ropes=(rope,),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


_MOE = r"model\.layers\.(\d+)\.block_sparse_moe\."
_EXPERT = r"layers.\1.mlp.experts."

TENSORS = (
    (_MOE + r"gate\.weight", r"layers.\1.mlp.router.weight"),
    (_MOE + r"experts\.(\d+)\.w1\.weight", _EXPERT + r"gate_proj.weight[\2]"),
    (_MOE + r"experts\.(\d+)\.w2\.weight", _EXPERT + r"down_proj.weight[\2]"),
    (_MOE + r"experts\.(\d+)\.w3\.weight", _EXPERT + r"up_proj.weight[\2]"),
    *LLAMA_NAMES,
)
