"""`prepare`: a language model whose weights lie as the kernels read them."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import ops
from qjax.config import QuantConfig
from qjax.errors import ConfigError, DataError, one_of
from qjax.lm import LanguageModel, load
from qjax.models.llama import Llama
from qjax.nn.attention import Attention
from qjax.nn.layer import DecoderLayer
from qjax.nn.linear import Linear
from qjax.qarray import is_qarray
from qjax.quantize import Stats
from qjax.runtime.decoder import Decoder
from qjax.runtime.fuse import differences, fuse, operand, refusal, repack, row_output, stack
from qjax.runtime.weights import APART, INTERLEAVED, STACKED, LayerWeights, Projection

# What a cache may hold, by the names of formats; None is the type of the activations.
CACHE_DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp8_e4m3": "float8_e4m3fn",
    "int8": "int8",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `prepare` did with each product of a model.

    Attributes:
      fused: products that took the place of several, 'layers.0.self_attn.qkv_proj'.
      apart: those that could have been fused, and why they were not.
      canonical: weights that no kernel takes repacked, and why; XLA dequantizes them at each
        product.
    """

    fused: tuple[str, ...]
    apart: dict[str, str]
    canonical: dict[str, str]

    def __str__(self) -> str:
        """One line for all layers that fared alike."""
        rows = [("fused", name, "") for name in self.fused]
        rows += [("not fused", name, reason) for name, reason in self.apart.items()]
        rows += [("left to XLA", name, reason) for name, reason in self.canonical.items()]
        counts: dict[tuple[str, str, str], int] = {}
        for what, name, reason in rows:
            key = what, re.sub(r"^layers\.\d+\.", "layers.*.", name), reason
            counts[key] = counts.get(key, 0) + 1
        lines = []
        for (what, name, reason), count in counts.items():
            times = f" ({count} layers)" if name.startswith("layers.") else ""
            lines.append(f"{what}: {name}{times}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)


class PreparedModel(LanguageModel):
    """What `prepare` returns: it generates and evaluates as the model it came from.

    Attributes:
      report: what became of the products.
    """

    canonical = False

    def __init__(self, model: nnx.Module, config: Any, *, report: Report, **known: Any) -> None:
        super().__init__(model, config, **known)
        self.report = report

    def __repr__(self) -> str:
        name = None if self.quantization is None else self.quantization.name
        return f"PreparedModel({self.model_type}, {name})\n{self.report}"

    def with_state(self, state: Any, quantization: QuantConfig | None) -> LanguageModel:
        raise DataError("a prepared model is not quantized or changed; do that before prepare")

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        raise DataError("a prepared model is not saved; save the model it was prepared from")


def prepare(
    lm: LanguageModel,
    device: jax.Device | None = None,
    *,
    donate: bool = False,
    kv_cache: str | None = None,
    kv_scales: Sequence[tuple[jax.Array, jax.Array]] | None = None,
) -> PreparedModel:
    """Lay out a model's weights for the kernels; layer by layer, once.

    The products with q, k and v become one, and those with gate and up, where that changes no
    number: formats, group sizes and input scales must be the same. Weight-only weights, and int4
    ones with fp8 activations, are repacked. Where a kernel takes a layer's shapes and types it
    runs, elsewhere its reference: the result generates the same text on any machine. Sums and norms
    are rounded less often than in the canonical model, so that in 16 bits logits differ in the last
    places.

    Args:
      lm: canonical weights, arrays or QArrays, or all of them abstract (`jax.ShapeDtypeStruct`),
        of which static input scales are taken to agree.
      device: where the weights go, one layer at a time; None: they stay where they are.
      donate: free each layer's weights once they are laid out: `lm` cannot be used afterwards.
      kv_cache: what the cache of keys and values holds, a key of CACHE_DTYPES; None: the type of
        the activations.
      kv_scales: (k_scale, v_scale) of each layer, float32 [] or [kv_heads], for a cache in 8 bits:
        what its numbers are multiplied by; None: 1, for fp8 only.

    Raises:
      DataError: not a model of a known architecture, or prepared already.
      ConfigError: kv_cache or kv_scales do not fit together or the model.
    """
    if not lm.canonical:
        raise DataError("the model is prepared already")
    if not isinstance(lm.model, Llama):
        raise DataError(f"prepare takes decoders of llama's layers, not {type(lm.model).__name__}")
    model, config = lm.model, lm.config
    scales = _cache_scales(kv_cache, kv_scales, config)
    work = _Work(model, device, donate)
    layers = [work.layer(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    head = None if model.lm_head is None else work.product("lm_head", (model.lm_head,))
    decoder = Decoder(
        config,
        embed_tokens=work.placed_module(model.embed_tokens),
        layers=layers,
        norm=work.placed_module(model.norm),
        head=head,
        cache_dtype=None if kv_cache is None else CACHE_DTYPES[kv_cache],
        cache_scales=scales if scales is None else work.placed(scales),
    )
    return PreparedModel(
        decoder,
        config,
        report=work.report(),
        model_type=lm.model_type,
        tokenizer=lm.tokenizer,
        quantization=lm.quantization,
    )


def load_prepared(
    path: str | os.PathLike[str],
    dtype: Any = None,
    *,
    quantization: QuantConfig | str | None = None,
    stats: Stats | None = None,
    device: jax.Device | None = None,
    kv_cache: str | None = None,
    kv_scales: Sequence[tuple[jax.Array, jax.Array]] | None = None,
    hf_overrides: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedModel:
    """`qjax.load`, then `prepare`, in little more memory than the result needs.

    Weights are quantized as they arrive, and each layer's are freed once they are laid out: at most
    one original weight is on the device, or one layer beside what it becomes.

    Args:
      path, dtype, quantization, stats, hf_overrides, progress: as in `qjax.load`.
      device: where the weights go; None: JAX's default.
      kv_cache, kv_scales: as in `prepare`.

    Raises:
      CheckpointError, ConfigError, DataError: as those two.
    """
    lm = load(
        path,
        dtype,
        quantization=quantization,
        stats=stats,
        device=device,
        hf_overrides=hf_overrides,
        progress=progress,
    )
    return prepare(lm, device, donate=True, kv_cache=kv_cache, kv_scales=kv_scales)


def _cache_scales(
    kv_cache: str | None, scales: Sequence[tuple[Any, Any]] | None, config: Any
) -> list[tuple[jax.Array, jax.Array]] | None:
    if kv_cache is not None:
        one_of("kv_cache", kv_cache, CACHE_DTYPES)
    if kv_cache not in ("fp8_e4m3", "int8"):
        if scales is not None:
            raise ConfigError(f"kv_scales are for a cache in 8 bits, not kv_cache={kv_cache!r}")
        return None
    layers = config.num_hidden_layers
    if scales is None:
        if kv_cache == "int8":
            raise ConfigError("kv_cache='int8' needs kv_scales: keys and values are not integers")
        return [(jnp.ones((), jnp.float32), jnp.ones((), jnp.float32)) for _ in range(layers)]
    if len(scales) != layers:
        raise ConfigError(f"kv_scales has {len(scales)} entries; the model has {layers} layers")
    arrays = [(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)) for k, v in scales]
    for pair in arrays:
        for scale in pair:
            if scale.shape not in ((), (config.num_key_value_heads,)):
                raise ConfigError(
                    f"a kv_scale is {scale.shape}; it must be () or "
                    f"({config.num_key_value_heads},), one for each KV head"
                )
    return arrays


class _Work:
    """Preparing one model: where to, and what happened."""

    def __init__(self, model: Llama, device: jax.Device | None, donate: bool) -> None:
        table = model.embed_tokens.embedding.get_value()
        self.dtype = jnp.dtype(table.dtype)  # of the activations
        self.device = device
        self.donate = donate
        self.fused: list[str] = []
        self.apart: dict[str, str] = {}
        self.canonical: dict[str, str] = {}

    def report(self) -> Report:
        return Report(fused=tuple(self.fused), apart=self.apart, canonical=self.canonical)

    def layer(self, name: str, layer: DecoderLayer) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        before = jax.tree.leaves(nnx.state(layer))
        qkv = self._qkv(f"{name}.self_attn", attention)
        o = self.product(f"{name}.self_attn.o_proj", (attention.o_proj,))
        down = self.product(f"{name}.mlp.down_proj", (mlp.down_proj,))
        gate_up, gated = self._gate_up(f"{name}.mlp", mlp.gate_proj, mlp.up_proj, down)
        result = LayerWeights(
            attention_norm=self.placed(layer.input_layernorm.scale.get_value()),
            qkv=qkv,
            o=o,
            mlp_norm=self.placed(layer.post_attention_layernorm.scale.get_value()),
            gate_up=gate_up,
            down=down,
            gated=gated,
        )
        if self.donate:
            kept = {id(leaf) for leaf in jax.tree.leaves(result)}
            for leaf in before:
                if isinstance(leaf, jax.Array) and id(leaf) not in kept:
                    leaf.delete()
        return result

    def _qkv(self, name: str, attention: Attention) -> tuple[Projection, ...]:
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        if reason := differences([_read(linear) for linear in linears]):
            self.apart[f"{name}.qkv_proj"] = reason
            return tuple(
                self.product(f"{name}.{part}_proj", (linear,))
                for part, linear in zip("qkv", linears, strict=True)
            )
        return (self.product(f"{name}.qkv_proj", linears),)

    def _gate_up(
        self, name: str, gate: Linear, up: Linear, down: Projection
    ) -> tuple[tuple[Projection, ...], str]:
        parts = [_read(linear) for linear in (gate, up)]
        reason = differences(parts)
        if reason is None and parts[0].weight.shape != parts[1].weight.shape:
            reason = "their shapes differ"
        if reason:
            self.apart[f"{name}.gate_up_proj"] = reason
            named = (("gate_proj", gate), ("up_proj", up))
            return tuple(self.product(f"{name}.{n}", (part,)) for n, part in named), APART
        gated = INTERLEAVED if _gate_in_product(parts[0], down) else STACKED
        product = self.product(f"{name}.gate_up_proj", (gate, up), gated == INTERLEAVED)
        return (product,), gated

    def product(
        self, name: str, linears: tuple[Linear, ...], interleaved: bool = False
    ) -> Projection:
        """The Projection of linears with one input."""
        parts = [self.placed(_read(linear)) for linear in linears]
        parts = [_cast(part, self.dtype) for part in parts]
        if len(parts) > 1:
            self.fused.append(name)
        reason = refusal(parts[0])
        if reason:
            self.canonical[name] = reason
        repacked = operand(parts[0].weight) is not None and not reason
        if len(parts) == 1 and not repacked:
            return parts[0]
        make = partial(_laid_out, interleaved=interleaved, repacked=repacked)
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
        """A copy of a module with its arrays on the device."""
        graphdef, state = nnx.split(module)
        return nnx.merge(graphdef, self.placed(state))


@partial(jax.jit, static_argnames=("interleaved", "repacked"))
def _laid_out(parts: list[Projection], *, interleaved: bool, repacked: bool) -> Projection:
    part = parts[0] if len(parts) == 1 else fuse(parts, ops.interleave if interleaved else stack)
    return repack(part) if repacked else part


def _read(linear: Linear) -> Projection:
    bias = None if linear.bias is None else linear.bias.get_value()
    return Projection(weight=linear.weight.get_value(), bias=bias)


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


def _gate_in_product(gate: Projection, down: Projection) -> bool:
    """Whether the product with gate and up can end with the gated unit, for `down` to read."""
    if gate.weight.shape[0] % 8:
        return False
    if operand(gate.weight) is not None:
        return refusal(gate) is None
    if gate.bias is not None:
        return False
    output = row_output([down])
    # A scale for each row is known only when all of the row is.
    return output is None or output[1] is not None
