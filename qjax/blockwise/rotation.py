"""Hadamard rotations folded into the weights: R1 of the hidden features, R2 of each head's values.

QuaRot (arXiv:2404.00456), SpinQuant (arXiv:2405.16406). The function stays what it is: gains of
norms go into the weights behind them, for RMSNorm without a gain commutes with rotations, and then
each pair of neighbouring weights is turned and turned back. Outliers spread over all features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.algorithms.hadamard import (
    has_hadamard,
    random_rotation,
    rotate_input_heads,
    rotate_inputs,
    rotate_output_heads,
    rotate_outputs,
)
from qjax.blockwise.blocks import LayerSpec, Spec
from qjax.config import QuantConfig
from qjax.errors import ConfigError
from qjax.models.decoder import DecoderConfig
from qjax.nn.layer import PARALLEL, SERIAL, SHARED
from qjax.structure import NORM

Leaves = dict[str, Any]
SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """A model's rotation.

    Attributes:
      hidden: float32 [hidden_size, hidden_size], orthogonal: x becomes x @ hidden.
      head: the same of the values of each head.
    """

    hidden: jax.Array
    head: jax.Array

    def stem(self, leaves: Leaves) -> Leaves:
        """The embedding gives rotated features."""
        name = "embed_tokens.embedding"
        return leaves | {name: _like(rotate_inputs(_wide(leaves[name]), self.hidden), leaves[name])}

    def block(self, spec: Spec, leaves: Leaves) -> Leaves:
        """A layer, or the head, that reads and gives rotated features."""
        wide = {name: _wide(leaf) for name, leaf in leaves.items()}
        for group in spec.groups:
            if group.fold is not None and group.fold.kind == NORM:
                gain = f"{group.fold.module}.scale"
                full = wide[gain] + (1 if spec.plus_one else 0)
                for reader in group.readers:
                    name = f"{reader}.weight"
                    wide[name] = rotate_inputs(wide[name] * full, self.hidden)
                wide[gain] = jnp.zeros_like(full) if spec.plus_one else jnp.ones_like(full)
        if isinstance(spec, LayerSpec):
            for writer in ("self_attn.o_proj", "mlp.down_proj", "mlp.experts.down_proj"):
                if f"{writer}.weight" in wide:
                    wide |= _written(wide, writer, self.hidden)
            wide |= self._heads(wide)
        return {name: _like(leaf, leaves[name]) for name, leaf in wide.items()}

    def _heads(self, leaves: Leaves) -> Leaves:
        v, o = "self_attn.v_proj", "self_attn.o_proj.weight"
        new = {
            f"{v}.weight": rotate_output_heads(leaves[f"{v}.weight"], self.head),
            o: rotate_input_heads(leaves[o], self.head),
        }
        if f"{v}.bias" in leaves:
            new[f"{v}.bias"] = rotate_input_heads(leaves[f"{v}.bias"][None], self.head)[0]
        return new


def rotation(cfg: DecoderConfig) -> Rotation:
    """The rotation of a model.

    Raises:
      ConfigError: the model's function would change, or there is no Hadamard matrix of its sizes.
    """
    reason = refusal(cfg)
    if reason is not None:
        raise ConfigError(f"rotation 'hadamard' does not fit this {cfg.model_type}: {reason}")
    return Rotation(
        hidden=random_rotation(cfg.hidden_size, SEED), head=random_rotation(cfg.head_dim, SEED)
    )


def refusal(cfg: DecoderConfig) -> str | None:
    """Why the hidden features of a model cannot be rotated; None: they can."""
    if cfg.tie_word_embeddings:
        return "its output head is the embedding, and the last norm's gain cannot go into both"
    if cfg.embedding_size != cfg.hidden_size or cfg.learned_positions or cfg.norm is None:
        return "its embedding is projected or has learned positions, or it has no last norm"
    norms = {cfg.norm, *(layer.norm for layer in cfg.layers)}
    if any(norm.kind != "rms" for norm in norms):
        return "layer norms subtract the mean of the features, which is not that of rotated ones"
    if any(layer.arrangement not in (SERIAL, PARALLEL, SHARED) for layer in cfg.layers):
        return "norms of what attention and MLP give have a gain for each feature"
    if any(layer.attention.clip_qkv is not None for layer in cfg.layers):
        return "values are clipped, one by one"
    for size in (cfg.hidden_size, cfg.head_dim):
        if not has_hadamard(size):
            return f"no Hadamard matrix of size {size} is known here"
    return None


def plan(recipe: QuantConfig, cfg: DecoderConfig) -> Rotation | None:
    """The rotation that a recipe asks for; None: none."""
    return None if recipe.rotation is None else rotation(cfg)


def _written(leaves: Leaves, name: str, turn: jax.Array) -> Leaves:
    new = {f"{name}.weight": rotate_outputs(leaves[f"{name}.weight"], turn)}
    if f"{name}.bias" in leaves:
        new[f"{name}.bias"] = rotate_inputs(leaves[f"{name}.bias"][None], turn)[0]
    return new


def _wide(x: Any) -> jax.Array:
    return x.astype(jnp.float32)


def _like(x: jax.Array, original: Any) -> jax.Array:
    return x.astype(original.dtype)
