"""qjax generate: continue a prompt."""

import argparse
import dataclasses
import sys

from qjax.cli.common import add_model, load_model, print_json

HELP = "continue a prompt"
EXAMPLES = """examples:
  qjax generate --prompt 'def fibonacci(n):'
  qjax generate --model my-int4 --prompt 'import ' --temperature 0.8 --top-p 0.95
  qjax generate --prompt 'class Stack:' --stop '\\n\\n\\n' --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", nargs="+", default=[], help="texts that end a sequence; \\n is a newline"
    )


def run(args: argparse.Namespace) -> None:
    """Stream one prompt, or generate for several at once."""
    lm = load_model(args)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop": [stop.replace("\\n", "\n") for stop in args.stop],
    }
    lm.require_tokenizer("text prompts")
    if args.json or len(args.prompt) > 1:
        result = lm.generate(args.prompt, **settings)
        assert result.text is not None
        if args.json:
            print_json(
                {
                    "prompts": args.prompt,
                    "text": result.text,
                    "token_ids": [
                        row[:length].tolist()
                        for row, length in zip(result.token_ids, result.lengths, strict=True)
                    ],
                    "stats": dataclasses.asdict(result.stats),
                }
            )
            return
        for prompt, text in zip(args.prompt, result.text, strict=True):
            print(f"{prompt}{text}\n{'-' * 40}")
        return
    pieces = lm.stream(args.prompt[0], **settings)
    sys.stdout.write(args.prompt[0])
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
