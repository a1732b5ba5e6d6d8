"""`python -m benchmarks.kernels.gemm_swiglu`: every candidate of the gated linear unit, and what it
is to be faster than.

First odd sizes and options, for errors only; then a table a size, of Llama 3 8B's shape: the
candidates, then qjax's product of both weights and its glu kernel, qjax's two products and XLA's
elementwise kernel, and XLA alone. A line is printed before each kernel runs, so that one which
hangs is known.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.random import fold_in
from qjax_kernels.gemm_swiglu import mosaic, xla
from qjax_kernels.gemm_swiglu.layout import interleave
from qjax_kernels.glu_quant import api as glu_quant
from qjax_kernels.glu_quant.xla import ACTIVATIONS
from qjax_kernels.plain_gemm import mosaic as plain
from qjax_kernels.row_quant import RANGES, quantize_rows
from qjax_kernels.scaled_gemm import mosaic as scaled
from qjax_kernels.scaled_gemm import plan
from qjax_kernels.scaled_gemm import xla as scaled_xla
from qjax_kernels.scaled_gemm.config import Config
from qjax_kernels.target import target

from benchmarks.kernels import bound
from benchmarks.kernels.rows import product, row_error, scales, values
from benchmarks.kernels.scaled_gemm import config_of, title
from benchmarks.kernels.sweep import attempt
from benchmarks.kernels.timing import run_and_time

DTYPES = {
    "bf16": jnp.bfloat16,
    "fp8": jnp.float8_e4m3fn,
    "int8": jnp.int8,
    "f16": jnp.float16,
}
FEATURES, K = 14336, 4096
# Rounding to bfloat16 alone makes errors of 2e-3 of a row. To 8 bits, numbers near the middle of
# two go either way: a step of e4m3 is up to 1/8.
WRONG, WRONG_8_BITS = 1e-2, 8e-2

WIDE = {"swap": False, "warpgroups": 2, "stages": 3}
CHECKS: list[tuple[tuple[int, int, int], Config, dict[str, Any]]] = [
    ((1, 512, 1024), Config(stages=8), {}),
    ((8, 512, 1024), Config(stages=8), {"dtype": "int8", "activation": "gelu"}),
    ((16, 1024, 4096), Config(stages=6, columns=16, warpgroups=4), {"activation": "gelu_tanh"}),
    ((40, 1000, 4096), Config(stages=4, columns=64, warpgroups=2), {"dtype": "int8"}),
    ((16, 512, 1024), Config(stages=8, columns=16), {"out": jnp.float8_e4m3fn}),
    ((16, 512, 1024), Config(stages=8, columns=16), {"out": jnp.int8, "dtype": "int8"}),
    ((24, 1000, 1024), Config(stages=4, columns=32), {"out": jnp.float32}),
    ((8, 512, 1024), Config(stages=8, k_tile=64), {"dtype": "bf16"}),
    ((16, 1000, 2752), Config(stages=4, k_tile=32, columns=16), {"dtype": "f16"}),
    # Results that are cut off, so leave through plain memory.
    ((5, 1000, 2752), Config(stages=4, k_tile=64), {}),
    ((77, 1000, 2752), Config(stages=4, k_tile=64, columns=32), {"dtype": "bf16"}),
    ((77, 1008, 2752), Config(**WIDE, columns=128, k_tile=64), {"out": jnp.int8}),
    # Many tiles a block, and clusters.
    ((2048, 2560, 2048), Config(**WIDE, columns=256, multicast=2), {}),
    ((2048, 2560, 2048), Config(**WIDE, columns=224, multicast=2, store=128), {}),
    ((2048, 2560, 2048), Config(**WIDE, columns=160), {"dtype": "int8", "out": jnp.float32}),
    ((2048, 2560, 2048), Config(**WIDE, columns=256, store=128), {"out": jnp.float8_e4m3fn}),
    ((2048, 2560, 2048), Config(**WIDE, columns=256, k_tile=64), {"dtype": "bf16"}),
    ((2048, 2560, 2048), Config(stages=3, columns=256, warpgroups=2, multicast=2), {}),
    ((2048, 2560, 2048), Config(stages=3, columns=208, warpgroups=2, store=16), {}),
    ((32, 1024, 4096), Config(stages=6, columns=32, splits=2, k_tile=64), {"dtype": "bf16"}),
]
# Beside the candidates, by M.
MORE = {
    256: [Config(warpgroups=2, columns=128, stages=6, multicast=2)],
    4096: [Config(**WIDE | {"stages": 4}, columns=256, store=64)],
}


def operands(
    index: int,
    size: tuple[int, int, int],
    *,
    dtype: str = "fp8",
    out: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """Random arguments of one call; those of another index differ in the weights. Gates are 2 or so
    from 0."""
    m, features, k = size
    key, same = fold_in(jax.random.key(1), index), jax.random.key(0)
    narrow = dtype in ("fp8", "int8")
    # The standard deviation of a product's terms.
    spread = (74.0**2 if dtype == "int8" else 1.0) * 0.0125**2
    weights = [values(fold_in(key, i), (features, k), DTYPES[dtype]) for i in range(2)]
    if not narrow:
        weights = [(w * jnp.asarray(2 / k**0.5, w.dtype)).astype(w.dtype) for w in weights]
    both = [scales(fold_in(key, 2 + i), (features, 1), jnp.float32) for i in range(2)]
    size_of_x = 2 / spread / k**0.5
    x_scale = scales(fold_in(same, 1), (m, 1), jnp.float32) * size_of_x
    return {
        "x": values(same, (m, k), DTYPES[dtype]),
        "x_scale": x_scale if narrow else None,
        "gate": weights[0],
        "up": weights[1],
        "gate_scale": both[0] if narrow else None,
        "up_scale": both[1] if narrow else None,
        "out_scale": jnp.float32(0.05) if jnp.dtype(out) in RANGES else None,
    }


@functools.partial(jax.jit, static_argnames=("activation", "out"))
def reference(given: dict[str, Any], activation: str, out: Any) -> jax.Array:
    """In float32, scaled before the product; rounded if the result is to be narrow."""
    x = given["x"].astype(jnp.float32)
    x = x if given["x_scale"] is None else x * given["x_scale"]
    parts = []
    for name in ("gate", "up"):
        w = given[name].astype(jnp.float32)
        scale = given[f"{name}_scale"]
        parts.append(product(x, w if scale is None else w * scale))
    h = ACTIVATIONS[activation](parts[0]) * parts[1]
    if given["out_scale"] is None:
        return h
    return quantize_rows(h, jnp.dtype(out), given["out_scale"], False)[0].astype(jnp.float32)


def fused(given: dict[str, Any]) -> tuple:
    """The arguments of the kernel."""
    scale = None
    if given["gate_scale"] is not None:
        scale = interleave(given["gate_scale"], given["up_scale"])
    weight = interleave(given["gate"], given["up"])
    return given["x"], given["x_scale"], weight, scale, given["out_scale"]


def side_by_side(given: dict[str, Any]) -> tuple:
    """The arguments of one product of both weights."""
    weight = jnp.concatenate([given["gate"], given["up"]])
    scale = given["gate_scale"]
    if scale is not None:
        scale = jnp.concatenate([scale, given["up_scale"]])
    return given["x"], given["x_scale"], weight, scale


def apart(given: dict[str, Any]) -> tuple:
    """The arguments of two products."""
    names = ("x", "x_scale", "gate", "gate_scale", "up", "up_scale")
    return tuple(given[name] for name in names)


def qjax_product(x: Any, x_scale: Any, w: Any, scale: Any) -> jax.Array:
    """x @ w.T by this package."""
    if x_scale is None:
        return plain.plain_gemm(x, w, jnp.bfloat16)
    return scaled.scaled_gemm(x, x_scale, w, scale, jnp.bfloat16)


def xla_product(x: Any, x_scale: Any, w: Any, scale: Any) -> jax.Array:
    """x @ w.T by XLA."""
    if x_scale is None:
        return x @ w.T
    return scaled_xla.scaled_gemm(x, x_scale, w, scale, jnp.bfloat16)


def product_and_glu(x: Any, x_scale: Any, w: Any, scale: Any, *, of: Callable) -> jax.Array:
    """One product of both weights, then qjax's row kernel."""
    return glu_quant.glu_quant(of(x, x_scale, w, scale), out_dtype=jnp.bfloat16).values


