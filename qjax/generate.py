"""From prompts to text: what `LanguageModel.generate` and `.stream` do around the jitted loop."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from qjax.decode import DecodeState, decode, prefill
from qjax.errors import DataError
from qjax.sampling import Sampling

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | np.ndarray | jax.Array

# Prompts are padded to a multiple of this, so that few shapes are compiled.
BUCKET = 64
# With stop strings, the text is searched every so many steps.
STOP_STRIDE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Checked arguments of a generation."""

    prompts: Any
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]

    @classmethod
    def make(
        cls,
        prompts: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        stop: str | int | Iterable[str | int],
    ) -> Self:
        if not _is_integer(max_new_tokens) or max_new_tokens < 1:
            raise DataError(
                f"max_new_tokens is {max_new_tokens!r}; it must be an integer, 1 or more"
            )
        if not _is_integer(seed) or not 0 <= seed < 2**32:
            raise DataError(f"seed is {seed!r}; it must be an integer from 0 to 2**32 - 1")
        stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
        if not all(_is_integer(s) or (isinstance(s, str) and s) for s in stops):
            raise DataError(f"stop holds {stops!r}; give token ids and non-empty strings")
        return cls(
            prompts=[prompts] if isinstance(prompts, str) else prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            seed=seed,
            stop_ids=tuple(int(s) for s in stops if isinstance(s, int | np.integer)),
            stop_strings=tuple(s for s in stops if isinstance(s, str)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What a generation cost. Compilation is timed apart from running.

    Attributes:
      prompt_tokens, new_tokens: over the whole batch.
      compile_s: seconds spent compiling; next to nothing when the shapes were seen before.
      prefill_s, decode_s: seconds of running; the first new token belongs to the prefill.
      prefill_tokens_per_s, decode_tokens_per_s: over the whole batch; 0 if nothing was decoded.
      peak_bytes: peak device memory of the process, where the backend reports it, else None.
    """

    prompt_tokens: int
    new_tokens: int
    compile_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of a generation.

    Attributes:
      token_ids: int32 [batch, new], the new tokens only, a row's end token included; new is the
        longest row's length, and shorter rows are padded with 0.
      lengths: int32 [batch], valid tokens of each row.
      text: the new text of each row, without end token and stop string; None without tokenizer.
      stats: GenerationStats.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    text: list[str] | None
    stats: GenerationStats


def generate(lm: Any, request: Request) -> Generation:
    """See `LanguageModel.generate`."""
    run = _Run(lm, request)
    carry = run.prefill()
    # Without stop strings nothing needs the host before the end: one call of the loop.
    stride = STOP_STRIDE if request.stop_strings else request.max_new_tokens
    step = 1
    while step < request.max_new_tokens and not bool(carry.done.all()):
        step = min(step + stride, request.max_new_tokens)
        carry = run.decode(carry, step)
        if request.stop_strings:
            rows = enumerate(run.rows(carry))
            stopped = [run.find_stop(index, row) is not None for index, row in rows]
            carry = dataclasses.replace(carry, done=carry.done | jnp.asarray(stopped))
    return run.result(carry)


def stream(lm: Any, request: Request) -> Iterator[str]:
    """See `LanguageModel.stream`. Arguments are checked here, before the first piece is asked."""
    if lm.tokenizer is None:
        raise DataError("stream yields text, and this checkpoint has no tokenizer; use generate")
    return _pieces(_Run(lm, request), request)


def _pieces(run: "_Run", request: Request) -> Iterator[str]:
    carry = run.prefill()
    # Text that could be the start of a stop string is held back until it is decided.
    hold = max((len(s) for s in request.stop_strings), default=1) - 1
    sent = 0
    for step in range(2, request.max_new_tokens + 2):
        row = run.rows(carry)[0]
        finished = bool(carry.done[0]) or step > request.max_new_tokens
        text, stopped = run.text_of(0, row)
        if stopped or finished:
            yield text[sent:]
            return
        # An unfinished character decodes to U+FFFD until its last byte has come.
        ready = len(text) - hold if not text.endswith("\ufffd") else sent
        if ready > sent:
            yield text[sent:ready]
            sent = ready
        carry = run.decode(carry, step)


class _Run:
    """One generation: its inputs on the device, its compiled functions, and its clock."""

    def __init__(self, lm: Any, request: Request) -> None:
        self.tokenizer = lm.tokenizer
        self.request = request
        self.graphdef, self.state = lm.split()
        for stop in request.stop_ids:
            if not 0 <= stop < lm.config.vocab_size:
                raise DataError(f"stop token {stop} is outside 0..{lm.config.vocab_size - 1}")
        if request.stop_strings and self.tokenizer is None:
            raise DataError("stop strings need a tokenizer, and this checkpoint has none")
        rows = _encode(lm, request)
        # New tokens are decoded behind the end of their prompt: SentencePiece tokenizers drop the
        # space in front of whatever comes first.
        self.tails = [row[-4:] for row in rows]
        self.prompt_tokens = sum(map(len, rows))
        self.lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
        self.width = _round_up(max(map(len, rows)), BUCKET)
        ids = np.zeros((len(rows), self.width), np.int32)
        for at, row in zip(ids, rows, strict=True):
            at[: len(row)] = row
        self.ids = jnp.asarray(ids)
        self.end_ids = jnp.asarray([*lm.config.eos_token_id, *request.stop_ids], jnp.int32)
        self.compile_s = self.prefill_s = self.decode_s = 0.0

    def prefill(self) -> DecodeState:
        new = self.request.max_new_tokens
        cache_length = _round_up(max(self.width, int(self.lengths.max()) + new), BUCKET)
        (carry, finite), seconds = self._timed(
            prefill,
            (self.state, self.ids, self.lengths, self.end_ids, jax.random.key(self.request.seed)),
            max_new=_round_up(new, BUCKET),
            cache_length=cache_length,
            how=self.request.sampling,
        )
        self.prefill_s += seconds
        if not bool(finite):
            raise DataError(
                "the model's logits are NaN or infinite after the prompt; check its weights "
                "(qjax quantize names bad ones) and try dtype='float32'"
            )
        return carry

    def decode(self, carry: DecodeState, limit: int) -> DecodeState:
        carry, seconds = self._timed(
            decode,
            (self.state, carry, self.end_ids, jnp.int32(limit)),
            how=self.request.sampling,
        )
        self.decode_s += seconds
        return carry

    def _timed(self, function: Any, args: tuple[Any, ...], **static: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        compiled = _compile(function, self.graphdef, args, static)
        ready = time.perf_counter()
        self.compile_s += ready - start
        result = jax.block_until_ready(compiled(*args))
        return result, time.perf_counter() - ready

    def rows(self, carry: DecodeState) -> list[list[int]]:
        tokens, counts = np.asarray(carry.tokens), np.asarray(carry.counts)
        return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]

    def text_of(self, index: int, row: list[int]) -> tuple[str, bool]:
        """Text of the new tokens `row` of sequence `index`, without end token and cut before the
        first stop string; and whether there was one."""
        ends = set(np.asarray(self.end_ids).tolist())
        kept = row[:-1] if row and row[-1] in ends else row
        tail = self.tails[index]
        before = self.tokenizer.decode(tail, skip_special_tokens=True)
        text = self.tokenizer.decode(tail + kept, skip_special_tokens=True)[len(before) :]
        cuts = [text.find(s) for s in self.request.stop_strings if s in text]
        return (text[: min(cuts)], True) if cuts else (text, False)

    def find_stop(self, index: int, row: list[int]) -> int | None:
        """How many tokens it takes for a stop string to be complete; None if none is."""
        if not self.request.stop_strings or not self.text_of(index, row)[1]:
            return None
        return next(n for n in range(1, len(row) + 1) if self.text_of(index, row[:n])[1])

    def result(self, carry: DecodeState) -> Generation:
        rows = [row[: self.find_stop(i, row)] for i, row in enumerate(self.rows(carry))]
        lengths = np.asarray([len(row) for row in rows], np.int32)
        token_ids = np.zeros((len(rows), int(lengths.max())), np.int32)
        for at, row in zip(token_ids, rows, strict=True):
            at[: len(row)] = row
        text = (
            None
            if self.tokenizer is None
            else [self.text_of(i, row)[0] for i, row in enumerate(rows)]
        )
        decoded = int(np.asarray(carry.counts).sum()) - len(rows)
        stats = GenerationStats(
            prompt_tokens=self.prompt_tokens,
            new_tokens=int(lengths.sum()),
            compile_s=self.compile_s,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            prefill_tokens_per_s=self.prompt_tokens / self.prefill_s,
            decode_tokens_per_s=decoded / self.decode_s if decoded else 0.0,
            peak_bytes=_peak_bytes(),
        )
        return Generation(token_ids=token_ids, lengths=lengths, text=text, stats=stats)


def _encode(lm: Any, request: Request) -> list[list[int]]:
    """Token ids of each prompt, checked against vocabulary and context."""
    prompts = request.prompts
    is_list = isinstance(prompts, list | tuple | np.ndarray | jax.Array)
    if not is_list or getattr(prompts, "ndim", 1) == 0:
        raise DataError(
            f"prompts is {type(prompts).__name__}; give a string, a list of strings, or token ids "
            "as [batch, seq]"
        )
    if len(prompts) == 0:
        raise DataError("there are no prompts; give at least one")
    rows = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if lm.tokenizer is None:
                raise DataError("this checkpoint has no tokenizer; give prompts as token ids")
            try:
                ids = lm.tokenizer(prompt, verbose=False)["input_ids"]
            except (TypeError, UnicodeError) as error:
                raise DataError(f"prompt {index} is not valid Unicode text: {error}") from error
        else:
            ids = prompt.tolist() if isinstance(prompt, np.ndarray | jax.Array) else prompt
            if not isinstance(ids, list | tuple):
                raise DataError(
                    f"prompts[{index}] is {prompt!r}; give strings, or token ids as [batch, seq]"
                )
        if not ids:
            raise DataError(f"prompt {index} is empty; give it at least one token")
        context = lm.config.max_position_embeddings
        if len(ids) + request.max_new_tokens > context:
            raise DataError(
                f"prompt {index} has {len(ids)} tokens; with max_new_tokens="
                f"{request.max_new_tokens} it does not fit the model's context of {context}: "
                "shorten the prompt or ask for fewer tokens"
            )
        lm.check_ids([ids])
        rows.append(list(ids))
    return rows


# Executables by function, shapes and settings; the oldest goes when there are too many.
_COMPILED: dict[Any, Callable[..., Any]] = {}
_COMPILED_LIMIT = 64


def _compile(function: Any, graphdef: Any, args: tuple[Any, ...], static: dict[str, Any]) -> Any:
    """The executable for these shapes, compiled once; apart, so that it can be timed apart."""
    leaves, treedef = jax.tree.flatten(args)
    shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    context = (jax.config.jax_default_matmul_precision, jax.config.jax_debug_nans)
    key = (function, graphdef, treedef, shapes, tuple(sorted(static.items())), context)
    if key not in _COMPILED:
        while len(_COMPILED) >= _COMPILED_LIMIT:
            del _COMPILED[next(iter(_COMPILED))]
        _COMPILED[key] = function.lower(graphdef, *args, **static).compile()
    return _COMPILED[key]


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _peak_bytes() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
