"""How a row of logits is split over blocks."""

import dataclasses

RUN = 16  # neighbouring logits that stay together: 32 or 64 bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """How logits are drawn from.

    Attributes:
      tile: logits that a warp sorts out in the first kernel; they come from all over the row.
      keep: how many of a tile the second kernel looks at. Powers of two.
      warps: of a block of the second kernel, which takes a row.
    """

    tile: int = 512
    keep: int = 16
    warps: int = 16


@dataclasses.dataclass(frozen=True)
class ArgmaxConfig:
    """Attributes: parts, that a row is split into, a block each; warps, of a block."""

    parts: int
    warps: int = 8


def candidates(rows: int, vocab: int) -> list[Config]:
    """At most 6, best guess first.

    tile / keep = 32 keeps 4096 of 131072. A larger tile is less likely to have more of what is
    drawn from than are kept of it, and takes longer to sort.
    """
    if vocab <= 16384:
        return [Config(256, 16, 8), Config(512, 32, 8)]
    return [Config(512, 16), Config(256, 8), Config(1024, 32), Config(512, 16, 8)]


def argmax_candidates(rows: int, vocab: int, cores: int) -> list[ArgmaxConfig]:
    """At most 6, best guess first: about one block a multiprocessor, or one for each row, which
    saves a launch."""
    parts = max(cores // rows, 1)
    parts = min(1 << (parts - 1).bit_length(), max(vocab // 2048, 1))
    found = [ArgmaxConfig(parts), ArgmaxConfig(max(parts // 2, 1)), ArgmaxConfig(1, 32)]
    found += [ArgmaxConfig(1, 16), ArgmaxConfig(2 * parts, 4)]
    return list(dict.fromkeys(found))
