"""A decoder layer, or the end of the stack, as a pure function of its leaves.

Leaves are a dict, dotted name in the block -> array or QArray. What is static is data and equal for
equal layers, so that a jitted function is compiled once for each different layer of a model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import structure
from qjax.checkpoint.orbax import fill
from qjax.models.decoder import Decoder, DecoderConfig
from qjax.models.rope import RopeConfig, rope_table
from qjax.nn.layer import DecoderLayer, LayerConfig
from qjax.nn.linear import Linear
from qjax.nn.norm import NormConfig, make_norm
from qjax.tree import named_leaves

Leaves = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A decoder layer.

    Attributes:
      layer: its LayerConfig.
      rope: of its attention, or None.
      hidden_size: features of its input.
      kv: what keys and values are rounded to, and whether each head has scales; None: nothing.
    """

    layer: LayerConfig
    rope: RopeConfig | None
    hidden_size: int
    kv: tuple[str, bool] | None = None

    @property
    def groups(self) -> tuple[structure.Group, ...]:
        return structure.groups(self.layer)

    @property
    def plus_one(self) -> bool:
        """Whether the gains of norms are 1 + what is stored."""
        return self.layer.norm.plus_one

    def make(self) -> nnx.Module:
        layer = DecoderLayer(
            self.hidden_size, self.layer, param_dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0)
        )
        if self.kv is not None:
            layer.self_attn.quantize_cache(*self.kv)
        return layer

    def args(self, x: jax.Array) -> tuple[Any, ...]:
        """What the module is called with: x [batch, tokens, hidden_size] from position 0 on."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        table = None
        if self.rope is not None:
            dims = self.layer.attention.rotary_dim
            table = rope_table(self.rope, dims, positions, x.shape[1])
        return x, table, positions, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The last norm, and the products behind it.

    Attributes:
      norm: NormConfig, or None.
      hidden_size, embedding_size, vocab_size: features of the input, of the head's input, outputs.
      lm_head: whether there is a head of its own; else it is the embedding's table.
      bias: whether it has a bias.
    """

    norm: NormConfig | None
    hidden_size: int
    embedding_size: int
    vocab_size: int
    lm_head: bool
    bias: bool

    @property
    def groups(self) -> tuple[structure.Group, ...]:
        narrow = self.embedding_size != self.hidden_size
        gain = self.norm is not None and self.norm.scale
        fold = structure.Fold(kind=structure.NORM, module="norm") if gain else None
        first = "embed_out" if narrow else "lm_head"
        found = [structure.Group(name="head_input", readers=(first,), fold=fold)]
        if narrow:
            found.append(structure.Group(name="logits_input", readers=("lm_head",)))
        return tuple(found if self.lm_head else found[: int(narrow)])

    @property
    def plus_one(self) -> bool:
        """Whether the gain of the norm is 1 + what is stored."""
        return self.norm is not None and self.norm.plus_one

    def make(self) -> nnx.Module:
        return _Head(self)

    def args(self, x: jax.Array) -> tuple[Any, ...]:
        return (x,)


class _Head(nnx.Module):
    def __init__(self, spec: HeadSpec) -> None:
        kind: dict[str, Any] = {"param_dtype": jnp.dtype(jnp.float32), "rngs": nnx.Rngs(0)}
        none = nnx.data(None)
        width = spec.embedding_size
        self.norm: Any = none
        if spec.norm is not None:
            self.norm = make_norm(spec.hidden_size, spec.norm, jnp.dtype(jnp.float32))
        narrow = width != spec.hidden_size
        self.embed_out: Any = Linear(spec.hidden_size, width, **kind) if narrow else none
        self.lm_head: Any = (
            Linear(width, spec.vocab_size, use_bias=spec.bias, **kind) if spec.lm_head else none
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        for part in (self.norm, self.embed_out, self.lm_head):
            x = x if part is None else part(x)
        return x, None


Spec = LayerSpec | HeadSpec


def specs(cfg: DecoderConfig) -> list[tuple[str, Spec]]:
    """(prefix of the block's leaves, or '' for the head; spec), in the order of computation."""
    found: list[tuple[str, Spec]] = []
    for index, layer in enumerate(cfg.layers):
        rope = None if layer.attention.rope is None else cfg.ropes[layer.attention.rope]
        spec = LayerSpec(layer=layer, rope=rope, hidden_size=cfg.hidden_size)
        found.append((f"layers.{index}.", spec))
    head = HeadSpec(
        norm=cfg.norm,
        hidden_size=cfg.hidden_size,
        embedding_size=cfg.embedding_size,
        vocab_size=cfg.vocab_size,
        lm_head=not cfg.tie_word_embeddings,
        bias=cfg.lm_head_bias,
    )
    return [*found, ("", head)]


def leaf_names(spec: Spec) -> tuple[str, ...]:
    """Names of a block's leaves."""
    abstract = nnx.eval_shape(lambda: nnx.state(spec.make()))
    return tuple(name for name, _ in named_leaves(abstract))


def module_of(spec: Spec, leaves: Leaves) -> Any:
    """The block as a module with `leaves`; under jit, where making one costs nothing."""
    graphdef, abstract = nnx.split(nnx.eval_shape(spec.make))
    return nnx.merge(graphdef, fill(abstract, leaves, "the block"))


def submodule(module: Any, path: str) -> Any:
    """module.a.b of the path 'a.b'."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def embed(cfg: DecoderConfig, leaves: Leaves, ids: jax.Array) -> jax.Array:
    """What the first layer reads: int32 [batch, tokens] -> [batch, tokens, hidden_size].

    Args:
      leaves: those of `stem_names`.
    """
    bare = _bare(cfg)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: _decoder(bare)))
    full = dict(named_leaves(abstract))
    # What the embedding does not read is never looked at.
    unused = {n: jnp.zeros(leaf.shape, leaf.dtype) for n, leaf in full.items() if n not in leaves}
    model = nnx.merge(graphdef, fill(abstract, dict(leaves) | unused, "the embedding"))
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model.embed(ids, positions)


def stem_names(cfg: DecoderConfig) -> tuple[str, ...]:
    """Names of the leaves in front of the first layer."""
    abstract = nnx.eval_shape(lambda: nnx.state(_decoder(_bare(cfg))))
    stems = ("embed_tokens", "embed_positions", "embed_in")
    names = (name for name, _ in named_leaves(abstract))
    return tuple(name for name in names if name.partition(".")[0] in stems)


def _bare(cfg: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(cfg, layers=())


def _decoder(cfg: DecoderConfig) -> Decoder:
    return Decoder(cfg, rngs=nnx.Rngs(0))
