"""A block, or a cluster of blocks, for each sequence and KV head.

Its warpgroups take the steps of the sequence in turn and add up what they found, across the blocks
of a cluster too. One launch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.decode_attention import launch, threads
from qjax_kernels.decode_attention.attend import Attention
from qjax_kernels.decode_attention.config import Config
from qjax_kernels.decode_attention.exchange import Exchange
from qjax_kernels.decode_attention.problem import Buffers, Inputs, Problem, Ref, Run

IN_REGISTERS = 64 * 128  # floats that a warpgroup merges at a time


def blocks(inputs: Inputs, problem: Problem, config: Config) -> jax.Array:
    """[batch, heads, head_dim] of `inputs`, which are arrays."""
    operands, warpgroups = problem.operands, config.warpgroups
    members, pairs = config.cluster * warpgroups, problem.batch * problem.kv_heads
    exchange = Exchange(
        operands.head_dim, operands.columns, config.cluster, warpgroups, operands.neighbours
    )
    # The interpreter has no sending: there the results are fetched.
    sends = members > 1 and config.push and not operands.interpret

    def decode_attention_blocks(inputs: Inputs, out: Ref, scratch: dict[str, Ref]) -> None:
        if sends:
            exchange.open(scratch)
        pair = lax.axis_index("pair")
        sequence, head = pair // problem.kv_heads, pair % problem.kv_heads
        warpgroup = lax.axis_index("warpgroup") if warpgroups > 1 else pair * 0
        block = lax.axis_index("block") if config.cluster > 1 else pair * 0
        member = block * warpgroups + warpgroup
        attention = Attention(
            problem, inputs, launch.buffers(scratch), config.stages, warpgroup, early=True
        )
        length = attention.read(inputs.lengths, sequence)
        first, count = problem.steps(length)
        if members > 1:
            # In turn: where a warpgroup begins does not depend on the length then.
            count = jnp.maximum(count - member + (members - 1), 0) // members
        run = Run(sequence, head, length, first + member, count, stride=members)
        attention.start(run)
        key_scale, value_scale, out_scale = (
            attention.of_head(scale, head)
            for scale in (inputs.key_scale, inputs.value_scale, inputs.out_scale)
        )
        rows = out.at[sequence, pl.ds(head * problem.group, problem.group)]
        result = attention.finish(run, key_scale)

        def write(total: jax.Array, mixed: jax.Array) -> None:
            mixed = launch.normalized(value_scale, total, mixed)
            operands.put_rows(mixed, rows, pair * 0, out_scale)

        if members == 1:
            write(*result[1:])
        elif sends:
            exchange.send(scratch, member, result)
            factor = jnp.float32(1) if value_scale is None else value_scale
            exchange.collect(scratch, block, warpgroup, rows, factor, out_scale, operands.query)
        else:
            _merge(config, scratch, warpgroup, member, result, write)

    scratch = Buffers.scratch(problem, warpgroups, config.stages, inputs.slopes is not None)
    if sends:
        scratch |= exchange.scratch()
    elif members > 1:
        scratch |= _parts(config, operands.features, operands.columns, operands.interpret)
    return launch.call(
        decode_attention_blocks,
        inputs,
        problem,
        jax.ShapeDtypeStruct(inputs.queries.shape, problem.out),
        scratch,
        grid=(pairs,),
        grid_names=("pair",),
        warpgroups=warpgroups,
        cluster=config.cluster,
    )


def _parts(config: Config, features: int, columns: int, interpret: bool) -> dict[str, Any]:
    """Shared memory for what the warpgroups of a block found."""
    warpgroups = config.warpgroups
    parts: dict[str, Any] = {
        "tops": plgpu.SMEM((warpgroups * columns,), jnp.float32),
        "totals": plgpu.SMEM((warpgroups * columns,), jnp.float32),
        "mixes": plgpu.SMEM((warpgroups * features, columns), jnp.float32),
    }
    if config.cluster == 1:
        parts["there"] = plgpu.Barrier(num_arrivals=warpgroups)
    elif interpret:  # elsewhere the barrier of the hardware does
        parts["there"] = plgpu.ClusterBarrier(
            collective_axes=("block",), num_arrivals=warpgroups, num_barriers=2
        )
    return parts


def _merge(
    config: Config,
    parts: dict[str, Ref],
    warpgroup: Any,
    member: Any,
    result: tuple[jax.Array, jax.Array, jax.Array],
    write: Any,
) -> None:
    """Call write(total, mixed) with the sum of what all warpgroups of a cluster have."""
    tops, totals, mixes = (parts[name] for name in ("tops", "totals", "mixes"))
    for ref, value in zip((tops, totals, mixes), result, strict=True):
        rows = value.shape[0]
        ref.at[pl.ds(warpgroup * rows, rows)][...] = value

    def of_block(ref: Ref, block: Any, layout: Any) -> list[jax.Array]:
        if config.cluster > 1:  # such a reference must be to all of an allocation
            ref = plgpu.cluster_ref(ref, {"block": block})
        every, rows = plgpu.load(ref, layout=layout), ref.shape[0] // config.warpgroups
        return [every[i : i + rows] for i in range(0, ref.shape[0], rows)]

    def merge() -> None:
        layout, columns = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)
        every = [x for block in range(config.cluster) for x in of_block(tops, block, columns)]
        top = functools.reduce(jnp.maximum, every)
        together = max(1, min(config.cluster, IN_REGISTERS // mixes.size))

        def some(chunk: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, mixed = carry
            for i in range(together):
                block = chunk * together + i
                weights = [jnp.exp2(x - top) for x in of_block(tops, block, columns)]
                total = _add_weighted(total, of_block(totals, block, columns), weights)
                mixed = _add_weighted(mixed, of_block(mixes, block, layout), weights)
            return total, mixed

        zeros = jnp.zeros(result[2].shape, jnp.float32)
        carry = (jnp.zeros_like(top), plgpu.layout_cast(zeros, layout))
        write(*lax.fori_loop(0, config.cluster // together, some, carry))

    if config.cluster == 1:
        plgpu.barrier_arrive(parts["there"])

        @pl.when(member == 0)
        def _() -> None:
            plgpu.barrier_wait(parts["there"])
            merge()

        return
    _synchronize(parts.get("there"), 0)
    pl.when(member == 0)(merge)
    _synchronize(parts.get("there"), 1)  # none may leave while its memory is read


def _add_weighted(sum_: jax.Array, parts: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
    """sum_ plus the parts, each with its weights by column."""
    for part, weight in zip(parts, weights, strict=True):
        sum_ = sum_ + part * lax.broadcast_in_dim(weight, part.shape, [part.ndim - 1])
    return sum_


def _synchronize(there: Ref | None, index: int) -> None:
    """Wait for all warpgroups of the cluster, and see what they wrote."""
    if there is None:
        plgpu.inline_mgpu()(threads.emit_synchronize_cluster)()
    else:
        plgpu.barrier_arrive(there.at[index])
        plgpu.barrier_wait(there.at[index])
