"""qjax quantize: a checkpoint in, a quantized checkpoint out."""

import argparse
from pathlib import Path

from qjax.cli.common import add_model, load_model, print_json, progress_bars
from qjax.config import CalibConfig, QuantConfig
from qjax.errors import CheckpointError, ConfigError
from qjax.presets import preset

HELP = "quantize a checkpoint and save it"
EXAMPLES = """examples:
  qjax quantize --preset int4_wo --out my-int4
  qjax quantize --model DIR --preset fp8 --out my-fp8 --ignore 'layers\\.0\\.'
  qjax quantize --preset int4_wo --group-size 64 --plan
  qjax quantize --config recipe.json --out mine"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    recipe = parser.add_mutually_exclusive_group(required=True)
    recipe.add_argument("--preset", help="name of a recipe; `qjax info` lists them")
    recipe.add_argument("--config", type=Path, help="a recipe as JSON (QuantConfig.to_json)")
    parser.add_argument("--out", type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --out")
    parser.add_argument("--plan", action="store_true", help="only show what would be done")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="weights to leave alone (regex)"
    )
    parser.add_argument("--group-size", type=int, help="weights that share a scale; -1: a channel")
    defaults = CalibConfig()
    parser.add_argument("--calib-samples", type=int, default=defaults.samples)
    parser.add_argument("--calib-seq-len", type=int, default=defaults.seq_len)


def run(args: argparse.Namespace) -> None:
    """Quantize and save, or show the plan."""
    from qjax.lm import quantize_model
    from qjax.plan import plan

    if args.out is not None and args.out.exists() and not args.overwrite and not args.plan:
        raise CheckpointError(f"{args.out} exists already; pass --overwrite or another --out")
    if args.out is None and not args.plan:
        raise ConfigError("say where to write with --out DIRECTORY, or ask for the --plan only")
    cfg = _recipe(args)
    calib = CalibConfig(samples=args.calib_samples, seq_len=args.calib_seq_len)
    lm = load_model(args)
    dry = plan(lm.split()[1], cfg)
    if args.plan:
        print_json(dry.to_dict()) if args.json else print(dry)
        return
    batches = None
    if cfg.needs_stats:
        from qjax.text import calibration_batches

        batches = calibration_batches(lm.require_tokenizer("calibration"), calib)
    with progress_bars() as progress:
        quantized = quantize_model(
            lm, cfg, batches, progress=lambda done, total: progress("quantize", done, total)
        )
    quantized.save(args.out, overwrite=args.overwrite)
    summary = {
        "out": str(args.out),
        "recipe": cfg.to_dict(),
        "bytes_before": dry.bytes_before,
        "bytes_after": dry.bytes_after,
    }
    if args.json:
        print_json(summary)
    else:
        print(f"{args.out}: {cfg.name}, {dry.bytes_before:,} -> {dry.bytes_after:,} bytes")


def _recipe(args: argparse.Namespace) -> QuantConfig:
    if args.preset is not None:
        changes = {} if args.group_size is None else {"group_size": args.group_size}
        return preset(args.preset, ignore=args.ignore, **changes)
    if args.ignore or args.group_size is not None:
        raise ConfigError("--ignore and --group-size go with --preset; edit the --config instead")
    try:
        return QuantConfig.from_json(args.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {args.config} cannot be read: {error}") from error
