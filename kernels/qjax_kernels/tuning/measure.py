"""Compiling and timing the candidates of one size.

A generator of messages, since whoever listens must know what ran when nothing more comes: a kernel
that hangs or takes the process with it is known by the last message.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qjax_kernels import timing
from qjax_kernels.tuning.assembly import dumped, kernels_in
from qjax_kernels.tuning.deviceless import CORES, KIND, SHARED_MEMORY, shape
from qjax_kernels.tuning.problem import Problem

Message = dict[str, Any]
Clock = Callable[[Any, Any, int, int], float]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
      compile_only: for an H200 that is not there; nothing runs.
      iterations: of a timed program.
      xla: XLA's implementation is a candidate too, where there is one.
      chosen: so is the configuration that a call gets now, and the result says which it is.
      gpu: a context manager that is held while anything runs on the GPU.
      clock: `timing.time_compiled`.
    """

    compile_only: bool = False
    iterations: int = 5
    xla: bool = False
    chosen: bool = False
    gpu: Callable[[], AbstractContextManager] = nullcontext
    clock: Clock = timing.time_compiled


@dataclasses.dataclass
class Candidate:
    """A configuration and what came of it. `dropped` says why it is none any more."""

    implementation: str
    config: dict[str, Any]
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    us: float | None = None
    row_error: float | None = None
    dropped: str | None = None
    chosen: bool = False
    program: Any = None

    def said(self) -> Message:
        """As JSON."""
        return {name: value for name, value in vars(self).items() if name != "program"}


def measure(
    problem: Problem, options: Options, skip: dict[str, str], cache: dict[Any, Any]
) -> Iterator[Message]:
    """Compile, check and time all candidates of a size.

    Args:
      problem: the size.
      options: how.
      skip: `label` of a configuration -> why it is not to be run.
      cache: of operands that other sizes of the job share; one dict a job.

    Yields:
      {"stage": "compile" | "wait" | "operands" | "run" | "time", "label": ...} before each step,
      then {"result": ...}, with every candidate.
    """
    candidates = _candidates(problem, options)
    for candidate in candidates:
        yield {"stage": "compile", "label": label(candidate)}
        candidate.dropped = skip.get(label(candidate))
        if not candidate.dropped and candidate.implementation == "mosaic":
            compile_candidate(problem, candidate, options)
    if not options.compile_only:
        helpers = _compile_helpers(problem, cache)
        yield {"stage": "wait"}
        with options.gpu():
            yield from _run(problem, candidates, helpers, options, cache)
    yield {"result": result(problem, candidates)}


def label(candidate: Candidate) -> str:
    """A candidate in a line."""
    fields = ",".join(f"{name}={value}" for name, value in candidate.config.items())
    return f"{candidate.implementation} {fields}".strip()


def result(problem: Problem, candidates: list[Candidate]) -> Message:
    """What is known of a size: what an entry of a table needs, and every candidate."""
    job = problem.job
    size = {"m": problem.m, "n": job.n, "k": job.k, "group_size": job.group_size}
    names = {"tuned": job.op, "op": problem.table_op, "format": problem.format}
    said = [candidate.said() for candidate in candidates]
    return names | size | {"bound_us": problem.work.us, "candidates": said}


def _candidates(problem: Problem, options: Options) -> list[Candidate]:
    configs = problem.candidates()
    chosen = None
    if options.chosen:
        with _target(options):
            chosen = problem.chosen()
        configs = [*configs, *([] if chosen in configs else [chosen])]
    found = [
        Candidate("mosaic", dataclasses.asdict(config), chosen=options.chosen and config == chosen)
        for config in configs
    ]
    if options.xla and problem.by_xla and not options.compile_only:
        found.append(Candidate("xla", {}))
    return found


def compile_candidate(problem: Problem, candidate: Candidate, options: Options) -> None:
    """Set the program, or say why there is none."""
    config = None
    if candidate.implementation == "mosaic":
        config = _config(problem, candidate.config)
    calls = 1 if options.compile_only else problem.copies
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    rotated = jax.eval_shape(problem.rotated, seed)
    operands = jax.eval_shape(problem.shared, seed), jax.eval_shape(problem.prepare, rotated)
    if options.compile_only:
        operands = jax.tree.map(lambda x: shape(x.shape, x.dtype), operands)
    try:
        with _target(options), dumped() as directory:
            run = jax.jit(timing.chain(problem.call(config)))
            candidate.program = run.lower(*[operands] * calls).compile(
                {"xla_gpu_autotune_level": 0} if options.compile_only else timing.OPTIONS
            )
            kernels = list(kernels_in(directory))
    except Exception as error:
        candidate.dropped = f"does not compile: {first_line(error)}"
        return
    if kernels:
        candidate.registers = max(kernel.registers for kernel in kernels)
        candidate.spills = sum(kernel.spills for kernel in kernels)
        candidate.shared = max(kernel.shared for kernel in kernels)
        if candidate.spills:
            candidate.dropped = f"spills {candidate.spills} bytes"
        elif candidate.shared > SHARED_MEMORY:
            candidate.dropped = f"takes {candidate.shared} bytes of shared memory"


