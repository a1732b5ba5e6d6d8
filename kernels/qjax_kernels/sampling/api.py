"""The next token of each row of logits."""

import jax
import jax.numpy as jnp

from qjax_kernels.dispatch import dispatch
from qjax_kernels.row_quant import FLOATS
from qjax_kernels.sampling import triton, xla

IMPLEMENTATIONS = {"triton": triton.sample, "xla": xla.sample}
ARGMAX_IMPLEMENTATIONS = {"triton": triton.argmax, "xla": xla.argmax}


def argmax(logits: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """The place of the largest logit of each row, the first of equal ones.

    Args:
      logits: [rows, vocab], bfloat16, float16 or float32, no NaN.
      implementation: a name of ARGMAX_IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      int32 [rows].

    Raises:
      ValueError: logits of another rank or dtype.
    """
    _check(logits)
    return dispatch("argmax", ARGMAX_IMPLEMENTATIONS, implementation, logits)


def sample(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """Draw a token of each row, by inverting the distribution function; rows may differ in how.

    w[i] = exp((x[i] - max x) / temperature)
    K = {i: fewer than top_k of the x[j] are larger}
    P = {i in K: sum of w[j] over j in K, x[j] > x[i], is less than top_p * sum of w over K}
    token = the least t with  sum of w[i] over i in P, i <= t  >  uniform * sum of w over P

    Logits equal to one that is kept are kept too. Where `uniform` lies within the rounding of
    float32 sums of a step, the neighbour may be drawn. arXiv:1904.09751 (top_p).

    Args:
      logits: [rows, vocab], bfloat16, float16 or float32, no NaN and no inf; -inf is never drawn.
      uniform: float32 [rows], random numbers in [0, 1).
      temperature: float32 [rows] or one for all; 0 takes the largest logit, the first of equals.
      top_k: int32 [rows] or one for all; 0, or vocab and more: all.
      top_p: float32 [rows] or one for all; 1: all.
      implementation: a name of IMPLEMENTATIONS; None: the first that takes the call.

    Returns:
      int32 [rows].

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    _check(logits)
    rows = logits.shape[:1]
    if uniform.shape != rows or uniform.dtype != jnp.float32:
        raise ValueError(f"uniform is {uniform.dtype}{uniform.shape}; it must be float32{rows}")
    settings = []
    for name, value, dtype in (
        ("temperature", temperature, jnp.float32),
        ("top_k", top_k, jnp.int32),
        ("top_p", top_p, jnp.float32),
    ):
        array = jnp.asarray(value, dtype)
        if array.shape not in ((), rows):
            raise ValueError(f"{name} is {array.shape}; it must be () or {rows}")
        settings.append(jnp.broadcast_to(array, rows))
    return dispatch("sample", IMPLEMENTATIONS, implementation, logits, uniform, *settings)


def _check(logits: jax.Array) -> None:
    if logits.ndim != 2 or logits.dtype not in FLOATS or not logits.shape[1]:
        raise ValueError(
            f"logits are {logits.dtype}{logits.shape}; they must be [rows, vocab], bfloat16, "
            "float16 or float32"
        )
