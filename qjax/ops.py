"""The operations models are written in, on arrays and QArrays. The only importer of qjax_kernels.

Dispatch is explicit and readable: on the type of the weight, its format, and what it does to its
input. Kernels that prepared decoders (`qjax.runtime`) call are imported by their names.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from qjax_kernels.decode_attention.api import decode_attention as decode_attention
from qjax_kernels.gemm_swiglu.api import gemm_swiglu as gemm_swiglu
from qjax_kernels.gemm_swiglu.layout import interleave as interleave
from qjax_kernels.glu_quant.api import glu_quant as glu_quant
from qjax_kernels.glu_quant.xla import ACTIVATIONS as GATES  # noqa: F401
from qjax_kernels.grouped_gemm import api as grouped
from qjax_kernels.grouped_gemm.api import grouped_gemm as grouped_gemm
from qjax_kernels.grouped_gemm.api import prepared_grouped_gemm as prepared_grouped_gemm
from qjax_kernels.grouped_gemm.layout import Prepared as PreparedExperts
from qjax_kernels.grouped_gemm.layout import prepare as pack_experts
from qjax_kernels.matmul import matmul
from qjax_kernels.norm_quant.api import norm_quant as norm_quant
from qjax_kernels.plain_gemm.api import plain_gemm as plain_gemm
from qjax_kernels.prefill_attention.api import paged_prefill_attention as paged_prefill_attention
from qjax_kernels.prefill_attention.api import prefill_attention as prefill_attention
from qjax_kernels.quantize_rows.api import quantize_rows as quantize_rows
from qjax_kernels.rope_cache.api import rope_cache as rope_cache
from qjax_kernels.sampling import api as sampling
from qjax_kernels.scaled_gemm import api as scaled
from qjax_kernels.scaled_gemm.api import scaled_gemm as scaled_gemm
from qjax_kernels.scaled_gemm.config import BLOCK
from qjax_kernels.weight_only_gemm import api as weight_only
from qjax_kernels.weight_only_gemm.api import Summed as Summed
from qjax_kernels.weight_only_gemm.api import prepared_gemm as prepared_gemm
from qjax_kernels.weight_only_gemm.api import residual_gemm as residual_gemm
from qjax_kernels.weight_only_gemm.api import w4a8_gemm as w4a8_gemm
from qjax_kernels.weight_only_gemm.layout import Prepared as Prepared

from qjax import attention as canonical_attention
from qjax.activations import dequantize_activations, transform
from qjax.activations import quantize_activations as quantize_activations
from qjax.qarray import InputSpec, QArray, dequantize, full_scale, is_cut, per_row

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
        x = transform(x, spec)
    if spec is not None and spec.format is not None:
        if not numbers_meet(weight):
            return _decoded_linear(x, weight, spec, out_dtype, implementation)
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
    if weight.axis == -2 or is_cut(weight):
        return _dense_linear(x, weight, out_dtype, implementation)
    return weight_only.weight_only_gemm(
        x,
        weight.values,
        weight.scale if weight.global_scale is None else full_scale(weight),
        weight.zero_point,
        out_dtype=out_dtype,
        implementation=implementation,
    )


def numbers_meet(weight: QArray) -> bool:
    """Whether a product multiplies numbers of the weight's format with those of its activations, as
    they are, and scales the sums: both are 8 bits of one format, with one scale for each row of the
    sum, or with those of DeepSeek's blocks (see `scaled_gemm`)."""
    spec = weight.input
    if spec is None or spec.format != weight.format or weight.values.dtype.itemsize != 1:
        return False
    if spec.granularity != "per_group":
        return spec.format in ("int8", "fp8_e4m3", "fp8_e5m2")
    blocks = weight.block == (BLOCK, BLOCK) and spec.group_size == BLOCK
    floats = spec.scale_dtype == "float32" and weight.scale.dtype == jnp.float32
    return blocks and floats and weight.axis == -1 and weight.shape[-1] % BLOCK == 0


