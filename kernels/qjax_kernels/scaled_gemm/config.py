"""How the Mosaic kernel cuts a product into tiles."""

import dataclasses

import jax

BLOCK = 128  # k and n that share a scale, in the mode with scales for blocks
SHARED_MEMORY = 232448  # bytes a Hopper block may have
_SHARED_MEMORY_OF_ALL = 233472  # of a multiprocessor, of which each block costs another 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of rows x columns of the product of a row operand and a column operand, both K-major.

    Attributes:
      swap: the weights are the row operand and the tokens the columns, so that few tokens waste
        nothing; else the tokens are the rows.
      warpgroups: that compute, each 64 rows of a tile; one more warpgroup loads.
      columns: of a tile; a multiple of 8 up to 256.
      stages: of the ring of shared memory between the loads and the products.
      k_tile: k of a stage; 128, 256 or 512 (or 32 or 64 if K is no multiple of 128); half of
        that for operands of 16 bits.
      splits: blocks of a cluster that share K: each sums a part of it.
      multicast: blocks of a cluster that lie along the rows and load the column operand together.
      store: columns of the product that are staged at a time on the way out.
      resident: blocks that share a multiprocessor, and its memory: one's beginning and end are
        hidden by the other's loads, and smaller shares of the work are spread more evenly.
      promote: fp8 only: k tiles after which the tensor cores' sums are added up in float32
        registers (Hopper's fp8 products keep about 14 bits); 0: never.
      snake: width in tiles of the bands in which the tiles are visited, for the L2 cache.
    """

    swap: bool = True
    warpgroups: int = 1
    columns: int = 8
    stages: int = 8
    k_tile: int = 128
    splits: int = 1
    multicast: int = 1
    store: int = 64
    resident: int = 1
    promote: int = 0
    snake: int = 8

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 64 * self.warpgroups

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.splits * self.multicast

    @property
    def memory(self) -> int:
        """Bytes of shared memory that a block may have."""
        return min(SHARED_MEMORY, _SHARED_MEMORY_OF_ALL // self.resident - 1024)

    @property
    def owned(self) -> int:
        """Columns of a tile that one block of those that share K finishes."""
        owners = next(n for n in range(self.splits, 0, -1) if self.columns % (8 * n) == 0)
        return self.columns // owners


def blocks_of(x_scale: jax.Array, scale: jax.Array, values: jax.Array) -> bool:
    """Whether the scales are those of blocks of 128 k (and 128 n)."""
    out, features = values.shape
    blocks = (-(-out // BLOCK), features // BLOCK)
    return (
        scale.shape == blocks
        and features % BLOCK == 0
        and x_scale.ndim > 0
        and x_scale.shape[-1] == blocks[1]
        and scale.shape not in ((1, 1), (out, 1))
    )
