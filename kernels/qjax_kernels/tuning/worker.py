"""A process that measures jobs: JSON lines in, JSON lines out.

Several share a GPU: all compile at once, and one at a time runs anything, under a lock that the
system releases even if the process dies.
"""

import fcntl
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

MARK = "@@ "  # starts a line that is for the parent


def main() -> None:
    """Hello (or what is missing here), then the messages of each job that standard input names,
    each job ended by 'done'."""
    given = json.loads(sys.argv[1])
    try:
        tell({"hello": hello(given["compile_only"])})
    except NotImplementedError as refusal:
        return tell({"refused": str(refusal)})
    for line in sys.stdin:
        for message in work(json.loads(line), given, locked(given["lock"])):
            tell(message)
        tell({"done": True})


def hello(compile_only: bool) -> dict[str, Any]:
    """The device and the versions.

    Raises:
      NotImplementedError: nothing can be measured, or compiled, here.
    """
    import importlib.metadata

    import jax

    from qjax_kernels.tuning import deviceless

    if compile_only:
        deviceless.mesh()
        found = {"device": deviceless.KIND, "cores": deviceless.CORES}
    else:
        from qjax_kernels.target import require_hopper

        target = require_hopper()
        found = {"device": target.kind, "cores": target.cores}
        jax.block_until_ready(jax.numpy.zeros(()) + 1)  # the GPU takes another process
    versions = {"python": sys.version.split()[0]}
    for package in ("jax", "jaxlib", "jax-cuda13-plugin"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"versions": versions}


def work(
    task: dict[str, Any],
    given: dict[str, Any],
    gpu: Callable[[], AbstractContextManager],
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """The messages of one job, see `measure.measure`.

    Args:
      task: {"job": a Job's fields, "cores", "skip": {m: {label: why}}, "ms": those still to do}.
      given: the parent's options: compile_only, iterations, xla, chosen.
      gpu: see `measure.Options`, and so options.
    """
    from qjax_kernels.tuning import measure
    from qjax_kernels.tuning.jobs import Job
    from qjax_kernels.tuning.problems import problem

    names = ("compile_only", "iterations", "xla", "chosen")
    asked = measure.Options(**{name: given[name] for name in names}, gpu=gpu, **options)
    job, cache = Job.of(task["job"]), dict[Any, Any]()
    for m in task["ms"]:
        yield {"stage": "size", "m": m}
        skip = task["skip"].get(str(m), {})
        size = problem(job, m, task["cores"])
        try:
            yield from measure.measure(size, asked, skip, cache)
        except NotImplementedError as refusal:
            yield {"failed": f"{job.op} m={m} n={job.n} k={job.k}: {refusal}"}


def locked(path: str) -> Callable[[], AbstractContextManager]:
    """A lock on a file, for all processes that name it."""

    @contextmanager
    def hold() -> Iterator[None]:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return hold


def tell(message: dict[str, Any]) -> None:
    """One line to the parent."""
    print(MARK + json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
