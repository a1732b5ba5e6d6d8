"""qjax quantize: a checkpoint in, a quantized checkpoint out."""

import argparse
from pathlib import Path
from typing import Any

from qjax.cli.common import REFERENCE, add_model, load_model, print_json, progress_bars
from qjax.config import CalibConfig, QuantConfig
from qjax.errors import CheckpointError, ConfigError
from qjax.presets import KV, preset

HELP = "quantize a checkpoint and save it"
EXAMPLES = """examples:
  qjax quantize --preset int4_wo --out my-int4
  qjax quantize --model DIR --preset int4_gptq --calib c4 --calib-seq-len 2048 --out my-int4
  qjax quantize --model DIR --preset fp8 --kv fp8 --calib my-text.txt --out my-fp8
  qjax quantize --model DIR --preset int4_awq --stream --out my-int4
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
    parser.add_argument("--kv", choices=sorted(KV), help="what the cache of keys and values holds")
    parser.add_argument(
        "--skip-misfits",
        action="store_true",
        help="leave weights alone whose shape the format cannot take, instead of failing",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read, quantize and write one block at a time: memory does not grow with the model, "
        "and the same command goes on where an interrupted one was",
    )
    parser.add_argument("--spill", action="store_true", help="keep activations in host memory")
    _add_calibration(parser)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    defaults = CalibConfig()
    parser.add_argument(
        "--calib",
        metavar="DATA",
        help="calibration text: 'stdlib', the name of a data set, or the path of a text file or a "
        f"data set (default: stdlib for the reference model, else {defaults.dataset})",
    )
    parser.add_argument(
        "--calib-samples", type=int, help=f"sequences ({defaults.num_samples}; of stdlib 64)"
    )
    parser.add_argument("--calib-seq-len", type=int, default=defaults.max_seq_length)
    parser.add_argument("--calib-batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--calib-seed", type=int, default=defaults.seed)


def run(args: argparse.Namespace) -> None:
    """Quantize and save, or show the plan."""
    from qjax.lm import LanguageModel, as_dtype
    from qjax.plan import plan
    from qjax.quantize_checkpoint import open_source, quantize_checkpoint
    from qjax.quantize_model import quantize_model, without_misfits

    if args.out is not None and args.out.exists() and not args.overwrite and not args.plan:
        raise CheckpointError(f"{args.out} exists already; pass --overwrite or another --out")
    if args.out is None and not args.plan:
        raise ConfigError("say where to write with --out DIRECTORY, or ask for the --plan only")
    cfg, calib = _recipe(args), calibration_config(args)
    how: dict[str, Any] = {"calib": calib, "strict": not args.skip_misfits, "spill": args.spill}
    lm: LanguageModel | None = None
    if args.stream:
        dtype = None if args.dtype is None else as_dtype(args.dtype)
        weights: Any = open_source(args.model, dtype, None).abstract()
    else:
        lm = load_model(args)
        weights = lm.split()[1]
    dry = plan(weights, without_misfits(weights, cfg)[0] if args.skip_misfits else cfg)
    if args.plan:
        print_json(dry.to_dict()) if args.json else print(dry)
        return
    with progress_bars() as progress:
        how["progress"] = lambda done, total: progress("quantize", done, total)
        if lm is None:
            how |= {"dtype": args.dtype, "overwrite": args.overwrite}
            report: Any = quantize_checkpoint(args.model, args.out, cfg, **how)
        else:
            quantized = quantize_model(lm, cfg, **how)
            quantized.save(args.out, overwrite=args.overwrite)
            report = quantized.quantization_report
    _print(args, cfg, dry, report)


def _print(args: argparse.Namespace, cfg: QuantConfig, dry: Any, report: Any) -> None:
    if args.json:
        print_json(
            {
                "out": str(args.out),
                "recipe": cfg.to_dict(),
                "bytes_before": dry.bytes_before,
                "bytes_after": dry.bytes_after,
                "report": None if report is None else report.to_dict(),
            }
        )
        return
    print(f"{args.out}: {cfg.name}, {dry.bytes_before:,} -> {dry.bytes_after:,} bytes")
    if report is not None:
        print(report)


def calibration_config(args: argparse.Namespace) -> CalibConfig:
    """What the --calib options ask for."""
    from qjax.data import STDLIB, STDLIB_CALIBRATION

    default = STDLIB if args.model == REFERENCE else CalibConfig().dataset
    dataset = default if args.calib is None else args.calib
    few = STDLIB_CALIBRATION if dataset == STDLIB else CalibConfig()
    return CalibConfig(
        num_samples=few.num_samples if args.calib_samples is None else args.calib_samples,
        batch_size=args.calib_batch_size,
        max_seq_length=args.calib_seq_len,
        seed=args.calib_seed,
        dataset=dataset,
    )


def _recipe(args: argparse.Namespace) -> QuantConfig:
    if args.preset is not None:
        changes = {} if args.group_size is None else {"group_size": args.group_size}
        return preset(args.preset, ignore=args.ignore, kv=args.kv, **changes)
    if args.ignore or args.group_size is not None or args.kv is not None:
        raise ConfigError(
            "--ignore, --group-size and --kv go with --preset; edit the --config instead"
        )
    try:
        return QuantConfig.from_json(args.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {args.config} cannot be read: {error}") from error
