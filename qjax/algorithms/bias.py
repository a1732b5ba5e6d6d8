"""Bias correction: what rounding the weights does to the mean output is taken back.

Nagel et al., Data-Free Quantization, https://arxiv.org/abs/1906.04721, section 4.2, equation 17,
with the mean input measured.
"""

import jax
import jax.numpy as jnp

from qjax.algorithms.statistics import EXACT
from qjax.qarray import QArray, dequantize


def bias_correction(weight: jax.Array, quantized: QArray, mean: jax.Array) -> jax.Array:
    """What to add to the bias, so that the outputs' mean over the calibration data stays.

    Args:
      weight: floating point [..., out, in], the original.
      quantized: of the same shape; in the basis of `mean` (x / s after AWQ or SmoothQuant).
      mean: float32 [..., in], mean input.

    Returns:
      float32 [..., out], (W - W') mean.
    """
    change = weight.astype(jnp.float32) - dequantize(quantized, "float32")
    return jnp.matmul(change, mean[..., None], precision=EXACT)[..., 0]
