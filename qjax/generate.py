"""From prompts to text: what `LanguageModel.generate` and `.stream` do around the jitted loop."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import compile_cache
from qjax.decode import DecodeState, decode, prefill
from qjax.errors import DataError
from qjax.request import Request, encode
from qjax.result import Generation, GenerationStats, SpeculationStats

# Prompts are padded to a multiple of this, so that few shapes are compiled.
BUCKET = 64
# With stop strings, the text is searched every so many steps.
STOP_STRIDE = 16
# End tokens are filled up to a multiple of this, likewise.
END_BUCKET = 8
_ADVICE = "check its weights (qjax quantize names bad ones) and try dtype='float32'"


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
            stopped = [run.text_of(index, row)[1] for index, row in rows]
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
        text, stopped = run.text_of(0, row)
        if stopped or bool(carry.done[0]):
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
        compile_cache.enable()
        self.tokenizer = lm.tokenizer
        self.request = request
        self.graphdef, self.state = lm.split()
        for stop in request.stop_ids:
            if not 0 <= stop < lm.config.vocab_size:
                raise DataError(f"stop token {stop} is outside 0..{lm.config.vocab_size - 1}")
        if request.stop_strings and self.tokenizer is None:
            raise DataError("stop strings need a tokenizer, and this checkpoint has none")
        n = request.sampling.logprobs
        if n is not None and n > lm.config.vocab_size:
            raise DataError(
                f"logprobs is {n}; the vocabulary has {lm.config.vocab_size} tokens: ask for fewer"
            )
        rows = encode(lm, request)
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
        own_ends = () if request.ignore_eos else lm.config.eos_token_id
        ends = [*own_ends, *request.stop_ids]
        self.ends = frozenset(ends)
        filled = np.full(_round_up(max(len(ends), 1), END_BUCKET), -1, np.int32)
        filled[: len(ends)] = ends
        self.end_ids = jnp.asarray(filled)
        self.settings = request.sampling.settings(len(rows), request.max_new_tokens)
        self.static = {"how": request.sampling.how, "speculate": request.speculate}
        self.compile_s = self.prefill_s = self.decode_s = 0.0
        self.program_bytes: int | None = None

    def prefill(self) -> DecodeState:
        speculate = self.request.speculate
        # A step of speculation writes all its candidates, also behind the last token.
        new = self.request.max_new_tokens + (0 if speculate is None else speculate.tokens)
        cache_length = _round_up(max(self.width, int(self.lengths.max()) + new), BUCKET)
        (carry, finite), seconds = self._timed(
            prefill,
            (self.state, self.ids, self.lengths, self.end_ids, self.settings),
            max_new=_round_up(new, BUCKET),
            cache_length=cache_length,
            **self.static,
        )
        self.prefill_s += seconds
        if not bool(finite):
            raise DataError(f"the model's logits are NaN or infinite after the prompt; {_ADVICE}")
        return carry

    def decode(self, carry: DecodeState, limit: int) -> DecodeState:
        carry, seconds = self._timed(
            decode,
            (self.state, carry, self.end_ids, self.settings, jnp.int32(limit)),
            **self.static,
        )
        self.decode_s += seconds
        broken = np.asarray(carry.broken)
        if broken.any():
            index = int(np.flatnonzero(broken)[0])
            raise DataError(
                f"the model's logits are NaN or infinite at new token {broken[index]} of prompt "
                f"{index}; {_ADVICE}"
            )
        return carry

    def _timed(self, function: Any, args: tuple[Any, ...], **static: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        program = _compile(function, self.graphdef, args, static)
        ready = time.perf_counter()
        self.compile_s += ready - start
        if program.bytes is not None:
            self.program_bytes = max(self.program_bytes or 0, program.bytes)
        result = jax.block_until_ready(program.run(*args))
        return result, time.perf_counter() - ready

    def rows(self, carry: DecodeState) -> list[list[int]]:
        tokens, counts = np.asarray(carry.tokens), np.asarray(carry.counts)
        return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]

    def text_of(self, index: int, row: list[int]) -> tuple[str, bool]:
        """Text of the new tokens `row` of sequence `index`, without end token and cut before the
        first stop string; and whether there was one."""
        kept = row[:-1] if row and row[-1] in self.ends else row
        text = self._text(index, kept)
        cuts = [text.find(s, self._stops_from(index, kept, s)) for s in self.request.stop_strings]
        cuts = [cut for cut in cuts if cut >= 0]
        return (text[: min(cuts)], True) if cuts else (text, False)

    def _stops_from(self, index: int, kept: list[int], stop: str) -> int:
        """Where in the text of `kept` a stop string counts: it ends behind the least tokens."""
        least = self.request.sampling.entries("min_tokens")
        least = least[index] if len(least) > 1 else least[0]
        if not least:
            return 0
        text = self._text(index, kept[:least])
        return max(0, len(text) - len(stop) + 1)

    def _text(self, index: int, kept: list[int]) -> str:
        """Text of tokens that follow the prompt."""
        tail = self.tails[index]
        before = self.tokenizer.decode(tail, skip_special_tokens=True)
        return self.tokenizer.decode(tail + kept, skip_special_tokens=True)[len(before) :]

    def find_stop(self, index: int, row: list[int]) -> int | None:
        """How many tokens it takes for a stop string to be complete; None if none is."""
        if not self.request.stop_strings or not self.text_of(index, row)[1]:
            return None
        return next(n for n in range(1, len(row) + 1) if self.text_of(index, row[:n])[1])

    def result(self, carry: DecodeState) -> Generation:
        rows = [row[: self.find_stop(i, row)] for i, row in enumerate(self.rows(carry))]
        lengths = np.asarray([len(row) for row in rows], np.int32)
        longest = int(lengths.max())
        inside = np.arange(longest) < lengths[:, None]

        def cut(array: jax.Array) -> np.ndarray:
            """[batch, max_new, ...] -> [batch, new, ...], 0 past the length of each row."""
            kept = np.asarray(array)[:, :longest]
            return np.where(inside.reshape(*inside.shape, *[1] * (kept.ndim - 2)), kept, 0)

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
            peak_bytes=_peak_bytes(carry.tokens),
            program_bytes=self.program_bytes,
            speculation=_speculation(carry),
        )
        logs = carry.logprobs
        return Generation(
            token_ids=cut(carry.tokens),
            lengths=lengths,
            text=text,
            stats=stats,
            logprobs=None if logs is None else cut(logs.chosen),
            top_ids=None if logs is None else cut(logs.top_ids),
            top_logprobs=None if logs is None else cut(logs.top),
        )


def _speculation(carry: DecodeState) -> SpeculationStats | None:
    if carry.lookup is None:
        return None
    passes, proposed, accepted = (
        tuple(np.asarray(x).tolist())
        for x in (carry.lookup.passes, carry.lookup.proposed, carry.lookup.accepted)
    )
    decoded = int(np.asarray(carry.counts).sum()) - len(passes)
    return SpeculationStats(
        passes=passes,
        proposed=proposed,
        accepted=accepted,
        acceptance=sum(accepted) / max(sum(proposed), 1),
        tokens_per_pass=decoded / max(sum(passes), 1),
    )


class _Program(NamedTuple):
    """An executable, and the device memory that it takes with all it is given, if known."""

    run: Callable[..., Any]
    bytes: int | None


# Executables by function, shapes and settings; the oldest goes when there are too many.
_COMPILED: dict[Any, _Program] = {}
_COMPILED_LIMIT = 64


def _compile(
    function: Any, graphdef: Any, args: tuple[Any, ...], static: dict[str, Any]
) -> _Program:
    """The executable for these shapes, compiled once; apart, so that it can be timed apart."""
    leaves, treedef = jax.tree.flatten(args)
    shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    context = (jax.config.jax_default_matmul_precision, jax.config.jax_debug_nans)
    key = (function, graphdef, treedef, shapes, tuple(sorted(static.items())), context)
    if key not in _COMPILED:
        while len(_COMPILED) >= _COMPILED_LIMIT:
            del _COMPILED[next(iter(_COMPILED))]
        compiled = function.lower(graphdef, *args, **static).compile()
        _COMPILED[key] = _Program(compiled, _program_bytes(compiled))
    return _COMPILED[key]


def _program_bytes(compiled: Any) -> int | None:
    found = compiled.memory_analysis()
    if found is None:
        return None
    inside = found.argument_size_in_bytes + found.output_size_in_bytes
    return int(inside - found.alias_size_in_bytes + found.temp_size_in_bytes)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _peak_bytes(array: jax.Array) -> int | None:
    """Of the device that has an array."""
    stats = min(array.devices(), key=lambda device: device.id).memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")
