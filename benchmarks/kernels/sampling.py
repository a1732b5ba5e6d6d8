"""`python -m benchmarks.kernels.sampling`: every candidate, checked and timed.

`peaked` logits are like a model's; of `flat` ones more are drawn from than the first kernel keeps,
so that the second reads the row again and again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels.sampling import triton, xla
from qjax_kernels.sampling.config import argmax_candidates, candidates

from benchmarks.kernels import row_bench

OFF = 1e-5  # of a sum of float32 numbers
CORES = 132


def bounds(x: np.ndarray, temperature: float, k: int, p: float, token: int) -> tuple[float, float]:
    """Between which random numbers the token is drawn, in float64; an empty interval if never."""
    weight = np.exp((x - x.max()) / temperature)
    ordered = np.sort(x)[::-1]
    if 0 < k < len(x):
        weight = np.where(x >= ordered[k - 1], weight, 0)
    if p < 1:
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(weight[order]) - weight[order]
        inside = before < p * weight.sum()
        weight = np.where(x >= x[order][inside][-1], weight, 0)
    total = weight.sum()
    if not weight[token]:
        return 1.0, 0.0
    above = weight[: token + 1].sum() / total
    return above - weight[token] / total, above


def check_sample(tokens: Any, arguments: tuple) -> str:
    """How many tokens are not those that float64 draws, but for rounding at an edge."""
    logits, *settings = arguments
    x = row_bench.some(logits).astype(np.float64)
    settings = [row_bench.some(s) for s in settings]
    tokens = row_bench.some(tokens)
    wrong = 0
    for row in range(min(len(x), 16)):
        u, temperature, k, p = (float(s[row]) for s in settings)
        if temperature == 0:
            wrong += tokens[row] != np.argmax(x[row])
            continue
        # At the edge of the nucleus a token may be in or out.
        near = [p, p * (1 - OFF), min(p * (1 + OFF), 1.0)] if p < 1 else [p]
        found = [bounds(x[row], temperature, int(k), q, int(tokens[row])) for q in near]
        wrong += not any(low - OFF <= u <= high + OFF for low, high in found)
    return "tokens ok" if not wrong else f"{wrong} tokens WRONG"


def check_argmax(tokens: Any, arguments: tuple) -> str:
    """How many tokens are not the first largest."""
    x = row_bench.some(arguments[0]).astype(np.float32)
    wrong = (row_bench.some(tokens) != np.argmax(x, axis=-1)).sum()
    return "tokens ok" if not wrong else f"{wrong} tokens WRONG"


def logits_of(key: jax.Array, rows: int, vocab: int, dtype: Any, flat: bool) -> jax.Array:
    """Logits like a model's: a few have most of the weight; or flat ones."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (rows, vocab))
    return (x if flat else 2 * x + 2 * jax.random.gumbel(keys[1], (rows, vocab))).astype(dtype)


def argmax_case(rows: int, vocab: int, dtype: Any, asked: Any) -> None:
    """One table."""

    def arguments(key: jax.Array) -> tuple:
        return (logits_of(key, rows, vocab, dtype, False),)

    moved = rows * vocab * jnp.dtype(dtype).itemsize
    calls = [
        (f"triton parts {c.parts} warps {c.warps}", partial(triton.argmax, config=c))
        for c in argmax_candidates(rows, vocab, CORES)
    ]
    calls.append(("xla", xla.argmax))
    title = f"argmax [{rows}, {vocab}] {jnp.dtype(dtype).name}"
    argument_sets = row_bench.sets(arguments, moved)
    row_bench.table(title, calls, argument_sets, moved, check_argmax, asked)


def sample_case(rows: int, vocab: int, dtype: Any, asked: Any, *, temperature: float = 1.0,
                top_k: int = 0, top_p: float = 1.0, flat: bool = False) -> None:  # fmt: skip
    """One table."""

    def arguments(key: jax.Array) -> tuple:
        keys = jax.random.split(key)
        return (
            logits_of(keys[0], rows, vocab, dtype, flat),
            jax.random.uniform(keys[1], (rows,)),
            jnp.full(rows, temperature, jnp.float32),
            jnp.full(rows, top_k, jnp.int32),
            jnp.full(rows, top_p, jnp.float32),
        )

    moved = rows * vocab * jnp.dtype(dtype).itemsize
    calls = [
        (f"triton tile {c.tile} keep {c.keep} warps {c.warps}", partial(triton.sample, config=c))
        for c in candidates(rows, vocab)
    ]
    calls.append(("xla (sorts)", xla.sample))
    title = (
        f"sample [{rows}, {vocab}] {jnp.dtype(dtype).name} temperature {temperature} "
        f"top_k {top_k} top_p {top_p} {'flat' if flat else 'peaked'}"
    )
    argument_sets = row_bench.sets(arguments, moved)
    row_bench.table(title, calls, argument_sets, moved, check_sample, asked)


def main() -> None:
    """All cases."""
    asked = row_bench.options(__doc__)
    vocab = 128256
    types = (jnp.float32,) if asked.quick else (jnp.float32, jnp.bfloat16)
    for dtype in types:
        for rows in (1, 64) if asked.quick else (1, 8, 64, 256):
            argmax_case(rows, vocab, dtype, asked)
        for rows in (1, 64):
            sample_case(rows, vocab, dtype, asked, temperature=0.8, top_k=50, top_p=0.95)
            sample_case(rows, vocab, dtype, asked, top_p=0.9)
            sample_case(rows, vocab, dtype, asked)
    sample_case(1, vocab, jnp.float32, asked, top_p=0.9, flat=True)
    if not asked.quick:
        sample_case(64, vocab, jnp.float32, asked, top_p=0.9, flat=True)
        sample_case(1, vocab, jnp.float32, asked, temperature=0.0)
        sample_case(1, 32000, jnp.float32, asked, top_k=40)


if __name__ == "__main__":
    main()
