"""`python -m benchmarks.kernels`: qjax's kernels, XLA's and the peers', in one run on one GPU.

qjax and each peer run in a process of their own, one after the other: JAX and torch both reserve
the GPU's memory, only one of them can hold CUPTI, and a kernel that crashes takes only its own
process with it. Rows are written as they come, so that a run that is cut off keeps them.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.kernels import peers, results
from benchmarks.kernels.sweep import Ops, sweep

ROOT = Path(__file__).resolve().parent.parent.parent
WORKERS = ("jax", *peers.OPS)
PACKAGES = {
    "jax": ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton"),
    "torch": ("torch", "triton"),
    "humming": ("torch", "humming-kernels"),
    "gemlite": ("torch", "triton", "gemlite"),
}
MARK = "@@ "  # starts a worker's line that is for its parent, in JSON


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if something that was asked for was not measured."""
    options = parse(arguments)
    if options.worker:
        return work(options)
    return supervise(options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Names are checked, but not a second time in a worker."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--ops", type=names, help="w4a16, fp8 ...; default: all")
    parser.add_argument(
        "--shapes", type=names, default=["square"], help="of: square, llama8b, llama70b_tp4"
    )
    parser.add_argument("--m", type=names, help="rows of activations; default 1,16,64,256,8192")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--implementations",
        type=names,
        help="of: qjax (or qjax/mosaic, qjax/triton), xla, torch, humming, gemlite; default: all",
    )
    parser.add_argument("--quick", action="store_true", help="2 iterations, M of 16 and 256")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/h200/kernels.json")
    parser.add_argument("--merge", action="store_true", help="keep the file's other rows")
    parser.add_argument("--commit", help="of the code measured; default: git's")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.passed = list(sys.argv[1:] if arguments is None else arguments)
    ms = options.m or (["16", "256"] if options.quick else ["1", "16", "64", "256", "8192"])
    if not all(m.isdecimal() and int(m) > 0 for m in ms):
        parser.error(f"--m takes positive numbers, not {','.join(ms)}")
    options.ms = [int(m) for m in ms]
    if not options.worker:
        for complaint in complaints(options):
            parser.error(complaint)
    return options


def complaints(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the names that were given."""
    for name in options.implementations or ():
        if name not in ("qjax", "xla", *peers.OPS) and not name.startswith("qjax/"):
            yield f"no implementation is called {name!r}"
    every = {worker: ops_of(worker) for worker in WORKERS}
    shapes = sorted({shape for ops in every.values() for op in ops.values() for shape in op.shapes})
    for shape in options.shapes:
        if shape not in shapes:
            yield f"no shapes are called {shape!r}; there are: {', '.join(shapes)}"
    for op in options.ops or ():
        if not any(op in ops for worker, ops in every.items() if asked(options, worker)):
            there = (f"{worker}: {', '.join(ops)}" for worker, ops in every.items())
            yield f"there is no {op!r} to measure by these implementations; " + "; ".join(there)


def ops_of(worker: str) -> Ops:
    """What a worker can measure. JAX is imported only for its own."""
    if worker == "jax":
        from benchmarks.kernels import other_rows

        return other_rows.OPS
    return peers.OPS[worker]


def wanted(options: argparse.Namespace, implementation: str) -> bool:
    """Whether an implementation was asked for, by its name or as one of qjax's."""
    asked_for = options.implementations
    return not asked_for or implementation in asked_for or implementation.split("/")[0] in asked_for


def asked(options: argparse.Namespace, worker: str) -> bool:
    """Whether any implementation of a worker was asked for."""
    if worker == "jax" and options.implementations:
        return any(name.split("/")[0] in ("qjax", "xla") for name in options.implementations)
    return wanted(options, worker)


def work(options: argparse.Namespace) -> int:
    """Measure one worker's implementations; rows and sentences go to standard output."""
    worker = options.worker
    absent = no_gpu() if worker == "jax" else peers.missing(worker)
    if absent:
        print(f"{worker}: not measured: {absent}", flush=True)
        return 1
    measure: Callable[..., Any] = peers.measure
    if worker == "jax":
        from benchmarks.kernels.rows import measure
    tell({"device": device(worker), "versions": versions(worker)})
    ops = ops_of(worker)
    found = sweep(
        ops.select(options.ops or ops),
        options.shapes,
        options.ms,
        options.group_size,
        partial(wanted, options),
        partial(measure, iterations=2 if options.quick else 5),
    )
    for row in found:
        if isinstance(row, str):
            print(f"not measured: {row}", flush=True)
        else:
            tell({"row": row})
            print(
                f"{row['op']} {row['m']}x{row['n']}x{row['k']} {row['implementation']}: "
                f"{row['us']:.1f} us, bound {row['bound_us']:.1f}, row error {row['row_error']}",
                flush=True,
            )
    return 0


def tell(message: dict[str, Any]) -> None:
    """One line to the parent."""
    print(MARK + json.dumps(message), flush=True)


def no_gpu() -> str | None:
    """Why JAX cannot be measured here; None if it can."""
    import jax

    backend = jax.default_backend()
    return None if backend == "gpu" else f"it needs an NVIDIA GPU, and JAX has a {backend}"


def device(worker: str) -> str:
    """The GPU's name."""
    if worker == "jax":
        import jax

        return jax.devices()[0].device_kind
    import torch

    return torch.cuda.get_device_name(0)


def versions(worker: str) -> dict[str, str]:
    """Of the packages that a worker runs, as far as they are installed as packages."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES[worker]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            module = sys.modules.get(package)  # on the path without its metadata
            if module is not None and hasattr(module, "__version__"):
                found[package] = module.__version__
    return found


def supervise(options: argparse.Namespace) -> int:
    """Run the workers one after the other, write what they tell, print the table."""
    document: dict[str, Any] = {
        "device": "",
        "versions": driver(),
        "commit": options.commit or commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [],
    }
    old = None
    if options.merge and options.out.exists():
        old = json.loads(options.out.read_text())
        results.check(old)
    failed = []
    for worker in filter(partial(asked, options), WORKERS):
        if not ops_of(worker).select(options.ops or ops_of(worker)):
            continue
        before = len(document["rows"])
        status = listen(worker, document, options, old)
        if status or len(document["rows"]) == before:
            failed.append(worker)
    if document["rows"]:
        print(f"\n{document['device']}, {document['versions']}")
        print(results.table(document["rows"]))
        print(f"\n{len(document['rows'])} rows in {options.out}")
    # A peer that is not installed is a failure only of a run that named it.
    fatal = [worker for worker in failed if worker == "jax" or options.implementations]
    if failed:
        print(f"failed or not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if fatal or not document["rows"] else 0


def listen(
    worker: str, document: dict[str, Any], options: argparse.Namespace, old: dict[str, Any] | None
) -> int:
    """Run a worker to its end; add its rows to the document and write it after each."""
    command = [sys.executable, "-u", "-m", "benchmarks.kernels", "--worker", worker]
    path = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path}
    with subprocess.Popen(
        [*command, *options.passed],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(MARK):
                print(line, end="", flush=True)
                continue
            message = json.loads(line.removeprefix(MARK))
            if "row" in message:
                document["rows"].append(message["row"])
                results.write(options.out, results.merge(old, document) if old else document)
            else:
                document["device"] = message["device"]
                document["versions"] |= message["versions"]
    return process.returncode


def driver() -> dict[str, str]:
    """The version of NVIDIA's driver, if its tool is here."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"driver": run.stdout.split()[0]}


def commit() -> str:
    """The commit checked out, with '+' if files differ from it; 'unknown' outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--short") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
