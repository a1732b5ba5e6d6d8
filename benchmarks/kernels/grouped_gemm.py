"""`python -m benchmarks.kernels.grouped_gemm`: every candidate, checked and timed.

A table a case: the products of Mixtral-8x7B and Qwen3-30B-A3B at decode and prefill sizes, for
rows routed at random, each token to different experts. The bound counts the weights of the experts
that have rows. A line is printed before each kernel runs, so that one which hangs is known.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.random import fold_in
from qjax_kernels.grouped_gemm import triton, xla
from qjax_kernels.grouped_gemm.config import Problem, candidates
from qjax_kernels.grouped_gemm.layout import prepare

from benchmarks.kernels import bound
from benchmarks.kernels.rows import row_error, scales, values
from benchmarks.kernels.timing import run_and_time


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product of a model's experts."""

    experts: int
    out: int
    features: int
    top: int  # experts of a token


SHAPES = {
    "mixtral up": Shape(8, 14336, 4096, 2),
    "mixtral down": Shape(8, 4096, 14336, 2),
    "qwen3 up": Shape(128, 768, 2048, 8),
    "qwen3 down": Shape(128, 2048, 768, 8),
}
# Types of activations and weights, bits of both, operations/s.
FORMATS: dict[str, tuple[Any, Any, int, int, float]] = {
    "bf16": (jnp.bfloat16, jnp.bfloat16, 16, 16, bound.BF16),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e4m3fn, 8, 8, bound.FP8),
    "w4a16": (jnp.bfloat16, jnp.int4, 16, 4, bound.BF16),
    "int8": (jnp.int8, jnp.int8, 8, 8, bound.INT8),
    "w8a16": (jnp.bfloat16, jnp.int8, 16, 8, bound.BF16),
}
GROUP = 128
OUT = jnp.dtype(jnp.bfloat16)


