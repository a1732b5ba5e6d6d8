"""What the Mosaic kernel puts into shared memory, and whether a tiling can be had at all."""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.scaled_gemm.config import BLOCK
from qjax_kernels.scaled_gemm.tiling import Tiling, round_up


def scratch(t: Tiling) -> dict[str, Any]:
    """All shared memory and barriers of a block, by name."""
    c = t.config
    bits = 8 * jnp.dtype(t.out_dtype).itemsize
    found: dict[str, Any] = {
        # The sums of a split K are exchanged where the stages were, if no other tile follows.
        "ring": plgpu.RefUnion(_ring(t), [_partial(t)]) if t.aliased else _ring(t),
        "staging": plgpu.SMEM(
            (c.warpgroups, t.slots, *t.staging),
            t.out_dtype,
            transforms=_transforms(t.staging[1], bits) if t.swizzled else (),
        ),
        "full": plgpu.Barrier(num_arrivals=2 + t.blocked, num_barriers=c.stages),
        "empty": plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages)
        if c.multicast == 1
        else plgpu.ClusterBarrier(
            collective_axes=("along",), num_arrivals=c.warpgroups, num_barriers=c.stages
        ),
    }
    if c.splits > 1:
        if not t.aliased:
            found["partial"] = _partial(t)
        found["summed"] = plgpu.ClusterBarrier(
            collective_axes=("split",), num_arrivals=1, num_barriers=2 * c.warpgroups
        )
        found["drained"] = plgpu.Barrier(num_arrivals=c.warpgroups)
    if t.vectors:
        found["fetched"] = plgpu.Barrier(
            num_arrivals=t.vectors, num_barriers=_several(c.warpgroups)
        )
    if t.token_scales or t.output_scales:
        found["scales"] = plgpu.SMEM((c.warpgroups, t.vector), jnp.float32)
    if t.blocked:
        found["scales"] = plgpu.SMEM((c.warpgroups, round_up(t.scale_blocks, 32)), jnp.float32)
    if t.bias is not None:
        found["bias"] = plgpu.SMEM((c.warpgroups, t.biases), t.bias)
    if t.residual:
        barriers = _several(c.warpgroups * t.slots)
        found["residual"] = plgpu.Barrier(num_arrivals=1, num_barriers=barriers)
    return found


def shared_memory(t: Tiling) -> int:
    """Bytes that a block asks for."""
    total = barriers = 0
    for name, refs in scratch(t).items():
        if name == "ring" and t.aliased:
            total += max(_bytes(_ring(t)), _bytes([_partial(t)]))
        elif isinstance(refs, plgpu.Barrier | plgpu.ClusterBarrier):
            barriers += 8 * math.prod(refs.num_barriers)
        else:
            total += _bytes(refs if isinstance(refs, list) else [refs])
    return total + barriers


def refusal(t: Tiling) -> str | None:
    """Why no kernel has this tiling; None if one has."""
    c = t.config
    line = BLOCK // t.operand_bytes  # numbers of K in 128 bytes
    granule = 8 * c.multicast if c.multicast > 1 else 8
    if c.columns % granule or c.columns > 256:
        return f"{c.columns} columns are no multiple of {granule} up to 256"
    if not t.registers_suffice:
        return f"sums of {t.sum_registers} registers a thread do not fit"
    if c.cluster > 8:
        return f"a cluster of {c.cluster} blocks does not fit"
    if t.steps < c.splits:
        return f"K = {t.k} has fewer than {c.splits} tiles of {c.k_tile}"
    if not 2 <= c.stages <= 32:
        return f"{c.stages} stages are not between 2 and 32"
    if t.k % min(c.k_tile, line) or c.k_tile % min(c.k_tile, line):
        return f"K = {t.k} is no multiple of {min(c.k_tile, line)}"
    if t.blocked and c.k_tile != BLOCK:
        return f"scales for blocks need a k_tile of {BLOCK}"
    if t.blocked and not c.swap and BLOCK % c.columns:
        return f"a tile of {c.columns} columns has several scales for blocks"
    if t.activation and not c.swap and t.staged % 16:
        return f"{t.staged} columns at a time are no pairs of 8 gates and 8 ups"
    if c.resident > 1 and t.moved_registers:
        return f"{c.resident} blocks on a multiprocessor leave no registers to hand over"
    if (need := shared_memory(t)) > c.memory:
        return f"the tiles need {need} bytes of shared memory, of {c.memory}"
    return None


def _ring(t: Tiling) -> list[Any]:
    """The stages: row operand, column operand, and the scales of the tokens if for blocks."""
    c = t.config
    wide = _transforms(c.k_tile, 8 * t.operand_bytes)
    found = [
        plgpu.SMEM((c.stages, c.rows, c.k_tile), t.dtype, transforms=wide),
        plgpu.SMEM((c.stages, c.columns, c.k_tile), t.dtype, transforms=wide),
    ]
    if t.blocked:
        found.append(plgpu.SMEM((c.stages, round_up(t.token_blocks, 32)), jnp.float32))
    return found


def _partial(t: Tiling) -> Any:
    """A block's sums over its part of K, piece by piece for the blocks that finish them."""
    c = t.config
    return plgpu.SMEM((c.warpgroups, t.owners, 64, c.owned), t.accumulator)


def _transforms(columns: int, bits: int) -> tuple[Any, ...]:
    swizzle = plgpu.find_swizzle(columns * bits)
    return (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),
        plgpu.SwizzleTransform(swizzle),
    )


def _bytes(refs: list[Any]) -> int:
    """Of arrays in shared memory, each of which starts at a multiple of 1024."""
    return sum(round_up(math.prod(r.shape) * jnp.dtype(r.dtype).itemsize, 1024) for r in refs)


def _several(barriers: int) -> int:
    """Only a barrier that is one of several can be named by its number."""
    return max(2, barriers)
