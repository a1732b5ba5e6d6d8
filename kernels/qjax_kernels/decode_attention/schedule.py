"""Which steps of which sequences a worker of the persistent kernel takes.

The steps of all sequences and KV heads stand in one line, sequence by sequence and head by head,
and are cut into equal shares. A (sequence, head) that a cut goes through has several shares, whose
results are merged; share w of segment s (the s-th sequence and head) is kept in slot s + w, which
no other pair has, for along the line one of the two grows by 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax_kernels.decode_attention.problem import Problem, Run

TOGETHER = 8  # lengths that are read at a time


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Attributes: lengths, a reference; workers; least, the steps that a share has at least."""

    problem: Problem
    lengths: Any
    workers: int
    least: int

    @property
    def slots(self) -> int:
        """For results of shares."""
        return self.problem.batch * self.problem.kv_heads + self.workers - 1

    def before(self, sequence: Any) -> jax.Array:
        """Steps of the sequences before one."""

        def many(chunk: jax.Array, sum_: jax.Array) -> jax.Array:
            return sum_ + self._chunk(chunk)

        def one(i: jax.Array, sum_: jax.Array) -> jax.Array:
            return sum_ + self._steps(i)

        chunks = sequence // TOGETHER
        sum_ = lax.fori_loop(0, chunks, many, self._zero())
        return lax.fori_loop(chunks * TOGETHER, sequence, one, sum_)

    def share(self) -> tuple[jax.Array, jax.Array]:
        """(steps of a share, steps of all)."""
        total = self.before(self.problem.batch)
        return jnp.maximum((total + (self.workers - 1)) // self.workers, self.least), total

    def find(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sequence, steps before it) of a step of the line; it must be on it."""
        zero, chunks = self._zero(), self.problem.batch // TOGETHER
        if chunks < 2:
            return self.next_at(step, zero, zero)

        def behind(carry: tuple) -> jax.Array:
            chunk, start, size = carry
            return (chunk < chunks) & (step >= start + size)

        def skip(carry: tuple) -> tuple:
            chunk, start, size = carry
            return chunk + 1, start + size, self._chunk(jnp.minimum(chunk + 1, chunks - 1))

        chunk, start, _ = lax.while_loop(behind, skip, (zero, zero, self._chunk(zero)))
        return self.next_at(step, chunk * TOGETHER, start)

    def next_at(
        self, step: jax.Array, sequence: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`find`, from a sequence that is not behind the step; the last one if the line ends."""
        last = self.problem.batch - 1

        def behind(carry: tuple) -> jax.Array:
            sequence, start, size = carry
            return (sequence < last) & (step >= start + size)

        def skip(carry: tuple) -> tuple:
            sequence, start, size = carry
            return sequence + 1, start + size, self._steps(sequence + 1)

        sequence = jnp.minimum(sequence, last)
        carry = (sequence, start, self._steps(sequence))
        return lax.while_loop(behind, skip, carry)[:2]

    def run(
        self, step: jax.Array, end: jax.Array, sequence: jax.Array, start: jax.Array
    ) -> tuple[Run, jax.Array]:
        """What is to be done from a step of the line on, up to `end` or to the end of a segment.

        Returns:
          The run, empty if step is not before end, and its segment.
        """
        length = self.lengths[sequence]
        first, count = self.problem.steps(length)
        count = jnp.maximum(count, 1)
        head = (step - start) // count
        done = step - start - head * count
        here = jnp.maximum(jnp.minimum(count - done, end - step), 0)
        run = Run(sequence, head, length, first + done, here)
        return run, sequence * self.problem.kv_heads + head

    def _zero(self) -> jax.Array:
        return self.lengths[0] * 0

    def _steps(self, sequence: jax.Array) -> jax.Array:
        return self.problem.steps(self.lengths[sequence])[1] * self.problem.kv_heads

    def _chunk(self, chunk: jax.Array) -> jax.Array:
        steps = [self._steps(chunk * TOGETHER + i) for i in range(TOGETHER)]
        return sum(steps[1:], steps[0])
