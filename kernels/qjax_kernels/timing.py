"""Microseconds a call, from the GPU's own clock: CUPTI's start and end of every kernel of the call.

Gaps between kernels and the launches on the host are not in it, so it is what a kernel costs inside
a decode loop that is one program. Copies and memsets are no kernels and are not in it either.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler

# A GPU that idles runs at a fifth of its clock and needs some milliseconds of work to leave that.
WARM_UP_SECONDS = 0.05
# A sequence of kernels must run one after the other, as launched: inside a CUDA graph kernels that
# do not depend on each other may overlap, and their times would add up to more than the wall's.
OPTIONS = {"xla_gpu_graph_min_graph_size": 1_000_000}


def chain(function: Callable[..., Any]) -> Callable[..., list]:
    """A function of any number of argument sets that calls `function` once for each, in order.

    Every result is returned and every call waits for the one before it, so that XLA can neither
    drop a call nor merge two that share an operand (it concatenates small products).
    """
    shared = jax.jit(function)  # identical calls are lowered, and their kernels compiled, once

    def run(*argument_sets: tuple) -> list:
        results: list = []
        for arguments in argument_sets:
            if results:
                arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
            results.append(shared(*arguments))
        return results

    return run


def run_kernels(
    function: Callable[..., Any], argument_sets: Sequence[tuple], iterations: int = 5
) -> tuple[list, list[list[tuple[str, float]]]]:
    """Run `function(*arguments)` for each of `argument_sets`, `iterations` times over.

    Returns:
      The results, one for each set; and for each iteration the name and the microseconds of every
      kernel in the order of launching: those of the first set's call, then the second's.

    Raises:
      RuntimeError: no kernel ran, or the iterations ran different ones.
    """
    compiled = jax.jit(chain(function)).lower(*argument_sets).compile(OPTIONS)
    jax.block_until_ready(compiled(*argument_sets))
    warm_up(compiled, argument_sets)
    measured: Any = profiler.measure(compiled, aggregate=False, iterations=iterations)
    results, times = measured(*argument_sets)
    if times is None:
        raise RuntimeError("no GPU kernel ran")
    if iterations == 1:
        times = [times]
    return results, [[(name, 1e3 * ms) for name, ms in kernels] for kernels in times]


def warm_up(program: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Run a compiled program until the GPU has its clock."""
    end = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < end:
        jax.block_until_ready(program(*arguments))


def time_compiled(
    program: jax.stages.Compiled, arguments: Sequence[Any], calls: int, iterations: int = 5
) -> float:
    """Microseconds of one of the calls that a compiled program makes, one after the other.

    The median over iterations. CUPTI stays attached, so the next program is timed sooner than by
    `time_kernels`; the GPU is to be warm.

    Raises:
      RuntimeError: no kernel ran, or the iterations ran different ones.
    """
    clock: Any = profiler.Cupti(finalize=False)
    _, times = clock.measure(program, aggregate=True, iterations=iterations)(*arguments)
    if times is None:
        raise RuntimeError("no GPU kernel ran")
    return 1e3 * median([times] if iterations == 1 else times) / calls


def run_and_time(
    function: Callable[..., Any], argument_sets: Sequence[tuple], iterations: int = 5
) -> tuple[list, float]:
    """The results of the run that was timed, one for each set, and `time_kernels` of it."""
    results, times = run_kernels(function, argument_sets, iterations)
    totals = [sum(microseconds for _, microseconds in kernels) for kernels in times]
    return results, median(totals) / len(argument_sets)


def time_kernels(
    function: Callable[..., Any], argument_sets: Sequence[tuple], iterations: int = 5
) -> float:
    """Microseconds of one call of `function`: the times of all its kernels added up.

    Args:
      function: of arrays (pytrees of them, and None); traceable by JAX. Close over all else.
      argument_sets: the arguments of one call each. Together they should be at least twice the
        L2 cache (60 MB on an H200), or later calls find their operands there.
      iterations: how many times all sets are run.

    Returns:
      The time of all sets' calls divided by the number of sets; the median over iterations.
    """
    return run_and_time(function, argument_sets, iterations)[1]
