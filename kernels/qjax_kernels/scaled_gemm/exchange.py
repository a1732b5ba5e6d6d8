"""Sums over the blocks of a cluster that share K, through each other's shared memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from qjax_kernels.scaled_gemm.tiling import Tiling

_THREADS = 128


def publish(t: Tiling, partial: Any, sums: jax.Array) -> None:
    """Write a warpgroup's sums [64, columns] where the blocks that finish them can read them.

    Each thread writes its registers one after the other, threads side by side: the reader has the
    same layout, so the order does not matter and there are no bank conflicts. What is written to a
    block's own shared memory has no second copy anywhere: no fence of a wider scope is needed.
    """
    if t.interpret:
        owned = t.config.owned
        for owner in range(t.owners):
            partial[owner] = sums[:, owner * owned : (owner + 1) * owned]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(context: Any, ref: Any, values: Any) -> None:
        base = utils.memref_ptr(ref)
        parts = np.split(values.registers.reshape(-1), t.owners)
        for owner, part in enumerate(parts):
            with utils.when(
                arith.xori(_is_block(owner), utils.c(1, ir.IntegerType.get_signless(1)))
            ):
                for i, register in enumerate(part):
                    llvm.store(register, _address(base, owner * len(part) + i, _type(t)))
        utils.warpgroup_barrier()  # one thread of the warpgroup will tell the other blocks

    store(partial, sums)


def collect(t: Tiling, partial: Any, sums: jax.Array) -> jax.Array:
    """The sum [64, owned] of this block's own piece and what the others published for it."""
    shape = (64, t.config.owned)
    if t.interpret:
        block = lax.axis_index("split")
        parts = [
            plgpu.cluster_ref(partial.at[block], {"split": _ahead(t, block, ahead)})[...]
            for ahead in range(t.config.splits)
        ]
        return sum(parts[1:], parts[0])

    result = plgpu.ShapeDtypeStruct(shape, t.accumulator, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA), return_type=result)
    def load(context: Any, ref: Any, values: Any) -> Any:
        layout = plgpu.Layout.WGMMA.to_mgpu()
        parts = np.split(values.registers.reshape(-1), t.owners)
        total = parts[0]
        for owner, part in enumerate(parts[1:], 1):
            total = [
                arith.select(_is_block(owner), *pair) for pair in zip(part, total, strict=True)
            ]
        pair = ir.VectorType.get((2,), _type(t))
        add = arith.addi if t.accumulator == jnp.int32 else arith.addf
        for ahead in range(1, t.config.splits):
            remote = _in_block_ahead(t, utils.memref_ptr(ref), ahead)
            found = [llvm.load(pair, _address(remote, i, _type(t))) for i in range(len(total))]
            total = [add(*pair) for pair in zip(total, found, strict=True)]
        registers = np.array([*total, None], dtype=object)[:-1]
        return fragmented_array.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape(shape)),
            _layout=layout,
            _is_signed=True if t.accumulator == jnp.int32 else None,
        )

    return load(partial.at[lax.axis_index("split")], sums)


def split_of_k(t: Tiling) -> tuple[Any, Any]:
    """First and last + 1 of the steps that this block sums."""
    splits = t.config.splits
    if splits == 1:
        return 0, t.steps
    block = lax.axis_index("split")
    begin, end = (lax.div(b * jnp.int32(t.steps), jnp.int32(splits)) for b in (block, block + 1))
    return begin, end


def _type(t: Tiling) -> ir.Type:
    return ir.IntegerType.get_signless(32) if t.accumulator == jnp.int32 else ir.F32Type.get()


def _address(base: ir.Value, register: int, element: ir.Type) -> ir.Value:
    """Of a thread's register of two elements."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
    offset = arith.addi(arith.muli(thread, utils.c(2, i32)), utils.c(2 * _THREADS * register, i32))
    return utils.getelementptr(base, [offset], element)


def _is_block(block: int) -> ir.Value:
    """Whether this is block number `block` of those that share K: axis x of the cluster."""
    index = ir.IndexType.get()
    here = gpu.cluster_block_id(gpu.Dimension.x)
    return arith.cmpi(arith.CmpIPredicate.eq, here, utils.c(block, index))


def _ahead(t: Tiling, block: jax.Array, ahead: int) -> jax.Array:
    return lax.rem(block + ahead, jnp.int32(t.config.splits))


def _in_block_ahead(t: Tiling, pointer: ir.Value, ahead: int) -> ir.Value:
    """The same place in the block that is so many further, round the blocks that share K."""
    index = ir.IndexType.get()
    indices: list[ir.Value] = [gpu.cluster_block_id(d) for d in gpu.Dimension]
    x = gpu.Dimension.x
    further = arith.addi(indices[x], utils.c(ahead, index))
    indices[x] = arith.remui(further, utils.c(t.config.splits, index))
    flat = arith.index_cast(ir.IntegerType.get_signless(32), utils.cluster_idx(dim_idx=indices))
    return utils.get_cluster_ptr(pointer, flat, generic=False)
