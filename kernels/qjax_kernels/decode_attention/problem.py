"""A call of decode attention, as its kernels see it: sizes, references, parts of the work."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.decode_attention.config import scratch_floats
from qjax_kernels.decode_attention.operands import Operands

Ref = Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static of a call.

    Attributes:
      operands: shapes and types of the products.
      batch, heads, kv_heads: sizes.
      page_size: tokens of a page.
      pages: of a sequence, at most.
      scale, window, soft_cap: see the api.
      out: dtype of the result.
    """

    operands: Operands
    batch: int
    heads: int
    kv_heads: int
    page_size: int
    pages: int
    scale: float
    window: int | None
    soft_cap: float | None
    out: np.dtype

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def boxes(self) -> int:
        """Pages of a step; 1 also if a page has several steps."""
        return 1 if self.pages == 1 else max(1, self.operands.tokens // self.page_size)

    def begin(self, length: jax.Array) -> jax.Array:
        """The first position that is seen."""
        return length * 0 if self.window is None else jnp.maximum(length - self.window, 0)

    def steps(self, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(first, number) of the steps that hold a position that is seen."""
        tokens = self.operands.tokens
        first = self.begin(length) // tokens
        return first, (length + (tokens - 1)) // tokens - first


@dataclasses.dataclass(frozen=True)
class Inputs:
    """References to global memory, as the api names them; None where a call has none."""

    queries: Ref
    keys: Ref
    values: Ref
    table: Ref | None
    lengths: Ref
    key_scale: Ref | None = None
    value_scale: Ref | None = None
    slopes: Ref | None = None
    out_scale: Ref | None = None


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Shared memory, each with a leading axis of warpgroups: slots of keys and of values with a
    barrier each, the queries of a KV head as they are and as an operand, softmax weights, what
    warps reduced, slopes of ALiBi."""

    keys: Ref
    values: Ref
    raw_queries: Ref
    queries: Ref
    weights: Ref
    reduced: Ref
    keys_there: Ref
    values_there: Ref
    queries_there: Ref
    slopes: Ref | None = None

    @staticmethod
    def scratch(problem: Problem, warpgroups: int, stages: int, slopes: bool) -> dict[str, Any]:
        """What to allocate, by attribute."""
        operands = problem.operands
        slots = (warpgroups, stages)
        shapes: dict[str, Any] = {
            "keys": operands.keys_buffer(*slots),
            "values": operands.values_buffer(*slots),
            "raw_queries": plgpu.SMEM(
                (warpgroups, operands.columns, operands.head_dim), operands.query
            ),
            "queries": operands.queries_buffer(warpgroups),
            "weights": operands.weights_buffer(warpgroups),
            "reduced": plgpu.SMEM((warpgroups, scratch_floats(operands.columns)), jnp.float32),
            "keys_there": plgpu.Barrier(num_barriers=slots, num_arrivals=problem.boxes),
            "values_there": plgpu.Barrier(num_barriers=slots, num_arrivals=problem.boxes),
            "queries_there": plgpu.Barrier(num_barriers=warpgroups, num_arrivals=1 + slopes),
        }
        if slopes:
            # The copy engine begins at 128 bytes; elsewhere it is an illegal instruction.
            columns = -(-operands.columns // 32) * 32
            shapes["slopes"] = plgpu.SMEM((warpgroups, columns), jnp.float32)
        return shapes


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps of a sequence's cache for one KV head: `count` of them, from `first` on every
    `stride`-th; traced int32, but for the last."""

    sequence: jax.Array
    head: jax.Array
    length: jax.Array
    first: jax.Array
    count: jax.Array
    stride: int = 1

    def at(self, step: Any) -> jax.Array:
        """Number, in the sequence, of a step of the run."""
        return self.first + (step if self.stride == 1 else step * self.stride)
