"""qjax eval: perplexity on the held-out text."""

import argparse

from qjax.cli.common import add_model, load_model, print_json, print_table, progress_bars

HELP = "measure perplexity on held-out text"
EXAMPLES = """examples:
  qjax eval
  qjax eval --model my-int4 --sequences 128 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    add_windows(parser)


def add_windows(parser: argparse.ArgumentParser) -> None:
    """--sequences, --seq-len: how much text is evaluated."""
    parser.add_argument("--sequences", type=int, default=64, help="windows of text (default 64)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each (default 512)")


def run(args: argparse.Namespace) -> None:
    """Evaluate one model."""
    from qjax.evaluate.perplexity import evaluate_perplexity
    from qjax.text import held_out, token_windows

    lm = load_model(args)
    text = held_out()
    tokenizer = lm.require_tokenizer("evaluation")
    windows = token_windows(text, tokenizer, count=args.sequences, seq_len=args.seq_len)
    with progress_bars() as progress:
        result = evaluate_perplexity(
            lm, windows, progress=lambda done, total: progress("evaluate", done, total)
        )
    low, high = result.interval
    data = {
        "model": str(args.model),
        "quantization": None if lm.quantization is None else lm.quantization.name,
        "perplexity": result.perplexity,
        "perplexity_ci": [low, high],
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "sequences": args.sequences,
        "seq_len": args.seq_len,
        "text": text.provenance(),
    }
    if args.json:
        print_json(data)
        return
    print_table(
        ("perplexity", "95 % interval", "bits/byte", "tokens"),
        [
            (
                f"{result.perplexity:.4f}",
                f"{low:.3f} .. {high:.3f}",
                f"{result.bits_per_byte:.4f}",
                f"{result.tokens}",
            )
        ],
        f"{args.model.name} on held-out source of Python {text.python}",
    )
