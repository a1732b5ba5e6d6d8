"""How the gate's and the up's weights lie in one array, so that both of an output meet."""

import jax
import jax.numpy as jnp

BLOCK = 8  # rows of one, then rows of the other


def interleave(gate: jax.Array, up: jax.Array) -> jax.Array:
    """[features, ...] twice -> [2 * features, ...]: 8 rows of gate, 8 rows of up, and so on.

    For the weights [features, in], and for what goes with their rows, as scales [features, 1].

    Raises:
      ValueError: they differ in shape or dtype, or features is no multiple of 8.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype}{gate.shape} and up {up.dtype}{up.shape} must be alike")
    features, *rest = gate.shape
    if features % BLOCK:
        raise ValueError(f"{features} features are no multiple of {BLOCK}")
    blocks = [array.reshape(-1, BLOCK, *rest) for array in (gate, up)]
    return jnp.stack(blocks, axis=1).reshape(2 * features, *rest)


def separate(both: jax.Array, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """The gate and the up of what `interleave` made, along any axis."""
    axis %= both.ndim
    before, after = both.shape[:axis], both.shape[axis + 1 :]
    blocks = both.reshape(*before, -1, 2, BLOCK, *after)
    gate, up = (
        jax.lax.index_in_dim(blocks, i, axis + 1, keepdims=False).reshape(*before, -1, *after)
        for i in range(2)
    )
    return gate, up
