"""What a kernel is called with: arrays by name, those that a call has not left out."""

import jax

from qjax_kernels.weight_only_gemm.layout import Prepared


def operands(
    x: jax.Array,
    weight: Prepared,
    token_scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> dict[str, jax.Array]:
    """Arrays of a call, in the order of the kernel's arguments."""
    every = {
        "words": weight.words,
        "x": x,
        "scale": weight.scale,
        "zero": weight.zero_point,
        "factor": weight.factor,
        "token_scale": token_scale,
        "bias": bias,
        "residual": residual,
    }
    return {name: array for name, array in every.items() if array is not None}
