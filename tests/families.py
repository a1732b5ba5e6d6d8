"""A small model of each family: what its config.json says, and random weights."""

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.bench.random_model import random_model, recipe
from qjax.lm import LanguageModel
from qjax.models.registry import get_family

MOST = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
MOST |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = MOST | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 6}
OLD = {"vocab_size": 64, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}

CONFIGS = {
    "llama": MOST,
    "falcon": {k: v for k, v in MOST.items() if k not in ("intermediate_size",
        "num_key_value_heads")} | {"ffn_hidden_size": 128, "num_kv_heads": 2,
        "new_decoder_architecture": True},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"sliding_window_pattern": 2},
    "gpt2": OLD | {"n_inner": 128},
    "gptj": OLD | {"n_inner": 128, "rotary_dim": 16},
    "mistral": MOST | {"sliding_window": 6},
    "mixtral": MOST | {"num_local_experts": 4},
    "mpt": {"vocab_size": 64, "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "opt": {"vocab_size": 64, "hidden_size": 128, "ffn_dim": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128},
    "phi3": MOST,
    "qwen2": MOST,
    "qwen3": MOST | {"head_dim": 32},
    "qwen3_moe": MOST | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
        "moe_intermediate_size": 128, "mlp_only_layers": [1]},
}  # fmt: skip


def config_of(family: str, **changes):
    """The family's config, fields of its config.json changed."""
    return get_family(family).from_hf(CONFIGS[family] | changes)


def small_lm(family: str, cfg=None, *, layers: int = 1, dtype=jnp.float32):
    """A LanguageModel of random weights, quantized by the recipe `cfg`."""
    names = CONFIGS[family].keys() & {"num_hidden_layers", "n_layer", "n_layers"}
    return random_model(config_of(family, **dict.fromkeys(names, layers)), cfg, dtype=dtype)


def abstract_lm(config, preset: str, dtype=jnp.bfloat16) -> LanguageModel:
    """A random model of any size in a preset's format, without arrays."""
    cfg, graphdefs = recipe(preset), []

    def state():
        graphdef, state = random_model(config, cfg, dtype=dtype).split()
        graphdefs.append(graphdef)
        return state

    state = jax.eval_shape(state)
    model = nnx.merge(graphdefs[0], state)
    return LanguageModel(model, config, model_type=config.model_type, quantization=cfg)
