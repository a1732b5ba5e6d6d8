"""How far each quantized weight, or what it gives, is from the original."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.lm import LanguageModel
from qjax.qarray import QArray, dequantize
from qjax.tree import named_leaves


def layer_errors(params: Any, quantized: Any) -> dict[str, float]:
    """Relative error of each quantized weight: ||W - dequantize(Q)|| / ||W||, Frobenius.

    Args:
      params: the original tree.
      quantized: what `quantize` made of it.

    Returns:
      name -> error, for the leaves that are QArrays, in tree order.
    """
    original = dict(named_leaves(params))
    return {
        name: float(_relative_error(original[name], leaf))
        for name, leaf in named_leaves(quantized)
        if isinstance(leaf, QArray)
    }


def model_errors(original: LanguageModel, quantized: LanguageModel) -> dict[str, float]:
    """Relative error of each quantized weight of a model, or of what it gives.

    Where calibration collected second moments H the error is that of the outputs,
    sqrt(tr(dW H dW^T) / tr(W H W^T)): GPTQ changes weights more than rounding to nearest does, to
    change outputs less. A weight whose columns were scaled or turned cannot be compared with the
    original, and is left out if that error is not known.
    """
    errors = layer_errors(original.split()[1], quantized.split()[1])
    report = quantized.quantization_report
    if report is None or quantized.quantization is None:
        return errors
    if quantized.quantization.rotation is not None:
        errors = {}
    for row in report.weights:
        if row.error is not None:
            errors[row.name] = row.error**0.5
        elif row.scaled_by is not None:
            errors.pop(row.name, None)
    return errors


@jax.jit
def _relative_error(weight: jax.Array, q: QArray) -> jax.Array:
    weight = weight.astype(jnp.float32)
    norm = jnp.linalg.norm(weight)
    error = jnp.linalg.norm(weight - dequantize(q, "float32"))
    return jnp.where(norm > 0, error / norm, 0.0)
