"""The operations models are written in, on arrays and QArrays. The only importer of qjax_kernels.

Dispatch is explicit and readable: on the type of the weight, its format, and what it does to its
input. Kernels that prepared decoders (`qjax.runtime`) call are imported by their names.
"""

import dataclasses

import jax
import jax.numpy as jnp
from qjax_kernels.attention import xla as xla_attention
from qjax_kernels.decode_attention.api import decode_attention as decode_attention
from qjax_kernels.gemm_swiglu.api import gemm_swiglu as gemm_swiglu
from qjax_kernels.gemm_swiglu.layout import interleave as interleave
from qjax_kernels.glu_quant.api import glu_quant as glu_quant
from qjax_kernels.matmul import matmul
from qjax_kernels.norm_quant.api import norm_quant as norm_quant
from qjax_kernels.prefill_attention.api import paged_prefill_attention as paged_prefill_attention
from qjax_kernels.prefill_attention.api import prefill_attention as prefill_attention
from qjax_kernels.quantize_rows.api import quantize_rows as quantize_rows
from qjax_kernels.rope_cache.api import rope_cache as rope_cache
from qjax_kernels.sampling import api as sampling
from qjax_kernels.scaled_gemm import api as scaled
from qjax_kernels.scaled_gemm.api import scaled_gemm as scaled_gemm
from qjax_kernels.weight_only_gemm import api as weight_only
from qjax_kernels.weight_only_gemm.api import prepared_gemm as prepared_gemm
from qjax_kernels.weight_only_gemm.layout import Prepared as Prepared
from qjax_kernels.weight_only_gemm.layout import prepare as prepare_weight  # noqa: F401

from qjax import numerics
from qjax.qarray import InputSpec, QArray, dequantize

Weight = jax.Array | QArray

# Kernel op -> its implementations, best first; `qjax info` shows them.
KERNELS: dict[str, tuple[str, ...]] = {
    "weight_only_gemm": tuple(weight_only.IMPLEMENTATIONS),
    "scaled_gemm": tuple(scaled.IMPLEMENTATIONS),
}


