"""qjax compare: one model in several formats, quality beside size beside speed."""

import argparse
import dataclasses
from pathlib import Path

from qjax.cli.common import add_model, load_model, print_json, print_table, progress_bars
from qjax.cli.evaluate import add_windows
from qjax.errors import ConfigError
from qjax.presets import KV, PRESETS, preset

HELP = "quantize to several formats and compare quality, size and speed"
EXAMPLES = """examples:
  qjax compare --presets fp8,int8_wo,int8,int4_wo
  qjax compare --presets all --json
  qjax compare --presets int4_wo --html report/index.html --keep checkpoints-of-each"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    add_windows(parser)
    parser.add_argument(
        "--presets",
        default="fp8,int8_wo,int8,int4_wo",
        help="comma-separated names, or all (default: %(default)s)",
    )
    parser.add_argument("--kv", choices=sorted(KV), help="what the cache of each holds")
    parser.add_argument(
        "--calib-samples", type=int, help="sequences of the standard library to calibrate on (64)"
    )
    parser.add_argument("--samples", action="store_true", help="print the sample of each format")
    parser.add_argument("--html", type=Path, help="also write a page with plots")
    parser.add_argument("--keep", type=Path, help="leave the checkpoint of each format here")


def run(args: argparse.Namespace) -> None:
    """Compare, then print the table, and write the page."""
    from qjax.data import STDLIB_CALIBRATION
    from qjax.evaluate.compare import compare
    from qjax.evaluate.report import COLUMNS, SPEED_NOTE, table_rows, write_report

    names = PRESETS if args.presets.strip() == "all" else args.presets.split(",")
    recipes = [preset(name.strip(), kv=args.kv) for name in names if name.strip()]
    if not recipes:
        raise ConfigError("name at least one preset, as in --presets fp8,int4_wo")
    if args.html is not None:
        # Now, not after minutes of work.
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.open("a", encoding="utf-8").close()
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    calib = STDLIB_CALIBRATION
    if args.calib_samples is not None:
        calib = dataclasses.replace(calib, num_samples=args.calib_samples)
    lm = load_model(args)
    with progress_bars() as progress:
        result = compare(
            lm,
            recipes,
            sequences=args.sequences,
            seq_len=args.seq_len,
            calib=calib,
            directory=args.keep,
            progress=progress,
        )
    files = write_report(result, args.html) if args.html is not None else []
    if args.json:
        print_json(result.to_dict())
        return
    if args.samples:
        for row in (result.baseline, *result.rows):
            print(f"--- {row.preset}\n{result.setup['prompt']}{row.sample}\n")
    print_table(COLUMNS, table_rows(result), optional=("95 % interval", "tokens/s here", "on disk"))
    print(SPEED_NOTE)
    for file in files[:1]:
        print(f"The same with plots: {file}")