def routed(seed: int, tokens: int, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(group sizes, row ids) of tokens that each go to `top` different experts."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((tokens, shape.experts)), axis=1)[:, : shape.top]
    sizes = np.bincount(chosen.ravel(), minlength=shape.experts)
    return sizes.astype(np.int32), (np.argsort(chosen.ravel(), kind="stable") // shape.top).astype(
        np.int32
    )


def weight_of(key: jax.Array, fmt: str, shape: Shape) -> tuple[jax.Array, jax.Array | None]:
    """(values, scale)."""
    _, dtype, _, bits, _ = FORMATS[fmt]
    size = (shape.experts, shape.out, shape.features)
    if bits == 16:
        return values(key, size, dtype), None
    groups = shape.features // GROUP if bits == 4 else 1
    scale = scales(fold_in(key, 1), (*size[:2], groups), jnp.float32 if bits == 8 else OUT)
    return values(key, size, dtype), scale


@jax.jit
def reference(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    scale: jax.Array | None,
    x_scale: jax.Array | None,
    ids: jax.Array,
    row_scale: jax.Array,
) -> jax.Array:
    """Every row times every expert, in float32, and the right one chosen."""
    x = x.astype(jnp.float32) * (1.0 if x_scale is None else x_scale)
    x = x[ids]
    expert_of = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(ids))

    def one(expert: jax.Array, y: jax.Array) -> jax.Array:
        weight = w[expert].astype(jnp.float32)
        if scale is not None:
            by = scale[expert].astype(jnp.float32)
            weight *= jnp.repeat(by, weight.shape[1] // by.shape[1], axis=1)
        product = jnp.matmul(x, weight.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.where((expert_of == expert)[:, None], product, y)

    y = jax.lax.fori_loop(0, len(sizes), one, jnp.zeros((len(ids), w.shape[1]), jnp.float32))
    return y * row_scale[:, None]


@dataclasses.dataclass
class Case:
    """Arguments of the calls to time, in turn, each with its own routing."""

    title: str
    sets: list[tuple]
    work: bound.Work
    problem: Problem


def case_of(name: str, fmt: str, tokens: int) -> Case:
    """Two weights, which are larger than the cache where their experts are not all used, and as
    many routings as read the cache twice."""
    shape = SHAPES[name]
    x_type, _, x_bits, bits, peak = FORMATS[fmt]
    rows = tokens * shape.top
    each = shape.out * shape.features * bits / 8
    if bits == 4:
        each += 4 * shape.out * shape.features / GROUP
    active = np.mean([(routed(seed, tokens, shape)[0] > 0).sum() for seed in range(8)])
    moved = active * each + tokens * shape.features * x_bits / 8 + 2 * rows * shape.out
    count = min(16, max(2, math.ceil(2 * bound.L2 / moved)))
    weights = [weight_of(jax.random.key(i), fmt, shape) for i in range(2)]
    x = values(jax.random.key(8), (tokens, shape.features), x_type)
    x_scale = scales(jax.random.key(9), (tokens, 1), jnp.float32) if x_bits == 8 else None
    row_scale = scales(jax.random.key(10), (rows,), jnp.float32)
    sets = []
    for seed in range(count):
        sizes, ids = (jnp.asarray(a) for a in routed(seed, tokens, shape))
        w, scale = weights[seed % 2]
        sets.append((x, w, sizes, scale, x_scale, ids, row_scale))
    return Case(
        f"{name} {fmt}: {tokens} tokens, {rows} rows, {active:.0f} of {shape.experts} experts",
        sets,
        bound.Work(moved, 2.0 * rows * shape.out * shape.features, peak),
        Problem(
            rows=rows,
            experts=shape.experts,
            out=shape.out,
            features=shape.features,
            x_bits=x_bits,
            bits=bits,
            group=GROUP if bits == 4 else shape.features,
            capability=90,
            integer=fmt == "int8",
        ),
    )


def calls(case: Case, fmt: str, quick: bool) -> Iterator[tuple[str, Callable[..., Any], list]]:
    """(label, function, its argument sets)."""
    if fmt == "w4a16":
        packed = {id(s[1]): prepare(s[1], s[3]) for s in case.sets}
        own: list[tuple] = [(s[0], packed[id(s[1])], s[2], s[5], s[6]) for s in case.sets]
        function: Callable[..., Any] = triton.prepared_grouped_gemm
    else:
        own = [(*s[:4], None, *s[4:]) for s in case.sets]
        function = triton.grouped_gemm
    for config in candidates(case.problem):
        label = (
            f"{config.rows} x {config.columns} x {config.k_bytes} B, {config.stages} stages, "
            f"{config.warps} warps{'' if config.swap else ', not swapped'}"
            f"{'' if config.scale_sums else ', weights scaled'}"
            f"{'' if config.band == 8 else f', band {config.band}'}"
        )
        yield label, partial(function, out_dtype=OUT, config=config), own
    if quick:
        return
    own = [(*s[:4], None, *s[4:]) for s in case.sets]
    yield "xla", partial(xla.grouped_gemm, out_dtype=OUT), own
    if fmt == "bf16":
        yield from _peers(case)


def _peers(case: Case) -> Iterator[tuple[str, Callable[..., Any], list]]:
    """What JAX has for bfloat16, of rows that are gathered already, without scales of rows."""
    rows = [(s[0][s[5]], s[1], s[2]) for s in case.sets]
    problem = case.problem
    if problem.rows * problem.experts * problem.features * 2 < 8e9:  # what it expands rows to
        turned = {id(s[1]): s[1].swapaxes(1, 2) for s in case.sets}
        sets = [(x, turned[id(w)], sizes) for x, w, sizes in rows]
        yield "jax.lax.ragged_dot (no gather, no scale)", jax.lax.ragged_dot, sets
    if problem.filled <= 64:
        return
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    for block_m, block_n in ((128, 128), (64, 256)):

        def call(x: jax.Array, w: jax.Array, sizes: jax.Array, m: int, n: int) -> jax.Array:
            return ragged_dot_mgpu.ragged_dot(
                x,
                w,
                group_sizes=sizes,
                block_m=m,
                block_n=n,
                block_k=64,
                max_concurrent_steps=4,
                grid_block_n=math.gcd(problem.out // n, 8),
                transpose_rhs=True,
            )

        label = f"jax ragged_dot_mgpu {block_m} x {block_n} (no gather, no scale)"
        yield label, partial(call, m=block_m, n=block_n), rows


def measure(case: Case, fmt: str, asked: Any) -> None:
    """Print the case's table."""
    work = case.work
    print(f"\n{case.title}: {work.bytes / 1e6:.1f} MB, bound {work.us:.2f} us", flush=True)
    exact = reference(*case.sets[0])
    for label, function, sets in calls(case, fmt, asked.quick):
        print(f"  {label:52}", end="", flush=True)
        try:
            results, us = run_and_time(function, sets, 2 if asked.quick else 5)
            if "no gather" in label:
                said = ""
            else:
                y = results[0].astype(jnp.float32)
                off = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
                said = f"error {off:.1e}, worst row {row_error(y, exact):.1e}"
            rate = work.operations / us / 1e6
            print(
                f" {us:9.2f} us {us / work.us:6.2f}x {work.bytes / us / 1e6:5.2f} TB/s "
                f"{rate:6.0f} TFLOP/s  {said}",
                flush=True,
            )
        except Exception as error:
            print(f" {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)


def main() -> None:
    """All cases; those of quantized weights at decode sizes first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, 2 iterations")
    parser.add_argument("--only", default="", help="only cases whose title contains this")
    parser.add_argument("--formats", default="", help=f"of {','.join(FORMATS)}")
    parser.add_argument("--tokens", default="", help="numbers of tokens, '1,64'")
    asked = parser.parse_args()
    formats = list(FORMATS)[: 3 if asked.quick else 5]
    if asked.formats:
        formats = asked.formats.split(",")
    sizes = [1, 32, 4096] if asked.quick else [1, 8, 32, 128, 512, 2048, 8192]
    if asked.tokens:
        sizes = list(map(int, asked.tokens.split(",")))
    names = [name for name in SHAPES if not asked.quick or name.endswith("up")]
    for tokens in sizes:
        for name in names:
            for fmt in formats:
                if asked.only in f"{name} {fmt}":
                    measure(case_of(name, fmt, tokens), fmt, asked)


if __name__ == "__main__":
    main()
