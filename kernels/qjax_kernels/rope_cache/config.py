"""How heads and tokens are spread over blocks."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes: warps, of a block; heads and tokens, that a block takes. Powers of two."""

    warps: int
    heads: int
    tokens: int


def candidates(tokens: int, heads: int, kv_heads: int, head_dim: int) -> list[Config]:
    """At most 6, best guess first.

    The heads of a block are all queries, all keys or all values. Few tokens: small blocks, for more
    of them. Many: a thread takes 16 bytes of each half of a head, once or twice.
    """
    most = math.gcd(heads, kv_heads)
    most = min(most & -most, 8)  # the largest power of two in it
    lanes = 2 ** max(head_dim // 16 - 1, 0).bit_length()  # of 8 elements in each half of a head

    def config(warps: int, heads: int, vectors: int) -> Config:
        rows = max(warps * 32 * vectors // lanes, 1)
        return Config(warps, min(heads, rows), max(rows // min(heads, rows), 1))

    if tokens <= 64:
        small = [config(1, min(4, most), 1), config(2, most, 1), config(4, most, 1)]
        return list(dict.fromkeys(small))
    large = [(4, 1), (4, 2), (8, 1), (2, 2), (8, 2), (4, 4)]
    return list(dict.fromkeys(config(warps, most, vectors) for warps, vectors in large))
