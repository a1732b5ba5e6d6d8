"""`python -m benchmarks.kernels.portable_gemm`: every candidate of the Triton products.

First odd sizes and formats, for errors only; then a table a format and number of tokens, with XLA
and, on Hopper, Mosaic beside it. Errors are against a float32 product, of the whole result and of
its worst row.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.random import fold_in
from qjax_kernels.scaled_gemm import api as scaled_api
from qjax_kernels.scaled_gemm import triton as scaled
from qjax_kernels.scaled_gemm import triton_config as scaled_config
from qjax_kernels.target import target
from qjax_kernels.triton_launch import capability
from qjax_kernels.weight_only_gemm import api, portable, triton
from qjax_kernels.weight_only_gemm import triton_config as config

from benchmarks.kernels import bound
from benchmarks.kernels.rows import product, row_error, scales, values
from benchmarks.kernels.sweep import attempt
from benchmarks.kernels.timing import run_and_time

N = K = 8192
BF16 = jnp.dtype(jnp.bfloat16)
WRONG = 1e-2  # rounding to bfloat16 alone makes 2e-3
# Weight-only: name -> dtype, group size (0: a row), zero points, the bound's name.
WEIGHT_ONLY = {
    "w4a16": ("int4", 128, False, "w4a16"),
    "w4a16 zeros": ("int4", 128, True, "w4a16"),
    "w4a16 rows": ("int4", 0, False, "w4a16"),
    "w4a16 g32": ("int4", 32, False, "w4a16"),
    "w8a16": ("int8", 0, False, "w8a16"),
    "w8a16 fp8": ("float8_e4m3fn", 0, False, "w8a16"),
}
SCALED = {"w8a8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# Tokens, outputs, features, format, group size, zero points.
CHECKS = [
    (3, 1000, 2752, "int4", 0, True),
    (17, 1000, 2752, "int4", 64, True),
    (100, 1000, 2752, "int4", 32, False),
    (5, 520, 1000, "int8", 0, False),
    (33, 520, 1024, "int8", 128, True),
    (300, 520, 1024, "int8", 64, True),
    (8, 520, 1024, "float8_e4m3fn", 128, False),
    (200, 520, 1024, "float8_e5m2", 0, False),
    (64, 4096, 4096, "int4", 256, True),
]


def weight(key: jax.Array, n: int, k: int, format: str, group: int, zeros: bool) -> tuple:
    """Random canonical arrays."""
    groups = k // group if group else 1
    zero = values(fold_in(key, 2), (n, groups), jnp.int8) // 16 if zeros else None
    return (
        values(key, (n, k), jnp.dtype(format)),
        scales(fold_in(key, 1), (n, groups), BF16 if group else jnp.dtype(jnp.float32)),
        zero,
    )


@jax.jit
def weight_only_reference(x: jax.Array, w: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
    """In float32, scaled before the product."""
    width = w.shape[1] // scale.shape[1]
    dense = w.astype(jnp.float32)
    if zero is not None:
        dense = dense - jnp.repeat(zero.astype(jnp.float32), width, axis=1)
    return product(x, dense * jnp.repeat(scale.astype(jnp.float32), width, axis=1))


@jax.jit
def scaled_reference(x: jax.Array, x_scale: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """In float32, scaled after the product."""
    return product(x, w) * x_scale * scale[:, 0]


def errors(y: jax.Array, expected: jax.Array) -> str:
    """Relative error of the whole result and of its worst row."""
    whole, worst = row_error(y.reshape(1, -1), expected.reshape(1, -1)), row_error(y, expected)
    return f"error {whole:.1e}, row {worst:.1e}" + ("" if worst < WRONG else "  WRONG")


def line(
    label: str,
    call: Callable[..., jax.Array],
    sets: list[tuple],
    expected: jax.Array,
    work: bound.Work,
    m: int,
    quick: bool,
) -> None:
    """Print what one implementation does."""
    found, failure = attempt(run_and_time, call, sets, 2 if quick else 5)
    if failure:
        print(f"  {label:44} {failure}", flush=True)
        return
    results, us = found
    rate = f", {2e-6 * m * N * K / us:5.0f} T/s" if m >= 128 else ""
    said = errors(results[0], expected)
    print(f"  {label:44} {us:8.2f} us {us / work.us:6.2f}x{rate}  {said}", flush=True)


def title(tiles: Any) -> str:
    """A configuration in a few letters."""
    step = f"chunks{tiles.chunks}" if hasattr(tiles, "chunks") else f"k{tiles.step}"
    return (
        f"triton {tiles.outs:3}x{tiles.tokens:<3} {step:8} warps{tiles.warps} "
        f"stages{tiles.stages} splits{tiles.splits}"
    )


def weight_only_table(name: str, m: int, quick: bool) -> None:
    """One line a candidate."""
    format, group, zeros, limit = WEIGHT_ONLY[name]
    work = bound.LINEAR[limit].work(m, N, K, group or K)
    print(f"\n{name} M={m} N={N} K={K}: bound {work.us:.1f} us", flush=True)
    x = values(jax.random.key(0), (m, K), BF16)
    count = bound.copies(bound.LINEAR[limit].weight_bytes(N, K, group or K))
    weights = [
        weight(fold_in(jax.random.key(1), i), N, K, format, group, zeros) for i in range(count)
    ]
    expected = weight_only_reference(x, *weights[0])
    packed = [portable.prepare_portable(*w) for w in weights]
    found = config.candidates(m, packed[0], capability=capability(), cores=target().cores)
    for tiles in found:
        call = partial(triton.packed_gemm, out_dtype=BF16, config=tiles)
        line(title(tiles), call, [(x, w) for w in packed], expected, work, m, quick)
    if target().hopper:
        prepared = [api.prepare(*w) for w in weights]
        call = partial(api.prepared_gemm, out_dtype=BF16, implementation="mosaic")
        line("mosaic", call, [(x, w) for w in prepared], expected, work, m, quick)
    if not quick:
        call = partial(portable.packed_gemm, out_dtype=BF16, implementation="xla")
        line("xla", call, [(x, w) for w in packed], expected, work, m, quick)


def scaled_table(name: str, m: int, quick: bool) -> None:
    """One line a candidate."""
    dtype, limit = SCALED[name], {"w8a8": "int8"}.get(name, name)
    work = bound.LINEAR[limit].work(m, N, K, None)
    print(f"\n{name} M={m} N={N} K={K}: bound {work.us:.1f} us", flush=True)
    x, x_scale = (
        values(jax.random.key(0), (m, K), dtype),
        scales(jax.random.key(2), (m, 1), jnp.float32),
    )
    keys = [fold_in(jax.random.key(1), i) for i in range(bound.copies(N * K))]
    sets = [
        (x, x_scale, values(key, (N, K), dtype), scales(key, (N, 1), jnp.float32)) for key in keys
    ]
    expected = scaled_reference(*sets[0])
    found = scaled_config.candidates(
        m, N, K, dtype=jnp.dtype(dtype), blocked=False, capability=capability(),
        cores=target().cores,
    )  # fmt: skip
    for tiles in found:
        call = partial(scaled.scaled_gemm, out_dtype=BF16, config=tiles)
        line(title(tiles), call, sets, expected, work, m, quick)
    for other in ["mosaic", "xla"] if target().hopper else ["xla"]:
        call = partial(scaled_api.scaled_gemm, out_dtype=BF16, implementation=other)
        line(other, call, sets, expected, work, m, quick)


def check(m: int, n: int, k: int, format: str, group: int, zeros: bool) -> str:
    """Errors of the best guess, in bfloat16 and float16."""
    arrays = weight(jax.random.key(3), n, k, format, group, zeros)
    packed = portable.prepare_portable(*arrays)
    said = []
    for dtype in (jnp.bfloat16, jnp.float16):
        x = values(jax.random.key(0), (m, k), dtype)
        bias = values(jax.random.key(1), (n,), dtype)
        y = portable.packed_gemm(x, packed, bias, out_dtype=BF16, implementation="triton")
        said.append(errors(y, weight_only_reference(x, *arrays) + bias.astype(jnp.float32)))
    return "; ".join(said)


def main() -> None:
    """Checks, then tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="w4a16, w8a16, w8a8; 2 iterations")
    parser.add_argument("--only", action="append", choices=[*WEIGHT_ONLY, *SCALED])
    parser.add_argument("--m", default="1,16,64,256,2048")
    parser.add_argument("--no-checks", action="store_true", help="tables only")
    asked = parser.parse_args()
    for size in [] if asked.no_checks else CHECKS:
        said, failure = attempt(check, *size)
        print(f"{size}: {failure or said}", flush=True)
    names = asked.only or (["w4a16", "w8a16", "w8a8"] if asked.quick else [*WEIGHT_ONLY, *SCALED])
    for name in names:
        table = weight_only_table if name in WEIGHT_ONLY else scaled_table
        for m in map(int, asked.m.split(",")):
            _, failure = attempt(table, name, m, asked.quick)
            if failure:
                print(failure, flush=True)


if __name__ == "__main__":
    main()
