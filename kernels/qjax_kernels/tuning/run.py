"""A whole run: what there is to do, who does it, what is written. `qjax tune` is this."""

import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qjax_kernels.tuned import lookup
from qjax_kernels.tuning import jobs as jobs_
from qjax_kernels.tuning.jobs import Job
from qjax_kernels.tuning.pool import Pool
from qjax_kernels.tuning.problems import problem
from qjax_kernels.tuning.record import Record

CORES = 132  # of an H200; the plan may be made where none is


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would do. Attributes: jobs; combinations, (op, shape, m, candidate) in all;
    refused, sizes that no configuration takes."""

    jobs: list[Job]
    combinations: int
    refused: list[str]


def plan(found: Iterable[Job], record: Record | None = None) -> Plan:
    """Count, and leave out the sizes that a record has and those that cannot be.

    Args:
      found: jobs.
      record: of a run that is resumed.
    """
    kept, combinations, refused = [], 0, []
    for job in found:
        ms = []
        for m in job.ms:
            one = problem(job, m, CORES)
            if record is not None and record.has(job, m, one.table_op, one.format):
                continue
            try:
                combinations += len(one.candidates())
            except NotImplementedError as reason:
                refused.append(f"{job.op} m={m} n={job.n} k={job.k}: {reason}")
                continue
            ms.append(m)
        if ms:
            kept.append(dataclasses.replace(job, ms=tuple(ms)))
    return Plan(kept, combinations, refused)


def compile_all(
    found: Plan, workers: int, seconds: float | None = None
) -> Iterator[dict[str, Any]]:
    """Messages of a run that compiles every candidate for an H200 and runs nothing."""
    options = {"compile_only": True, "iterations": 0, "xla": False, "chosen": False}
    yield from Pool(found.jobs, workers, options, seconds).messages()


def measure_all(
    found: Plan,
    workers: int,
    *,
    iterations: int = 5,
    xla: bool = False,
    chosen: bool = False,
    seconds: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Messages of a run that times the candidates on the GPU, see `Pool.messages`."""
    options = {"compile_only": False, "iterations": iterations, "xla": xla, "chosen": chosen}
    yield from Pool(found.jobs, workers, options, seconds).messages()


def keep(
    messages: Iterable[dict[str, Any]], record: Callable[[str], Record]
) -> Iterator[dict[str, Any]]:
    """Write every result to a record, and pass the messages on, with the entry that it became.

    Args:
      messages: of `measure_all`.
      record: device -> where to write.
    """
    growing: Record | None = None
    for message in messages:
        if "hello" in message and growing is None:
            hello = message["hello"]
            growing = record(hello["device"])
            growing.of_device(hello["device"], hello["versions"])
        if "result" in message and growing is not None:
            entry = growing.add(message["result"])
            message = message | {"entry": None if entry is None else dict(vars(entry))}
        yield message


def path_of(output: Path | None, device: str) -> Path:
    """The file to write: a file that is named, or the device's in a directory that is, or where
    the kernels look."""
    if output is not None and output.suffix == ".json":
        return output
    folder = output
    if folder is None:
        named = os.environ.get(lookup.VARIABLE)
        folder = Path(named) if named else Path(lookup.__file__).parent
    return folder / lookup.file_name(device)


def commit() -> str:
    """The commit checked out, with '+' if files differ from it; 'unknown' outside a repository."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--short") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def default_jobs(
    ops: Iterable[str], shapes: Iterable[str], ms: Iterable[int], group_size: int
) -> list[Job]:
    """`jobs.jobs`, with every name checked.

    Raises:
      ValueError: an op or a shape that is not known, an m below 1, a group size that does not fit.
    """
    ops, shapes, ms = list(ops), list(shapes), list(ms)
    for op in ops:
        if op not in jobs_.OPS:
            raise ValueError(f"unknown op {op!r}; choose of: {', '.join(jobs_.OPS)}")
    for m in ms:
        if m < 1:
            raise ValueError(f"m is {m}; it must be at least 1")
    found = list(jobs_.jobs(ops, shapes, ms, group_size))
    for job in found:
        if job.op in ("w4a16", "w4a8") and job.k % group_size:
            raise ValueError(
                f"the group size {group_size} does not divide the {job.k} inputs of {job.n}x{job.k}"
            )
    return found
