"""`prepare`: a language model whose weights lie as the kernels read them."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.config import QuantConfig
from qjax.errors import DataError
from qjax.lm import LanguageModel, load
from qjax.models.decoder import Decoder as CanonicalDecoder
from qjax.nn.linear import Linear
from qjax.quantize import Stats
from qjax.runtime.cache_scales import CACHE_DTYPES, cache_scales, calibrated
from qjax.runtime.decoder import Decoder
from qjax.runtime.layout import Layout
from qjax.runtime.report import Report
from qjax.runtime.weights import Projection


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
    number: formats, group sizes and input scales must be the same. Where attention and the MLP read
    the same norm, all of these become one. Weight-only weights, and int4 ones with fp8 activations,
    are repacked. Where a kernel takes a layer's shapes and types it
    runs, elsewhere its reference: the result generates the same text on any machine. Sums and norms
    are rounded less often than in the canonical model, so that in 16 bits logits differ in the last
    places.

    Args:
      lm: canonical weights, arrays or QArrays, or all of them abstract (`jax.ShapeDtypeStruct`),
        of which static input scales and global scales are taken to agree.
      device: where the weights go, one layer at a time; None: they stay where they are.
      donate: free each layer's weights once they are laid out: `lm` cannot be used afterwards.
      kv_cache: what the cache of keys and values holds, a key of CACHE_DTYPES; None: what the
        model was calibrated for (`preset(..., kv=...)`), or else the type of the activations.
      kv_scales: (k_scale, v_scale) of each layer, float32 [] or [kv_heads], for a cache in 8 bits:
        what its numbers are multiplied by; None: 1, for fp8 only.

    Raises:
      DataError: not a model of a known architecture, or prepared already.
      ConfigError: kv_cache or kv_scales do not fit together or the model.
    """
    if not lm.canonical:
        raise DataError("the model is prepared already")
    if not isinstance(lm.model, CanonicalDecoder):
        raise DataError(f"prepare takes qjax.models' decoders, not {type(lm.model).__name__}")
    model = lm.model
    if kv_cache is None and kv_scales is None:
        kv_cache, kv_scales = calibrated(model.layers)
    scales = cache_scales(kv_cache, kv_scales, model.decoder_config)
    dtype = jnp.dtype(model.embed_tokens.embedding.get_value().dtype)
    layout = Layout(dtype, device, donate)
    decoder = Decoder(
        lm.config,
        model.decoder_config,
        embed_tokens=layout.placed_module(model.embed_tokens),
        embed_positions=layout.placed_module(model.embed_positions),
        embed_in=_maybe(layout, "embed_in", model.embed_in),
        layers=[layout.layer(f"layers.{i}", layer) for i, layer in enumerate(model.layers)],
        norm=layout.maybe_norm(model.norm),
        embed_out=_maybe(layout, "embed_out", model.embed_out),
        head=_maybe(layout, "lm_head", model.lm_head),
        cache_dtype=None if kv_cache is None else CACHE_DTYPES[kv_cache],
        cache_scales=scales if scales is None else layout.placed(scales),
    )
    return PreparedModel(
        decoder,
        lm.config,
        report=layout.report(),
        model_type=lm.model_type,
        tokenizer=lm.tokenizer,
        quantization=lm.quantization,
    )


def _maybe(layout: Layout, name: str, linear: Linear | None) -> Projection | None:
    return None if linear is None else layout.product(name, (linear,))


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
