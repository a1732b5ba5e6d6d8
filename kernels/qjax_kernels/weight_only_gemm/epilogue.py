"""From the sums of a block of 64 rows to the result: scales, bias, residual, and out.

RMSNorm's part in it is split: the product before adds the residual and multiplies the sum by the
norm's gain, the product behind by 1 / rms, of which it gets the sums of squares of 64 features each
(Zhang & Sennrich 2019, equation 4, where 1 / rms is the same for all features of a token)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.gate import gated
from qjax_kernels.hopper import EXCHANGED, load_column, load_row, over_rows, swizzled
from qjax_kernels.weight_only_gemm.config import piece_of
from qjax_kernels.weight_only_gemm.layout import Prepared

Ref = Any
SLOTS = 2  # pieces under way


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What one warpgroup does with the sums [64 rows, tile] of a block.

    Attributes:
      given: references to the operands, by name.
      out: [tokens, out], global.
      scaled, squares: of a product with a gain, global: [tokens, out], the sum with the residual
        times the gain; [blocks, tokens], sums of squares of that sum; or None.
      staged: [slots, piece, 64], shared: pieces of the residual and the result.
      token_scales: [at least tile], shared; or None.
      copied: barriers.
      barrier: the first of this warpgroup's: one for each slot, then one for `tokens`.
      tile: tokens.
      per_channel: the weight's scale is not in the sums yet.
      multiplier: of everything.
      activation: of gated units, whose gates and ups are 8 and 8 rows in turn; or None.
      features, eps: of the norm whose sums of squares are an operand.
      shared: shared memory for the norms, by name, see `scratch`.
    """

    given: dict[str, Ref]
    out: Ref
    staged: Ref
    token_scales: Ref | None
    copied: Ref
    barrier: Any
    tile: int
    per_channel: bool
    multiplier: float = 1.0
    activation: str | None = None
    features: int = 0
    eps: float = 0.0
    shared: dict[str, Ref] = dataclasses.field(default_factory=dict)
    scaled: Ref | None = None
    squares: Ref | None = None
    interpret: bool = False

    @property
    def piece(self) -> int:
        """Tokens that leave at a time."""
        return piece_of(self.tile)

    @property
    def pieces(self) -> int:
        """Of a tile."""
        return self.tile // self.piece

    @property
    def fetches(self) -> bool:
        """Something is to be copied before the end."""
        return self._vector or "residual" in self.given or "squares" in self.given

    def fetch(self, block: Any, first: Any) -> None:
        """Start to copy what the tokens from `first` on need."""
        if self._vector:
            source = self.given["token_scale"].at[pl.ds(first, self.tile)]
            plgpu.copy_gmem_to_smem(source, self._scales, self.copied.at[self.barrier + SLOTS])
        if "squares" in self.given:
            # Not a static 0, with which rows that are not there would be refused.
            rows = pl.ds(block * 0, self.shared["parts"].shape[0])
            source = self.given["squares"].at[rows, pl.ds(first, self.tile)]
            plgpu.copy_gmem_to_smem(source, self.shared["parts"], self.shared["arrived"].at[0])
        if "residual" in self.given:
            # The buffers are those of the last tile's results.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for piece in range(min(SLOTS, self.pieces)):
                self._fetch_residual(block, first, piece)

    def finish(self, y: jax.Array, block: Any, first: Any) -> None:
        """Store the result of sums y, which `fetch` has prepared."""
        y = self._scaled(y, block)
        dtype = self.out.dtype
        for piece in range(self.pieces):
            slot = self.staged.at[piece % SLOTS]
            part = y[:, piece * self.piece : (piece + 1) * self.piece]
            if "residual" in self.given:
                plgpu.barrier_wait(self.copied.at[self.barrier + piece % SLOTS])
                there = plgpu.load(slot.T, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
                part = part + plgpu.layout_cast(there, plgpu.Layout.WGMMA).astype(jnp.float32)
            else:
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            if self.scaled is not None:
                self._put_scaled(part, block, first, piece)
            if self.activation is None:
                part = plgpu.layout_cast(part.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            else:
                part = gated(part, self.activation, rows=True, interpret=self.interpret)
            slot.T[...] = part.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, self._piece_of(self.out, block, first, piece))
            ahead = piece - 1 + SLOTS
            if "residual" in self.given and piece >= 1 and ahead < self.pieces:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                self._fetch_residual(block, first, ahead)

    def _put_scaled(self, y: jax.Array, block: Any, first: Any, piece: int) -> None:
        """Store the sum y [64 rows, piece] times the gain, and its squares' sums."""
        scratch, tokens = self.shared["reduced"], pl.ds(piece * self.piece, self.piece)
        squares = over_rows(y * y, "add", scratch, interpret=self.interpret)
        self.shared["squared"].at[tokens][...] = squares
        gain = load_row(self.given["gain"].at[pl.ds(block * 64, 64)])
        scaled = (y * _of_rows(gain, y)).astype(self.out.dtype)
        slot = self.shared["scaled"].at[piece % SLOTS]
        slot.T[...] = plgpu.layout_cast(scaled, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, self._piece_of(self.scaled, block, first, piece))
        assert self.squares is not None
        there = self.squares.at[block, pl.ds(first + piece * self.piece, self.piece)]
        plgpu.copy_smem_to_gmem(self.shared["squared"].at[tokens], there)

    @property
    def _vector(self) -> bool:
        """Each token has a scale."""
        return "token_scale" in self.given and self.given["token_scale"].shape[0] > 1

    @property
    def _scales(self) -> Ref:
        return self.token_scales.at[pl.ds(0, self.tile)]  # type: ignore[union-attr]

    def _scaled(self, y: jax.Array, block: Any) -> jax.Array:
        block = jnp.minimum(block, self.given["words"].shape[0] - 1)
        if self.per_channel:
            y = y * _of_rows(load_row(self.given["scale"].at[block, 0]), y)
        multiplier: Any = self.multiplier
        if "factor" in self.given:
            multiplier = self.given["factor"][0] * multiplier
        if self._vector:
            plgpu.barrier_wait(self.copied.at[self.barrier + SLOTS])
            scales = load_column(self._scales) * multiplier
            y = y * lax.broadcast_in_dim(scales, y.shape, [1])
        elif "token_scale" in self.given:
            y = y * (self.given["token_scale"][0] * multiplier)
        elif "factor" in self.given:
            y = y * multiplier
        if "squares" in self.given:
            y = y * lax.broadcast_in_dim(self._inverse_rms(), y.shape, [1])
        if "bias" in self.given:
            y = y + _of_rows(load_row(self.given["bias"].at[pl.ds(block * 64, 64)]), y)
        return y

    def _inverse_rms(self) -> jax.Array:
        """Of each token of the tile."""
        parts = self.shared["parts"]
        plgpu.barrier_wait(self.shared["arrived"].at[0])
        rows = [
            plgpu.load(parts.at[pl.ds(64 * i, 64)], layout=plgpu.Layout.WGMMA, optimized=False)
            for i in range(parts.shape[0] // 64)
        ]
        total = over_rows(
            sum(rows[1:], rows[0]), "add", self.shared["reduced"], interpret=self.interpret
        )
        return lax.rsqrt(total * (1 / self.features) + self.eps)

    def _piece_of(self, ref: Ref, block: Any, first: Any, piece: int) -> Ref:
        tokens = pl.ds(first + piece * self.piece, self.piece)
        rows = rows_out(self.activation)
        return ref.at[tokens, pl.ds(block * rows, rows)]

    def _fetch_residual(self, block: Any, first: Any, piece: int) -> None:
        plgpu.copy_gmem_to_smem(
            self._piece_of(self.given["residual"], block, first, piece),
            self.staged.at[piece % SLOTS],
            self.copied.at[self.barrier + piece % SLOTS],
        )


def scratch(
    given: dict[str, jax.Array],
    tile: int,
    out_dtype: jnp.dtype,
    warpgroups: int,
    activation: str | None,
) -> dict[str, Any]:
    """Shared memory for an `Epilogue` of each of some warpgroups: `staged`,
    `copied`, and `token_scales` if the tokens have some."""
    piece = piece_of(tile)
    slots = min(SLOTS, tile // piece)
    rows = rows_out(activation)
    transforms = swizzled(rows, jnp.dtype(out_dtype).itemsize * 8)
    found: dict[str, Any] = {
        "staged": plgpu.SMEM((warpgroups, slots, piece, rows), out_dtype, transforms=transforms),
        "copied": plgpu.Barrier(num_barriers=warpgroups * (SLOTS + 1)),
    }
    if "token_scale" in given:
        # Each warpgroup's begin at a multiple of 128 bytes, as the copy engine needs.
        found["token_scales"] = plgpu.SMEM((warpgroups, -(-tile // 32) * 32), jnp.float32)
    return found


def norm_shared_memory(parts: int, gain: bool, tile: int) -> int:
    """Bytes of `norm_scratch`, at least."""
    return 4 * tile * (parts + 64) + gain * 2 * 64 * tile + 4 * EXCHANGED + 1024


def norm_scratch(given: dict[str, jax.Array], tile: int, out_dtype: jnp.dtype) -> dict[str, Any]:
    """`shared` of one `Epilogue`."""
    piece = piece_of(tile)
    found: dict[str, Any] = {}
    if "squares" in given:
        # What is not there of them, the copy engine fills with zeros.
        parts = -(-given["squares"].shape[0] // 64) * 64
        found["parts"] = plgpu.SMEM((parts, tile), jnp.float32)
        found["arrived"] = plgpu.Barrier(num_barriers=1)
    if "gain" in given:
        transforms = swizzled(64, jnp.dtype(out_dtype).itemsize * 8)
        slots = min(SLOTS, tile // piece)
        found["scaled"] = plgpu.SMEM((slots, piece, 64), out_dtype, transforms=transforms)
        found["squared"] = plgpu.SMEM((tile,), jnp.float32)
    if found:
        found["reduced"] = plgpu.SMEM((EXCHANGED,), jnp.float32)
    return found


def rows_out(activation: str | None) -> int:
    """Of the result, of the 64 of a block."""
    return 64 if activation is None else 32


def per_channel(weight: Prepared) -> bool:
    """One scale for all columns of a row: it multiplies the sum."""
    return weight.groups == 1


def _of_rows(numbers: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(numbers.astype(jnp.float32), like.shape, [0])
