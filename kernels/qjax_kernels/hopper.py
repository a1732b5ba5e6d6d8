"""What the Mosaic GPU kernels share."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


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
