"""qjax generate: continue a prompt."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from qjax.cli.common import add_model, load_model, print_json
from qjax.errors import DataError

if TYPE_CHECKING:
    from qjax.result import Generation

HELP = "continue a prompt"
EXAMPLES = """examples:
  qjax generate --prompt 'def fibonacci(n):'
  qjax generate --model my-int4 --prompt 'import ' --temperature 0.8 --top-p 0.95
  qjax generate --prompt 'class Stack:' --stop '\\n\\n\\n' --json
  qjax generate --prompt 'x = 1' 'y = 2' --temperature 1 --min-p 0.1 --seed 7 8
  qjax generate --prompt 'def add(a, b):' --speculate --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model(parser)
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more texts to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="at most so many for each prompt (64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="divides the logits; 0 is greedy (default)"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k most likely tokens")
    parser.add_argument(
        "--top-p", type=float, help="draw from the most likely tokens that together reach p"
    )
    parser.add_argument(
        "--min-p", type=float, help="draw from tokens at least p times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="more than 1 makes tokens that were there before less likely; 1 is off (default)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="of the draws: one for each prompt, or one: prompt i then has seed + i (0)",
    )
    parser.add_argument(
        "--stop", nargs="+", default=[], help="texts that end a sequence; \\n is a newline"
    )
    parser.add_argument(
        "--stop-id",
        type=int,
        nargs="+",
        default=[],
        metavar="ID",
        help="tokens that end a sequence, besides the model's own",
    )
    parser.add_argument(
        "--min-tokens", type=int, default=0, help="no sequence ends before so many new tokens (0)"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="the model's own end token ends nothing"
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: log-probabilities of the tokens, and of the N likeliest at each place",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        nargs="?",
        const=8,
        metavar="TOKENS",
        help="guess so many tokens (8) from the text so far and verify them in one pass: the same "
        "text in fewer passes, where it repeats itself; greedy only",
    )
    parser.add_argument(
        "--ngram",
        type=int,
        metavar="N",
        help="with --speculate: look for the last N tokens, or fewer (3)",
    )


def run(args: argparse.Namespace) -> None:
    """Stream one prompt, or generate for several at once."""
    settings = _settings(args)
    lm = load_model(args)
    lm.require_tokenizer("text prompts")
    if args.json:
        print_json(_as_json(args.prompt, lm.generate(args.prompt, **settings)))
    elif len(args.prompt) > 1:
        result = lm.generate(args.prompt, **settings)
        assert result.text is not None
        for prompt, text in zip(args.prompt, result.text, strict=True):
            print(f"{prompt}{text}\n{'-' * 40}")
    else:
        pieces = lm.stream(args.prompt[0], **settings)
        sys.stdout.write(args.prompt[0])
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` and `stream`."""
    from qjax.speculate import PromptLookup

    settings = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "min_tokens": args.min_tokens,
        "ignore_eos": args.ignore_eos,
        "seed": args.seed[0] if len(args.seed) == 1 else args.seed,
        "stop": [*(stop.replace("\\n", "\n") for stop in args.stop), *args.stop_id],
    }
    if args.logprobs is not None:
        if not args.json:
            raise DataError(f"--logprobs {args.logprobs} is for machines to read: add --json")
        settings["logprobs"] = args.logprobs
    if args.speculate is not None:
        ngram = {} if args.ngram is None else {"ngram": args.ngram}
        settings["speculate"] = PromptLookup(tokens=args.speculate, **ngram)
    elif args.ngram is not None:
        raise DataError(f"--ngram {args.ngram} is a setting of speculation: add --speculate")
    return settings


def _as_json(prompts: list[str], result: "Generation") -> dict[str, Any]:
    """The result, each row cut to its length."""

    def rows(array: Any) -> list[Any]:
        return [row[:n].tolist() for row, n in zip(array, result.lengths, strict=True)]

    data = {
        "prompts": prompts,
        "text": result.text,
        "token_ids": rows(result.token_ids),
        "stats": dataclasses.asdict(result.stats),
    }
    for name in ("logprobs", "top_ids", "top_logprobs"):
        if getattr(result, name) is not None:
            data[name] = rows(getattr(result, name))
    return data
