"""What the Mosaic GPU kernels share."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

EXCHANGED = 512  # floats that the warps of a warpgroup exchange in `over_rows`


def swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """Transforms that let the copy engine and `wgmma` share a tile [rows, columns]."""
    swizzle = plgpu.find_swizzle(columns * bits)
    return (plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))


def load_row(ref: Any) -> jax.Array:
    """One number for each of the 64 rows of an accumulator, beside it in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def load_column(ref: Any) -> jax.Array:
    """One number for each of the columns of an accumulator, beside it in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def over_rows(x: jax.Array, operation: str, scratch: Any, *, interpret: bool) -> jax.Array:
    """The maximum ('max') or the sum ('add') of an accumulator [rows, columns] over the rows.

    Pallas keeps one piece of shared memory for this in a block, which warpgroups would write at
    once: each has a `scratch` of its own, of EXCHANGED floats (fewer for fewer columns).
    """
    if interpret:
        return x.max(0) if operation == "max" else x.sum(0)

    def emit(context: Any, x: Any, scratch: Any) -> Any:
        del context
        return x.reduce(operation, 0, scratch)

    layout = plgpu.Layout.WGMMA
    out = plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=layout.reduce(0))
    types = layout, plgpu.RefType(())
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(emit)(x, scratch)
