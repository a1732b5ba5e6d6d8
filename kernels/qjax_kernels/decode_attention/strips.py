"""Strips of 16 features by 8 heads: who gets which, and what the threads send and add up. See
`exchange`."""

import dataclasses
import math

import numpy as np

from qjax_kernels.decode_attention.places import Rows
from qjax_kernels.decode_attention.threads import Memory, Threads, Value

STRIP = 512  # bytes: 16 features by 8 heads of float32
WEIGHTS = 64  # bytes: the largest score and the sum of weights of 8 heads
TOGETHER = 8  # members whose numbers are in registers at a time
LOWEST = -1e30  # of a largest score: finite, so that differences are numbers


@dataclasses.dataclass(frozen=True)
class Deal:
    """Who adds up what.

    Attributes:
      head_dim: features.
      columns: heads, a multiple of 8.
      blocks: of a cluster.
      warpgroups: of a block.
      neighbours: as `places.emit_put_rows` has it.
    """

    head_dim: int
    columns: int
    blocks: int
    warpgroups: int
    neighbours: int

    @property
    def members(self) -> int:
        """Warpgroups that found something."""
        return self.blocks * self.warpgroups

    @property
    def eights(self) -> int:
        """Groups of 8 heads."""
        return self.columns // 8

    @property
    def strips(self) -> int:
        """Of 8 heads."""
        return self.head_dim // 16

    @property
    def all(self) -> int:
        """Strips of all heads."""
        return self.strips * self.eights

    @property
    def each(self) -> int:
        """Strips of a block, at most: the last ones may have fewer."""
        return math.ceil(self.all / self.blocks)


def emit_send(
    t: Threads,
    x: Deal,
    memory: tuple[Memory, ...],
    member: Value,
    of_heads: list[np.ndarray],
    mixed: np.ndarray,
) -> None:
    """Send a warpgroup's part.

    Args:
      t: the threads.
      x: who adds up what.
      memory: strips, weights and, if there are several blocks, the barrier: of any block.
      member: number of the warpgroup in the cluster.
      of_heads: the largest scores and the sums of weights: registers of each 8 columns.
      mixed: registers [blocks of 64 rows, blocks of 8 columns, 2 halves of a warp's rows].
    """
    strips, weights, *barrier = memory
    warp, lane = t.divmod(t.index(), 32)
    i, c = t.divmod(lane, 4)

    def put(target: Memory, byte: Value, values: list[Value], block: Value) -> None:
        if barrier:
            t.send_floats(target, byte, values, block, barrier[0])
        else:
            t.store_floats(target, byte, values)

    for eight in range(x.eights):
        for block in range(mixed.shape[0]):
            strip = t.add(warp, 4 * block)
            to, slot = t.divmod(t.add(strip, eight * x.strips), x.each)
            byte = t.add(t.mul(slot, x.members * STRIP), t.mul(member, STRIP))
            byte = t.add(byte, t.mul(lane, 16))
            values = [t.part(half, j) for half in mixed[block, eight] for j in range(2)]
            if 4 * block + 4 <= x.strips:
                put(strips, byte, values, to)
            else:
                with t.when(t.less(strip, x.strips)):
                    put(strips, byte, values, to)
        values = [t.part(found[eight], j) for found in of_heads for j in range(2)]
        byte = t.add(t.mul(member, x.eights * WEIGHTS), eight * WEIGHTS)
        byte = t.add(byte, t.mul(c, 16))
        for first in range(0, x.blocks, 4):
            to = t.add(warp, first)
            with t.when(t.less(i, 1)), t.when(t.less(to, x.blocks)):
                put(weights, byte, values, to)


def emit_collect(
    t: Threads,
    x: Deal,
    memory: tuple[Memory, Memory],
    block: Value,
    warpgroup: Value,
    factor: Value,
    rows: Rows,
) -> None:
    """Add up a block's strips and store them.

    Args:
      t: the threads of a warpgroup.
      x: who adds up what.
      memory: strips and weights that came.
      block: of the cluster.
      warpgroup: of the block.
      factor: float32.
      rows: of the result, as many as there are heads.
    """
    warp, lane = t.divmod(t.index(), 32)
    i, c = t.divmod(lane, 4)
    for first in range(0, x.each, 4 * x.warpgroups):
        slot = t.add(t.add(warp, t.mul(warpgroup, 4)), first)
        number = t.add(t.mul(block, x.each), slot)
        with t.when(t.less(slot, x.each)), t.when(t.less(number, x.all)):
            eight, strip = t.divmod(number, x.strips)
            from_weights = t.add(t.mul(eight, WEIGHTS), t.mul(c, 16))
            from_strips = t.add(t.mul(slot, x.members * STRIP), t.mul(lane, 16))
            total, mixed = _emit_sum(t, x, memory, from_weights, from_strips)
            for column in range(2):
                head = t.add(t.mul(eight, 8), t.add(t.mul(c, 2), column))
                feature = t.add(t.mul(strip, 16), t.mul(i, x.neighbours))
                norm = t.times(t.one_over(total[column]), factor)
                values = [t.times(mixed[2 * half + column], norm) for half in range(2)]
                with t.when(t.less(head, rows.shape[0])):
                    rows.put(t, head, feature, values, 1 if x.neighbours == 2 else 8)


def _emit_sum(
    t: Threads,
    x: Deal,
    memory: tuple[Memory, Memory],
    from_weights: Value,
    from_strips: Value,
) -> tuple[list[Value], list[Value]]:
    """(sums of weights of 2 heads, 4 sums of values) of all members."""
    strips, weights = memory
    together = math.gcd(x.members, TOGETHER)

    def some(chunk: Value, carry: list[Value]) -> list[Value]:
        top, sums = carry[:2], carry[2:]
        places = [
            (
                t.add(from_weights, t.mul(member, x.eights * WEIGHTS)),
                t.add(from_strips, t.mul(member, STRIP)),
            )
            for member in (t.add(t.mul(chunk, together), i) for i in range(together))
        ]
        tops = [t.load_floats(weights, where, 2) for where, _ in places]
        most = top
        for other in tops:
            most = [t.larger(*pair) for pair in zip(most, other, strict=True)]
        shrink = [t.exp2(t.minus(*pair)) for pair in zip(top, most, strict=True)]
        sums = [t.times(y, shrink[j % 2]) for j, y in enumerate(sums)]
        for other, (where, strip) in zip(tops, places, strict=True):
            weight = [t.exp2(t.minus(*pair)) for pair in zip(other, most, strict=True)]
            found = t.load_floats(weights, t.add(where, 8), 2) + t.load_floats(strips, strip, 4)
            found = [t.times(y, weight[j % 2]) for j, y in enumerate(found)]
            sums = [t.plus(*pair) for pair in zip(sums, found, strict=True)]
        return most + sums

    carry = [t.number(LOWEST)] * 2 + [t.number(0.0)] * 6
    found = t.repeat(x.members // together, some, carry)
    return found[2:4], found[4:]
