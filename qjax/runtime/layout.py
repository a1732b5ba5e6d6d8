"""Canonical layers -> LayerWeights, one at a time: what is fused and repacked, and what is not."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import ops
from qjax.errors import DataError
from qjax.nn.attention import Attention
from qjax.nn.layer import SHARED, DecoderLayer
from qjax.nn.linear import Linear
from qjax.nn.mlp import MLP, MLPConfig
from qjax.nn.moe import MoE
from qjax.nn.norm import LayerNorm, RMSNorm
from qjax.qarray import is_qarray
from qjax.runtime import dense, experts
from qjax.runtime.dense import by_groups, row_output
from qjax.runtime.fuse import Join, differences, fuse, stack
from qjax.runtime.report import Report, between_kernels
from qjax.runtime.weights import (
    APART,
    INTERLEAVED,
    JOINED,
    PLAIN,
    STACKED,
    LayerWeights,
    Norm,
    Projection,
)


class Layout:
    """Laying out one model: where to, and what happened."""

    def __init__(self, dtype: jnp.dtype, device: jax.Device | None, donate: bool) -> None:
        self.dtype = dtype  # of the activations
        self.device = device
        self.donate = donate
        self.fused: list[str] = []
        self.apart: dict[str, str] = {}
        self.canonical: dict[str, str] = {}
        self.between: dict[str, str] = {}

    def report(self) -> Report:
        return Report(
            fused=tuple(self.fused),
            apart=self.apart,
            canonical=self.canonical,
            between=self.between,
        )

    def layer(self, name: str, layer: DecoderLayer) -> LayerWeights:
        attention = layer.self_attn
        heads = layer.config.attention.qk_norm
        if heads is not None and heads.kind != "rms":
            raise DataError(f"{name}: norms of heads of kind {heads.kind!r}; prepare takes 'rms'")
        before = jax.tree.leaves(nnx.state(layer))
        self.between |= {f"{name}.{k}": why for k, why in between_kernels(layer.config).items()}
        result = LayerWeights(
            config=layer.config,
            attention_norm=self.norm(layer.input_layernorm),
            q_norm=self.maybe_norm(attention.q_norm),
            k_norm=self.maybe_norm(attention.k_norm),
            o=self.product(f"{name}.self_attn.o_proj", (attention.o_proj,)),
            attention_output_norm=self.maybe_norm(layer.attention_output_norm),
            mlp_norm=self.maybe_norm(layer.post_attention_layernorm),
            mlp_output_norm=self.maybe_norm(layer.mlp_output_norm),
            **self._inputs(name, layer),
        )
        if self.donate:
            kept = {id(leaf) for leaf in jax.tree.leaves(result)}
            for leaf in before:
                if isinstance(leaf, jax.Array) and id(leaf) not in kept:
                    leaf.delete()
        return result

    def norm(self, module: RMSNorm | LayerNorm) -> Norm:
        if isinstance(module, RMSNorm):
            scale = self.placed(module.scale.get_value())
            return Norm(scale=scale, kind="rms", eps=module.eps, offset=float(module.plus_one))
        scale, bias = (
            None if param is None else self.placed(param.get_value())
            for param in (module.scale, module.bias)
        )
        return Norm(scale=scale, bias=bias, kind="layer", eps=module.eps)

    def maybe_norm(self, module: RMSNorm | LayerNorm | None) -> Norm | None:
        return None if module is None else self.norm(module)

    def _inputs(self, name: str, layer: DecoderLayer) -> dict[str, Any]:
        """qkv, gate_up, down, gated: the products with what the norms give, and the last one."""
        mlp = layer.mlp
        if isinstance(mlp, MoE):
            qkv = self._qkv(f"{name}.self_attn", layer.self_attn)
            return {"qkv": qkv, **self._mixture(f"{name}.mlp", mlp)}
        down = self.product(f"{name}.mlp.down_proj", (mlp.down_proj,))
        if layer.config.arrangement == SHARED:
            joined = self._joined(name, layer.self_attn, mlp)
            if joined is not None:
                return {"qkv": (joined,), "gate_up": (), "down": down, "gated": JOINED}
        qkv = self._qkv(f"{name}.self_attn", layer.self_attn)
        gate_up, gated = self._gate_up(f"{name}.mlp", mlp, down)
        return {"qkv": qkv, "gate_up": gate_up, "down": down, "gated": gated}

    def _joined(self, name: str, attention: Attention, mlp: MLP) -> Projection | None:
        """One product for all that reads the one norm of a layer."""
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, *_ups(mlp))
        reason = differences([_read(linear) for linear in linears])
        if mlp.config.gated and mlp.config.activation not in ops.GATES:
            reason = f"no kernel has a gate with {mlp.config.activation}"
        if reason:
            self.apart[f"{name}.qkv_up_proj"] = reason
            return None
        return self.product(f"{name}.qkv_up_proj", linears)

    def _qkv(self, name: str, attention: Attention) -> tuple[Projection, ...]:
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        if reason := differences([_read(linear) for linear in linears]):
            self.apart[f"{name}.qkv_proj"] = reason
            return tuple(
                self.product(f"{name}.{part}_proj", (linear,))
                for part, linear in zip("qkv", linears, strict=True)
            )
        return (self.product(f"{name}.qkv_proj", linears),)

    def _gate_up(self, name: str, mlp: MLP, down: Projection) -> tuple[tuple[Projection, ...], str]:
        linears = _ups(mlp)
        if not mlp.config.gated:
            return (self.product(f"{name}.up_proj", linears),), PLAIN
        parts = [_read(linear) for linear in linears]
        reason = differences(parts)
        if reason is None and parts[0].weight.shape != parts[1].weight.shape:
            reason = "their shapes differ"
        if reason:
            self.apart[f"{name}.gate_up_proj"] = reason
            named = zip(("gate_proj", "up_proj"), linears, strict=True)
            return tuple(self.product(f"{name}.{n}", (part,)) for n, part in named), APART
        inside = _gate_in_product(mlp.config, parts[0], down)
        join = ops.interleave if inside else stack
        product = self.product(f"{name}.gate_up_proj", linears, join)
        return (product,), INTERLEAVED if inside else STACKED

    def _mixture(self, name: str, mlp: MoE) -> dict[str, Any]:
        """router, gate_up, down, gated."""
        linears = (mlp.experts.gate_proj, mlp.experts.up_proj)
        if reason := differences([_read(linear) for linear in linears]):
            self.apart[f"{name}.experts.gate_up_proj"] = reason
            named = zip(("gate_proj", "up_proj"), linears, strict=True)
            gate_up = tuple(self.product(f"{name}.experts.{n}", (part,)) for n, part in named)
        else:
            gate_up = (self.product(f"{name}.experts.gate_up_proj", linears),)
        return {
            "router": self.product(f"{name}.router", (mlp.router,)),
            "gate_up": gate_up,
            "down": self.product(f"{name}.experts.down_proj", (mlp.experts.down_proj,)),
            "gated": APART if len(gate_up) > 1 else STACKED,
        }

    def product(self, name: str, linears: Sequence[Linear], join: Join = stack) -> Projection:
        """The Projection of linears with one input."""
        parts = [self.placed(_read(linear)) for linear in linears]
        parts = [_cast(part, self.dtype) for part in parts]
        if len(parts) > 1:
            self.fused.append(name)
        kind = experts if parts[0].weight.ndim == 3 else dense
        reason = kind.refusal(parts[0])
        if reason:
            self.canonical[name] = reason
        if rounding := by_groups(parts[0].weight):
            self.between[name] = rounding
        pack = kind.pack if kind.is_packed(parts[0].weight) and not reason else None
        if len(parts) == 1 and pack is None:
            return parts[0]
        make = partial(_laid_out, join=join, pack=pack)
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(parts))
        return jax.eval_shape(make, parts) if abstract else make(parts)

    def placed(self, tree: Any) -> Any:
        """The arrays of a tree on the device; those that are there stay the arrays they are."""

        def place(leaf: Any) -> Any:
            if self.device is None or not isinstance(leaf, jax.Array):
                return leaf
            there = leaf.devices() == {self.device}
            return leaf if there else jax.device_put(leaf, self.device)

        return jax.tree.map(place, tree)

    def placed_module(self, module: Any) -> Any:
        """A copy of a module with its arrays on the device; None of none."""
        if module is None:
            return None
        graphdef, state = nnx.split(module)
        return nnx.merge(graphdef, self.placed(state))


@partial(jax.jit, static_argnames=("join", "pack"))
def _laid_out(
    parts: list[Projection], *, join: Join, pack: Callable[[Projection], Projection] | None
) -> Projection:
    part = parts[0] if len(parts) == 1 else fuse(parts, join)
    return part if pack is None else pack(part)


def _read(linear: Linear) -> Projection:
    bias = None if linear.bias is None else linear.bias.get_value()
    return Projection(weight=linear.weight.get_value(), bias=bias)


def _ups(mlp: MLP) -> tuple[Linear, ...]:
    """The products in front of the activation."""
    return (mlp.gate_proj, mlp.up_proj) if mlp.config.gated else (mlp.up_proj,)


def _cast(part: Projection, dtype: jnp.dtype) -> Projection:
    """A plain weight in the type of the activations, which products cast it to."""
    weight = part.weight
    if is_qarray(weight) or weight.dtype == dtype:
        return part
    if isinstance(weight, jax.ShapeDtypeStruct):
        weight = jax.ShapeDtypeStruct(weight.shape, dtype)
    else:
        weight = weight.astype(dtype)
    return dataclasses.replace(part, weight=weight)


def _gate_in_product(cfg: MLPConfig, gate: Projection, down: Projection) -> bool:
    """Whether the product with gate and up can end with the gated unit, for `down` to read."""
    if cfg.activation not in ops.GATES or gate.weight.shape[0] % 8:
        return False
    if dense.is_packed(gate.weight):
        return dense.refusal(gate) is None
    if gate.bias is not None:
        return False
    output = row_output([down])
    # A scale for each row is known only when all of the row is.
    return output is None or output[1] is not None
