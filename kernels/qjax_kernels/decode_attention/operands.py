"""The tensor-core products of decode attention, and the order of data that they dictate.

The products are swapped: the cache is the left operand, whose 64 rows are tokens (scores) or
features (mix), and the query heads that share a KV head are the columns, 8 at a time. A group of 8
heads thus fills an instruction, where it would leave 7/8 of one with 64 rows of heads empty.

A 16-bit cache is multiplied where TMA put it, in shared memory. An 8-bit cache goes through
registers and becomes float16 on the way, which is exact (see `narrow`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.decode_attention import narrow, places, threads
from qjax_kernels.hopper import over_rows
from qjax_kernels.row_quant import quantize_rows

Ref = Any
THREADS = threads.Threads()


@dataclasses.dataclass(frozen=True)
class Operands:
    """Shapes and types of the products of one KV head.

    Attributes:
      tokens: of the cache, a step; a multiple of 64.
      head_dim: features; a multiple of 16.
      columns: query heads of a KV head, rounded up to a multiple of 8.
      cache: dtype of keys and values.
      query: dtype of queries.
      interpret: runs in the CPU interpreter, where conversions are plain jnp.
    """

    tokens: int
    head_dim: int
    columns: int
    cache: np.dtype
    query: np.dtype
    interpret: bool = False

    @property
    def narrow(self) -> bool:
        """The cache has 8 bits a value."""
        return self.cache.itemsize == 1

    @property
    def compute(self) -> np.dtype:
        """What the tensor cores multiply."""
        return np.dtype(jnp.float16) if self.narrow else self.cache

    @property
    def features(self) -> int:
        """Rows of the mix: head_dim rounded up to a multiple of 64."""
        return -(-self.head_dim // 64) * 64

    @property
    def values_width(self) -> int:
        """Columns of a step's values in shared memory. A product takes 64 features at a time, so
        there are zeros behind head_dim, and the rows that they give are dropped."""
        return self.head_dim if self.narrow else self.features

    @property
    def swizzle(self) -> int:
        """Bytes: the widest that divides a row of the cache."""
        return plgpu.find_swizzle(self.head_dim * self.cache.itemsize * 8)

    @property
    def cache_transforms(self) -> tuple:
        """Of the cache in shared memory. Rows too odd to swizzle stay as they are: their stride
        already spreads them over the banks."""
        return () if self.narrow and self.swizzle < 64 else tiled(self.swizzle, self.cache)

    def keys_buffer(self, *leading: int) -> Any:
        """Shared memory for the keys of a step."""
        shape = (*leading, self.tokens, self.head_dim)
        return plgpu.SMEM(shape, self.cache, transforms=self.cache_transforms)

    def values_buffer(self, *leading: int) -> Any:
        """Shared memory for the values of a step."""
        shape = (*leading, self.tokens, self.values_width)
        return plgpu.SMEM(shape, self.cache, transforms=self.cache_transforms)

    def queries_buffer(self, *leading: int) -> Any:
        """Shared memory for `put_queries`."""
        return self._right(*leading, self.columns, self.head_dim)

    def weights_buffer(self, *leading: int) -> Any:
        """Shared memory for `put_weights`."""
        return self._right(*leading, self.columns, self.tokens)

    def _right(self, *shape: int) -> Any:
        return plgpu.SMEM(shape, self.compute, transforms=self._right_transforms(shape[-1]))

    def _right_transforms(self, columns: int) -> tuple:
        # A left operand in shared memory wants a right one with the same swizzle.
        swizzle = plgpu.find_swizzle(columns * 16) if self.narrow else self.swizzle
        return tiled(swizzle, self.compute)

    def put_queries(self, raw: Ref, queries: Ref) -> None:
        """Store queries [columns, head_dim] for `scores`."""
        if self.interpret:
            x = raw[...]
            queries[...] = narrow.queries(x) if self.narrow else x.astype(self.compute)
            return
        types = plgpu.RefType(()), plgpu.RefType(self._right_transforms(self.head_dim))
        plgpu.inline_mgpu(arg_types=types)(self._emit_put_queries)(raw, queries)

    def scores(self, keys: Ref, queries: Ref) -> jax.Array:
        """keys [tokens, head_dim] @ queries.T, float32 [tokens, columns]."""
        left = self._convert(keys, narrow.keys, narrow.emit_keys) if self.narrow else keys
        return _product(left, queries.T)

    def put_weights(self, weights: jax.Array, buffer: Ref) -> None:
        """Store weights [tokens, columns] for `mix`."""
        weights = weights.astype(self.compute)
        buffer.T[...] = plgpu.layout_cast(weights, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

    def mix(self, values: Ref, weights: Ref) -> jax.Array:
        """values.T @ weights, float32 [features, columns]; of an 8-bit cache, with the rows in
        the order of `narrow.values`."""
        left = self._convert(values, narrow.values, narrow.emit_values) if self.narrow else values.T
        return _product(left, weights.T)

    def over_tokens(self, x: jax.Array, operation: str, scratch: Ref) -> jax.Array:
        """See `hopper.over_rows`; `scratch` has `config.scratch_floats`."""
        return over_rows(x, operation, scratch, interpret=self.interpret)

    @property
    def neighbours(self) -> int:
        """How `mix` orders features, as `places.emit_put_rows` has it."""
        return 2 if self.narrow else 1

    def read(self, ref: Ref, *index: jax.Array) -> jax.Array:
        """One number of 32 bits from global memory, asked for here: left alone, the compiler asks
        where the number is first needed, and what could have been one wait becomes several."""
        if self.interpret:
            return ref[index]
        dtype, widths = ref.dtype, ref.shape[1:]

        def emit(context: Any, ref: Any, *index: Any) -> Any:
            del context
            place, *rest = (i.registers.item() for i in index)
            for i, width in zip(rest, widths, strict=True):
                place = THREADS.add(THREADS.mul(place, width), i)
            signed = True if dtype == jnp.int32 else None
            return FragmentedArray.splat(THREADS.read_word(ref, place), (), is_signed=signed)

        types = plgpu.RefType(()), *[plgpu.Layout.WG_SPLAT] * len(index)
        out = plgpu.ShapeDtypeStruct((), dtype, layout=plgpu.Layout.WG_SPLAT)
        return plgpu.inline_mgpu(arg_types=types, return_type=out)(emit)(ref, *index)

    def put_rows(
        self, mixed: jax.Array, rows: Ref, start: jax.Array, scale: jax.Array | None
    ) -> None:
        """Store features from `start` on of what `mix` returned, in their true order, as columns of
        rows [group, head_dim] of global memory; of 8 bits with a scale."""
        if self.interpret:
            x = narrow.rows(mixed) if self.narrow else mixed.T
            x = x[: rows.shape[0]].astype(self.query)
            if scale is not None:
                x = quantize_rows(x.astype(jnp.float32), rows.dtype, scale, group_sums=False)[0]
            full = jnp.pad(rows[...], ((0, 0), (0, self.features - self.head_dim)))
            rows[...] = lax.dynamic_update_slice(full, x, (start * 0, start))[:, : self.head_dim]
            return
        shape, itemsize = rows.shape, rows.dtype.itemsize

        def emit(context: Any, mixed: Any, memory: Any, start: Any, *scale: Any) -> None:
            del context
            step = scale[0].registers.item() if scale else None
            rows = places.Rows(memory, shape, itemsize, self.query, step)
            registers = mixed.registers.reshape(-1, self.columns // 8, 2)
            first = start.registers.item()
            places.emit_put_rows(THREADS, registers, rows, first, self.neighbours)

        scales = [] if scale is None else [scale]
        types = plgpu.Layout.WGMMA, plgpu.RefType(()), *[plgpu.Layout.WG_SPLAT] * (1 + len(scales))
        plgpu.inline_mgpu(arg_types=types)(emit)(mixed, rows, start, *scales)

    def clear(self, values: Ref, low: jax.Array, high: jax.Array) -> None:
        """Zero the values of all tokens but low .. high of a step."""
        if self.interpret:
            row = jnp.arange(self.tokens)[:, None]
            kept = (row >= low) & (row < high)
            values[...] = jnp.where(kept, values[...], jnp.zeros((), self.cache))
            return
        types = plgpu.RefType(self.cache_transforms), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT
        plgpu.inline_mgpu(arg_types=types)(self._emit_clear)(values, low, high)

    def _emit_clear(self, context: Any, values: Any, low: Any, high: Any) -> None:
        del context
        bounds = low.registers.item(), high.registers.item()
        row_bytes = self.values_width * self.cache.itemsize
        swizzle = self.swizzle if self.cache_transforms else None
        places.emit_clear_rows(THREADS, values, bounds, (self.tokens, row_bytes), swizzle)

    def _convert(self, cache: Ref, plain: Any, emit: Any) -> jax.Array:
        if self.interpret:
            return plain(cache[...])
        step = jax.ShapeDtypeStruct((self.tokens, self.head_dim), self.cache)
        shape = jax.eval_shape(plain, step).shape
        out = plgpu.ShapeDtypeStruct(shape, jnp.float16, layout=plgpu.Layout.WGMMA)
        swizzle = self.swizzle if self.cache_transforms else None

        def emitter(context: Any, source: Any) -> Any:
            del context
            registers = emit(THREADS, source, self.tokens, self.head_dim, self.cache, swizzle)
            layout = out.layout.to_mgpu()
            return FragmentedArray(
                _registers=registers.reshape(layout.registers_shape(out.shape)),
                _layout=layout,
                _is_signed=None,
            )

        types = (plgpu.RefType(self.cache_transforms),)
        return plgpu.inline_mgpu(arg_types=types, return_type=out)(emitter)(cache)

    def _emit_put_queries(self, context: Any, raw: Any, queries: Any) -> None:
        del context
        [tile, _] = self._right_transforms(self.head_dim)
        shape = (self.columns, self.head_dim)
        convert = narrow.emit_query_pair if self.narrow else None
        places.emit_put_queries(THREADS, raw, queries, shape, 2 * tile.tiling[1], convert)


def tiled(swizzle: int, dtype: np.dtype) -> tuple:
    """Transforms of a swizzled operand of the tensor cores."""
    tile = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return tile, plgpu.SwizzleTransform(swizzle)


def _product(left: Any, right: Ref) -> jax.Array:
    """left @ right, float32; left in registers or in shared memory."""

    def multiply(sums: Ref) -> jax.Array:
        plgpu.wgmma(sums, left, right)
        return sums[...]

    shape = (left.shape[0], right.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