def _target(options: Options) -> AbstractContextManager:
    """What traces are for."""
    if not options.compile_only:
        return nullcontext()
    device = AbstractDevice(device_kind=KIND, num_cores=CORES, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _config(problem: Problem, fields: dict[str, Any]) -> Any:
    return type(problem.candidates()[0])(**fields)


@dataclasses.dataclass(frozen=True)
class _Helpers:
    """Compiled programs beside the candidates'."""

    shared: Any
    rotated: Any
    prepare: Any
    reference: Any
    error: Any


def _compile_helpers(problem: Problem, cache: dict[Any, Any]) -> _Helpers:
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    shared, rotated = (jax.eval_shape(f, seed) for f in (problem.shared, problem.rotated))
    expected = jax.eval_shape(problem.reference, shared, rotated)
    y = jax.ShapeDtypeStruct((problem.m, expected.shape[1]), jnp.bfloat16)

    def compiled(function: Any, *arguments: Any) -> Any:
        # No autotuning, which would run on the GPU while another process measures.
        return jax.jit(function).lower(*arguments).compile({"xla_gpu_autotune_level": 0})

    key = ("make", str(rotated))
    if key not in cache:
        cache[key] = compiled(problem.rotated, seed), compiled(problem.prepare, rotated)
    return _Helpers(
        shared=compiled(problem.shared, seed),
        rotated=cache[key][0],
        prepare=cache[key][1],
        reference=compiled(problem.reference, shared, rotated),
        error=compiled(problem.error, y, expected),
    )


def _run(
    problem: Problem,
    candidates: list[Candidate],
    helpers: _Helpers,
    options: Options,
    cache: dict[Any, Any],
) -> Iterator[Message]:
    yield {"stage": "operands"}
    seeds = [np.uint32(i) for i in range(problem.copies)]
    shared = helpers.shared(seeds[0])
    arguments = [(shared, prepared) for prepared in _prepared(helpers, seeds, cache)]
    ends = (0, -1)
    expected = [helpers.reference(shared, helpers.rotated(seeds[i])) for i in ends]
    for candidate in candidates:
        if candidate.dropped:
            continue
        yield {"stage": "run", "label": label(candidate)}
        if candidate.implementation == "xla":
            compile_candidate(problem, candidate, options)  # here, since it autotunes on the GPU
            if candidate.dropped:
                continue
        results = candidate.program(*arguments)
        found = [
            float(helpers.error(results[i].reshape(problem.m, -1), expected[j]))
            for j, i in enumerate(ends)
        ]
        del results
        candidate.row_error = max(found) if all(map(math.isfinite, found)) else None
        if candidate.row_error is None:
            candidate.dropped = "wrong: not finite"
        elif candidate.row_error > problem.limit:
            candidate.dropped = f"wrong: row error {candidate.row_error:.1e} > {problem.limit}"
    good = [candidate for candidate in candidates if not candidate.dropped]
    if good:
        yield {"stage": "warm up"}
        timing.warm_up(good[0].program, arguments)
    for candidate in good:
        yield {"stage": "time", "label": label(candidate)}
        try:
            candidate.us = options.clock(
                candidate.program, arguments, len(arguments), options.iterations
            )
        except RuntimeError as error:
            candidate.dropped = f"not timed: {first_line(error)}"
    for candidate in candidates:
        candidate.program = None


def _prepared(helpers: _Helpers, seeds: list[Any], cache: dict[Any, Any]) -> list[Any]:
    """Operands of each seed; those of the last size are kept if they are the same."""
    made = cache.get("made")
    if made is None or made[0] is not helpers.rotated:
        made = cache["made"] = (helpers.rotated, [])
    while len(made[1]) < len(seeds):
        # Two programs, as a model's weights are prepared: values first, as arrays.
        made[1].append(helpers.prepare(helpers.rotated(seeds[len(made[1])])))
    jax.block_until_ready(made[1])
    return list(made[1][: len(seeds)])


def first_line(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
