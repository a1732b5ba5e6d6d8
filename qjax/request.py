"""What a generation is asked for: checked arguments, and prompts as token ids."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax
import numpy as np

from qjax.errors import DataError
from qjax.sampling import Sampling, is_integer
from qjax.speculate import PromptLookup

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Checked arguments of a generation."""

    prompts: Any
    max_new_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    ignore_eos: bool
    speculate: PromptLookup | None

    @classmethod
    def make(
        cls,
        prompts: Any,
        *,
        max_new_tokens: int,
        stop: str | int | Iterable[str | int],
        ignore_eos: bool,
        speculate: PromptLookup | None,
        **sampling: Any,
    ) -> Self:
        if not is_integer(max_new_tokens) or max_new_tokens < 1:
            raise DataError(
                f"max_new_tokens is {max_new_tokens!r}; it must be an integer, 1 or more"
            )
        stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
        if not all(is_integer(s) or (isinstance(s, str) and s) for s in stops):
            raise DataError(f"stop holds {stops!r}; give token ids and non-empty strings")
        if not isinstance(ignore_eos, bool):
            raise DataError(f"ignore_eos is {ignore_eos!r}; it must be true or false")
        checked = Sampling(**sampling)
        if max(checked.entries("min_tokens")) > max_new_tokens:
            raise DataError(
                f"min_tokens is {max(checked.entries('min_tokens'))}, more than max_new_tokens, "
                f"{max_new_tokens}"
            )
        if speculate is not None:
            _check_speculation(speculate, checked)
        return cls(
            prompts=[prompts] if isinstance(prompts, str) else prompts,
            max_new_tokens=int(max_new_tokens),
            sampling=checked,
            stop_ids=tuple(int(s) for s in stops if isinstance(s, int | np.integer)),
            stop_strings=tuple(s for s in stops if isinstance(s, str)),
            ignore_eos=ignore_eos,
            speculate=speculate,
        )


def _check_speculation(speculate: object, sampling: Sampling) -> None:
    if not isinstance(speculate, PromptLookup):
        raise DataError(
            f"speculate is {speculate!r}; give a qjax.PromptLookup, for example "
            "PromptLookup(ngram=3, tokens=8), or None"
        )
    for temperature in sampling.entries("temperature"):
        if temperature != 0:
            raise DataError(
                f"temperature is {temperature} and speculate is given; speculation verifies greedy "
                "tokens only: set temperature=0 or speculate=None"
            )


def encode(lm: Any, request: Request) -> list[list[int]]:
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
