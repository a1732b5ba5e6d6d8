"""qjax bench: how fast a known model's shapes generate here, in each preset."""

import argparse
import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qjax.cli.common import print_json, print_table
from qjax.errors import ConfigError, one_of

HELP = "time generation with random weights in the shapes of known models"
EXAMPLES = """examples:
  qjax bench latency --shape llama3-8b --presets bf16,fp8,int4_wo --batch 1,8,64
  qjax bench latency --presets int4_wo --lm-head fp8_wo --input 1024 --output 128 --json
  qjax bench latency --presets fp8 --kv fp8 --batch 64 --input 4096 --out latency.json --merge
  qjax bench latency --presets bf16 --implementations qjax,xla --out latency.json"""

COLUMNS = (
    "shape", "preset", "kv", "batch", "implementation", "ms a token", "bound", "first, ms",
    "tokens/s", "GiB",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("what", choices=["latency"], help="time to the first token, and a token")
    parser.add_argument(
        "--shape", default="llama3-8b", help="of models, comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--presets", default="bf16,fp8,int8,int4_wo", help="comma-separated; bf16 is none"
    )
    parser.add_argument("--lm-head", help="a preset for the output head, which presets leave alone")
    parser.add_argument("--kv", default="bf16", help="what the cache holds: bf16, fp8, int8 (bf16)")
    parser.add_argument("--batch", default="1", help="sequences, comma-separated (1)")
    parser.add_argument("--input", type=int, default=2048, help="tokens of a prompt (2048)")
    parser.add_argument("--output", type=int, default=128, help="new tokens, 2 or more (128)")
    parser.add_argument(
        "--implementations",
        default="qjax",
        help="qjax: prepared for the kernels; xla: canonical weights, XLA's products (qjax)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, after one more (3)")
    parser.add_argument("--out", type=Path, help="a JSON file of the rows, versions and device")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="with --out: keep the rows of the file that are not measured now",
    )
    parser.add_argument("--commit", default="unknown", help="what the file says was measured")


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    from qjax.bench import results

    if args.merge and args.out is None:
        raise ConfigError("--merge adds to a file: name it with --out")
    # Read before anything is measured, and written after each row.
    old = results.read(args.out) if args.merge and args.out.exists() else None
    rows = []
    for row in _rows(args):
        rows.append(row)
        if not args.json:
            print(_line(row), flush=True)
        if args.out is not None:
            new = results.document(rows, args.commit)
            results.write(args.out, new if old is None else results.merge(old, new))
    if args.json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_table(COLUMNS, [_cells(row) for row in rows], optional=("GiB", "implementation"))


def _rows(args: argparse.Namespace) -> Iterable[Any]:
    from qjax.bench import latency, random_model, shapes

    names = args.shape.split(",")
    for name in names:
        one_of("shape", name, shapes.SHAPES)
    one_of("kv", args.kv, latency.KV)
    presets, implementations = args.presets.split(","), args.implementations.split(",")
    for name in presets:
        one_of("preset", name, random_model.presets())
    for name in implementations:
        one_of("implementation", name, latency.IMPLEMENTATIONS)
    for option, least in (("input", 1), ("output", 2), ("repeats", 1)):
        if getattr(args, option) < least:
            raise ConfigError(f"--{option} is {getattr(args, option)}; it must be {least} or more")
    batches = _numbers(args.batch)
    for name in names:
        context = shapes.shape(name).max_position_embeddings
        if args.input + args.output > context:
            raise ConfigError(
                f"{args.input} tokens and {args.output} more do not fit the {context} of {name}"
            )
    for name, preset, implementation in itertools.product(names, presets, implementations):
        yield from latency.measure(
            name,
            preset,
            lm_head=args.lm_head,
            kv=args.kv,
            batches=batches,
            input=args.input,
            output=args.output,
            implementation=implementation,
            repeats=args.repeats,
        )


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise ConfigError(f"--batch is {text!r}; give positive numbers, as in 1,8,64")
    return [int(part) for part in text.split(",")]


def _cells(row: Any) -> tuple[str, ...]:
    bound = "-" if row.bound_ms is None else f"{row.bound_ms:.3f}"
    return (
        row.shape, row.preset, row.kv, str(row.batch), row.implementation,
        f"{row.ms_per_token:.3f}", bound, f"{row.ttft_ms:.1f}", f"{row.tokens_per_s:.0f}",
        "-" if row.peak_gib is None else f"{row.peak_gib:.1f}",
    )  # fmt: skip


def _line(row: Any) -> str:
    cells = _cells(row)
    what = f"{cells[0]} {cells[1]}, {cells[2]} cache, batch {cells[3]}, {cells[4]}"
    return (
        f"{what}: {cells[5]} ms a token, bound {cells[6]}, first {cells[7]} ms, "
        f"{cells[8]} tokens/s, {cells[9]} GiB"
    )