def linear(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y = x @ weight.T + bias.

    Args:
      x: [..., in], floating point.
      weight: [out, in], an array (cast to the dtype of x) or a QArray with its InputSpec.
      bias: [out] or None.
      out_dtype: of the result; None: the dtype of x.
      implementation: of the quantized product: a name of its kernel's table, or None.

    Returns:
      [..., out]. Sums are float32, or exact int32 for int8 x int8.
    """
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if weight.ndim != 2:
        raise ValueError(f"linear takes one [out, in] weight, not {weight.shape}; scan over stacks")
    if implementation not in (None, "xla") and not isinstance(weight, QArray):
        raise ValueError(f"plain arrays have the implementation 'xla', not {implementation!r}")
    if isinstance(weight, QArray):
        y = _quantized_linear(x, weight, out_dtype, implementation)
    else:
        y = matmul(x, weight.astype(x.dtype)).astype(out_dtype)
    return y if bias is None else y + bias.astype(y.dtype)


def _quantized_linear(
    x: jax.Array, weight: QArray, out_dtype: jnp.dtype, implementation: str | None
) -> jax.Array:
    spec = weight.input
    if spec is not None:
        x = _transform_input(x, spec)
    if spec is not None and spec.format is not None:
        x_values, x_scale = quantize_activations(x, spec)
        columns = weight.axis == -1
        return scaled.scaled_gemm(
            x_values,
            x_scale,
            weight.values if columns else weight.values.T,
            weight.scale if columns else weight.scale.T,
            out_dtype=out_dtype,
            implementation=implementation,
        )
    if weight.axis == -2:
        return _transposed_linear(x, weight, out_dtype, implementation)
    scale = weight.scale
    if weight.global_scale is not None:
        scale = scale.astype(jnp.float32) * weight.global_scale
    return weight_only.weight_only_gemm(
        x,
        weight.values,
        scale,
        weight.zero_point,
        out_dtype=out_dtype,
        implementation=implementation,
    )


def _transposed_linear(
    x: jax.Array, weight: QArray, out_dtype: jnp.dtype, implementation: str | None
) -> jax.Array:
    """Weight-only product with an [in, out] weight, as raw trees of other frameworks have them.

    Kernels want [out, in]. The weight is not transposed into that: XLA's GPU backend (jax 0.11.2)
    gives wrong numbers for a transposed int4 that is converted, while a product over the first
    axis is right.
    """
    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation {implementation!r} takes [out, in] weights, not [in, out]; quantize "
            "a converted model (qjax.nn.convert), or use implementation=None"
        )
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    dense = dequantize(weight, x.dtype.name)
    y = jax.lax.dot_general(
        x, dense, contract, precision=_precision(x.dtype), preferred_element_type=jnp.float32
    )
    return y.astype(out_dtype)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 products are float32 products: GPUs would take TF32, with 11 bits, by default."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _transform_input(x: jax.Array, spec: InputSpec) -> jax.Array:
    if spec.perm is not None:
        x = jnp.take(x, spec.perm, axis=-1)
    if spec.pre_scale is not None:
        x = x * spec.pre_scale.astype(x.dtype)
    return x


def quantize_activations(x: jax.Array, spec: InputSpec) -> tuple[jax.Array, jax.Array]:
    """Activations -> (values, scale) in the format of `spec`.

    Args:
      x: [..., in].

    Returns:
      values [..., in], and scale: float32 [] (per_tensor) or [..., 1] (per_token).
    """
    assert spec.format is not None
    fmt = numerics.get_format(spec.format)
    x = x.astype(jnp.float32)
    if spec.scale is not None:
        scale = spec.scale
    else:
        per_token = spec.granularity == "per_token"
        axis = -1 if per_token else None
        amax = jnp.max(jnp.abs(x), axis=axis, keepdims=per_token, initial=0.0)
        scale = numerics.scale_from_amax(amax, fmt)
    return numerics.round_to_format(numerics.divide(x, scale), fmt), scale


def embed(ids: jax.Array, table: Weight) -> jax.Array:
    """Rows of an embedding table: int32 [...] -> [..., features] in the table's (logical) dtype."""
    if not isinstance(table, QArray):
        return jnp.take(table, ids, axis=0)
    if table.block[0] != 1 or table.axis != -1:
        return jnp.take(dequantize(table), ids, axis=0)
    # Only the rows that are looked up are dequantized.
    flat = ids.reshape(-1)
    table = dataclasses.replace(table, input=None)
    rows = jax.tree.map(lambda x: x if x.ndim == 0 else jnp.take(x, flat, axis=0), table)
    return dequantize(rows).reshape(*ids.shape, table.shape[-1])


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32; arXiv:1910.07467 eq. 4.

    Args:
      x: [..., features].
      scale: [features].
      eps: added to the mean square.
    """
    x32 = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(_mean(jnp.square(x32)) + eps)
    return (x32 * rms).astype(x.dtype) * scale.astype(x.dtype)


def _mean(x: jax.Array) -> jax.Array:
    """Mean of the last axis, float32 [..., features] -> [..., 1].

    XLA's CPU reduces a row in an order that depends on the number of rows; in a product it does
    not, so there the sum is a product with ones.
    """

    def product(x: jax.Array) -> jax.Array:
        # 64 columns: smaller products take yet another path.
        ones = jnp.ones((64, x.shape[-1]), x.dtype)
        return matmul(x, ones)[..., :1] / x.shape[-1]

    def reduction(x: jax.Array) -> jax.Array:
        return jnp.mean(x, axis=-1, keepdims=True)

    return jax.lax.platform_dependent(x, cpu=product, default=reduction)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding, halves convention (Hugging Face Llama); arXiv:2104.09864.

    Args:
      x: [batch, tokens, heads, head_dim].
      cos, sin: float32 [batch, tokens, head_dim/2].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Causal grouped-query attention over cached or fresh keys; softmax in float32.

    Args:
      q: [batch, tokens, heads, head_dim].
      k, v: [batch, kv_heads, length, head_dim], index in `length` = position; heads is a
        multiple of kv_heads.
      positions: int32 [batch, tokens]; a query sees keys at positions up to its own.

    Returns:
      [batch, tokens, heads, head_dim].
    """
    return xla_attention.attention(q, k, v, positions)


def argmax(logits: jax.Array) -> jax.Array:
    """[rows, vocab] -> int32 [rows], the largest of each row and the first of equal ones."""
    return sampling.argmax(logits)


def sample(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """[rows, vocab] -> int32 [rows], drawn after top_k and top_p; see `qjax_kernels.sampling`."""
    return sampling.sample(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
