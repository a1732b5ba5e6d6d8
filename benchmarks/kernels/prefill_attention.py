"""`python -m benchmarks.kernels.prefill_attention`: prompts and chunks, checked and timed.

A line for each implementation and candidate: microseconds, operations a second, the share of the
bound, errors. The bound is the time that the sums over what is seen need at the tensor cores' peak,
or the bytes at 4.1 TB/s. Errors are against float64, of all heads of some queries (at the ends of
tiles and sequences, and others); `rows` is the largest of a head. What must not be read counts:
rows of pages that nobody sees hold NaN, table entries that nobody needs an impossible page.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels import target, triton_launch
from qjax_kernels.prefill_attention import cudnn, triton, xla
from qjax_kernels.prefill_attention.config import Config, candidates
from qjax_kernels.prefill_attention.launch import most_seen

from benchmarks.kernels.bound import BANDWIDTH, BF16, L2
from benchmarks.kernels.timing import run_kernels

FP8 = jnp.float8_e4m3fn
CHECKED = 24  # queries
Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
      tokens: of a prompt or chunk.
      context: tokens before the chunk; None: a prompt, which is not in pages.
      spread: chunks of 0 to `tokens` tokens behind 0 to `context`; otherwise all are full.
    """

    title: str
    batch: int
    tokens: int
    context: int | None = None
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    cache: Any = jnp.bfloat16
    page_size: int = 64
    spread: bool = False
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    quick: bool = False

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens before the chunk and of it, int32 [batch] each."""
        context = np.full(self.batch, self.context or 0)
        lengths = np.full(self.batch, self.tokens)
        if self.spread:
            rng = np.random.default_rng(0)
            lengths = rng.integers(0, self.tokens + 1, self.batch)
            lengths[:2] = self.tokens, self.tokens - 1
            context = rng.integers(0, (self.context or 0) + 1, self.batch)
        return context.astype(np.int32), lengths.astype(np.int32)

    @property
    def pages(self) -> int:
        """Of a sequence, at most."""
        return -(-((self.context or 0) + self.tokens) // self.page_size)

    @functools.cached_property
    def seen(self) -> float:
        """Pairs of a query and a key, of one head."""
        total = 0
        for before, n in zip(*self.sizes, strict=True):
            keys = before + 1 + np.arange(n)
            total += np.minimum(keys, self.window or keys.max(initial=0)).sum()
        return float(total)

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 4.0 * self.heads * self.head_dim * self.seen

    @property
    def bytes(self) -> float:
        """Of queries, results, and of keys and values that are seen."""
        context, lengths = self.sizes
        first = 0 if self.window is None else np.maximum(context + 1 - self.window, 0)
        keys = np.where(lengths > 0, context + lengths - first, 0).sum()
        kept = 2 * keys * self.kv_heads * self.head_dim * jnp.dtype(self.cache).itemsize
        return float(kept + 4 * lengths.sum() * self.heads * self.head_dim)

    @property
    def bound(self) -> float:
        """Microseconds."""
        return 1e6 * max(self.operations / BF16, self.bytes / BANDWIDTH)


def cases() -> Iterator[Case]:
    """Those that the project is judged by first."""
    yield Case("prompts, 8 x 2048", 8, 2048, quick=True)
    yield Case("prompts, 1 x 2048", 1, 2048, quick=True)
    yield Case("prompts, 8 x 0..2048", 8, 2048, spread=True, quick=True)
    yield Case("prompts, 1 x 16384", 1, 16384)
    yield Case("prompts, 8 x 2048, 32 KV heads", 8, 2048, kv_heads=32)
    yield Case("prompts, 8 x 2048, window 512", 8, 2048, window=512, quick=True)
    yield Case("prompts, 8 x 0..2048, window 512", 8, 2048, spread=True, window=512, quick=True)
    yield Case("prompts, 8 x 2048, cap, ALiBi", 8, 2048, soft_cap=30.0, alibi=True, quick=True)
    yield Case("prompts, 8 x 2048, head_dim 64", 8, 2048, head_dim=64)
    yield Case("prompts, 8 x 2048, head_dim 80", 8, 2048, heads=32, kv_heads=32, head_dim=80)
    yield Case("prompts, 8 x 2048, head_dim 256", 8, 2048, heads=16, kv_heads=8, head_dim=256)
    yield Case("prompts, 64 x 128", 64, 128)
    for name, cache in (("bf16", jnp.bfloat16), ("fp8", FP8), ("int8", jnp.int8)):
        yield Case(f"chunks, 8 x 512 behind 3584, {name}", 8, 512, 3584, cache=cache, quick=True)
        yield Case(
            f"chunks, 16 x 0..256 behind 0..4096, {name}", 16, 256, 4096, cache=cache, spread=True,
            quick=name != "int8",
        )  # fmt: skip
        yield Case(f"chunks, 1 x 8 behind 32768, {name}", 1, 8, 32768, cache=cache, quick=True)
    yield Case("chunks, 8 x 512 behind 3584, pages of 16", 8, 512, 3584, page_size=16)
    yield Case("chunks, 8 x 512 behind 3584, pages of 256", 8, 512, 3584, page_size=256)
    yield Case(
        "chunks, 8 x 512 behind 3584, window, cap, ALiBi", 8, 512, 3584, window=1000,
        soft_cap=30.0, alibi=True, spread=True, quick=True,
    )  # fmt: skip


def arguments(case: Case, seed: int) -> Arrays:
    """Of `prefill_attention`, or of `paged_prefill_attention`."""
    keys = jax.random.split(jax.random.key(seed), 3)
    rng = np.random.default_rng(seed)
    q = jax.random.normal(keys[0], (case.batch, case.tokens, case.heads, case.head_dim))
    q = q.astype(jnp.bfloat16)
    slopes = jnp.float32(rng.uniform(0.001, 0.1, case.heads)) if case.alibi else None
    context, lengths = case.sizes
    if case.context is None:
        shape = (case.batch, case.tokens, case.kv_heads, case.head_dim)
        k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
        return q, k, v, jnp.asarray(lengths) if case.spread else None, slopes
    pages, size = case.pages, case.page_size
    table = rng.permutation(case.batch * pages).reshape(case.batch, pages)
    position = np.arange(pages * size).reshape(pages, size)
    first = 0 if case.window is None else context[:, None, None] + 1 - case.window
    seen = (position >= first) & (position < (context + lengths)[:, None, None])
    seen &= lengths[:, None, None] > 0
    used = np.zeros((case.batch * pages, size), bool)
    used[table] = seen
    table = np.where(seen.any(-1), table, 2**31 - 1).astype(np.int32)
    shape = (case.batch * pages, case.kv_heads, size, case.head_dim)
    caches = [_cache(key, shape, case.cache, jnp.asarray(used)) for key in keys[1:]]
    scales: list[jax.Array | None] = [None, None]
    if jnp.dtype(case.cache).itemsize == 1:
        unit = 0.02 if case.cache == jnp.int8 else 1.0
        scales = [jnp.float32(unit * rng.uniform(0.5, 2, case.kv_heads)) for _ in range(2)]
    sizes = (jnp.asarray(context), jnp.asarray(lengths))
    return q, *caches, jnp.asarray(table), *sizes, *scales, slopes


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _cache(key: jax.Array, shape: tuple[int, ...], dtype: Any, used: jax.Array) -> jax.Array:
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -128, 128, jnp.int8)
    x = jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
    return jnp.where(used[:, None, :, None], x, jnp.full((), jnp.nan, dtype))


def checked(case: Case) -> list[tuple[int, int]]:
    """Queries whose results are compared: (sequence, index)."""
    rng = np.random.default_rng(1)
    _, lengths = case.sizes
    some = {(int(b), int(rng.integers(lengths[b]))) for b in np.flatnonzero(lengths) for _ in "12"}
    longest = int(np.argmax(lengths))
    ends = {(longest, i) for i in (0, 31, 32, 127, 128, int(lengths[longest]) - 1)}
    shuffled = rng.permutation(np.array(sorted(some))).tolist()
    found = [*ends, *map(tuple, shuffled)]
    return [(b, i) for b, i in found if i < lengths[b]][:CHECKED]


def float64(case: Case, arrays: Arrays) -> dict[tuple[int, int], np.ndarray]:
    """The results for those queries, [heads, head_dim] each."""
    context, _ = case.sizes
    found, rows = {}, functools.lru_cache(maxsize=2)(functools.partial(_rows, case, arrays))
    slopes = arrays[-1]
    for b, i in sorted(checked(case)):
        k, v = rows(b)
        p = int(context[b]) + i
        first = 0 if case.window is None else max(0, p + 1 - case.window)
        q = np.asarray(arrays[0][b, i].astype(jnp.float32), np.float64)
        q = q.reshape(case.kv_heads, -1, case.head_dim)
        scores = q @ k[:, first : p + 1].swapaxes(1, 2) * case.head_dim**-0.5
        if case.soft_cap is not None:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        if slopes is not None:
            by_head = np.asarray(slopes, np.float64).reshape(case.kv_heads, -1, 1)
            scores = scores + by_head * (np.arange(first, p + 1) - p)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        found[b, i] = (weights @ v[:, first : p + 1]).reshape(case.heads, case.head_dim)
    return found


def _rows(case: Case, arrays: Arrays, b: int) -> tuple[np.ndarray, ...]:
    """Keys and values of a sequence, [KV head, position, dim]; those not seen mean nothing."""
    if case.context is None:
        both = (np.asarray(x[b].astype(jnp.float32), np.float64) for x in arrays[1:3])
        return tuple(x.swapaxes(0, 1) for x in both)
    _, keys, values, table, _, _, *scales, _ = arrays
    pages = jnp.where(table[b] < len(keys), table[b], 0)
    result = []
    for cache, scale in zip((keys, values), scales, strict=True):
        x = np.asarray(cache[pages].astype(jnp.float32), np.float64)  # [page, KV head, row, dim]
        x = x.swapaxes(0, 1).reshape(case.kv_heads, -1, case.head_dim)
        result.append(x if scale is None else x * np.asarray(scale, np.float64)[:, None, None])
    return tuple(result)


def errors(case: Case, result: jax.Array, expected: dict[tuple[int, int], np.ndarray]) -> str:
    """Relative error of all that is checked, and of the worst head."""
    behind = jnp.arange(case.tokens)[None, :] >= jnp.asarray(case.sizes[1])[:, None]
    if not bool(jnp.isfinite(result).all()):
        return "NOT FINITE"
    if bool((jnp.where(behind[:, :, None, None], result, 0) != 0).any()):
        return "NOT 0 BEHIND THE END"
    at = tuple(np.array(list(expected)).T)
    found = np.asarray(result[at].astype(jnp.float32), np.float64)
    reference = np.stack(list(expected.values()))
    off = np.linalg.norm(found - reference, axis=-1)
    size = np.linalg.norm(reference, axis=-1)
    total = np.linalg.norm(off) / np.linalg.norm(size)
    return f"error {total:.1e} rows {(off / size).max():.1e}"


def configs(case: Case) -> list[Config]:
    """The candidates."""
    group, contiguous = case.heads // case.kv_heads, case.context is None
    length = case.tokens if contiguous else case.pages * case.page_size
    rows = case.tokens * group
    return candidates(
        rows,
        case.batch * case.kv_heads,
        most_seen(length, case.window, min(rows, triton.MOST_ROWS), group),
        case.head_dim,
        jnp.dtype(case.cache).itemsize,
        triton_launch.capability(),
        target.target().cores,
        0 if contiguous else case.page_size,
        case.window is None and case.soft_cap is None and not case.alibi,
    )


def table(case: Case, asked: argparse.Namespace) -> None:
    """Print a line for each implementation and candidate."""
    # Together at least twice the cache.
    sets = [arguments(case, seed) for seed in range(min(16, math.ceil(2 * L2 / case.bytes)))]
    sets = sets if len(sets) > 1 else 2 * sets
    print(
        f"\n{case.title}: {case.operations / 1e9:.1f} GFLOP, {case.bytes / 1e6:.1f} MB, "
        f"bound {case.bound:.1f} us",
        flush=True,
    )
    expected = float64(case, sets[0])
    static = {"scale": case.head_dim**-0.5, "window": case.window, "soft_cap": case.soft_cap}
    prompts = case.context is None
    run = triton.prefill_attention if prompts else triton.paged_prefill_attention
    calls: list[tuple[str, Callable[..., Any]]] = [
        (f"triton {config}", functools.partial(run, config=config, **static))
        for config in configs(case)
    ]
    if prompts:
        calls.insert(0, ("cudnn", functools.partial(cudnn.prefill_attention, **static)))
    if not asked.quick:
        reference = xla.prefill_attention if prompts else xla.paged_prefill_attention
        calls.append(("xla", functools.partial(reference, **static)))
    for label, call in calls:
        if (asked.implementation or "") in label:
            line(label, call, sets, case, 2 if asked.quick else 5, expected)
    if prompts and case.spread and (asked.implementation or "cudnn") == "cudnn":
        print(f"  {behind_the_end(case, sets[0])}", flush=True)


def line(
    label: str,
    call: Callable[..., Any],
    sets: list[Any],
    case: Case,
    iterations: int,
    expected: dict[tuple[int, int], np.ndarray],
) -> None:
    """One candidate."""
    label = label.replace("Config(", "").replace(")", "")
    try:
        results, times = run_kernels(call, sets, iterations)
        us = median(sum(t for _, t in kernels) for kernels in times) / len(sets)
        said = errors(case, results[0], expected)
        each = len(times[0]) // len(sets)
        parts = [median(kernels[i][1] for kernels in times) for i in range(each)]
        by_kernel = " + ".join(f"{t:.1f}" for t in parts[:4]) if 1 < each <= 4 else ""
        rate = case.operations / us / 1e6
        text = f"{us:9.1f} us {rate:5.0f} TFLOP/s {100 * case.bound / us:5.1f} %  {said}"
        text = f"{text}  {by_kernel}"
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    print(f"  {label:58} {text}", flush=True)


def behind_the_end(case: Case, arrays: Arrays) -> str:
    """What cuDNN itself leaves in results of queries that are not there."""
    q, k, v, lengths, _ = arrays
    try:
        y = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
                    static_argnames="is_causal")(
            q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths
        )  # fmt: skip
    except Exception as error:
        return f"cudnn alone: {type(error).__name__}: {str(error).splitlines()[:1]}"
    behind = jnp.arange(case.tokens)[None, :] >= lengths[:, None]
    rest = np.asarray(y.astype(jnp.float32))[np.asarray(behind)]
    said = "zeros" if (rest == 0).all() else "numbers" if np.isfinite(rest).all() else "NaN"
    return f"cudnn alone leaves {said} behind the end of a sequence"


def main() -> None:
    """All cases, or some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, 2 iterations")
    parser.add_argument("--only", help="only cases whose title contains this")
    parser.add_argument("--implementation", help="only lines that contain this: cudnn, triton, xla")
    asked = parser.parse_args()
    for case in cases():
        if (case.quick or not asked.quick) and (asked.only or "") in case.title:
            table(case, asked)


if __name__ == "__main__":
    main()