def two_products(
    x: Any, x_scale: Any, gate: Any, gate_scale: Any, up: Any, up_scale: Any, *, of: Callable
) -> jax.Array:
    """Two products, then an elementwise kernel by XLA."""
    g, u = of(x, x_scale, gate, gate_scale), of(x, x_scale, up, up_scale)
    h = jax.nn.silu(g.astype(jnp.float32)) * u.astype(jnp.float32)
    return h.astype(jnp.bfloat16)


# Name -> function and how its arguments are laid out.
PEERS: dict[str, tuple[Callable[..., jax.Array], Callable[[dict[str, Any]], tuple]]] = {
    "qjax's product of both, glu_quant": (
        functools.partial(product_and_glu, of=qjax_product),
        side_by_side,
    ),
    "qjax's two products, XLA's elementwise": (
        functools.partial(two_products, of=qjax_product),
        apart,
    ),
    "XLA's product of both, glu_quant": (
        functools.partial(product_and_glu, of=xla_product),
        side_by_side,
    ),
    "XLA's two products and elementwise": (
        functools.partial(two_products, of=xla_product),
        apart,
    ),
    "gemm_swiglu's reference (xla)": (
        functools.partial(xla.gemm_swiglu, out_dtype=jnp.dtype(jnp.bfloat16), activation="silu"),
        fused,
    ),
}


