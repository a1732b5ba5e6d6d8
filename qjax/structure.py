"""What reads what inside a decoder layer, as data derived from its config.

Methods that move range between activations and weights (SmoothQuant, AWQ) divide an input by a
scale s, one number a feature, and multiply the columns of every weight that reads it by s. The
function stays the same if whatever gives the input is divided by s as well: the gain of a norm, or
the rows of a linear. Where that is not possible the product itself divides (InputSpec.pre_scale).
"""

import dataclasses

from qjax.nn.attention import AttentionConfig
from qjax.nn.layer import PARALLEL, POST, SHARED, LayerConfig
from qjax.nn.mlp import MLPConfig
from qjax.nn.moe import MoEConfig
from qjax.nn.norm import NormConfig

NORM = "norm"  # the gain of a norm, and its bias
ROWS = "rows"  # the rows of a linear, and its bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """Where the division by s goes.

    Attributes:
      kind: NORM or ROWS.
      module: its dotted name in the layer.
      repeats: each block of `width` rows of the linear reaches so many heads, one after the other,
        which must share their part of s (grouped-query attention).
      width: rows of such a block, the size of a head; 0: rows are features, one by one.
    """

    kind: str
    module: str
    repeats: int = 1
    width: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Linears of a layer that read one input, and so share its scales.

    Attributes:
      name: of the input, 'attention_input' for instance.
      readers: dotted names of all linears that read it. The first is the one to observe.
      fold: None: nothing can take the division.
      experts: the readers are stacks of experts (but for a router, which is the last): each sees
        rows of its own.
      own_scale: each expert may have a scale of its own, since its input is nobody else's.
    """

    name: str
    readers: tuple[str, ...]
    fold: Fold | None = None
    experts: bool = False
    own_scale: bool = False


def groups(layer: LayerConfig) -> tuple[Group, ...]:
    """The inputs of a layer's linears, in the order in which they are computed."""
    attention = Group(
        name="attention_input",
        readers=tuple(f"self_attn.{part}_proj" for part in "qkv"),
        fold=None if layer.arrangement == POST else _norm("input_layernorm", layer.norm),
    )
    mixed = Group(
        name="attention_output",
        readers=("self_attn.o_proj",),
        fold=_values(layer.attention),
    )
    mlp = _mlp_input(layer)
    if layer.arrangement == SHARED:
        # One norm, and one input: a scale of it is everybody's.
        if mlp.experts:  # which see rows of their own: the norm stays as it is
            attention, mlp = (dataclasses.replace(g, fold=None) for g in (attention, mlp))
            return attention, mlp, mixed, _mlp_output(layer.mlp)
        shared = dataclasses.replace(attention, readers=attention.readers + mlp.readers)
        return shared, mixed, _mlp_output(layer.mlp)
    if layer.arrangement == PARALLEL:
        return attention, mlp, mixed, _mlp_output(layer.mlp)
    return attention, mixed, mlp, _mlp_output(layer.mlp)


def _norm(name: str, norm: NormConfig) -> Fold | None:
    return Fold(kind=NORM, module=name) if norm.scale else None


def _values(attention: AttentionConfig) -> Fold | None:
    """Mixing is linear in the values, head by head; a bound on them is not."""
    if attention.clip_qkv is not None:
        return None
    return Fold(
        kind=ROWS,
        module="self_attn.v_proj",
        repeats=attention.heads // attention.kv_heads,
        width=attention.head_dim,
    )


def _mlp_input(layer: LayerConfig) -> Group:
    # POST reads the residual stream itself, which others read too.
    fold = None if layer.arrangement == POST else _norm("post_attention_layernorm", layer.norm)
    if isinstance(layer.mlp, MoEConfig):
        experts = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.router")
        return Group(name="mlp_input", readers=experts, fold=fold, experts=True)
    linears = ("mlp.gate_proj", "mlp.up_proj") if layer.mlp.gated else ("mlp.up_proj",)
    return Group(name="mlp_input", readers=linears, fold=fold)


def _mlp_output(mlp: MLPConfig | MoEConfig) -> Group:
    if isinstance(mlp, MoEConfig):
        return Group(
            name="mlp_output",
            readers=("mlp.experts.down_proj",),
            fold=Fold(kind=ROWS, module="mlp.experts.up_proj"),
            experts=True,
            own_scale=True,
        )
    # down(f(gate(x)) * up(x)) is linear in up; without a gate f itself has to be: relu(x / s) is
    # relu(x) / s, and no other activation does that.
    linear = mlp.gated or mlp.activation == "relu"
    return Group(
        name="mlp_output",
        readers=("mlp.down_proj",),
        fold=Fold(kind=ROWS, module="mlp.up_proj") if linear else None,
    )