def _decoded_linear(
    x: jax.Array,
    weight: QArray,
    spec: InputSpec,
    out_dtype: jnp.dtype,
    implementation: str | None,
) -> jax.Array:
    """Quantized activations with a weight that they cannot meet as they are.

    Of another format, or with more scales along the sum than tensor cores add up. The weight is
    dequantized block by block, and the product is one of float32 numbers: of the activations that
    are rounded to their format, so that nothing but sums is rounded again.
    """
    wide = jnp.dtype(jnp.float32)
    values, scale = quantize_activations(x, spec)
    weight = dataclasses.replace(weight, input=None)
    if spec.granularity == "per_group":
        x = dequantize_activations(values, scale, spec)
        return _quantized_linear(x, weight, wide, implementation).astype(out_dtype)
    y = _quantized_linear(values.astype(wide), weight, wide, implementation)
    return (y * scale).astype(out_dtype)


def prepare_weight(weight: QArray, operand: str) -> Prepared:
    """A weight [out, in] as the kernels read it, see `weight_only_gemm.layout.prepare`.

    int2 and int3 become int4 there, and 5 to 7 bits are int8 already.

    Raises:
      NotImplementedError: no kernel takes its format or its blocks.
    """
    values, scale, zero_point = weight.values, weight.scale, weight.zero_point
    if weight.block[0] > 1:
        if weight.shape[1] % weight.block[1]:
            raise NotImplementedError(f"blocks of {weight.block} that are cut at the edge")
        scale = per_row(scale, weight)
    if weight.format in ("int2", "int3"):
        values = values.astype(jnp.int8).astype(jnp.int4)
    if zero_point is not None:
        zero_point = zero_point.astype(jnp.int8)
    return weight_only.prepare(
        values, scale, zero_point, factor=weight.global_scale, operand=operand
    )


def prepare_experts(weight: QArray) -> PreparedExperts:
    """Weights [experts, out, in] in at most 4 bits as the kernels read them.

    Raises:
      NotImplementedError: no kernel takes their format or their blocks.
    """
    values, scale, zero_point = weight.values, full_scale(weight), weight.zero_point
    if is_cut(weight):
        raise NotImplementedError(f"blocks of {weight.block} that are cut at the edge")
    if weight.format in ("int2", "int3"):
        values = values.astype(jnp.int8).astype(jnp.int4)
    if zero_point is not None:
        zero_point = per_row(zero_point.astype(jnp.int8), weight)
    return pack_experts(values, per_row(scale, weight), zero_point)


def rounded(x: jax.Array, spec: InputSpec) -> jax.Array:
    """Activations as their format has them, in the type of x."""
    return dequantize_activations(*quantize_activations(x, spec), spec).astype(x.dtype)


def _dense_linear(
    x: jax.Array, weight: QArray, out_dtype: jnp.dtype, implementation: str | None
) -> jax.Array:
    """Weight-only product with a weight that is dequantized first: an [in, out] one, as raw trees
    of other frameworks have them, or one with smaller blocks at its edges.

    Kernels want [out, in]. The weight is not transposed into that: XLA's GPU backend (jax 0.11.2)
    gives wrong numbers for a transposed int4 that is converted, while a product over the first
    axis is right.
    """
    if implementation not in (None, "xla"):
        if weight.axis == -2:
            raise NotImplementedError(
                f"implementation {implementation!r} takes [out, in] weights, not [in, out]; "
                "quantize a converted model (qjax.nn.convert), or use implementation=None"
            )
        raise NotImplementedError(
            f"implementation {implementation!r} takes whole blocks, not {weight.shape} in blocks "
            f"of {weight.block}; use implementation=None"
        )
    dense = dequantize(weight, x.dtype.name)
    if weight.axis == -1:
        return matmul(x, dense).astype(out_dtype)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(
        x, dense, contract, precision=_precision(x.dtype), preferred_element_type=jnp.float32
    )
    return y.astype(out_dtype)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 products are float32 products: GPUs would take TF32, with 11 bits, by default."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


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


