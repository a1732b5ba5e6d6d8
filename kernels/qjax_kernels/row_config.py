"""How the rows of an elementwise kernel with reductions are spread over blocks and warps."""

import dataclasses
import math

VECTOR = 8  # elements a thread loads at once: 16 bytes of bfloat16
LONG = 512  # rows up to here lie side by side in a block
FEW = 264  # rows up to here leave each multiprocessor at most two blocks


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes: warps, of a block; rows, that a block takes, side by side."""

    warps: int
    rows: int = 1

    @property
    def chunk(self) -> int:
        """Columns of each row that a block takes at a time: one vector a thread."""
        return self.warps * 32 * VECTOR // self.rows

    def vectors(self, features: int) -> int:
        """How many of them a thread takes."""
        return math.ceil(features / self.chunk)


def candidates(rows: int, features: int, most: int) -> list[Config]:
    """At most 6, best guess first, with at most `most` vectors a thread (registers).

    A long row is split over the warps of one block. Few rows: as many warps as have a vector each,
    so that every load is in flight at once and the time is that of one. Many rows: about two
    vectors a thread, which is enough in flight while a reduction of one block waits and others
    load, and as few idle lanes as the row's length allows.
    Short rows: half a warp or more for each, several in a block.
    """
    few = rows <= FEW
    if features <= LONG:
        lanes = max(_power_of_two(features) // VECTOR, 16)
        order = (1, 2, 4) if few else (4, 8, 2)
        return [Config(warps, max(warps * 32 // lanes, 1)) for warps in order]
    full = min(max(_power_of_two(features) // (32 * VECTOR), 2), 32)
    fitting = [Config(w) for w in (2, 4, 8, 16, 32) if w <= full]
    fitting = [c for c in fitting if c.vectors(features) <= most] or fitting[-1:]

    def cost(config: Config) -> float:
        vectors = config.vectors(features)
        # A block of 1024 threads leaves no room for a second one.
        crowd = 1.2 if config.warps == 32 else 1.0
        if few:
            return (1 + 0.15 * vectors) * crowd
        idle = vectors * config.chunk / features
        return idle * (1 + 0.1 * abs(math.log2(vectors / 2))) * crowd

    return sorted(fitting, key=cost)[:6]


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
