"""What is measured of qjax and XLA: one function an op makes its operands on the device. Products
are here, other ops in `other_rows`.

To add an op, write a function of (n, k, group_size) that returns a function of m that returns a
`Case`, and register it with the shapes it is measured at if those are not a linear layer's.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.random import fold_in, normal, randint, uniform

from benchmarks.kernels import bound
from benchmarks.kernels.sweep import Ops
from benchmarks.kernels.timing import run_and_time

OPS = Ops()


@dataclasses.dataclass(frozen=True)
class Call:
    """One implementation of an op.

    Attributes:
      function: of the arguments that `prepare` returns.
      prepare: of a case's arguments, to the layout that the implementation wants; not timed.
    """

    function: Callable[..., Any]
    prepare: Callable[..., tuple] = lambda *arguments: arguments


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one size.

    Attributes:
      sets: the arguments of one call each, enough of them to exceed the cache twice.
      calls: by name of the implementation as results have it ('xla', 'qjax/mosaic').
      work: of one call.
      reference: of one set's arguments: what `finish` returns, in float32.
      finish: of a call's result: the arrays to compare; not timed.
    """

    sets: Sequence[tuple]
    calls: Mapping[str, Call]
    work: bound.Work
    reference: Callable[..., Any]
    finish: Callable[[Any], Any] = lambda result: result


def measure(
    case: Case,
    implementation: str,
    iterations: int = 5,
    clock: Callable[..., tuple[list, float]] = run_and_time,
) -> tuple[float, float | None]:
    """Microseconds of one call, and its maximum relative error over all rows.

    The results compared are those of the run that was timed, its first and its last call's. The
    error is None where one is not finite.

    Args:
      case: what to run.
      implementation: the name of one of the case's calls.
      iterations: of the clock.
      clock: (function, argument sets, iterations) -> (results, microseconds).
    """
    call = case.calls[implementation]
    prepared = [call.prepare(*arguments) for arguments in case.sets]
    results, us = clock(call.function, prepared, iterations)
    ends = [(case.finish(results[i]), case.reference(*case.sets[i])) for i in (0, -1)]
    errors = [row_error(found, expected) for found, expected in ends]
    return us, max(errors) if all(map(math.isfinite, errors)) else None


def row_error(found: Any, expected: Any) -> float:
    """max over rows (all but the last axis) and leaves of |found - expected| / |expected|."""
    errors = []
    for y, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if y.shape != reference.shape:
            raise ValueError(f"the result is {y.shape}, the reference {reference.shape}")
        reference = reference.astype(jnp.float32)
        off = jnp.linalg.norm(y.astype(jnp.float32) - reference, axis=-1)
        size = jnp.linalg.norm(reference, axis=-1)
        errors.append(jnp.max(off / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)))
    return float(jnp.max(jnp.stack(errors)))  # a NaN stays one


