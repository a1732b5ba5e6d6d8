"""`python -m benchmarks.kernels.regret`: what it costs that a shape was not tuned.

Shapes of other models, and numbers of tokens, that the tuned table has no entry for: the time of
the configuration that a call gets, from the nearest entry, over that of the best of the shape's own
candidates, all measured now. Regret 0.10: a tenth slower than it could be.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qjax_kernels.tuning import run
from qjax_kernels.tuning.jobs import LINEAR_OPS, Job

# (outputs, inputs): fused qkv, attention's output, fused gate and up (or the first), down.
MODELS = {
    "llama-2-7b": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "gpt-j": [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)],
    "mixtral-8x7b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "qwen3-8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "llama-3.2-3b": [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)],
}
TOKENS = (1, 4, 16, 24, 48, 100, 200, 512, 1024, 4096)
SEED = 20


def samples(count: int) -> list[tuple[str, Job]]:
    """(model, job of one size): every model and every op in turn, the rest at random."""
    chance = random.Random(SEED)
    found: dict[Job, str] = {}
    models, ops = list(MODELS), list(LINEAR_OPS)
    while len(found) < count:
        i = len(found)
        model, op = models[i % len(models)], ops[(i + i // len(models)) % len(ops)]
        n, k = chance.choice(MODELS[model])
        group_size = 128 if op in ("w4a16", "w4a8") else None
        job = Job(op=op, ms=(chance.choice(TOKENS),), n=n, k=k, group_size=group_size)
        found.setdefault(job, model)
    return [(model, job) for job, model in found.items()]


def regret(result: dict[str, Any]) -> dict[str, Any] | None:
    """A row: times of the chosen and of the best configuration. None if one was not timed."""
    timed = [one for one in result["candidates"] if one["us"] is not None and not one["dropped"]]
    chosen = [one for one in timed if one["chosen"]]
    if not chosen:
        return None
    best = min(timed, key=lambda one: one["us"])
    names = ("tuned", "m", "n", "k", "group_size", "bound_us")
    return {name: result[name] for name in names} | {
        "us": chosen[0]["us"],
        "best_us": best["us"],
        "regret": chosen[0]["us"] / best["us"] - 1,
        "config": chosen[0]["config"],
        "best": best["config"],
        "row_error": chosen[0]["row_error"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a shape was not measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.regret",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("--count", type=int, default=20, help="shapes")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--minutes", type=float, help="stop then")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen = samples(asked.count)
    models = {(job.op, job.ms[0], job.n, job.k): model for model, job in chosen}
    plan = run.plan(job for _, job in chosen)
    print(f"{len(chosen)} shapes, {plan.combinations} candidates", flush=True)
    seconds = None if asked.minutes is None else 60 * asked.minutes
    rows, head = [], {}
    for message in run.measure_all(plan, asked.workers, chosen=True, seconds=seconds):
        if "hello" in message:
            head = {name: message["hello"][name] for name in ("device", "versions")}
        if "failed" in message:
            print(f"not measured: {message['failed']}", file=sys.stderr, flush=True)
        row = regret(message["result"]) if "result" in message else None
        if row is not None:
            row["model"] = models[row["tuned"], row["m"], row["n"], row["k"]]
            rows.append(row)
            size = f"{row['m']}x{row['n']}x{row['k']}"
            print(
                f"{row['model']:13} {row['tuned']:6} {size:18} {row['us']:8.2f} us, best "
                f"{row['best_us']:8.2f}: regret {row['regret']:6.1%}",
                flush=True,
            )
    if rows:
        rows.sort(key=lambda row: -row["regret"])
        print(f"{len(rows)} of {len(chosen)} measured, regret at most {rows[0]['regret']:.1%}")
    if asked.out is not None and rows:
        document = head | {"commit": run.commit(), "rows": rows}
        asked.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if len(rows) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
