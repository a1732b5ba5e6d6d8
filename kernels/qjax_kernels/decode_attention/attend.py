"""One warpgroup attends to a run of one sequence's cache: TMA loads, online softmax, two products.

A warpgroup issues its own loads, `stages` steps ahead: a slot is refilled as soon as its product is
done, so nobody else has to be told, and at least `stages - 1` steps are always under way. Rows that
must not be seen may hold anything, for pages are reused: their scores are replaced before softmax,
and where a step has such rows its values are cleared, for 0 * NaN is NaN.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.decode_attention.problem import Buffers, Inputs, Problem, Ref, Run

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # of a running maximum: finite, so that differences are numbers


@dataclasses.dataclass(frozen=True)
class Attention:
    """The work of warpgroup `index` of a block, with `stages` slots.

    If `early`, everything is asked for before it is known whether it is needed: queries also of a
    run without steps.
    """

    problem: Problem
    inputs: Inputs
    buffers: Buffers
    stages: int
    index: Any
    early: bool = False

    def start(self, run: Run) -> None:
        """Load the queries and the first steps. All slots must be free."""
        problem, buffers = self.problem, self.buffers
        there = buffers.queries_there.at[self.index]

        steps = [run.count * 0 + step for step in range(self.stages)]
        # Asked for before it is known that there are so many: one wait for memory, not two.
        pages = [self._pages(run, step) for step in steps]

        @self._if_any(run)
        def _() -> None:
            heads = pl.ds(run.head * problem.group, problem.operands.columns)
            source = self.inputs.queries.at[run.sequence, heads]
            plgpu.copy_gmem_to_smem(source, buffers.raw_queries.at[self.index], there)
            if buffers.slopes is not None:
                slopes = self._slopes()
                source = self.inputs.slopes.at[heads]  # type: ignore[union-attr]
                plgpu.copy_gmem_to_smem(source, slopes, there)

        for slot, step in enumerate(steps):

            @pl.when(self._has(run, step))
            def _(slot: int = slot, step: jax.Array = step) -> None:
                self._fetch(run, step, pages[slot], slot, keys=True)
                self._fetch(run, step, pages[slot], slot, keys=False)

    def _slopes(self) -> Ref:
        """Of the queries of this warpgroup's KV head."""
        columns = pl.ds(0, self.problem.operands.columns)
        return self.buffers.slopes.at[self.index, columns]  # type: ignore[union-attr]

    def of_head(self, scale: Ref | None, head: jax.Array) -> jax.Array | None:
        """The number of a KV head, or the one that there is for all; asked for here."""
        if scale is None:
            return None
        return self.read(scale, head if scale.shape[0] > 1 else head * 0)

    def read(self, ref: Ref, *index: jax.Array) -> jax.Array:
        """One number, `early` or where the compiler wants it."""
        return self.problem.operands.read(ref, *index) if self.early else ref[index]

    def finish(
        self, run: Run, key_scale: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attend to what `start` began to load.

        Args:
          run: as `start` had it.
          key_scale: `of_head` of it.

        Returns:
          top [columns], the largest score of each head in units of log 2; total [columns], the sum
          of 2 ** (score - top); mixed [features, columns], the sum of the values so weighted, in
          the order of `Operands.mix`, without the value scale.
        """
        problem, buffers, wg = self.problem, self.buffers, self.index
        operands, columns, layout = problem.operands, problem.operands.columns, plgpu.Layout.WGMMA
        queries, weights_buffer = buffers.queries.at[wg], buffers.weights.at[wg]
        scratch = buffers.reduced.at[wg]

        @self._if_any(run)
        def _() -> None:
            plgpu.barrier_wait(buffers.queries_there.at[wg])
            operands.put_queries(buffers.raw_queries.at[wg], queries)
            plgpu.commit_smem()

        factor: Any = problem.scale * LOG2_E / (problem.soft_cap or 1.0)
        if key_scale is not None:
            factor = key_scale * factor

        def step(i: jax.Array, carry: tuple) -> tuple:
            top, total, mixed, slot, pages = carry
            ahead = i + self.stages
            plgpu.barrier_wait(buffers.keys_there.at[wg, slot])
            scores = operands.scores(buffers.keys.at[wg, slot], queries)

            @pl.when(ahead < run.count)
            def _() -> None:
                self._fetch(run, ahead, pages, slot, keys=True)

            begin = run.at(i) * operands.tokens
            scores = self._seen(run, begin, scores * factor)
            new_top = jnp.maximum(top, operands.over_tokens(scores, "max", scratch))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - _down(new_top, scores))
            total = total * _down(shrink, total) + weights
            operands.put_weights(weights, weights_buffer)
            plgpu.barrier_wait(buffers.values_there.at[wg, slot])
            self._clear_unseen(run, begin, buffers.values.at[wg, slot])
            added = operands.mix(buffers.values.at[wg, slot], weights_buffer)
            mixed = mixed * _down(shrink, mixed) + added

            @pl.when(ahead < run.count)
            def _() -> None:
                self._fetch(run, ahead, pages, slot, keys=False)

            slot = jnp.where(slot == self.stages - 1, 0, slot + 1)
            # The table is read a step before it is needed, for that takes as long as a step.
            return new_top, total, mixed, slot, self._pages(run, ahead + 1)

        carry = (
            plgpu.layout_cast(jnp.full((columns,), LOWEST, jnp.float32), layout.reduce(0)),
            plgpu.layout_cast(jnp.zeros((operands.tokens, columns), jnp.float32), layout),
            plgpu.layout_cast(jnp.zeros((operands.features, columns), jnp.float32), layout),
            run.count * 0,
            self._pages(run, run.count * 0 + self.stages),
        )
        top, total, mixed, *_ = lax.fori_loop(0, run.count, step, carry)
        return top, operands.over_tokens(total, "add", scratch), mixed

    def _if_any(self, run: Run) -> Any:
        return (lambda body: body()) if self.early else pl.when(run.count > 0)

    def _has(self, run: Run, step: jax.Array) -> jax.Array:
        """Whether a run has a step; of one in a hurry, without counting its steps."""
        if self.early:
            return run.at(step) * self.problem.operands.tokens < run.length
        return run.count > step

    def _pages(self, run: Run, step: jax.Array) -> tuple[jax.Array, ...]:
        """The table's entries for a step; any entries for one that the run has not."""
        problem, table = self.problem, self.inputs.table
        if table is None:
            return (run.sequence,)
        if problem.pages == 1:
            return (table[run.sequence, run.head * 0],)
        read = self.read
        if problem.boxes == 1:
            index = run.at(step) // (problem.page_size // problem.operands.tokens)
            return (read(table, run.sequence, jnp.minimum(index, problem.pages - 1)),)
        # Of a step's pages some may hold nothing that is seen, and their entries anything: the
        # nearest page that is seen takes their place.
        last = jnp.maximum(run.length - 1, 0) // problem.page_size
        first = problem.begin(run.length) // problem.page_size
        indices = [run.at(step) * problem.boxes + box for box in range(problem.boxes)]
        indices = [jnp.minimum(jnp.maximum(index, first), last) for index in indices]
        return tuple(read(table, run.sequence, index) for index in indices)

    def _fetch(self, run: Run, step: jax.Array, pages: tuple, slot: Any, *, keys: bool) -> None:
        problem, operands, buffers = self.problem, self.problem.operands, self.buffers
        source, target, there = (
            (self.inputs.keys, buffers.keys, buffers.keys_there)
            if keys
            else (self.inputs.values, buffers.values, buffers.values_there)
        )
        start = run.at(step) * operands.tokens
        if problem.boxes > 1:
            start = run.head * 0
        elif problem.pages > 1:
            start = start % problem.page_size
        # Traced, though it is 0: a box may reach behind head_dim, where TMA puts zeros.
        columns = pl.ds(run.head * 0, operands.head_dim if keys else operands.values_width)
        rows = operands.tokens // problem.boxes
        for box, page in enumerate(pages):
            part = target.at[self.index, slot]
            if problem.boxes > 1:
                part = part.at[pl.ds(box * rows, rows)]
            plgpu.copy_gmem_to_smem(
                source.at[page, run.head, pl.ds(start, rows), columns],
                part,
                there.at[self.index, slot],
            )

    def _seen(self, run: Run, begin: jax.Array, scores: jax.Array) -> jax.Array:
        """Scaled scores with cap and bias, -inf for positions that are not seen."""
        problem, layout = self.problem, plgpu.Layout.WGMMA
        positions = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=layout) + begin
        if problem.soft_cap is not None:
            # tanh(x) = 1 - 2 / (e ** 2x + 1); the GPU's own tanh has 11 bits.
            scores = 1.0 - 2.0 / (jnp.exp2(2.0 * scores) + 1.0)
            scores = scores * (problem.soft_cap * LOG2_E)
        if self.buffers.slopes is not None:
            slopes = plgpu.load(self._slopes(), layout=layout.reduce(0))
            distances = (positions - (run.length - 1)).astype(jnp.float32)
            scores = scores + distances * _down(slopes * LOG2_E, scores)
        seen = positions < run.length
        if problem.window is not None:
            seen = seen & (positions >= run.length - problem.window)
        return jnp.where(seen, scores, -jnp.inf)

    def _clear_unseen(self, run: Run, begin: jax.Array, values: Ref) -> None:
        problem, operands = self.problem, self.problem.operands
        if operands.cache == jnp.int8:
            return  # every integer times 0 is 0
        low, high = problem.begin(run.length) - begin, run.length - begin
        partial = high < operands.tokens
        if problem.window is not None:
            partial = partial | (low > 0)

        @pl.when(partial)
        def _() -> None:
            operands.clear(values, low, high)
            plgpu.commit_smem()


def _down(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [columns] for every row of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [1])
