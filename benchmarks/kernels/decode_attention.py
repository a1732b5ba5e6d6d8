"""`python -m benchmarks.kernels.decode_attention`: every candidate, checked and timed.

What must not be read counts: rows behind a sequence's end hold NaN, table entries behind it an
impossible page. Errors are against float64, of all heads of a few sequences; `rows` is the largest
of a head. The bound is the time that the bytes of the tokens seen need at 4.1 TB/s.
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
from qjax_kernels.decode_attention import mosaic, triton, xla
from qjax_kernels.decode_attention.config import Config, candidates
from qjax_kernels.prefill_attention import config as portable
from qjax_kernels.prefill_attention.launch import most_seen

from benchmarks.kernels.bound import BANDWIDTH, L2
from benchmarks.kernels.timing import run_kernels

FP8 = jnp.float8_e4m3fn
CHECKED = 3  # sequences
Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call. `spread`: lengths from 1 to `most`, uniformly; otherwise all are `most`."""

    title: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    most: int
    cache: Any = jnp.bfloat16
    spread: bool = False
    capacity: int = 0  # tokens that the table has room for, if more than `most`
    page_size: int = 64
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    quick: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """int32 [batch]."""
        rng = np.random.default_rng(0)
        many = rng.integers(1, self.most + 1, self.batch) if self.spread else [self.most]
        return np.resize(many, self.batch).astype(np.int32)

    @property
    def pages(self) -> int:
        """Of a sequence, at most."""
        return -(-max(self.most, self.capacity) // self.page_size)

    @property
    def bytes(self) -> float:
        """Of keys and values that are seen, queries and results."""
        seen = np.minimum(self.lengths, self.window or self.most).sum()
        values = 2 * seen * self.kv_heads * self.head_dim
        return float(values * jnp.dtype(self.cache).itemsize) + 4.0 * self.batch * self.heads * (
            self.head_dim
        )


def cases() -> Iterator[Case]:
    """Those that the project is judged by first."""
    for name, cache in (("bf16", jnp.bfloat16), ("fp8", FP8), ("int8", jnp.int8)):
        yield Case(f"64 x 4096, group 8, {name}", 64, 64, 8, 128, 4096, cache, quick=True)
        yield Case(f"64 x 4096, group 4, {name}", 64, 32, 8, 128, 4096, cache)
        yield Case(f"64 x 1..8192, group 4, {name}", 64, 32, 8, 128, 8192, cache, spread=True)
        yield Case(f"1 x 32768, group 4, {name}", 1, 32, 8, 128, 32768, cache, quick=True)
    for name, cache in (("bf16", jnp.bfloat16), ("fp8", FP8)):
        yield Case(f"1 x 1024, group 4, {name}", 1, 32, 8, 128, 1024, cache, quick=True)
        yield Case(f"1 x 200 of 4096, group 4, {name}", 1, 32, 8, 128, 200, cache, capacity=4096)
        yield Case(f"1 x 1024 of 1152, group 4, {name}", 1, 32, 8, 128, 1024, cache, capacity=1152)
        for batch, most in ((8, 1024), (8, 4096), (16, 1024), (16, 2048), (32, 2048), (64, 1024)):
            yield Case(f"{batch} x {most}, group 4, {name}", batch, 32, 8, 128, most, cache)
        yield Case(f"64 x 128 of 2048, group 4, {name}", 64, 32, 8, 128, 128, cache, capacity=2048)
        yield Case(f"16 x 2048, 32 KV heads, {name}", 16, 32, 32, 128, 2048, cache)
        yield Case(f"32 x 4096, head_dim 256, {name}", 32, 16, 8, 256, 4096, cache)
        yield Case(f"32 x 4096, head_dim 64, {name}", 32, 32, 8, 64, 4096, cache)
        yield Case(f"32 x 2048, head_dim 80, {name}", 32, 32, 32, 80, 2048, cache)
        yield Case(f"32 x 2048, head_dim 96, {name}", 32, 32, 32, 96, 2048, cache)
        yield Case(f"64 x 4096, group 16, {name}", 64, 128, 8, 128, 4096, cache)
        yield Case(f"32 x 4096, 71 heads on one, {name}", 32, 71, 1, 64, 4096, cache)
        yield Case(f"64 x 4096, pages of 16, {name}", 64, 32, 8, 128, 4096, cache, page_size=16)
        yield Case(
            f"64 x 1..8192, window, cap, ALiBi, {name}", 64, 32, 8, 128, 8192, cache,
            spread=True, window=1000, soft_cap=30.0, alibi=True, quick=True,
        )  # fmt: skip


def arguments(case: Case, seed: int) -> Arrays:
    """q, k_pages, v_pages, block_table, lengths, k_scale, v_scale, slopes."""
    rng = np.random.default_rng(seed)
    lengths, pages = case.lengths, case.pages
    table = rng.permutation(case.batch * pages).reshape(case.batch, pages).astype(np.int32)
    position = np.arange(pages * case.page_size).reshape(pages, case.page_size)
    seen = position < lengths[:, None, None]
    if case.window is not None:
        seen &= position >= lengths[:, None, None] - case.window
    used = np.zeros((case.batch * pages, case.page_size), bool)
    used[table] = seen
    table = np.where(seen.any(-1), table, 2**31 - 1)
    shape = (case.batch * pages, case.kv_heads, case.page_size, case.head_dim)

    @jax.jit
    def make(key: jax.Array, used: jax.Array) -> tuple[jax.Array, ...]:
        q_key, k_key, v_key = jax.random.split(key, 3)
        q = jax.random.normal(q_key, (case.batch, case.heads, case.head_dim), jnp.bfloat16)
        caches = []
        for cache_key in (k_key, v_key):
            if case.cache == jnp.int8:
                x = jax.random.randint(cache_key, shape, -128, 128, jnp.int8)
            else:
                x = jax.random.normal(cache_key, shape, jnp.bfloat16).astype(case.cache)
                x = jnp.where(used[:, None, :, None], x, jnp.full((), jnp.nan, case.cache))
            caches.append(x)
        return q, *caches

    q, keys, values = make(jax.random.key(seed), jnp.asarray(used))
    scales: list[jax.Array | None] = [None, None]
    if jnp.dtype(case.cache).itemsize == 1:
        size = 0.02 if case.cache == jnp.int8 else 1.0
        scales = [jnp.float32(size * rng.uniform(0.5, 2, case.kv_heads)) for _ in range(2)]
    slopes = jnp.float32(rng.uniform(0.001, 0.1, case.heads)) if case.alibi else None
    return q, keys, values, jnp.asarray(table, jnp.int32), jnp.asarray(lengths), *scales, slopes


def float64(case: Case, arrays: Arrays, sequence: int) -> np.ndarray:
    """The result for a sequence [heads, head_dim]."""
    q, keys, values, table, lengths, k_scale, v_scale, slopes = arrays
    n = int(lengths[sequence])
    first = 0 if case.window is None else max(0, n - case.window)
    entries = np.arange(first // case.page_size, -(-n // case.page_size))
    pages = table[sequence, entries]

    def rows(cache: jax.Array, scale: jax.Array | None) -> np.ndarray:
        x = np.asarray(cache[pages].astype(jnp.float32), np.float64)  # [page, KV head, row, dim]
        x = x.swapaxes(0, 1).reshape(case.kv_heads, -1, case.head_dim)
        start = first - int(entries[0]) * case.page_size
        x = x[:, start : start + n - first]
        return x if scale is None else x * np.asarray(scale, np.float64)[:, None, None]

    k, v = rows(keys, k_scale), rows(values, v_scale)
    grouped = np.asarray(q[sequence].astype(jnp.float32), np.float64)
    grouped = grouped.reshape(case.kv_heads, -1, case.head_dim)
    scores = grouped @ k.swapaxes(1, 2) * case.head_dim**-0.5
    if case.soft_cap is not None:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    if slopes is not None:
        distance = np.arange(first, n) - (n - 1)
        by_head = np.asarray(slopes, np.float64).reshape(case.kv_heads, -1, 1)
        scores = scores + by_head * distance
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).reshape(case.heads, case.head_dim)


def errors(result: jax.Array, expected: dict[int, np.ndarray]) -> str:
    """Relative error of all that is checked, and of the worst head."""
    found = np.stack([np.asarray(result[i].astype(jnp.float32), np.float64) for i in expected])
    reference = np.stack(list(expected.values()))
    off = np.linalg.norm(found - reference, axis=-1)
    size = np.linalg.norm(reference, axis=-1)
    total = np.linalg.norm(off) / np.linalg.norm(size)
    if not bool(jnp.isfinite(result).all()):
        return "NOT FINITE"
    return f"error {total:.1e} rows {(off / size).max():.1e}"


def describe(config: Config) -> str:
    """On one line."""
    kind = f"persistent {config.persistent}" if config.persistent else f"cluster {config.cluster}"
    how = "" if config.push else ", fetched"
    return f"{kind}, {config.warpgroups} wg, {config.tokens} x {config.stages}{how}"


def dense() -> Callable[..., jax.Array]:
    """`jax.nn.dot_product_attention` of XLA, over a cache that is not paged, its best case."""

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(
            q[:, None], keys, values, key_value_seq_lengths=lengths, implementation="xla"
        )
        return y[:, 0]

    return attend


def portable_candidates(case: Case) -> list[portable.Config]:
    """Of the Triton kernel."""
    group = case.heads // case.kv_heads
    return portable.candidates(
        group,
        case.batch * case.kv_heads,
        most_seen(case.pages * case.page_size, case.window, group, group),
        case.head_dim,
        np.dtype(case.cache).itemsize,
        triton_launch.capability(),
        target.target().cores,
        case.page_size,
        case.window is None and case.soft_cap is None and not case.alibi,
    )


def table(case: Case, iterations: int, implementation: str = "") -> None:
    """Print a line for each candidate of the implementations whose names contain that."""
    bound = 1e6 * case.bytes / BANDWIDTH
    # Together at least twice the cache; of a call that is that large, the same again.
    sets = [arguments(case, seed) for seed in range(min(32, math.ceil(2 * L2 / case.bytes)))]
    sets = sets if len(sets) > 1 else 2 * sets
    print(f"\n{case.title}: {case.bytes / 1e6:.2f} MB, bound {bound:.2f} us", flush=True)
    chosen = {0, case.batch - 1, int(np.argmax(case.lengths)), int(np.argmin(case.lengths))}
    expected = {i: float64(case, sets[0], i) for i in sorted(chosen)[: CHECKED + 1]}
    static = {
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "soft_cap": case.soft_cap,
    }
    sizes = (case.batch, case.kv_heads, case.heads // case.kv_heads, case.head_dim)
    cache, cores = (case.page_size, case.pages, np.dtype(case.cache)), target.target().cores
    calls: list[tuple[str, Callable[..., Any]]] = []
    if implementation in "mosaic":
        calls += [
            (describe(config), functools.partial(mosaic.decode_attention, config=config, **static))
            for config in candidates(*sizes, *cache, cores)
        ]
    if implementation in "triton":
        calls += [
            (
                f"triton, {c.rows} x {c.keys} x {c.stages}, {c.warps} warps, split {c.split}",
                functools.partial(triton.decode_attention, config=c, **static),
            )
            for c in portable_candidates(case)
        ]
    if implementation in "xla":
        calls.append(("xla", functools.partial(xla.decode_attention, **static)))
    for label, call in calls:
        line(label, call, sets, bound, iterations, expected)
    plain = case.window is None and case.soft_cap is None and not case.alibi
    if case.cache == jnp.bfloat16 and plain and not case.spread and implementation in "xla":
        del sets
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (case.batch, case.most, case.kv_heads, case.head_dim)
        q = jax.random.normal(keys[0], (case.batch, case.heads, case.head_dim), jnp.bfloat16)
        k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
        dense_sets = [(q, k, v, jnp.asarray(case.lengths))] * 2
        line("jax.nn, XLA", dense(), dense_sets, bound, iterations, {})


def line(
    label: str,
    call: Callable[..., Any],
    sets: list[Any],
    bound: float,
    iterations: int,
    expected: dict[int, np.ndarray],
) -> None:
    """One candidate: microseconds, the bound's share of them, errors, microseconds by kernel."""
    try:
        results, times = run_kernels(call, sets, iterations)
        us = median(sum(t for _, t in kernels) for kernels in times) / len(sets)
        said = errors(results[0], expected) if expected else ""
        each = len(times[0]) // len(sets)
        parts = [median(kernels[i][1] for kernels in times) for i in range(each)]
        by_kernel = " + ".join(f"{t:.1f}" for t in parts[:4]) if 1 < each <= 4 else ""
        text = f"{us:9.2f} us {100 * bound / us:5.1f} %  {said}  {by_kernel}"
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    print(f"  {label:46} {text}", flush=True)


def main() -> None:
    """All cases, or some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, 2 iterations")
    parser.add_argument("--only", help="only cases whose title contains this")
    parser.add_argument(
        "--implementation", choices=["mosaic", "triton", "xla"], default="", help="only this one's"
    )
    asked = parser.parse_args()
    for case in cases():
        if (case.quick or not asked.quick) and (asked.only or "") in case.title:
            table(case, 2 if asked.quick else 5, asked.implementation)


if __name__ == "__main__":
    main()
