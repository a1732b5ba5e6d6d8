"""How warpgroups, of a block or of a cluster of blocks, add up what they found.

Each has a sum of values for all features and heads, with a weight for each head. The sums are cut
into strips of 16 features by 8 heads, which is what one warp has of an accumulator, 4 numbers a
lane; the strips are dealt out to the blocks, and in a block to its warps. Everybody sends every
strip to its block and its weights to all blocks; then a lane has what it adds up in the order in
which it was in the sender's registers.

Between blocks this is one way, not two: a sender does not wait, and the receiver's barrier counts
the bytes that have come. Nobody reads another block's memory, so none has to stay for others.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from qjax_kernels.decode_attention.places import Rows
from qjax_kernels.decode_attention.problem import Ref
from qjax_kernels.decode_attention.strips import STRIP, WEIGHTS, Deal, emit_collect, emit_send
from qjax_kernels.decode_attention.threads import Memory, Threads, Value

THREADS = Threads()


class Exchange(Deal):
    """What the warpgroups do."""

    def scratch(self) -> dict[str, Any]:
        """What to allocate: what comes, and the barrier that counts it."""
        found: dict[str, Any] = {
            "strips": plgpu.SMEM((self.each * self.members * STRIP // 4,), jnp.float32),
            "of_heads": plgpu.SMEM((self.members * self.eights * WEIGHTS // 4,), jnp.float32),
        }
        if self.blocks == 1:
            return found | {"there": plgpu.Barrier(num_arrivals=self.warpgroups)}
        return found | {"came": plgpu.SMEM((4,), jnp.int32)}

    def open(self, parts: dict[str, Ref]) -> None:
        """Say that this block can be sent to. To be called first, by all threads."""
        if self.blocks == 1:
            return

        def emit(context: Any, barrier: Any, block: Any) -> None:
            del context
            i32 = ir.IntegerType.get_signless(32)
            zero, each = utils.c(0, i32), utils.c(self.each, i32)
            before = arith.muli(block.registers.item(), each)
            mine = arith.minsi(arith.subi(utils.c(self.all, i32), before), each)
            size = arith.muli(arith.maxsi(mine, zero), utils.c(self.members * STRIP, i32))
            size = arith.addi(size, utils.c(self.members * self.eights * WEIGHTS, i32))
            first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), zero)
            for ptx, arguments in (
                ("mbarrier.init.shared::cta.b64 [$0], 1;", [_pointer(barrier)]),
                (
                    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
                    [_pointer(barrier), size],
                ),
                ("fence.mbarrier_init.release.cluster;", []),
            ):
                utils.inline_ptx(ptx, *arguments, predicate=first, has_side_effects=True)
            # Of what came before, only the barrier matters to others, and its fence is above: to
            # release everything would take as long as a look into memory.
            _cluster("arrive.relaxed")

        types = plgpu.RefType(()), plgpu.Layout.WG_SPLAT
        plgpu.inline_mgpu(arg_types=types)(emit)(parts["came"], lax.axis_index("block"))

    def send(
        self, parts: dict[str, Ref], member: Any, result: tuple[jax.Array, jax.Array, jax.Array]
    ) -> None:
        """Send what `Attention.finish` returned; all warpgroups do."""

        def emit(context: Any, strips: Any, weights: Any, *rest: Any) -> None:
            del context
            *barrier, member, top, total, mixed = rest
            if barrier:
                _cluster("wait.acquire")
            emit_send(
                THREADS,
                self,
                (strips, weights, *barrier),
                member.registers.item(),
                [x.registers.reshape(-1) for x in (top, total)],
                mixed.registers.reshape(-1, self.eights, 2),
            )

        layout = plgpu.Layout.WGMMA
        refs = [parts[name] for name in ("strips", "of_heads", "came") if name in parts]
        types = [*[plgpu.RefType(())] * len(refs), plgpu.Layout.WG_SPLAT]
        types += [layout.reduce(0), layout.reduce(0), layout]
        plgpu.inline_mgpu(arg_types=tuple(types))(emit)(*refs, member, *result)
        if "there" in parts:
            plgpu.barrier_arrive(parts["there"])

    def collect(
        self,
        parts: dict[str, Ref],
        block: Any,
        warpgroup: Any,
        rows: Ref,
        factor: jax.Array,
        scale: jax.Array | None,
        through: np.dtype,
    ) -> None:
        """Add up this block's strips when all has come, and store them times a factor.

        Args:
          parts: references to `scratch`.
          block: of the cluster.
          warpgroup: of the block.
          rows: of global memory, [heads, head_dim].
          factor: float32, of all.
          scale, through: see `places.Rows`.
        """
        if "there" in parts:
            plgpu.barrier_wait(parts["there"])
        group, head_dim = rows.shape
        itemsize = jnp.dtype(rows.dtype).itemsize

        def emit(context: Any, strips: Any, weights: Any, *rest: Any) -> None:
            del context
            *barrier, out, block, warpgroup, factor, scale = rest
            if barrier:
                _wait(barrier[0])
            scale = scale.registers.item() if itemsize == 1 else None
            emit_collect(
                THREADS,
                self,
                (strips, weights),
                block.registers.item(),
                warpgroup.registers.item(),
                factor.registers.item(),
                Rows(out, (group, head_dim), itemsize, through, scale),
            )

        refs = [parts[name] for name in ("strips", "of_heads", "came") if name in parts]
        types = [plgpu.RefType(())] * (len(refs) + 1) + [plgpu.Layout.WG_SPLAT] * 4
        scale = factor if scale is None else scale
        values = (*refs, rows, block, warpgroup, factor, scale)
        plgpu.inline_mgpu(arg_types=tuple(types))(emit)(*values)


def _pointer(barrier: Memory) -> Value:
    return utils.memref_ptr(barrier)


def _cluster(what: str) -> None:
    utils.inline_ptx(f"barrier.cluster.{what}.aligned;", has_side_effects=True, convergent=True)


def _wait(barrier: Memory) -> None:
    utils.inline_ptx(
        "{ .reg .pred p; "
        "AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], 0; "
        "@!p bra AGAIN; }",
        _pointer(barrier),
        has_side_effects=True,
    )
