"""What a generation returns, and what it cost."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationStats:
    """How well the guesses of a generation did. Tuples have an entry for each sequence.

    Attributes:
      passes: decode steps in which the sequence was running; each gave it 1 to tokens + 1 tokens.
      proposed: candidates that were verified.
      accepted: candidates that became tokens.
      acceptance: accepted over proposed, of all sequences; 0 if nothing was proposed.
      tokens_per_pass: tokens over passes of the model, prefill left out; without speculation it
        is 1. 0 if the prefill's token was all.
    """

    passes: tuple[int, ...]
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    acceptance: float
    tokens_per_pass: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What a generation cost. Compilation is timed apart from running.

    Attributes:
      prompt_tokens, new_tokens: over the whole batch.
      compile_s: seconds spent compiling; next to nothing when the shapes were seen before.
      prefill_s, decode_s: seconds of running; the first new token belongs to the prefill.
      prefill_tokens_per_s, decode_tokens_per_s: over the whole batch; 0 if nothing was decoded.
      peak_bytes: peak device memory of the process, where the backend reports it, else None.
      program_bytes: device memory of the larger of the two programs, that of the prompts and that
        of the new tokens: weights, cache and temporaries; None where it is not known.
      speculation: SpeculationStats, or None without it.
    """

    prompt_tokens: int
    new_tokens: int
    compile_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_bytes: int | None
    program_bytes: int | None
    speculation: SpeculationStats | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of a generation.

    Attributes:
      token_ids: int32 [batch, new], the new tokens only, a row's end token included; new is the
        longest row's length, and shorter rows are padded with 0.
      lengths: int32 [batch], valid tokens of each row.
      text: the new text of each row, without end token and stop string; None without tokenizer.
      stats: GenerationStats.
      logprobs: float32 [batch, new], natural logarithm of the model's own probability of each
        token; padded with 0. None unless asked for, like the next two.
      top_ids, top_logprobs: int32 and float32 [batch, new, n], the n most likely tokens at each
        place, the likeliest first; padded with 0.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    text: list[str] | None
    stats: GenerationStats
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
