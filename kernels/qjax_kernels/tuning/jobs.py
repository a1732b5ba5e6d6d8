"""What is tuned: ops times shapes times m, cut into jobs for the workers."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Products and attention of a model.

    Attributes:
      linear: (n, k) of fused qkv, attention's output, fused gate and up, down.
      attention: (query heads, KV heads, head_dim) on one GPU; None: no model.
    """

    linear: tuple[tuple[int, int], ...]
    attention: tuple[int, int, int] | None = None


SHAPES = {
    "llama3-8b": Shapes(((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)), (32, 8, 128)),
    "llama3-70b-tp4": Shapes(
        ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)), (16, 2, 128)
    ),
    "square": Shapes(((8192, 8192),)),
}
M = (1, 16, 64, 256, 2048, 8192)
CONTEXTS = (1024, 8192)  # tokens that a sequence may have
MOST_SEQUENCES = 256
MOST_CACHE = 4e9  # bytes: what is larger is not tuned
PAGE = 64  # tokens
LINEAR_OPS = ("w4a16", "w8a16", "fp8", "int8", "w4a8")
DEFAULT_OPS = (*LINEAR_OPS, "decode_attention")
# bf16 only where it is asked for: plain_gemm leaves more than 64 tokens to XLA anyway.
OPS = (*DEFAULT_OPS, "bf16")
CHUNK = 3  # sizes of a job: small enough that the last jobs end together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Sizes of one op that share their weights.

    Attributes:
      op: of OPS.
      ms: tokens, or sequences of decode_attention.
      n, k: outputs and inputs; of decode_attention KV heads times head_dim, and tokens.
      group_size: inputs that share a scale, None for all; of decode_attention query heads of a KV
        head.
      cache: dtype of decode_attention's cache.
      head_dim: of decode_attention.
    """

    op: str
    ms: tuple[int, ...]
    n: int
    k: int
    group_size: int | None = None
    cache: str = ""
    head_dim: int = 0

    def __str__(self) -> str:
        cache = f" {self.cache}x{self.head_dim}" if self.cache else ""
        return f"{self.op}{cache} m={','.join(map(str, self.ms))} n={self.n} k={self.k}"

    @staticmethod
    def of(fields: dict[str, Any]) -> "Job":
        """From JSON."""
        return Job(**fields | {"ms": tuple(fields["ms"])})


def shapes_of(name: str) -> Shapes:
    """A preset's, or those of '4096x14336', outputs times inputs.

    Raises:
      ValueError: neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return Shapes(((int(found[1]), int(found[2])),))
    raise ValueError(f"unknown shapes {name!r}; choose of: {', '.join(SHAPES)}, or OUTxIN")


def jobs(
    ops: Iterable[str], shapes: Iterable[str], ms: Sequence[int], group_size: int = 128
) -> Iterator[Job]:
    """All work, the large sizes first, so that no worker is left with one at the end.

    Args:
      ops: of OPS.
      shapes: names for `shapes_of`.
      ms: tokens, or sequences.
      group_size: of the int4 ops.
    """
    chosen = [shapes_of(name) for name in shapes]
    linear = list(dict.fromkeys(shape for one in chosen for shape in one.linear))
    heads = list(dict.fromkeys(one.attention for one in chosen if one.attention))
    ordered = sorted(set(ms))
    chunks = [tuple(ordered[i : i + CHUNK]) for i in range(0, len(ordered), CHUNK)]
    few = tuple(m for m in ordered if m <= MOST_SEQUENCES)
    for chunk in reversed(chunks):
        for op in ops:
            if op == "decode_attention":
                continue
            for n, k in linear:
                group = group_size if op in ("w4a16", "w4a8") else None
                yield Job(op=op, ms=chunk, n=n, k=k, group_size=group)
    if "decode_attention" in ops:
        for query_heads, kv_heads, head_dim in heads:
            yield from _attention(query_heads, kv_heads, head_dim, few)


def _attention(heads: int, kv_heads: int, head_dim: int, ms: Sequence[int]) -> Iterator[Job]:
    for context in CONTEXTS:
        for cache, size in (("bfloat16", 2), ("float8_e4m3fn", 1)):
            each = 2 * size * kv_heads * head_dim * context
            fitting = tuple(m for m in ms if m * each <= MOST_CACHE)
            if fitting:
                yield Job(
                    op="decode_attention",
                    ms=fitting,
                    n=kv_heads * head_dim,
                    k=context,
                    group_size=heads // kv_heads,
                    cache=cache,
                    head_dim=head_dim,
                )
