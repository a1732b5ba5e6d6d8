"""qjax tune: time the kernels' candidates on this GPU and write the table that they read."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qjax.cli.common import print_json, print_table
from qjax.errors import ConfigError

HELP = "time the kernels' configurations on this GPU, and write the table that they read"
EXAMPLES = """examples:
  qjax tune
  qjax tune --ops w4a16,fp8 --shapes llama3-8b,square --m 1,16,64 --minutes 5 --resume
  qjax tune --compile-only --ops w4a16 --shapes 4096x11008 --m 1

Only --compile-only needs no GPU: it compiles every candidate for an H200, says which ones spill
registers or take too much shared memory, and writes nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from qjax_kernels.tuning import jobs

    parser.add_argument(
        "--ops",
        default=",".join(jobs.DEFAULT_OPS),
        help=f"of {','.join(jobs.OPS)}; default: %(default)s",
    )
    parser.add_argument(
        "--shapes",
        default=",".join(jobs.SHAPES),
        help="linear layers and attention of a model, or OUTxIN; default: %(default)s",
    )
    parser.add_argument(
        "--m",
        default=",".join(map(str, jobs.M)),
        help="tokens, and for decode_attention sequences; default: %(default)s",
    )
    parser.add_argument("--group-size", type=int, default=128, help="of int4 weights")
    parser.add_argument(
        "--output",
        type=Path,
        help="a directory for DEVICE.json, or a file ending in .json; default: where the kernels "
        "look, $QJAX_TUNED or the package",
    )
    parser.add_argument(
        "--resume", action="store_true", help="skip the sizes that the file already has"
    )
    parser.add_argument("--minutes", type=float, help="stop then; what was measured is kept")
    parser.add_argument("--iterations", type=int, default=5, help="of each timing, whose median")
    parser.add_argument(
        "--workers", type=int, help="processes that compile; default: all processors but two"
    )
    parser.add_argument(
        "--xla", action="store_true", help="time XLA's product too, where there is one (slow)"
    )
    parser.add_argument("--commit", help="of the code measured; default: git's")
    parser.add_argument(
        "--compile-only", action="store_true", help="compile for an H200 and time nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Plan, measure, report."""
    from qjax_kernels.tuned.schema import TableError
    from qjax_kernels.tuning import run as tuning
    from qjax_kernels.tuning.record import Record

    try:
        found = tuning.default_jobs(
            _names(args.ops), _names(args.shapes), _numbers(args.m), args.group_size
        )
    except ValueError as error:
        raise ConfigError(f"{error}; see qjax tune --help") from error
    _check(args)
    # Should anything here ask JAX for the GPU: its memory is the workers'.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    seconds = None if args.minutes is None else 60 * args.minutes
    workers = args.workers or max(1, (os.cpu_count() or 1) - 2)
    try:
        if args.compile_only:
            plan = tuning.plan(found)
            _announce(plan, args)
            _report(args, plan, tuning.compile_all(plan, workers, seconds), None)
            return
        path = tuning.path_of(args.output, _device())
        record = Record.at(path, args.commit or tuning.commit())
        record.check_writable()
        plan = tuning.plan(found, record if args.resume else None)
        _announce(plan, args)
        timed = tuning.measure_all(
            plan, workers, iterations=args.iterations, xla=args.xla, seconds=seconds
        )
        _report(args, plan, tuning.keep(timed, lambda device: record), path)
    except TableError as error:
        raise ConfigError(f"{error}; correct or delete the file") from error


def _check(args: argparse.Namespace) -> None:
    for name in ("iterations", "workers", "minutes", "group_size"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is {value}; it must be above 0")


def _device() -> str:
    """The GPU's name, asked of a process of its own: this one must not hold the GPU's memory."""
    import subprocess
    import sys

    code = "from qjax_kernels.target import require_hopper; print(require_hopper().kind)"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no GPU"])[-1].split(": ", 1)[-1]
        raise ConfigError(f"nothing can be timed here: {reason}; see --compile-only")
    return done.stdout.strip().splitlines()[-1]


def _announce(plan: Any, args: argparse.Namespace) -> None:
    sizes = sum(len(job.ms) for job in plan.jobs)
    what = "to compile" if args.compile_only else "to compile and time"
    _say(args, f"{sizes} sizes, {plan.combinations} combinations with a configuration {what}")
    for sentence in plan.refused:
        _say(args, f"left out: {sentence}")


def _report(
    args: argparse.Namespace, plan: Any, messages: Iterator[dict[str, Any]], path: Path | None
) -> None:
    """Print each size as it comes, then what was dropped."""
    results, dropped, failed = [], [], list(plan.refused)
    total = sum(len(job.ms) for job in plan.jobs)
    for message in messages:
        if "failed" in message:
            failed.append(message["failed"])
            _say(args, f"not measured: {message['failed']}")
        if "result" not in message:
            continue
        result = message["result"]
        results.append(result)
        _say(args, f"[{len(results)}/{total}] {_line(result, message.get('entry'))}")
        for one in result["candidates"]:
            if one["dropped"]:
                dropped.append({"size": _size(result)} | one)
                _say(args, f"    dropped {one['config']}: {one['dropped']}")
    if args.json:
        where = None if path is None else str(path)
        print_json({"file": where, "sizes": results, "dropped": dropped, "failed": failed})
        return
    if args.compile_only:
        _compiled(results)
    elif results:
        print(f"{len(results)} sizes in {path}")
    print(f"{len(dropped)} candidates dropped, {len(failed)} sizes not measured")


def _compiled(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        good = [one for one in result["candidates"] if not one["dropped"]]
        counts = (f"{len(good)} of {len(result['candidates'])}",)
        most = tuple(
            str(max((one[name] or 0 for one in good), default="-"))
            for name in ("registers", "shared")
        )
        rows.append((_size(result), *counts, *most))
    print_table(("size", "compile well", "most registers", "most shared memory"), rows)


def _size(result: dict[str, Any]) -> str:
    size = "x".join(str(result[name]) for name in ("m", "n", "k"))
    return f"{result['tuned']} {result['format']} {size}"


def _line(result: dict[str, Any], entry: dict[str, Any] | None) -> str:
    if entry is None:
        return f"{_size(result)}: {len(result['candidates'])} candidates"
    said = ", ".join(f"{name} {value}" for name, value in entry["config"].items())
    ratio = entry["us"] / entry["bound_us"]
    return f"{_size(result)}: {entry['us']:.2f} us, {ratio:.2f}x the bound: {said or 'XLA'}"


def _say(args: argparse.Namespace, sentence: str) -> None:
    """Progress; under --json standard output is only JSON."""
    import sys

    print(sentence, file=sys.stderr if args.json else sys.stdout, flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    names = _names(text)
    if not names or not all(name.isdecimal() for name in names):
        raise ConfigError(f"--m is {text!r}; it takes positive numbers, such as 1,16,64")
    return [int(name) for name in names]
