"""As many blocks as the GPU holds at a time, whose warpgroups have equal shares of all there is to
do; then a kernel that merges what was cut. Balanced for any lengths.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.decode_attention import launch
from qjax_kernels.decode_attention.attend import LOWEST, Attention
from qjax_kernels.decode_attention.config import Config
from qjax_kernels.decode_attention.problem import Buffers, Inputs, Problem, Ref
from qjax_kernels.decode_attention.schedule import Schedule

Place = tuple[jax.Array, jax.Array, jax.Array]  # a step of the line, its sequence, that one's start


@dataclasses.dataclass(frozen=True)
class Shares:
    """What the merge reads; the first three by slot of the schedule, as `Attention.finish` returns
    them. Slots without a share are not written."""

    tops: Any
    totals: Any
    mixes: Any
    lengths: Any
    value_scale: Any
    out_scale: Any


def persistent(inputs: Inputs, problem: Problem, config: Config, cores: int) -> jax.Array:
    """[batch, heads, head_dim] of `inputs`, which are arrays; on so many multiprocessors."""
    workers = config.persistent * cores * config.warpgroups
    return _merged(inputs, problem, config, workers, _shares(inputs, problem, config, workers))


def _shares(inputs: Inputs, problem: Problem, config: Config, workers: int) -> Shares:
    operands, warpgroups = problem.operands, config.warpgroups

    def decode_attention_shares(inputs: Inputs, outs: Any, scratch: dict[str, Ref]) -> None:
        tops, totals, mixes = outs
        warpgroup = lax.axis_index("warpgroup") if warpgroups > 1 else 0
        worker = lax.axis_index("blocks") * warpgroups + warpgroup
        schedule = Schedule(problem, inputs.lengths, workers, config.least)
        share, steps = schedule.share()
        step = worker * share
        end = jnp.minimum(step + share, steps)
        attention = Attention(problem, inputs, launch.buffers(scratch), config.stages, warpgroup)

        def more(place: Place) -> jax.Array:
            return place[0] < end

        def segment(place: Place) -> Place:
            step, sequence, start = place
            run, index = schedule.run(step, end, sequence, start)
            key_scale = attention.of_head(inputs.key_scale, run.head)
            top, total, mixed = attention.finish(run, key_scale)
            step = step + run.count
            sequence, start = schedule.next_at(step, sequence, start)
            # What comes next is under way before this is written.
            attention.start(schedule.run(step, end, sequence, start)[0])
            slot = index + worker
            tops.at[slot][...] = top
            totals.at[slot][...] = total
            mixes.at[slot][...] = mixed
            return step, sequence, start

        @pl.when(step < end)
        def _() -> None:
            place = (step, *schedule.find(step))
            attention.start(schedule.run(step, end, *place[1:])[0])
            lax.while_loop(more, segment, place)

    slots = Schedule(problem, None, workers, config.least).slots
    shapes = [(slots, operands.columns)] * 2 + [(slots, operands.features, operands.columns)]
    found = launch.call(
        decode_attention_shares,
        inputs,
        problem,
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        Buffers.scratch(problem, warpgroups, config.stages, inputs.slopes is not None),
        grid=(workers // warpgroups,),
        grid_names=("blocks",),
        warpgroups=warpgroups,
    )
    tops, totals, mixes = found
    return Shares(tops, totals, mixes, inputs.lengths, inputs.value_scale, inputs.out_scale)


def _merged(
    inputs: Inputs, problem: Problem, config: Config, workers: int, shares: Shares
) -> jax.Array:
    """The result. A block has 64 features of a sequence and KV head."""
    queries = inputs.queries
    columns = problem.operands.columns

    def decode_attention_merge(shares: Shares, out: Ref, scratch: dict[str, Ref]) -> None:
        del scratch
        pair, block = lax.axis_index("pair"), lax.axis_index("features")
        sequence, head = pair // problem.kv_heads, pair % problem.kv_heads
        schedule = Schedule(problem, shares.lengths, workers, config.least)
        share, _ = schedule.share()
        _, count = problem.steps(shares.lengths[sequence])
        step = schedule.before(sequence) + head * count
        first, last = step // share, (step + jnp.maximum(count, 1) - 1) // share
        number = jnp.where(count > 0, last - first + 1, 0)
        value_scale, out_scale = (
            None if x is None else x[head if x.shape[0] > 1 else head * 0]
            for x in (shares.value_scale, shares.out_scale)
        )
        total, mixed = _sum(shares, pair + first, number, block * 64, columns)
        rows = out.at[sequence, pl.ds(head * problem.group, problem.group)]
        mixed = launch.normalized(value_scale, total, mixed)
        problem.operands.put_rows(mixed, rows, block * 64, out_scale)

    return launch.call(
        decode_attention_merge,
        shares,
        problem,
        jax.ShapeDtypeStruct(queries.shape, problem.out),
        {},
        grid=(problem.batch * problem.kv_heads, problem.operands.features // 64),
        grid_names=("pair", "features"),
    )


def _sum(
    shares: Shares, slot: Any, number: Any, feature: Any, columns: int
) -> tuple[jax.Array, jax.Array]:
    """(total, mixed) of `number` slots from `slot` on, for 64 features."""
    layout = plgpu.Layout.WGMMA
    together = max(1, min(16, 128 // columns))  # as many at a time as registers hold

    def load(ref: Ref, layout: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    def some(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        places = [chunk * together + i for i in range(together)]
        at = [slot + jnp.minimum(place, number - 1) for place in places]
        some_tops = [load(shares.tops.at[i], layout.reduce(0)) for i in at]
        some_totals = [load(shares.totals.at[i], layout.reduce(0)) for i in at]
        some_mixes = [load(shares.mixes.at[i, pl.ds(feature, 64)], layout) for i in at]
        new_top = top
        for other in some_tops:  # one that is there again does no harm
            new_top = jnp.maximum(new_top, other)
        shrink = jnp.exp2(top - new_top)
        total, mixed = total * shrink, mixed * lax.broadcast_in_dim(shrink, mixed.shape, [1])
        for i, place in enumerate(places):
            there = (place < number).astype(jnp.float32)
            weight = jnp.exp2(some_tops[i] - new_top) * there
            total = total + some_totals[i] * weight
            mixed = mixed + some_mixes[i] * lax.broadcast_in_dim(weight, mixed.shape, [1])
        return new_top, total, mixed

    carry = (
        plgpu.layout_cast(jnp.full((columns,), LOWEST, jnp.float32), layout.reduce(0)),
        plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout.reduce(0)),
        plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), layout),
    )
    chunks = (number + (together - 1)) // together
    _, total, mixed = lax.fori_loop(0, chunks, some, carry)
    return total, mixed
