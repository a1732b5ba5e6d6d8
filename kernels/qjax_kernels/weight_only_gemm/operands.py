"""What a kernel is called with: arrays by name, those that a call has not left out."""

from typing import NamedTuple

import jax

from qjax_kernels.weight_only_gemm.layout import Prepared


class Added(NamedTuple):
    """What joins a product besides its factors. See `api`.

    Attributes:
      bias: [out].
      residual: [tokens, out].
      squares: float32 [parts, at least tokens], of the RMSNorm in front of the product.
      gain: [out], of the RMSNorm behind it.
    """

    bias: jax.Array | None = None
    residual: jax.Array | None = None
    squares: jax.Array | None = None
    gain: jax.Array | None = None


def operands(
    x: jax.Array, weight: Prepared, token_scale: jax.Array | None, added: Added
) -> dict[str, jax.Array]:
    """Arrays of a call, in the order of the kernel's arguments."""
    every = {
        "words": weight.words,
        "x": x,
        "scale": weight.scale,
        "zero": weight.zero_point,
        "factor": weight.factor,
        "token_scale": token_scale,
        "bias": added.bias,
        "residual": added.residual,
        "squares": added.squares,
        "gain": added.gain,
    }
    return {name: array for name, array in every.items() if array is not None}
