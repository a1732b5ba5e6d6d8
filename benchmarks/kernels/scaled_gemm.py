"""`python -m benchmarks.kernels.scaled_gemm`: every candidate of the int8 and fp8 products.

First odd sizes and options, for errors only; then a table a shape. A line is printed before each
kernel runs, so that one which hangs is known.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.random import fold_in
from qjax_kernels.scaled_gemm import mosaic, plan
from qjax_kernels.scaled_gemm.config import BLOCK, Config
from qjax_kernels.target import target

from benchmarks.kernels import bound
from benchmarks.kernels.rows import product, row_error, scales, values
from benchmarks.kernels.sweep import LINEAR_SHAPES, attempt
from benchmarks.kernels.timing import run_and_time

DTYPES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
# Rounding to bfloat16 alone makes errors of 2e-3 of a row.
WRONG = 1e-2

CHECKS: list[tuple[tuple[int, int, int], Config, dict[str, Any]]] = [
    ((1, 1024, 2048), Config(stages=8), {}),
    ((3, 1000, 2752), Config(stages=4, k_tile=64), {"bias": True, "residual": True}),
    ((12, 1000, 2752), Config(stages=4, k_tile=32, columns=16), {"out": jnp.float32}),
    ((8, 1024, 2048), Config(stages=4, k_tile=512), {"dtype": "int8", "out": jnp.float16}),
    ((16, 2560, 8192), Config(stages=12, columns=16, splits=3), {"residual": True}),
    ((40, 1000, 4096), Config(stages=4, columns=64, splits=4, warpgroups=2), {"dtype": "int8"}),
    ((64, 40000, 1024), Config(stages=4, columns=64, splits=2, multicast=2, warpgroups=2), {}),
    ((128, 4096, 4096), Config(stages=6, columns=128, warpgroups=2, splits=2, multicast=2), {}),
    (
        (777, 1000, 2752),
        Config(swap=False, stages=4, columns=256, k_tile=64, warpgroups=2, store=32),
        {"bias": True, "residual": True},
    ),
    (
        (2048, 4096, 4096),
        Config(swap=False, stages=4, columns=256, warpgroups=2, multicast=2, store=32),
        {"dtype": "int8", "per_tensor": True},
    ),
    (
        (2048, 4096, 4096),
        Config(swap=True, stages=3, columns=256, warpgroups=2, multicast=4, store=32),
        {"bias": True, "residual": True},
    ),
    ((16, 2112, 7168), Config(stages=12, columns=16, splits=2), {"blocked": True}),
    ((100, 4096, 7168), Config(stages=4, columns=128, warpgroups=2), {"blocked": True}),
    (
        (2000, 4096, 7168),
        Config(swap=False, stages=4, columns=128, warpgroups=2, multicast=2),
        {"blocked": True, "bias": True},
    ),
    ((64, 4096, 14336), Config(stages=8, columns=64, warpgroups=2, promote=4), {}),
    ((64, 4096, 14336), Config(stages=8, columns=64, warpgroups=2), {}),
]


def operands(
    index: int,
    size: tuple[int, int, int],
    *,
    dtype: str = "fp8",
    out: Any = jnp.bfloat16,
    per_tensor: bool = False,
    blocked: bool = False,
    bias: bool = False,
    residual: bool = False,
) -> dict[str, Any]:
    """Random arguments of one call; those of another index differ in the weight."""
    m, n, k = size
    key, same = fold_in(jax.random.key(1), index), jax.random.key(0)
    x_scale, scale = ((), (1, 1)) if per_tensor else ((m, 1), (n, 1))
    if blocked:
        x_scale, scale = (m, k // BLOCK), (-(-n // BLOCK), k // BLOCK)
    return {
        "x": values(same, (m, k), DTYPES[dtype]),
        "x_scale": scales(fold_in(same, 1), x_scale, jnp.float32),
        "values": values(key, (n, k), DTYPES[dtype]),
        "scale": scales(fold_in(key, 1), scale, jnp.float32),
        "bias": values(fold_in(same, 2), (n,), jnp.bfloat16) if bias else None,
        "residual": values(fold_in(same, 3), (m, n), jnp.dtype(out)) if residual else None,
    }


@jax.jit
def reference(given: dict[str, Any]) -> jax.Array:
    """In float32, scaled before the product."""
    x, w = given["x"].astype(jnp.float32), given["values"].astype(jnp.float32)
    x_scale, scale = given["x_scale"], given["scale"]
    if scale.shape[1] > 1:
        x_scale = jnp.repeat(x_scale, BLOCK, axis=1)
        scale = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0)[: w.shape[0]], BLOCK, axis=1)
    y = product(x * x_scale, w * scale)
    for name in ("bias", "residual"):
        if given[name] is not None:
            y = y + given[name].astype(jnp.float32)
    return y


def errors(y: jax.Array, given: dict[str, Any]) -> tuple[float, float]:
    """Relative error of the whole result and of its worst row."""
    expected = reference(given)
    whole = row_error(y.reshape(1, -1), expected.reshape(1, -1))
    return whole, row_error(y, expected)


def title(config: Config) -> str:
    """A configuration in a few letters."""
    return (
        f"{'weights' if config.swap else 'tokens '} {config.rows:3}x{config.columns:<3} "
        f"k{config.k_tile:<3} x{config.stages:<2} split{config.splits} cast{config.multicast} "
        f"store{config.store:<2} snake{config.snake:<2}"
        + (f" promote{config.promote}" if config.promote else "")
    )


def check(size: tuple[int, int, int], config: Config, **options: Any) -> str:
    """Run one call; its errors."""
    given = operands(0, size, **options)
    out = options.get("out", jnp.bfloat16)
    y = mosaic.scaled_gemm(**given, out_dtype=out, config=config)
    whole, worst = errors(y, given)
    return f"error {whole:.1e}, row {worst:.1e}" + ("" if worst < WRONG else "  WRONG")


def time_one(config: Config, sets: list[dict[str, Any]], iterations: int) -> tuple[str, float]:
    """Errors of the timed run's first result, and microseconds a call."""
    names = list(sets[0])

    def call(*arguments: Any) -> jax.Array:
        given = dict(zip(names, arguments, strict=True))
        return mosaic.scaled_gemm(**given, out_dtype=jnp.bfloat16, config=config)

    results, us = run_and_time(call, [tuple(given.values()) for given in sets], iterations)
    whole, worst = errors(results[0], sets[0])
    return f"error {whole:.1e}, row {worst:.1e}" + ("" if worst < WRONG else "  WRONG"), us