def layer_norm(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, eps: float
) -> jax.Array:
    """(x - mean) / deviation * scale + bias over the last axis, in float32; arXiv:1607.06450.

    Args:
      x: [..., features].
      scale, bias: [features]; None: ones, zeros.
      eps: added to the mean square of x - mean.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - _mean(x32)
    y = x32 * jax.lax.rsqrt(_mean(jnp.square(x32)) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def apply_rope(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False
) -> jax.Array:
    """Rotary position embedding; arXiv:2104.09864.

    Args:
      x: [batch, tokens, heads, head_dim].
      cos, sin: float32 [batch, tokens, r/2]; dims from r on are not rotated.
      interleaved: dims 2i and 2i + 1 are a pair (GPT-J), instead of i and i + r/2 (Llama).
    """
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    x32 = x[..., :rotary_dim].astype(jnp.float32)
    if interleaved:
        first, second = x32[..., ::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        rotated = jnp.stack(pair, axis=-1).reshape(x32.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    rotated = rotated.astype(x.dtype)
    if rotary_dim == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., rotary_dim:]], axis=-1)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    alibi_slopes: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention over cached or fresh keys; softmax in float32.

    With p the position of query i, and t that of a key:

        s[i, t] = cap(scale * sum_d q[i, h, d] k[t, d]) + alibi_slopes[h] * (t - p)
        y[i, h] = sum_t softmax(s[i])[t] v[t],  over t with p - window < t <= p
        cap(x) = soft_cap * tanh(x / soft_cap)

    Args:
      q: [batch, tokens, heads, head_dim].
      k, v: [batch, kv_heads, length, head_dim], index in `length` = position; heads is a
        multiple of kv_heads.
      positions: int32 [batch, tokens]; a query sees keys at positions up to its own.
      alibi_slopes: float32 [heads], arXiv:2108.12409; None: no bias.
      scale: None: head_dim ** -0.5.
      window: positions that a query sees, the last ones; None: all.
      soft_cap: None: no cap.

    Returns:
      [batch, tokens, heads, head_dim].
    """
    return canonical_attention.attention(
        q, k, v, positions, alibi_slopes, scale=scale, window=window, soft_cap=soft_cap
    )


def grouped_linear(
    x: jax.Array,
    weight: Weight,
    group_sizes: jax.Array,
    *,
    row_ids: jax.Array | None = None,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """y[m] = row_scale[m] * x[row_ids[m]] @ weight[expert of m].T, rows sorted by expert.

    Args:
      x: [tokens, in], floating point.
      weight: [experts, out, in], an array (cast to the dtype of x) or a QArray.
      group_sizes: int32 [experts], rows of each.
      row_ids: int32 [rows]; None: row m is token m.
      row_scale: float32 [rows]; None: ones.

    Returns:
      [rows, out] in the dtype of x. Sums are float32, or exact int32 for int8 x int8.
    """
    dtype = x.dtype
    options: dict[str, Any] = {"row_ids": row_ids, "row_scale": row_scale, "out_dtype": dtype}
    if not isinstance(weight, QArray):
        return grouped.grouped_gemm(x, weight.astype(dtype), group_sizes, **options)
    if weight.axis != -1:
        raise ValueError("grouped_linear takes [experts, out, in] weights, not [experts, in, out]")
    spec = weight.input
    if spec is not None:
        x = transform(x, spec)
    if spec is not None and spec.format is not None:
        values, scale = quantize_activations(x, spec)
        meet = spec.granularity != "per_group" and numbers_meet(weight)
        if meet and values.dtype in grouped.EIGHT_BITS:
            x, options["x_scale"] = values, jnp.broadcast_to(scale, (len(x), 1))
        else:
            # As in `_decoded_linear`: a product of float32 numbers.
            x = dequantize_activations(values, scale, spec)
    integers = weight.values.dtype in (jnp.int4, jnp.int8)
    groups = weight.scale.shape[-1] > 1 or weight.zero_point is not None
    floats = weight.values.dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
    if not is_cut(weight) and (integers or (floats and not groups)):
        options["scale"] = per_row(full_scale(weight), weight)
        if weight.zero_point is not None:
            options["zero_point"] = per_row(weight.zero_point, weight)
        return grouped.grouped_gemm(x, weight.values, group_sizes, **options)
    return grouped.grouped_gemm(x, dequantize(weight, x.dtype.name), group_sizes, **options)


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
