"""Which class loads which model_type."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qjax.errors import CheckpointError, one_of
from qjax.models import llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face model_type.

    Attributes:
      config: config class, with from_hf, to_dict and from_dict.
      model: nnx.Module class, built as model(config, param_dtype=..., rngs=...).
      hf_names: (pattern, replacement) pairs from Hugging Face's parameter names to ours.
    """

    config: Any
    model: Any
    hf_names: tuple[tuple[str, str], ...]


FAMILIES: dict[str, Family] = {
    "llama": Family(config=llama.LlamaConfig, model=llama.Llama, hf_names=llama.HF_NAMES),
}


def get_family(model_type: object) -> Family:
    """The Family of a model_type; raises CheckpointError, listing those there are."""
    return FAMILIES[one_of("model_type", model_type, FAMILIES, CheckpointError)]


def abstract_model(model_type: str, config: Any, dtype: jnp.dtype) -> tuple[nnx.GraphDef, Any]:
    """The model's graph definition and its state as ShapeDtypeStructs: no array is made."""
    family = get_family(model_type)
    return nnx.split(
        nnx.eval_shape(lambda: family.model(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
    )
