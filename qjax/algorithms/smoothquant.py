"""SmoothQuant: the range of activations is moved into the weights, channel by channel.

Xiao et al., https://arxiv.org/abs/2211.10438, equation 4. y = (x / s) (W * s)^T for any s.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import numerics
from qjax.algorithms.scales import WeightSpec, fake_quantize
from qjax.algorithms.statistics import gram_loss
from qjax.errors import ConfigError, one_of
from qjax.qarray import ACT_GRANULARITIES


class SmoothSearch(NamedTuple):
    """What the grid gave.

    Attributes:
      scale: float32 [in], s of the best alpha: quantize W * s, feed x / s.
      alpha: float32 scalar; -1 if s = 1 was best.
      losses: float32 [points], see `smooth_search`.
      alphas: float32 [points]; the first is -1, which stands for s = 1.
    """

    scale: Any
    alpha: Any
    losses: Any
    alphas: Any


def smooth_scale(
    act_amax: jax.Array, weight_amax: jax.Array, alpha: Any, *, floor: float = 1e-5
) -> jax.Array:
    """s = act_amax^alpha / weight_amax^(1 - alpha), all three at least `floor`.

    Args:
      act_amax: float32 [in], largest magnitude of each input.
      weight_amax: float32 [in], largest magnitude of each column, over all weights that share the
        input.
      alpha: 0 (all of the range stays in the activations, but for weights' own) to 1 (activations
        all get range 1); a number or an array that broadcasts.

    Raises:
      ConfigError: a number outside 0..1.
    """
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; SmoothQuant needs 0 <= alpha <= 1")
    act, weight = jnp.maximum(act_amax, floor), jnp.maximum(weight_amax, floor)
    return jnp.maximum(act**alpha / weight ** (1 - alpha), floor)


def column_amax(weights: Sequence[jax.Array]) -> jax.Array:
    """float32 [in], largest magnitude of each column over weights [out, in] of one input."""
    each = [jnp.abs(weight.astype(jnp.float32)).max(axis=0) for weight in weights]
    return jnp.stack(each).max(axis=0)


@partial(jax.jit, static_argnames=("spec", "act_format", "act_granularity", "grid"))
def smooth_search(
    weights: Sequence[jax.Array],
    gram: jax.Array,
    tokens: jax.Array,
    act_amax: jax.Array,
    spec: WeightSpec,
    *,
    act_format: str,
    act_granularity: str,
    grid: int = 20,
) -> SmoothSearch:
    """The alpha with the least expected error of the layer's outputs, of 0, 1/grid ... 1.

    Both operands are rounded: with W' = round(W * s), x' = round(x / s) and n = x' - x / s,

        x' W'^T - x W^T = x dW^T + n W'^T,    dW = W' / s - W.

    Rounding errors n of different inputs are taken to be independent, of mean 0 and not correlated
    with x, so that the squared error, summed over tokens, is expected to be

        tr(dW H dW^T) + tokens * sum_j var(n_j) * sum_o W'_oj^2.

    var(n_j) is min(step^2 / 12, E[x_j^2] / s_j^2) for integers: an input far below the step is
    rounded to 0, and the error is the input. With one step for all tokens ('per_tensor'),
    step = max_j (act_amax_j / s_j) / largest number. 'per_token' steps differ; their mean square
    is estimated from second moments m_j = E[x_j^2] / s_j^2 as max(m) * (1 + 2 ln n) / largest^2,
    the expected square of the maximum of n = sum(m) / max(m) normal variables, but no more than
    per tensor. Floats round relative to each number: with p bits of mantissa the step at x is
    2^(floor(log2 x) - p), whose square over 12 is, for x that are spread evenly over the logarithms
    of an octave, 4^-p (2 ln 2) / 36 of their mean square. To this the step of the subnormals is
    added, as for integers. (That the largest number of a token is exact is left out.)

    Args:
      weights: floating point [out, in] each, all that read this input.
      gram: float32 [in, in], sum over `tokens` tokens of x x^T.
      tokens: float32 scalar.
      act_amax: float32 [in].
      act_format: format of the activations.
      act_granularity: 'per_tensor' or 'per_token'.

    Raises:
      ConfigError: grid below 1, unknown names.
    """
    if grid < 1:
        raise ConfigError(f"grid is {grid}; it must be 1 or more")
    one_of("act_granularity", act_granularity, ACT_GRANULARITIES)
    fmt = numerics.get_format(act_format)
    stacked = [weight.astype(jnp.float32) for weight in weights]
    moments = jnp.maximum(jnp.diagonal(gram), 0) / jnp.maximum(tokens, 1)
    alphas = jnp.asarray(np.concatenate([[-1], np.arange(grid + 1) / grid]), jnp.float32)
    smooth = smooth_scale(act_amax, column_amax(stacked), alphas[1:, None])
    scales = jnp.concatenate([jnp.ones_like(smooth[:1]), smooth])

    def loss(scale: jax.Array) -> jax.Array:
        noise = _noise(moments / scale**2, act_amax / scale, fmt, act_granularity)
        total = jnp.float32(0)
        for weight in stacked:
            rounded = fake_quantize(weight * scale, spec)
            total += gram_loss(rounded / scale - weight, gram).sum()
            total += tokens * jnp.sum(noise * jnp.sum(rounded**2, axis=0))
        return total

    losses = lax.map(loss, scales)
    best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    return SmoothSearch(scale=scales[best], alpha=alphas[best], losses=losses, alphas=alphas)


def _noise(
    moments: jax.Array, amax: jax.Array, fmt: numerics.Format, granularity: str
) -> jax.Array:
    """[in], the expected square of the rounding error of inputs with E[x^2] and max |x|."""
    square = jnp.max(amax) ** 2
    if granularity == "per_token":
        largest = jnp.maximum(jnp.max(moments), jnp.finfo(jnp.float32).tiny)
        count = jnp.maximum(jnp.sum(moments) / largest, 1)
        square = jnp.minimum(square, largest * (1 + 2 * jnp.log(count)))
    step, relative = 1.0, 0.0
    if not fmt.is_integer:
        info = jnp.finfo(fmt.dtype)
        step = float(info.smallest_subnormal)
        relative = 4.0 ** -int(info.nmant) * 2 * np.log(2) / 36
    uniform = square * (step / fmt.max) ** 2 / 12
    return jnp.minimum(uniform + relative * moments, moments)
