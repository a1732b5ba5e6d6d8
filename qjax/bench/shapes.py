"""Sizes of known models."""

from typing import Any

from qjax.errors import one_of
from qjax.models.llama import LlamaConfig

# What a model's config.json says of its sizes (Hugging Face: meta-llama).
_SIZES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "llama3-70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
}
SHAPES = tuple(_SIZES)


def shape(name: str) -> LlamaConfig:
    """The sizes of a model of SHAPES. No token ends a sequence: all are as long as asked for.

    >>> shape("llama3-8b").head_dim
    128
    """
    return LlamaConfig.from_hf(_SIZES[one_of("shape", name, SHAPES)])
