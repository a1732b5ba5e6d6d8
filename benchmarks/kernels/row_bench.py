"""What the scripts of the row kernels share: a table of candidates, checks against float64."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.bound import BANDWIDTH, L2
from benchmarks.kernels.timing import run_and_time

TOPS = {"int8": 127.0, "float8_e4m3fn": 448.0}
CHECKED_ROWS = 256  # of large results, from all over them


def options(description: str | None) -> argparse.Namespace:
    """The command line of such a script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, 2 iterations")
    parser.add_argument("--only", help="only cases whose title contains this")
    return parser.parse_args()


def sets(arguments: Callable[[jax.Array], tuple], bytes_each: float) -> list[tuple]:
    """Arguments of one call each, from different keys, together twice the L2 cache at least;
    of small ones only 16, which stay in it, as activations do."""
    count = min(16, max(2, math.ceil(2 * L2 / bytes_each)))
    make = jax.jit(arguments)
    return [make(key) for key in jax.random.split(jax.random.key(1), count)]


def table(
    title: str,
    calls: Iterable[tuple[str, Callable[..., Any]]],
    argument_sets: Sequence[tuple],
    bytes_moved: float,
    check: Callable[[Any, tuple], str],
    asked: argparse.Namespace,
) -> None:
    """Print a line for each of `calls`: what `check(result, arguments)` says of the first set's
    result, microseconds, those that the bytes need, and the ratio."""
    if asked.only and asked.only not in title:
        return
    bound = 1e6 * bytes_moved / BANDWIDTH
    print(f"\n{title}: {bytes_moved / 1e6:.2f} MB, bound {bound:.2f} us", flush=True)
    for label, call in calls:
        try:
            results, us = run_and_time(call, argument_sets, 2 if asked.quick else 5)
            said = check(results[0], argument_sets[0])
        except Exception as error:
            print(f"  {label:34} {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        print(f"  {label:34} {us:9.2f} us {us / bound:7.2f}x  {said}", flush=True)


def some(array: jax.Array) -> np.ndarray:
    """Some rows of [rows, ...], the same ones of every array with as many, as NumPy's."""
    rows = array.shape[0]
    chosen = np.random.default_rng(0).permutation(rows)[:CHECKED_ROWS]
    return np.asarray(array[np.sort(chosen)])


def against(values: np.ndarray, scale: np.ndarray | None, exact: np.ndarray) -> str:
    """How quantized or rounded rows compare with float64 ones, overall and in the worst row.

    `off` is the share of values that are not what float64 rounds to with the same scale: where a
    number lies within the error of float32 of the middle of two, 1e-4 of them at most.
    """
    decoded = values.astype(np.float64)
    if scale is None:
        expected = exact.astype(values.dtype).astype(np.float64)
        scale = np.ones((1, 1))
    else:
        top = TOPS[values.dtype.name]
        quotient = (exact / scale).astype(np.float32).astype(np.float64)  # as it is defined
        low = -128 if values.dtype == np.int8 else -top
        expected = np.clip(quotient, low, top)
        if values.dtype == np.int8:
            expected = np.rint(expected)
        expected = expected.astype(values.dtype).astype(np.float64)
    error = np.linalg.norm(decoded * scale - exact, axis=-1)
    size = np.maximum(np.linalg.norm(exact, axis=-1), 1e-30)
    whole = np.linalg.norm(error) / np.linalg.norm(size)
    off = (decoded != expected).mean(axis=-1)
    return (
        f"error {whole:.1e}, worst row {np.max(error / size):.1e}, "
        f"off {off.mean():.0e}, worst row {off.max():.0e}"
    )


def rows(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Rows of different sizes with outliers."""
    keys = jax.random.split(key, 3)
    sizes = 10 ** jax.random.uniform(keys[0], (*shape[:-1], 1), minval=-2, maxval=1)
    outliers = jnp.where(
        jax.random.uniform(keys[1], (1,) * len(shape[:-1]) + shape[-1:]) < 0.003, 30, 1
    )
    return (jax.random.normal(keys[2], shape) * sizes * outliers).astype(dtype)
