"""Hadamard rotations: an orthogonal change of basis that spreads outliers over all features.

QuaRot, https://arxiv.org/abs/2404.00456, section 4; SpinQuant, https://arxiv.org/abs/2405.16406,
figure 1: R1 rotates the hidden features, R2 the features of each value head. Both fold into the
weights on either side, and the model stays the same function.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.algorithms.statistics import EXACT
from qjax.errors import ConfigError


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` can be built."""
    return _core(n) is not None


def hadamard(n: int) -> np.ndarray:
    """int8 [n, n] of +1 and -1 with H H^T = n I.

    Sylvester's doubling of a matrix of order 1, or of Paley's first (q + 1, q = 3 mod 4 a prime) or
    second construction (2 (q + 1), q = 1 mod 4 a prime): orders 12, 20, 28, 36, 44, 60, ... times
    powers of 2. That is every hidden size in use but multiples of 172 and a few more.

    Raises:
      ConfigError: no such construction gives order n.

    >>> hadamard(4).tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    core = _core(n)
    if core is None:
        raise ConfigError(
            f"no Hadamard matrix of order {n} is known here: orders are powers of 2 times q + 1 or "
            "2 (q + 1), q a prime; leave these features without rotation"
        )
    matrix = core
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def random_rotation(n: int, seed: int) -> jax.Array:
    """float32 [n, n], orthogonal: H diag(signs) / sqrt(n) with random signs (QuaRot, section 3).

    Raises:
      ConfigError: see `hadamard`.
    """
    signs = jax.random.rademacher(jax.random.key(seed), (n,), jnp.float32)
    return jnp.asarray(hadamard(n), jnp.float32) * signs / np.float32(np.sqrt(n))


def rotate_inputs(weight: jax.Array, rotation: jax.Array) -> jax.Array:
    """The weight that gives for x Q what `weight` gives for x: W Q.

    Args:
      weight: floating point [..., out, in].
      rotation: Q, float32 [in, in], orthogonal.

    Returns:
      of the shape and dtype of weight; products are float32.
    """
    return _times(weight, rotation).astype(weight.dtype)


def rotate_outputs(weight: jax.Array, rotation: jax.Array) -> jax.Array:
    """The weight whose outputs are y Q where those of `weight` are y: Q^T W.

    Args:
      weight: floating point [..., out, in].
      rotation: Q, float32 [out, out], orthogonal.
    """
    return jnp.swapaxes(rotate_inputs(jnp.swapaxes(weight, -1, -2), rotation), -1, -2)


def rotate_input_heads(weight: jax.Array, rotation: jax.Array) -> jax.Array:
    """`rotate_inputs` for the features of each head: in = heads * head_dim.

    Args:
      weight: floating point [..., out, in].
      rotation: Q, float32 [head_dim, head_dim], orthogonal.
    """
    heads = weight.reshape(*weight.shape[:-1], -1, len(rotation))
    return _times(heads, rotation).reshape(weight.shape).astype(weight.dtype)


def rotate_output_heads(weight: jax.Array, rotation: jax.Array) -> jax.Array:
    """`rotate_outputs` for the features of each head: out = heads * head_dim."""
    return jnp.swapaxes(rotate_input_heads(jnp.swapaxes(weight, -1, -2), rotation), -1, -2)


def _times(x: jax.Array, rotation: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.float32), rotation, precision=EXACT)


def _core(n: int) -> np.ndarray | None:
    """The smallest matrix that there is whose order is n divided by a power of 2."""
    order = n & -n and n // (n & -n)  # the odd part; 0 for 0
    while 0 < order <= n:
        if order == 1:
            return np.ones((1, 1), np.int8)
        if order % 4 == 0 and _is_prime(order - 1):
            return _paley_first(order - 1)
        if order % 4 == 0 and (order // 2) % 4 == 2 and _is_prime(order // 2 - 1):
            return _paley_second(order // 2 - 1)
        order *= 2
    return None


def _paley_first(q: int) -> np.ndarray:
    """Order q + 1: I + S, S = [[0, 1], [-1, Q]] skew-symmetric for q = 3 mod 4."""
    s = np.zeros((q + 1, q + 1), np.int8)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
    return s + np.eye(q + 1, dtype=np.int8)


def _paley_second(q: int) -> np.ndarray:
    """Order 2 (q + 1): each number of C = [[0, 1], [1, Q]], symmetric for q = 1 mod 4, becomes a
    2 x 2 block."""
    c = np.zeros((q + 1, q + 1), np.int8)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(q)
    off = np.array([[1, 1], [1, -1]], np.int8)
    on = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(c, off) + np.kron(np.eye(q + 1, dtype=np.int8), on)


def _jacobsthal(q: int) -> np.ndarray:
    """int8 [q, q]: 1 where i - j is a square modulo the prime q, -1 where it is not, 0 for 0."""
    symbol = np.full(q, -1, np.int8)
    symbol[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    symbol[0] = 0
    at = np.arange(q)
    return symbol[(at[:, None] - at[None, :]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
