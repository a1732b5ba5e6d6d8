"""The command line: `qjax quantize | generate | eval | compare | info | tune | bench`.

argparse, because it is in the standard library and ends wrong usage with exit code 2. What a verb
alone needs (transformers, matplotlib, rich) is imported when it runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from qjax import compile_cache
from qjax._version import __version__
from qjax.cli import bench, compare, evaluate, generate, info, quantize, tune
from qjax.errors import QJaxError

VERBS = {
    "quantize": quantize,
    "generate": generate,
    "eval": evaluate,
    "compare": compare,
    "info": info,
    "tune": tune,
    "bench": bench,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(prog="qjax", description="Quantize language models in JAX.")
    parser.add_argument("--version", action="version", version=f"qjax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print JSON on standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for input that cannot be used."""
    args = build_parser().parse_args(argv)
    # transformers is here for its tokenizers; that torch is absent is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    compile_cache.enable()
    try:
        VERBS[args.verb].run(args)
    except QJaxError as error:
        print(f"qjax {args.verb}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"qjax {args.verb}: error: {error}; check the path and its permissions", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; a save that was under way does not load", file=sys.stderr)
        return 130
    return 0
