"""Choosing the next token from logits."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import ops
from qjax.errors import DataError

SEEDS = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. A setting is one for all sequences, or a list with one for each.

    Filters act after the temperature: min_p, then top_k, then top_p on what those two keep.
    Logits equal to one that is kept are kept too.

    Attributes:
      temperature: 0 takes the largest logit (greedy); else logits are divided by it.
      top_k: keep the k largest logits; None keeps all.
      top_p: keep the fewest most likely tokens whose probabilities reach p (the one that crosses
        is kept); None keeps all. arXiv:1904.09751.
      min_p: keep tokens at least min_p times as likely as the most likely one; None or 0 keeps
        all. arXiv:2407.01082.
      repetition_penalty: of tokens in the prompt and among the new ones, logits above 0 are
        divided by it and others multiplied, before all else (greedy too). arXiv:1909.05858, 4.1.
      min_tokens: tokens that end a sequence are not chosen before it has so many; 0: at any time.
      seed: of the random draws. One number: sequence i has seed + i, so that equal prompts differ.
        The draws of a sequence depend on its own seed and on nothing else.
      logprobs: None, or how many of the most likely tokens to report at each step beside the
        chosen one. It is the same for all. Probabilities are the model's own: before penalty,
        temperature and filters.

    Raises:
      DataError: a setting that is not allowed.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int | None] | None = None
    top_p: float | Sequence[float | None] | None = None
    min_p: float | Sequence[float | None] | None = None
    repetition_penalty: float | Sequence[float] = 1.0
    min_tokens: int | Sequence[int] = 0
    seed: int | Sequence[int] = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (allows, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            value = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
            several = isinstance(value, list | tuple)
            object.__setattr__(self, name, tuple(value) if several else value)
            for index, entry in enumerate(self.entries(name)):
                if not allows(entry):
                    what = f"{name}[{index}]" if several else name
                    raise DataError(f"{what} is {entry!r}; it must be {allowed}")
        if self.logprobs is not None and not (is_integer(self.logprobs) and self.logprobs >= 0):
            raise DataError(
                f"logprobs is {self.logprobs!r}; it must be how many of the most likely tokens to "
                "report, 0 or more, or None"
            )

    def entries(self, name: str) -> tuple[Any, ...]:
        """The values of a setting: one a sequence, or a single one for all."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    @property
    def how(self) -> "How":
        """What is compiled: the features that some sequence uses."""
        return How(
            draws=any(self.entries("temperature")),
            min_p=any(self.entries("min_p")),
            penalty=any(p != 1 for p in self.entries("repetition_penalty")),
            min_tokens=any(self.entries("min_tokens")),
            logprobs=None if self.logprobs is None else int(self.logprobs),
        )

    def settings(self, batch: int, max_tokens: int) -> "Settings":
        """The numbers, as arrays with an entry for each of `batch` sequences.

        Raises:
          DataError: a list of another length.
        """

        def array(name: str, dtype: Any, none: Any = None) -> jax.Array:
            values = [none if v is None else v for v in self.entries(name)]
            if isinstance(getattr(self, name), tuple) and len(values) != batch:
                raise DataError(
                    f"{name} has {len(values)} entries for {batch} prompts; give one for each, or "
                    "a single number for all"
                )
            return jnp.asarray(np.broadcast_to(np.asarray(values, np.float64), batch).astype(dtype))

        seed = array("seed", np.uint32)
        if not isinstance(self.seed, tuple):
            seed = jnp.asarray(((self.seed + np.arange(batch)) % SEEDS).astype(np.uint32))
        return Settings(
            temperature=array("temperature", np.float32),
            top_k=array("top_k", np.int32, 0),
            top_p=array("top_p", np.float32, 1),
            min_p=array("min_p", np.float32, 0),
            penalty=array("repetition_penalty", np.float32),
            seed=seed,
            min_tokens=array("min_tokens", np.int32),
            max_tokens=jnp.asarray(np.full(batch, max_tokens, np.int32)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """The part of `Sampling` that is compiled: which features are in use, but not their values.

    Attributes:
      draws: some temperature is not 0.
      min_p, penalty, min_tokens: some sequence uses it.
      logprobs: how many of the most likely tokens to report, or None.
    """

    draws: bool = False
    min_p: bool = False
    penalty: bool = False
    min_tokens: bool = False
    logprobs: int | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "penalty",
        "seed",
        "min_tokens",
        "max_tokens",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The part of `Sampling` that is data: other values compile nothing again.

    Attributes:
      temperature: float32 [batch]; 0 is greedy.
      top_k: int32 [batch]; 0 is all.
      top_p: float32 [batch]; 1 is all.
      min_p: float32 [batch]; 0 is all.
      penalty: float32 [batch]; 1 is none.
      seed: uint32 [batch].
      min_tokens, max_tokens: int32 [batch], how many new tokens a sequence gets before it may end,
        and at most.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    seed: jax.Array
    min_tokens: jax.Array
    max_tokens: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["chosen", "top", "top_ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities.

    Attributes:
      chosen: float32 [...], of the chosen tokens.
      top: float32 [..., n], of the n most likely tokens, largest first.
      top_ids: int32 [..., n], which tokens those are; of equal ones the lowest first.
    """

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array


def sample(
    logits: jax.Array,
    step: jax.Array,
    settings: Settings,
    how: How,
    seen: jax.Array | None = None,
) -> jax.Array:
    """The next token of each sequence; what a row gives does not depend on the rows beside it.

    Args:
      logits: float32 [batch, vocab].
      step: int32 [], number of the token, folded into the seeds.
      seen: bool [batch, vocab], tokens that the penalty is for; needed if `how.penalty`.

    Returns:
      int32 [batch].
    """
    if not how.draws:
        return greedy(logits, settings, how, seen)

    def uniform(seed: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step))

    return draw(logits, jax.vmap(uniform)(settings.seed), settings, how, seen)


def greedy(
    logits: jax.Array, settings: Settings, how: How, seen: jax.Array | None = None
) -> jax.Array:
    """The largest logit, the first of equal ones: [batch, ..., vocab] -> int32 [batch, ...].

    Args:
      seen: bool, shape of the logits; needed if `how.penalty`.
    """
    logits = _penalized(logits, settings, how, seen)
    return ops.argmax(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape[:-1])


def draw(
    logits: jax.Array,
    uniform: jax.Array,
    settings: Settings,
    how: How,
    seen: jax.Array | None = None,
) -> jax.Array:
    """The token at which the distribution function, in order of ids, passes `uniform`.

    Args:
      logits: float32 [batch, vocab].
      uniform: float32 [batch], in [0, 1).
      seen: bool [batch, vocab]; needed if `how.penalty`.

    Returns:
      int32 [batch]; where the temperature is 0, the largest logit.
    """
    logits = _penalized(logits, settings, how, seen)
    if how.min_p:
        # p >= min_p * p_max, in logits. At temperature 0 nothing is drawn, and nothing filtered.
        heat = jnp.where(settings.temperature > 0, settings.temperature, 1)
        margin = heat * jnp.log(settings.min_p)
        lowest = jnp.max(logits, axis=-1) + margin
        logits = jnp.where(logits >= lowest[:, None], logits, -jnp.inf)
    return ops.sample(
        logits,
        uniform,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )


def logprobs(logits: jax.Array, tokens: jax.Array, n: int) -> Logprobs:
    """Log-probabilities of `tokens` and of the n most likely ones.

    Args:
      logits: float32 [..., vocab].
      tokens: int32 [...].
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_ids = jax.lax.top_k(logits, n)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return Logprobs(
        chosen=(chosen - total)[..., 0], top=top - total, top_ids=top_ids.astype(jnp.int32)
    )


def is_end(tokens: jax.Array, end_ids: jax.Array) -> jax.Array:
    """Which of int32 [...] are among the few int32 [ends]: bool [...].

    Comparisons one by one join the operations around them; a reduction is a kernel of its own.
    """
    found = jnp.zeros(tokens.shape, bool)
    for i in range(end_ids.size):
        found |= tokens == end_ids[i]
    return found


def withhold(
    logits: jax.Array, counts: jax.Array, end_ids: jax.Array, settings: Settings, how: How
) -> jax.Array:
    """Logits without the end tokens, where a sequence may not end yet.

    Args:
      logits: [batch, ..., vocab].
      counts: int32 [batch, ...], tokens that the sequence has before the one to be chosen.
      end_ids: int32 [ends]; negative ones are none.
    """
    if not how.min_tokens:
        return logits
    vocab = logits.shape[-1]
    # A negative index would be one from the end.
    ends = jnp.zeros(vocab, bool).at[jnp.where(end_ids < 0, vocab, end_ids)].set(True, mode="drop")
    least = settings.min_tokens.reshape(-1, *[1] * (counts.ndim - 1))
    return jnp.where((counts < least)[..., None] & ends, -jnp.inf, logits)


def _penalized(
    logits: jax.Array, settings: Settings, how: How, seen: jax.Array | None
) -> jax.Array:
    if not how.penalty:
        return logits
    assert seen is not None
    by = settings.penalty.reshape(-1, *[1] * (logits.ndim - 1))
    return jnp.where(seen, jnp.where(logits > 0, logits / by, logits * by), logits)


def is_integer(value: object) -> bool:
    """Whether value is a whole number and not a truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Setting -> what one of its entries may be, and the same in words. Below a thousandth of
# temperature logits would overflow, and 0 is what is meant; penalties are bounded alike.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda t: _is_number(t) and (t == 0 or 1e-3 <= t <= 1e3),
        "0 (greedy), or from 0.001 to 1000",
    ),
    "top_k": (
        lambda k: k is None or (is_integer(k) and 1 <= k < 2**31),
        "an integer, 1 or more, or None",
    ),
    "top_p": (lambda p: p is None or (_is_number(p) and 0 < p <= 1), "in (0, 1], or None"),
    "min_p": (lambda p: p is None or (_is_number(p) and 0 <= p <= 1), "in [0, 1], or None"),
    "repetition_penalty": (
        lambda p: _is_number(p) and 0.01 <= p <= 100,
        "from 0.01 to 100; 1 is none, and more than 1 discourages repetition",
    ),
    "min_tokens": (lambda n: is_integer(n) and 0 <= n < 2**31, "an integer, 0 or more"),
    "seed": (lambda s: is_integer(s) and 0 <= s < SEEDS, "an integer from 0 to 2**32 - 1"),
}
