"""Which class loads which model_type."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qjax.config import QuantConfig
from qjax.errors import CheckpointError, one_of
from qjax.models import (
    falcon,
    gemma2,
    gemma3_text,
    gpt2,
    gptj,
    llama,
    mistral,
    mixtral,
    mpt,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from qjax.models.decoder import Decoder, DecoderConfig
from qjax.models.tensors import Rename, Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face model_type.

    Attributes:
      from_hf: contents of a config.json -> config.
      from_dict: what config.to_dict() gave -> config.
      model: nnx.Module class, built as model(config, param_dtype=..., rngs=...).
      tensors: what each of Hugging Face's tensors is.
      computed: patterns of tensors that checkpoints may hold and models compute.
    """

    from_hf: Callable[[dict[str, Any]], Any]
    from_dict: Callable[[dict[str, Any]], Any] = DecoderConfig.from_dict
    model: Any = Decoder
    tensors: tuple[Rename | Split, ...]
    computed: tuple[str, ...] = ()


def _family(module: Any) -> Family:
    """Of a module with `from_hf` and TENSORS, and COMPUTED if there are such."""
    return Family(
        from_hf=module.from_hf, tensors=module.TENSORS, computed=getattr(module, "COMPUTED", ())
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(
        from_hf=llama.LlamaConfig.from_hf,
        from_dict=llama.LlamaConfig.from_dict,
        model=llama.Llama,
        tensors=llama.HF_NAMES,
    ),
    "falcon": _family(falcon),
    "gemma2": _family(gemma2),
    "gemma3_text": _family(gemma3_text),
    "gpt2": _family(gpt2),
    "gptj": _family(gptj),
    "mistral": _family(mistral),
    "mixtral": _family(mixtral),
    "mpt": _family(mpt),
    "opt": _family(opt),
    "phi3": _family(phi3),
    "qwen2": _family(qwen2),
    "qwen3": _family(qwen3),
    "qwen3_moe": _family(qwen3_moe),
}


def get_family(model_type: object) -> Family:
    """The Family of a model_type; raises CheckpointError, listing those there are."""
    return FAMILIES[one_of("model_type", model_type, FAMILIES, CheckpointError)]


def abstract_model(
    model_type: str, config: Any, dtype: jnp.dtype, recipe: QuantConfig | None = None
) -> tuple[nnx.GraphDef, Any]:
    """The model's graph definition and its state as ShapeDtypeStructs: no array is made.

    Args:
      recipe: of a quantized model. It says what its cache holds; weights are plain here.
    """
    family = get_family(model_type)

    def make() -> Any:
        model = family.model(config, param_dtype=dtype, rngs=nnx.Rngs(0))
        if recipe is not None and recipe.kv is not None:
            for layer in model.layers:
                layer.self_attn.quantize_cache(recipe.kv, recipe.kv_granularity == "per_head")
        return model

    return nnx.split(nnx.eval_shape(make))
