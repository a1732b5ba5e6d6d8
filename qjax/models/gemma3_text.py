"""Gemma 3, text only (model_type 'gemma3_text'): Gemma 2 with norms of q and k in soft caps' place.

arXiv:2503.19786. Layers with a window have a rotary embedding of their own.
"""

from typing import Any

from qjax.models.decoder import DecoderConfig
from qjax.models.fields import Fields, reading
from qjax.models.gemma2 import TENSORS as GEMMA2_TENSORS
from qjax.models.gemma2 import embedding_scale, gemma_layer
from qjax.models.rope import RopeConfig
from qjax.models.tensors import QK_NORM_NAMES

_LOCAL, _GLOBAL = 0, 1  # rotary embeddings


def from_hf(config: dict[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; raises CheckpointError naming what is wrong."""
    with reading(config, "gemma3_text") as fields:
        fields.ignore("cache_implementation")
        fields.only("attn_logit_softcapping", None)
        heads = fields.heads(256)
        count = fields.size("num_hidden_layers")
        every = fields.size("sliding_window_pattern", 6)
        window = fields.window("sliding_window", 4096)
        default = [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)
        ]
        short, long = (
            gemma_layer(fields, heads, heads["head_dim"], window=width, qk_norm=True, rope=rope)
            for width, rope in ((window, _LOCAL), (None, _GLOBAL))
        )
        return DecoderConfig(
            model_type="gemma3_text",
            **fields.sizes(),
            layers=tuple(short if s else long for s in fields.layer_windows(count, default)),
            norm=short.norm,
            ropes=_ropes(fields),
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            embedding_scale=embedding_scale(fields),
            soft_cap=fields.maybe_number("final_logit_softcapping"),
        )


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """That of layers with a window, and that of those that see everything.

    rope_parameters has both (transformers 5), or rope_local_base_freq is the base of the first,
    and rope_theta and rope_scaling are of the second (before).
    """
    config = fields.data
    fields.ignore("rope_theta", "rope_scaling", "rope_dtype", "partial_rotary_factor")
    both = fields.value("rope_parameters", {})
    local = {"rope_theta": fields.number("rope_local_base_freq", 10000.0)}
    full = {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})}
    return (
        RopeConfig.from_hf(config, parameters=local | (both.get("sliding_attention") or {})),
        RopeConfig.from_hf(config, parameters=full | (both.get("full_attention") or {})),
    )


TENSORS = (*QK_NORM_NAMES, *GEMMA2_TENSORS)
