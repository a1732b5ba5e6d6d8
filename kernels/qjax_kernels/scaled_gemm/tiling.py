"""One call of the Mosaic kernel as static numbers: its tiles, its blocks, its registers."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from qjax_kernels.scaled_gemm.config import BLOCK, Config

_REGISTERS = 512  # of a multiprocessor, for each of 128 threads
_LOADER_REGISTERS = 40
_SPARE_REGISTERS = 30  # of a thread, beside the sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """A product [m, k] x [n, k] -> [m, n], or [m, n/2] with an activation, and how it is cut.

    Attributes:
      m, n, k: sizes.
      config: tiles.
      dtype: of both operands; those of 16 bits have no scales.
      out_dtype: of the result and of the residual.
      token_scales: x has a scale for each row, not one in all.
      output_scales: the weight has a scale for each output, not one in all.
      blocked: there are scales for blocks of 128 k on both sides instead.
      bias: its dtype, or None.
      residual: whether one is added.
      activation: 'silu', 'gelu' or 'gelu_tanh': rows of the weight are gates and ups, 8 and 8 in
        turn, and the result is activation(gate) * up; None: the product itself.
      requantized: the result is divided by one scale and rounded to out_dtype, int8 or e4m3.
      cores: multiprocessors of the GPU.
      interpret: whether the kernel runs in the interpreter.
    """

    m: int
    n: int
    k: int
    config: Config
    dtype: Any
    out_dtype: Any
    token_scales: bool = True
    output_scales: bool = True
    blocked: bool = False
    bias: Any = None
    residual: bool = False
    activation: str | None = None
    requantized: bool = False
    cores: int = 132
    interpret: bool = False

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.activation else self.n

    @property
    def scaled(self) -> bool:
        """The operands are numbers to be scaled."""
        return self.operand_bytes == 1

    @property
    def operand_bytes(self) -> int:
        """Of a number of an operand."""
        return int(jnp.dtype(self.dtype).itemsize)

    @property
    def row_size(self) -> int:
        """Rows of the product as the kernel sees it."""
        return self.n if self.config.swap else self.m

    @property
    def column_size(self) -> int:
        """Columns of the product as the kernel sees it."""
        return self.m if self.config.swap else self.n

    @property
    def row_tiles(self) -> int:
        """Tiles along the rows, counting those that a cluster takes together as one."""
        return _quotient(self.row_size, self.config.rows * self.config.multicast)

    @property
    def column_tiles(self) -> int:
        """Tiles along the columns."""
        return _quotient(self.column_size, self.config.columns)

    @property
    def tiles(self) -> int:
        """Pieces of work for one cluster."""
        return self.row_tiles * self.column_tiles

    @property
    def clusters(self) -> int:
        """Clusters that are launched."""
        at_once = resident_clusters(self.cores, self.config.cluster) * self.config.resident
        return min(self.tiles, at_once)

    @property
    def blocks(self) -> int:
        """Blocks that are launched."""
        return self.clusters * self.config.cluster

    @property
    def once(self) -> bool:
        """Each cluster has one tile."""
        return self.tiles == self.clusters

    @property
    def steps(self) -> int:
        """Stages' worth of K."""
        return _quotient(self.k, self.config.k_tile)

    @property
    def owners(self) -> int:
        """Blocks, of those that share K, that finish a part of the tile."""
        return self.config.columns // self.config.owned

    @property
    def staged(self) -> int:
        """Columns that leave in one copy."""
        return math.gcd(self.config.owned, self.config.store)

    @property
    def slots(self) -> int:
        """Staging buffers of a warpgroup: the residual comes in through them too, ahead of time."""
        return min(self.config.owned // self.staged, 4 if self.residual else 2)

    @property
    def accumulator(self) -> Any:
        """Type of the sums."""
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32

    @property
    def chunk(self) -> int:
        """Stages whose sum stays in the tensor cores; 0 for all of them."""
        return 1 if self.blocked else self.config.promote

    @property
    def vector(self) -> int:
        """Floats of shared memory for the scales of a warpgroup: 64 rows, then the columns."""
        return 64 + round_up(self.config.columns, 32)

    @property
    def vectors(self) -> int:
        """Copies that fetch a tile's scales and bias."""
        return self.token_scales + self.output_scales + self.blocked + (self.bias is not None)

    @property
    def biases(self) -> int:
        """Outputs of a tile of one warpgroup."""
        return 64 if self.config.swap else round_up(self.config.columns, 64)

    @property
    def aliased(self) -> bool:
        """The sums of a split K are exchanged where the stages were."""
        return self.config.splits > 1 and self.once

    @property
    def scale_blocks(self) -> int:
        """Scales of a weight's row of blocks, in whole 16 bytes."""
        return round_up(self.k // BLOCK, 4)

    @property
    def token_blocks(self) -> int:
        """Scales of tokens that a stage brings: those of the tile."""
        return self.config.columns if self.config.swap else self.config.rows

    @property
    def launch_registers(self) -> int:
        """Registers of each thread at the start: an even share."""
        groups = (self.config.warpgroups + 1) * self.config.resident
        return min(255, _REGISTERS // groups // 8 * 8)

    @property
    def sum_registers(self) -> int:
        """Registers of a thread that hold sums."""
        return self.config.columns // 2 * (2 if self.chunk else 1)

    @property
    def moved_registers(self) -> tuple[int, int] | None:
        """Registers of a thread that multiplies and of one that loads, after some are handed over.

        None: the even share is plenty.
        """
        groups = self.config.warpgroups
        if groups == 1 or self.launch_registers >= 2 * self.sum_registers + 40:
            return None
        left = self.launch_registers * (groups + 1) - _LOADER_REGISTERS
        return min(240, left // groups // 8 * 8), _LOADER_REGISTERS

    @property
    def registers_suffice(self) -> bool:
        """The sums fit, beside what every thread needs.

        Sums in the tensor cores must fit an even share: the assembler wants them to.
        """
        have = self.launch_registers
        if self.chunk and self.moved_registers:
            have = self.moved_registers[0]
        return have >= self.sum_registers + _SPARE_REGISTERS

    @property
    def staging(self) -> tuple[int, int]:
        """Shape of a staging buffer, as the result lies in memory."""
        halves = 2 if self.activation else 1
        return (self.staged, 64 // halves) if self.config.swap else (64, self.staged // halves)

    @property
    def swizzled(self) -> bool:
        """Staging buffers are swizzled, so have no bank conflicts.

        Copies of swizzled memory move whole tiles of 8 rows and some columns, so only a result
        that ends with a tile can be clipped. Copies of plain memory are clipped anywhere.
        """
        size = jnp.dtype(self.out_dtype).itemsize
        if self.activation and self.config.swap and size != 2:
            return False  # written a number at a time
        swizzle = math.gcd(self.staging[1] * size, 128)
        clipped = (self.m % 8 and self.m > 8) or self.outputs * size % swizzle
        return swizzle >= 32 and not clipped


def resident_clusters(cores: int, size: int) -> int:
    """Clusters that run at once: a cluster stays within a group of some 16 multiprocessors.

    A kernel that loops over its tiles must not launch more: the last ones would start when the
    first have ended. The groups are not alike: on an H200 with 132 multiprocessors, 32 clusters of
    4 take two rounds.
    """
    return max(1, cores // size if size <= 2 else cores // 18 * (16 // size))


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is no smaller than size."""
    return _quotient(size, multiple) * multiple


def _quotient(size: int, divisor: int) -> int:
    return -(-size // divisor)