def errors(y: jax.Array, given: dict[str, Any], activation: str = "silu") -> str:
    """Relative error of the whole result and of its worst row."""
    expected = reference(given, activation, y.dtype)
    wrong = WRONG_8_BITS if y.dtype.itemsize == 1 else WRONG
    y = y.astype(jnp.float32)
    whole = row_error(y.reshape(1, -1), expected.reshape(1, -1))
    worst = row_error(y, expected)
    return f"error {whole:.1e}, row {worst:.1e}" + ("" if worst < wrong else "  WRONG")


def check(
    size: tuple[int, int, int], config: Config, activation: str = "silu", **options: Any
) -> str:
    """Run one call; its errors."""
    given = operands(0, size, **options)
    out = jnp.dtype(options.get("out", jnp.bfloat16))
    y = mosaic.gemm_swiglu(*fused(given), out_dtype=out, activation=activation, config=config)
    return errors(y, given, activation)


def time_one(
    call: Callable[..., jax.Array], sets: list[tuple], given: dict[str, Any], iterations: int
) -> tuple[str, float]:
    """Errors of the timed run's first result, and microseconds a call."""
    results, us = run_and_time(call, sets, iterations)
    return errors(results[0], given), us


def table(m: int, dtype: str, asked: argparse.Namespace) -> None:
    """One line a candidate, then one a peer."""
    n = 2 * FEATURES
    peak = bound.BF16 if dtype == "bf16" else bound.FP8
    width = jnp.dtype(DTYPES[dtype]).itemsize
    work = bound.Work(width * (m + n) * K + 2 * m * FEATURES, 2.0 * m * n * K, peak)
    print(f"\n{dtype} M={m} 2 x N={FEATURES} K={K}: bound {work.us:.1f} us", flush=True)
    given = [operands(i, (m, FEATURES, K), dtype=dtype) for i in range(bound.copies(width * n * K))]
    iterations = 2 if asked.quick else 5
    configs = asked.config or [
        *plan.candidates(m, n, K, dtype=DTYPES[dtype], activation="silu", cores=target().cores),
        *(MORE.get(m, []) if width == 1 else []),
    ]
    calls: dict[str, tuple] = {
        title(config): (
            functools.partial(
                mosaic.gemm_swiglu,
                out_dtype=jnp.dtype(jnp.bfloat16),
                activation="silu",
                config=config,
            ),
            fused,
        )
        for config in configs
    }
    layouts: dict[Any, list[tuple]] = {}
    for name, (call, layout) in (calls | ({} if asked.no_peers else PEERS)).items():
        print(f"  {name:64} ", end="", flush=True)
        if layout not in layouts:
            layouts = {layout: [layout(one) for one in given]}
        found, failure = attempt(time_one, call, layouts[layout], given[0], iterations)
        if failure:
            print(failure, flush=True)
            continue
        said, us = found
        rate = f", {1e-6 * work.operations / us:6.0f} T/s" if m >= 128 else ""
        print(f"{us:8.2f} us {us / work.us:5.2f}x{rate}  {said}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 iterations")
    parser.add_argument("--no-checks", action="store_true", help="tables only")
    parser.add_argument("--no-tables", action="store_true", help="checks only")
    parser.add_argument("--no-peers", action="store_true", help="candidates only")
    parser.add_argument("--dtype", choices=["bf16", "fp8", "int8"], action="append")
    parser.add_argument("--m", default="1,16,256,4096")
    parser.add_argument(
        "--config",
        type=config_of,
        action="append",
        help="instead of the candidates: swap=0,columns=256,...; may be repeated",
    )
    return parser.parse_args()


def tables(asked: argparse.Namespace) -> Iterator[functools.partial]:
    """Of all sizes and types that were asked for."""
    for dtype in asked.dtype or ["bf16", "fp8", "int8"]:
        for m in map(int, asked.m.split(",")):
            yield functools.partial(table, m, dtype, asked)


def main() -> None:
    """Checks, then tables."""
    asked = parse()
    for size, config, options in [] if asked.no_checks else CHECKS:
        print(f"{size} {title(config)} {options or ''}: ", end="", flush=True)
        said, failure = attempt(functools.partial(check, size, config, **options))
        print(failure or said, flush=True)
    for make in [] if asked.no_tables else tables(asked):
        _, failure = attempt(make)
        if failure:
            print(failure, flush=True)


if __name__ == "__main__":
    main()
