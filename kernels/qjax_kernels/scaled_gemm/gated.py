"""How the result of an activation, half a tile, is rounded and stored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qjax_kernels.gate import HALF
from qjax_kernels.row_quant import RANGES
from qjax_kernels.scaled_gemm.tiling import Tiling


def in_range(t: Tiling, y: jax.Array) -> jax.Array:
    """Numbers that `astype` makes the nearest ones of int8 or e4m3: on the GPU it saturates."""
    y = jnp.round(y) if t.out_dtype == jnp.int8 else y
    return jnp.clip(y, *RANGES[t.out_dtype]) if t.interpret else y


def store(t: Tiling, ref: Any, y: jax.Array) -> None:
    """Write what `qjax_kernels.gate.gated` made to a staging buffer."""
    if not t.config.swap:
        ref[...] = y
    elif t.swizzled or t.interpret:
        ref.T[...] = y
    else:
        _scatter(ref, y)


def _scatter(ref: Any, y: jax.Array) -> None:
    """Write [32, columns] to plain memory [columns, 32], one number at a time."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), HALF))
    def write(context: Any, ref: Any, values: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        bits = ir.IntegerType.get_signless(utils.bitwidth(values.mlir_dtype))
        thread = arith.remui(utils.thread_idx(), utils.c(128, i32))
        lane = arith.remui(thread, utils.c(32, i32))
        warp, row = (arith.divui(*pair) for pair in ((thread, utils.c(32, i32)), (lane, _c(4))))
        column = arith.muli(arith.remui(lane, _c(4)), _c(2))
        first = arith.addi(arith.muli(column, _c(32)), arith.addi(arith.muli(warp, _c(8)), row))
        base = utils.memref_ptr(ref)
        for j, register in enumerate(values.registers.flat):
            pair = utils.bitcast(register, ir.VectorType.get((2,), bits))
            for i in range(2):
                number = vector.extract(pair, dynamic_position=[], static_position=[i])
                offset = arith.addi(first, _c(32 * (8 * j + i)))
                llvm.store(number, utils.getelementptr(base, [offset], bits))

    write(ref, y)


def _c(number: int) -> ir.Value:
    return utils.c(number, ir.IntegerType.get_signless(32))
