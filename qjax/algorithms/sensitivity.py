"""How much a layer suffers from a format, and which formats to give all layers under a budget."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qjax.algorithms.statistics import gram_loss
from qjax.errors import ConfigError, DataError
from qjax.qarray import QArray, dequantize


def output_error(
    weight: jax.Array,
    quantized: QArray,
    gram: jax.Array,
    output_importance: jax.Array | None = None,
) -> jax.Array:
    """The second-order score of a quantized layer: sum_o g_o (dW H dW^T)_oo.

    To second order a model's loss grows by 1/2 dy^T F dy with dy the change of a layer's output
    and F the Fisher information, which is taken to be diagonal: g_o = E[(dL/dy_o)^2]. Summed over
    tokens, and with the change of the weight independent of the gradient, that is the score
    (ModelOpt's auto_quantize sums (dL/dy_o dy_o)^2 itself). Without g it is the squared error of
    the outputs, comparable between formats of a layer but not between layers.

    Args:
      weight: floating point [..., out, in].
      quantized: the same weight quantized, in the same basis.
      gram: float32 [..., in, in], sum over tokens of x x^T.
      output_importance: g, float32 [..., out]; None: 1.

    Returns:
      float32 [...].
    """
    change = dequantize(quantized, "float32") - weight.astype(jnp.float32)
    rows = gram_loss(change, gram)
    return jnp.sum(rows if output_importance is None else rows * output_importance, axis=-1)


def choose_formats(costs: np.ndarray, bits: np.ndarray, budget: float) -> np.ndarray:
    """One format a layer: the least total cost with at most `budget` bits in all. Exact.

    A multiple-choice knapsack, solved as an integer linear program by HiGHS (scipy).

    Args:
      costs: [layers, formats], what a format costs a layer; infinity where it cannot be had.
      bits: [layers, formats], bits of the layer in that format, scales included.
      budget: bits of all layers together.

    Returns:
      int64 [layers], a column each.

    Raises:
      DataError: costs that are NaN or negative infinity, shapes that do not agree.
      ConfigError: the budget is too small for the smallest formats.

    >>> choose_formats(np.array([[5.0, 1.0], [9.0, 1.0]]), np.array([[4, 8], [4, 8]]), budget=12)
    array([0, 1])
    """
    costs, bits = np.asarray(costs, np.float64), np.asarray(bits, np.float64)
    if costs.ndim != 2 or costs.shape != bits.shape or not costs.size:
        raise DataError(f"costs {costs.shape} and bits {bits.shape} must be [layers, formats] both")
    if np.isnan(costs).any() or np.isneginf(costs).any() or not np.isfinite(bits).all():
        raise DataError("costs hold NaN or -infinity, or bits are not finite")
    possible = np.isfinite(costs)
    if not possible.any(axis=1).all():
        raise DataError(f"layer {int(np.flatnonzero(~possible.any(axis=1))[0])} has no format")
    least = np.where(possible, bits, np.inf).min(axis=1).sum()
    if least > budget:
        raise ConfigError(
            f"the budget of {budget:g} bits is below the {least:g} that the smallest formats take; "
            "allow more bits, or add a smaller format"
        )
    layers, formats = costs.shape
    # The solver's tolerances are absolute, 1e-6 of the cost: in a unit of a millionth of the most
    # that a layer can lose, layers that lose far less still count. What a layer loses in any case
    # does not.
    regret = np.where(possible, costs - costs.min(axis=1, keepdims=True), 0)
    unit = regret.max() * 1e-6 if regret.any() else 1.0
    result = milp(
        (regret / unit).ravel(),
        integrality=np.ones(costs.size),
        bounds=Bounds(0, possible.astype(np.float64).ravel()),
        constraints=[
            LinearConstraint(np.kron(np.eye(layers), np.ones(formats)), 1, 1),
            LinearConstraint((bits / bits.max()).ravel()[None], -np.inf, budget / bits.max()),
        ],
        options={"mip_rel_gap": 0},
    )
    if not result.success:
        raise DataError(f"the solver found no choice of formats: {result.message}")
    return np.asarray(result.x.reshape(layers, formats).argmax(axis=1), np.int64)
