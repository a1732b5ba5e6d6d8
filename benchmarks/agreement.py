"""Whether kernels say what the reference path says, on the model that comes with the source.

`python -m benchmarks.agreement --out benchmarks/results/h200/agreement.json` quantizes the
reference model in every preset. Tokens that the reference path (the canonical model, without
kernels for decoding) writes after each of 64 prompts are then fed to both, one by one, and so are
windows of held-out text: the largest logits and the perplexities must agree. Presets run side by
side, a process each. Exits with 1 if one of them fails.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qjax_kernels import dispatch

import qjax
from qjax import compile_cache
from qjax.bench import random_model, results
from qjax.data import STDLIB, calibration_data
from qjax.evaluate import Perplexity, evaluate_perplexity
from qjax.lm import LanguageModel
from qjax.text import held_out, token_windows

REFERENCE = Path(__file__).resolve().parents[1] / "checkpoints" / "reference"
LEAST_SHARE = 0.99  # of positions at which the largest logits agree
LARGEST_GAP = 0.1  # between the reference's first two logits, where they do not
LARGEST_CHANGE = 1e-3  # of the perplexity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one preset.

    Attributes:
      preset: its name; the model's own type is 'bf16'.
      batch: sequences that are decoded together.
      positions: prompts times new tokens.
      share: of positions at which both have the same largest logit.
      gap: the largest distance of the reference's first two logits where they have not; 0 if all
        agree.
      perplexity, reference_perplexity: on held-out text, through kernels and without.
      change: relative change of the first against the second.
      floor_share, floor_gap, floor_change: the same of the prepared model without kernels: what
        other orders and places of rounding do by themselves. Where activations are quantized, the
        last bit of a sum decides now and then which number they are rounded to.
      skipped: 'op: implementation: reason' of kernels in whose place something else ran.
    """

    preset: str
    batch: int
    positions: int
    share: float
    gap: float
    perplexity: float
    reference_perplexity: float
    change: float
    floor_share: float
    floor_gap: float
    floor_change: float
    skipped: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words."""
        found = []
        if not self.share >= LEAST_SHARE:
            found.append(f"{1 - self.share:.2%} of the tokens differ")
        if not self.gap <= LARGEST_GAP:
            found.append(f"one of them by {self.gap:.2f}")
        if not abs(self.change) <= LARGEST_CHANGE:
            found.append(f"the perplexity changes by {self.change:+.3%}")
        return found


@partial(jax.jit, static_argnames=("graphdef", "new"))
def decode(
    graphdef: nnx.GraphDef, state: Any, ids: jax.Array, tokens: jax.Array | None, new: int
) -> tuple[jax.Array, jax.Array]:
    """The largest logit at each of `new` positions, of a prompt and steps of one token.

    Args:
      ids: int32 [batch, prompt].
      tokens: int32 [batch, new], what each step is fed; None: the largest logit.

    Returns:
      int32 [batch, new], which it is; float32 [batch, new], by how much it is the largest.
    """
    model = nnx.merge(graphdef, state)
    batch, length = ids.shape
    cache = model.init_cache(batch, length + new)
    hidden, cache = model.hidden(
        ids, jnp.broadcast_to(jnp.arange(length), ids.shape), cache, fresh=True
    )

    def step(carry: Any, at: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        cache, logits = carry
        top, which = jax.lax.top_k(logits, 2)
        token = which[:, 0] if tokens is None else tokens[:, at]
        positions = jnp.full((batch, 1), length + at)
        hidden, cache = model.hidden(token[:, None], positions, cache)
        return (cache, model.logits(hidden[:, 0])), (which[:, 0], top[:, 0] - top[:, 1])

    first = cache, model.logits(hidden[:, -1])
    _, (chosen, gaps) = jax.lax.scan(step, first, jnp.arange(new))
    return chosen.T, gaps.T


def compare(
    preset: str,
    reference: LanguageModel,
    prompts: np.ndarray,
    windows: np.ndarray,
    *,
    new: int = 32,
    batch: int = 64,
) -> Row:
    """Prepare a model, and hold the result against it.

    Args:
      preset: what the row is called.
      reference: canonical; quantized or not.
      prompts: int32 [prompts, tokens].
      windows: int32 [windows, seq_len], of held-out text.
      new: tokens after each prompt.
      batch: prompts that are decoded together; it divides their number.
    """
    whole = reference.check_ids(prompts)
    tokens, gaps = (np.asarray(x) for x in decode(*reference.split(), whole, None, new))
    base = evaluate_perplexity(reference, windows, batch_size=16)
    prepared = qjax.prepare(reference)

    def found() -> tuple[float, float, Perplexity]:
        """Share, gap and perplexity of the prepared model."""
        parts = []
        for start in range(0, len(whole), batch):
            here = slice(start, start + batch)
            chosen, _ = decode(*prepared.split(), whole[here], jnp.asarray(tokens[here]), new)
            parts.append(np.asarray(chosen))
        differs = np.concatenate(parts) != tokens
        perplexity = evaluate_perplexity(prepared, windows, batch_size=16)
        return 1 - float(differs.mean()), float(gaps[differs].max(initial=0.0)), perplexity

    dispatch.forget()
    share, gap, perplexity = found()
    reasons = [f"{op}: {why}" for op, whys in dispatch.skipped().items() for why in whys]
    with dispatch.references():
        floor_share, floor_gap, floor = found()
    return Row(
        preset=preset,
        batch=batch,
        positions=tokens.size,
        share=share,
        gap=gap,
        perplexity=perplexity.perplexity,
        reference_perplexity=base.perplexity,
        change=perplexity.change_from(base)[0],
        floor_share=floor_share,
        floor_gap=floor_gap,
        floor_change=floor.change_from(base)[0],
        skipped=tuple(reasons),
    )


def of_preset(preset: str, *, batch: int, new: int, dtype: str | None) -> Row:
    """`compare` for the reference model in a preset."""
    lm = qjax.load(REFERENCE, dtype)
    prompts = token_windows(held_out(), lm.tokenizer, count=64, seq_len=64)
    windows = token_windows(held_out(), lm.tokenizer, count=64, seq_len=256)
    recipe = random_model.recipe(preset)
    if recipe is not None:
        calib = qjax.CalibConfig(num_samples=8, max_seq_length=256)
        batches = calibration_data(STDLIB, lm.tokenizer, calib) if recipe.needs_stats else None
        lm = qjax.quantize_model(lm, recipe, batches)
    return compare(preset, lm, prompts, windows, new=new, batch=batch)


def main(argv: list[str] | None = None) -> int:
    """Run the presets, print a line each, write the file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--presets", default=",".join(["bf16", *qjax.PRESETS]))
    parser.add_argument("--batch", type=int, default=64, help="sequences decoded together: 1 .. 64")
    parser.add_argument("--new", type=int, default=32, help="tokens after each prompt (32)")
    parser.add_argument("--dtype", help="of the activations (default: stored, bfloat16)")
    parser.add_argument("--workers", type=int, default=min(5, max(1, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--out", type=Path, help="a JSON file of the rows, versions and device")
    parser.add_argument("--commit", default="unknown", help="what the file says was checked")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a preset: its row, as JSON, here
    args = parser.parse_args(argv)
    if args.one:
        compile_cache.enable()
        row = of_preset(args.one, batch=args.batch, new=args.new, dtype=args.dtype)
        print(json.dumps(dataclasses.asdict(row)))
        return 0
    if not 1 <= args.batch <= 64 or 64 % args.batch:
        parser.error(f"--batch is {args.batch}; it must divide 64")
    rows, failed = [], False
    with ThreadPoolExecutor(args.workers) as pool:
        presets = args.presets.split(",")
        for preset, found in zip(presets, pool.map(partial(_apart, args), presets), strict=True):
            problems = [found] if isinstance(found, str) else found.problems
            if not isinstance(found, str):
                rows.append(found)
            failed |= bool(problems)
            print(_line(preset, found, problems), flush=True)
    if args.out is not None:
        results.write(args.out, results.document(rows, args.commit))
    return int(failed)


def _apart(args: argparse.Namespace, preset: str) -> Row | str:
    """The row of a process of its own, or how it ended."""
    command = [sys.executable, "-m", "benchmarks.agreement", "--one", preset]
    command += ["--batch", str(args.batch), "--new", str(args.new)]
    command += ["--dtype", args.dtype] if args.dtype else []
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return f"exit {done.returncode}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def _line(preset: str, row: Row | str, problems: list[str]) -> str:
    ends = f"WRONG: {'; '.join(problems)}" if problems else "ok"
    if isinstance(row, str):
        return f"{preset:14} {ends}"
    numbers = f"{row.share:8.3%} of {row.positions}, largest gap {row.gap:.3f}, perplexity "
    numbers += f"{row.reference_perplexity:.4f} -> {row.perplexity:.4f} ({row.change:+.4%})"
    floor = (
        f"    without kernels: {row.floor_share:.3%}, {row.floor_gap:.3f}, {row.floor_change:+.4%}"
    )
    lines = [f"{preset:14} {numbers}: {ends}", floor]
    lines += [f"    skipped {reason}" for reason in row.skipped]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
