"""activation(gate) * up of sums whose weights are gates and ups, 8 and 8 in turn.

A thread of wgmma's layout has rows r and r + 8 of 16, and two columns of each 8: whether weights
are rows or columns, the gate and the up of an output are in one thread.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qjax_kernels.glu_quant.xla import ACTIVATIONS

# What is left of wgmma's rows: each warp has 8 of 32.
HALF = plgpu.Layout.TILED(
    fa.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_TANH = 2 * math.sqrt(2 / math.pi)
_CUBE = 0.044715 * _TANH
_LARGEST = 62.0  # exponent


def gated(y: jax.Array, activation: str, *, rows: bool, interpret: bool) -> jax.Array:
    """activation(gate) * up.

    Args:
      y: float32 [64, columns], in the layout of wgmma's sums.
      activation: 'silu', 'gelu' or 'gelu_tanh'.
      rows: the weights are the rows, else the columns.
      interpret: compute it with jax.numpy.

    Returns:
      [32, columns] in the layout HALF, or [64, columns / 2].
    """
    columns = y.shape[1]
    shape = (32, columns) if rows else (64, columns // 2)
    if interpret:
        pairs = y.reshape(4, 2, 8, columns) if rows else y.reshape(64, columns // 16, 2, 8)
        parts = (pairs[:, i] if rows else pairs[:, :, i] for i in range(2))
        gate, up = (part.reshape(shape) for part in parts)
        return ACTIVATIONS[activation](gate) * up

    layout = HALF if rows else plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout),
    )
    def combine(context: Any, values: Any) -> Any:
        registers = values.registers.reshape(-1, 2)  # columns by 8, rows r and r + 8
        halves = (registers[:, i] if rows else registers[i::2] for i in range(2))
        gate, up = (_array(half, layout.to_mgpu(), shape) for half in halves)
        return _FAST[activation](gate) * up

    return combine(y)


def _array(registers: np.ndarray, layout: Any, shape: tuple[int, int]) -> Any:
    return fa.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=None,
    )


def _times_sigmoid(gate: Any, z: Any) -> Any:
    """gate / (1 + exp(-z)): three instructions of the unit for special functions for two results.

    The exponential is held at 2^62, so that the product of two of the sums has a reciprocal; the
    result is off by 2^-62 gate at most.
    """
    power = (z * -math.log2(math.e))._pointwise(arith.minnumf, _LARGEST)
    return gate * (power.exp2(approx=True) + 1.0)._pointwise(_reciprocals)


def _reciprocals(pair: ir.Value) -> ir.Value:
    """Of the two numbers of a register, by one division: 1/a = b/(ab)."""
    a, b = (vector.extract(pair, dynamic_position=[], static_position=[i]) for i in range(2))
    f32 = ir.F32Type.get()
    product = arith.mulf(a, b)
    inverse = llvm.inline_asm(f32, [product], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
    numbers = [arith.mulf(inverse, b), arith.mulf(inverse, a)]
    return vector.from_elements(ir.VectorType.get((2,), f32), numbers)


_FAST: dict[str, Callable[[Any], Any]] = {
    "silu": lambda gate: _times_sigmoid(gate, gate),
    "gelu": lambda gate: gate * 0.5 * ((gate * math.sqrt(0.5)).erf() + 1.0),
    # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
    "gelu_tanh": lambda gate: _times_sigmoid(gate, gate * (gate * gate * _CUBE + _TANH)),
}