def table(size: tuple[int, int, int], asked: argparse.Namespace, **options: Any) -> None:
    """One line a candidate."""
    m, n, k = size
    dtype = options.get("dtype", "fp8")
    work = bound.LINEAR[dtype].work(m, n, k, None)
    print(f"\n{dtype}{' blocks' * options.get('blocked', False)} M={m} N={n} K={k}: ", end="")
    print(f"bound {work.us:.1f} us", flush=True)
    sets = [operands(i, size, **options) for i in range(bound.copies(n * k))]
    blocked = options.get("blocked", False)
    configs = asked.config or plan.candidates(
        m, n, k, dtype=DTYPES[dtype], blocked=blocked, cores=target().cores
    )
    for config in configs:
        print(f"  {title(config)} ", end="", flush=True)
        found, failure = attempt(time_one, config, sets, 2 if asked.quick else 5)
        if failure:
            print(failure, flush=True)
            continue
        said, us = found
        rate = f", {2e-6 * m * n * k / us:6.0f} T/s" if m >= 128 else ""
        print(f"{us:8.2f} us {us / work.us:5.2f}x{rate}  {said}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the square shape, 2 iterations")
    parser.add_argument("--no-checks", action="store_true", help="tables only")
    parser.add_argument("--dtype", choices=[*DTYPES, "blocks"], action="append")
    parser.add_argument("--shapes", default="square", help=",".join(LINEAR_SHAPES))
    parser.add_argument("--m", default="1,16,64,256,8192")
    parser.add_argument(
        "--config",
        type=config_of,
        action="append",
        help="instead of the candidates: swap=0,columns=256,...; may be repeated",
    )
    return parser.parse_args()


def config_of(text: str) -> Config:
    """A `Config` from its command line form."""
    pairs = (item.split("=") for item in text.split(","))
    return Config(**{name: bool(int(v)) if name == "swap" else int(v) for name, v in pairs})


def tables(asked: argparse.Namespace) -> Iterator[functools.partial]:
    """Of all sizes and types that were asked for."""
    sets = ["square"] if asked.quick else asked.shapes.split(",")
    for dtype in asked.dtype or ["fp8"]:
        for n, k in [shape for name in sets for shape in LINEAR_SHAPES[name]]:
            for m in map(int, asked.m.split(",")):
                options = {"blocked": True} if dtype == "blocks" else {"dtype": dtype}
                yield functools.partial(table, (m, n, k), asked, **options)


def main() -> None:
    """Checks, then tables."""
    asked = parse()
    for size, config, options in [] if asked.no_checks else CHECKS:
        print(f"{size} {title(config)} {options or ''}: ", end="", flush=True)
        said, failure = attempt(functools.partial(check, size, config, **options))
        print(failure or said, flush=True)
    for make in tables(asked):
        _, failure = attempt(make)
        if failure:
            print(failure, flush=True)


if __name__ == "__main__":
    main()
