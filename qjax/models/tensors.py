"""Which tensors of a Hugging Face checkpoint become which of our weights, as data."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from qjax.errors import CheckpointError

# (pattern, replacement) of re.fullmatch and re.sub: Hugging Face's name -> ours. A name of ours
# that ends with [n] is matrix n of those that are stacked in the weight of the name before it.
Rename = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A tensor that is not one of our weights as it is: it holds several, or one transposed.

    Attributes:
      pattern: of Hugging Face's name, for re.fullmatch.
      names: replacements, one for each weight in it.
      split: (tensor, the model's config) -> the weights, in the order of `names`.
    """

    pattern: str
    names: tuple[str, ...]
    split: Callable[[np.ndarray, Any], Iterable[np.ndarray]]


# Of Llama and those that took its names: norms and the embedding are called otherwise.
LLAMA_NAMES: tuple[Rename, ...] = (
    (r"model\.embed_tokens\.weight", "embed_tokens.embedding"),
    (r"model\.norm\.weight", "norm.scale"),
    (r"model\.layers\.(\d+)\.(\w*layernorm)\.weight", r"layers.\1.\2.scale"),
    (r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.(weight|bias)", r"layers.\1.\2.\3.\4"),
    (r"lm_head\.weight", "lm_head.weight"),
)
QK_NORM_NAMES: tuple[Rename, ...] = (
    (r"model\.layers\.(\d+)\.self_attn\.([qk]_norm)\.weight", r"layers.\1.self_attn.\2.scale"),
)
QKV = tuple(rf"layers.\1.self_attn.{part}_proj.\2" for part in "qkv")


def heads_in_blocks(tensor: np.ndarray, config: Any) -> list[np.ndarray]:
    """[all query heads, all key heads, all value heads] -> q, k, v; weights and biases alike."""
    q, kv = config.num_attention_heads, config.num_key_value_heads
    sizes = [n * config.head_dim for n in (q, kv, kv)]
    if len(tensor) != sum(sizes):
        raise ValueError(f"it has {len(tensor)} rows; {sum(sizes)} were expected")
    return np.split(tensor, np.cumsum(sizes)[:-1])


def new_names(name: str, rules: Iterable[Rename | Split]) -> tuple[str, ...]:
    """Our names of what is in Hugging Face's tensor `name`, as `renamed` gives them.

    Raises:
      CheckpointError: no rule matches.
    """
    for rule in rules:
        pattern = rule.pattern if isinstance(rule, Split) else rule[0]
        if re.fullmatch(pattern, name):
            ours = rule.names if isinstance(rule, Split) else (rule[1],)
            return tuple(re.sub(pattern, each, name) for each in ours)
    raise CheckpointError(f"tensor {name!r} belongs to no part of the model")


def renamed(name: str, tensor: Any, rules: Iterable[Rename | Split], config: Any) -> dict[str, Any]:
    """Our names -> our weights, of one tensor.

    Args:
      name: Hugging Face's.
      tensor: a numpy array.
      rules: the first that matches decides.
      config: of the model.

    Raises:
      CheckpointError: no rule matches, or the tensor cannot be split.
    """
    for rule in rules:
        pattern = rule.pattern if isinstance(rule, Split) else rule[0]
        if not re.fullmatch(pattern, name):
            continue
        if not isinstance(rule, Split):
            return {re.sub(pattern, rule[1], name): tensor}
        try:
            parts = list(rule.split(tensor, config))
        except ValueError as error:
            raise CheckpointError(
                f"tensor {name!r} of shape {tensor.shape} does not fit the model: {error}"
            ) from error
        names = [re.sub(pattern, ours, name) for ours in rule.names]
        return dict(zip(names, parts, strict=True))
    raise CheckpointError(f"tensor {name!r} belongs to no part of the model")
