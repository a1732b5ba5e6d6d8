"""A Llama small enough to build in a test: random weights, no tokenizer."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.lm import LanguageModel
from qjax.models.llama import Llama, LlamaConfig
from qjax.presets import PRESETS, preset

# Presets that need no more than round-to-nearest; test_blockwise_presets.py has the others.
PLAIN = tuple(name for name in PRESETS if not preset(name).needs_blocks)
# Those of which no other has the same kind of product: what takes long runs with these.
ALIKE = ("fp8_wo", "int4_wo_asym", "int2_wo", "mxfp4", "mxfp4_wo")
KINDS = tuple(name for name in PLAIN if name not in ALIKE)
# Of which each has a product of its own.
DISTINCT = ("fp8", "fp8_per_token", "fp8_block", "int8", "int8_wo", "int4_wo", "w4a8", "nvfp4")
OFTEN = (None, "fp8", "int8", "int4_wo", "nvfp4")


def some_heavy(presets: Iterable[str | None]) -> list[Any]:
    """Parameters of a test that takes seconds: all but those of OFTEN are marked heavy."""
    return [p if p in OFTEN else pytest.param(p, marks=pytest.mark.heavy) for p in presets]


def tiny_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "eos_token_id": (2,),
    }
    return LlamaConfig(**sizes | changes)


def tiny_lm(seed: int = 0, dtype=jnp.float32, **changes) -> LanguageModel:
    """Weights are large enough for the logits to be far from uniform."""
    cfg = tiny_config(**changes)
    model = Llama(cfg, param_dtype=dtype, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, state)
    return LanguageModel(nnx.merge(graphdef, state), cfg, model_type="llama")


def token_batches(count: int, batch: int = 2, seq: int = 32, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 256, (batch, seq)).astype(np.int32) for _ in range(count)]