def calls_of(
    function: Callable[..., Any], implementations: Mapping[str, Any], **static: Any
) -> dict[str, Call]:
    """A `Call` for each of an op's IMPLEMENTATIONS.

    Args:
      function: of the op's api.
      implementations: the api's.
      **static: keyword arguments of the function.
    """
    return {
        name if name == "xla" else f"qjax/{name}": Call(
            partial(function, implementation=name, **static)
        )
        for name in implementations
    }


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T in float32."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.matmul(x, w.T, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def values(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random values of a dtype: integers over the whole range, normal floats."""
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return randint(key, shape, int(limits.min), int(limits.max) + 1, jnp.int32).astype(dtype)
    return normal(key, shape, jnp.float32).astype(dtype)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def scales(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random scales that vary by a factor of four."""
    return uniform(key, shape, jnp.float32, 0.005, 0.02).astype(dtype)


def _keys(op: str, n: int, k: int, group_size: int | None) -> Iterator[jax.Array]:
    """Enough keys to rotate an op's weights past the cache."""
    weight_bytes = bound.LINEAR[op].weight_bytes(n, k, group_size)
    return (fold_in(jax.random.key(1), i) for i in range(bound.copies(weight_bytes)))


@OPS.register("bf16")
def _bf16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """x @ w.T in bfloat16: what quantization is to be faster than."""
    weights = [values(key, (n, k), jnp.bfloat16) for key in _keys("bf16", n, k, None)]

    def case(m: int) -> Case:
        x = values(jax.random.key(0), (m, k), jnp.bfloat16)
        calls = {"xla": Call(lambda x, w: x @ w.T)}
        work = bound.LINEAR["bf16"].work(m, n, k, None)
        return Case([(x, w) for w in weights], calls, work, product)

    return case


@OPS.register("w4a16", grouped=True)
def _w4a16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """bfloat16 activations, int4 weights with a bfloat16 scale for each group."""
    return _weight_only("w4a16", jnp.int4, jnp.bfloat16, n, k, group_size)


@OPS.register("w8a16")
def _w8a16(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """bfloat16 activations, int8 weights with a float32 scale for each output."""
    return _weight_only("w8a16", jnp.int8, jnp.float32, n, k, k)


def _weight_only(
    op: str, dtype: Any, scale_dtype: Any, n: int, k: int, group_size: int
) -> Callable[[int], Case]:
    from qjax_kernels.weight_only_gemm import api

    weights = [
        (values(key, (n, k), dtype), scales(key, (n, k // group_size), scale_dtype))
        for key in _keys(op, n, k, group_size)
    ]

    def reference(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        scale = jnp.repeat(scale.astype(jnp.float32), group_size, axis=1)
        return product(x, w.astype(jnp.float32) * scale)

    def case(m: int) -> Case:
        x = values(jax.random.key(0), (m, k), jnp.bfloat16)
        calls = calls_of(api.weight_only_gemm, api.IMPLEMENTATIONS, out_dtype=jnp.bfloat16)
        calls["qjax/mosaic"] = Call(
            partial(api.prepared_gemm, out_dtype=jnp.bfloat16, implementation="mosaic"),
            lambda x, w, scale: (x, api.prepare(w, scale)),
        )
        work = bound.LINEAR[op].work(m, n, k, group_size)
        return Case([(x, *weight) for weight in weights], calls, work, reference)

    return case


@OPS.register("w4a8", grouped=True)
def _w4a8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """e4m3 activations with a scale for each row, int4 weights with one for each group."""
    from qjax_kernels.weight_only_gemm import api

    weights = [
        (values(key, (n, k), jnp.int4), scales(key, (n, k // group_size), jnp.bfloat16))
        for key in _keys("w4a8", n, k, group_size)
    ]

    def reference(x: jax.Array, x_scale: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        scale = jnp.repeat(scale.astype(jnp.float32), group_size, axis=1)
        return product(x, w.astype(jnp.float32) * scale) * x_scale

    def prepare(x: jax.Array, x_scale: jax.Array, w: jax.Array, scale: jax.Array) -> tuple:
        return x, x_scale, api.prepare(w, scale, operand="float8_e4m3fn")

    def case(m: int) -> Case:
        x = values(jax.random.key(0), (m, k), jnp.float8_e4m3fn)
        x_scale = scales(jax.random.key(2), (m, 1), jnp.float32)
        call = partial(api.w4a8_gemm, out_dtype=jnp.bfloat16, implementation="mosaic")
        work = bound.LINEAR["w4a8"].work(m, n, k, group_size)
        sets = [(x, x_scale, *weight) for weight in weights]
        calls = {"qjax/mosaic": Call(call, prepare), "xla": Call(_w4a8_xla)}
        return Case(sets, calls, work, reference)

    return case


def _w4a8_xla(x: jax.Array, x_scale: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """What there is without a kernel: widen both, which loses nothing of x."""
    from qjax_kernels.weight_only_gemm import xla

    y = xla.weight_only_gemm(x.astype(jnp.bfloat16), w, scale, None, out_dtype=jnp.float32)
    return (y * x_scale).astype(jnp.bfloat16)


@OPS.register("fp8")
def _fp8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """e4m3 x e4m3, a scale for each row of x and each output."""
    return _scaled("fp8", jnp.float8_e4m3fn, n, k)


@OPS.register("fp8_tensor")
def _fp8_tensor(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """e4m3 x e4m3, one scale for x and one for w."""
    return _scaled("fp8_tensor", jnp.float8_e4m3fn, n, k, per_tensor=True)


@OPS.register("int8")
def _int8(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """int8 x int8, a scale for each row of x and each output."""
    return _scaled("int8", jnp.int8, n, k)


def _scaled(op: str, dtype: Any, n: int, k: int, per_tensor: bool = False) -> Callable[[int], Case]:
    from qjax_kernels.scaled_gemm import api

    weights = [
        (values(key, (n, k), dtype), scales(key, (1 if per_tensor else n, 1), jnp.float32))
        for key in _keys(op, n, k, None)
    ]

    def reference(x: jax.Array, x_scale: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        return product(x, w) * x_scale * scale[:, 0]

    def case(m: int) -> Case:
        x = values(jax.random.key(0), (m, k), dtype)
        x_scale = scales(jax.random.key(2), () if per_tensor else (m, 1), jnp.float32)
        calls = calls_of(api.scaled_gemm, api.IMPLEMENTATIONS, out_dtype=jnp.bfloat16)
        work = bound.LINEAR[op].work(m, n, k, None)
        return Case([(x, x_scale, *weight) for weight in weights], calls, work, reference)

    return case
