"""Speculative decoding by prompt lookup: the text itself proposes how it goes on.

Where the last few tokens of a sequence stood before, the tokens that followed them there are the
candidates for what follows now (arXiv:2304.04487). One pass of the
model over the last token and all candidates says which of them it would have chosen itself; those
are kept, up to the first that differs, and one more token, the model's own, comes for free.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from qjax.errors import DataError
from qjax.sampling import is_end, is_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Settings of prompt lookup. Hashable: they are part of what is compiled.

    Attributes:
      ngram: how many of the last tokens to look for, at most; of the places where the longest
        run of them stood before, the latest is taken.
      min_ngram: with fewer equal tokens than this there are no candidates.
      tokens: candidates a step. A step runs the model on one token more.
    """

    ngram: int = 3
    min_ngram: int = 1
    tokens: int = 8

    def __post_init__(self) -> None:
        if not is_integer(self.ngram) or not 1 <= self.ngram <= 64:
            raise DataError(f"ngram is {self.ngram!r}; it must be an integer from 1 to 64")
        if not is_integer(self.min_ngram) or not 1 <= self.min_ngram <= self.ngram:
            raise DataError(
                f"min_ngram is {self.min_ngram!r}; it must be an integer from 1 to ngram, "
                f"{self.ngram}"
            )
        if not is_integer(self.tokens) or not 1 <= self.tokens <= 64:
            raise DataError(f"tokens is {self.tokens!r}; it must be an integer from 1 to 64")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["history", "passes", "proposed", "accepted"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    """What prompt lookup carries from step to step.

    Attributes:
      history: int32 [batch, length], prompt and new tokens of each sequence, by position. What
        lies past its last token is never read.
      passes: int32 [batch], steps in which a sequence was still running.
      proposed: int32 [batch], candidates that were verified.
      accepted: int32 [batch], candidates that became tokens.
    """

    history: jax.Array
    passes: jax.Array
    proposed: jax.Array
    accepted: jax.Array


def start(input_ids: jax.Array, lengths: jax.Array, token: jax.Array, length: int) -> Lookup:
    """The state after the first new token.

    Args:
      input_ids: int32 [batch, tokens], padded on the right.
      lengths: int32 [batch].
      token: int32 [batch], the first new token.
      length: room for prompt, new tokens and one step's candidates.
    """
    batch, tokens = input_ids.shape
    history = jnp.zeros((batch, length), jnp.int32).at[:, :tokens].set(input_ids)
    none = jnp.zeros(batch, jnp.int32)
    history = history.at[jnp.arange(batch), lengths].set(token)
    return Lookup(history=history, passes=none, proposed=none, accepted=none)


def propose(
    history: jax.Array, last: jax.Array, settings: PromptLookup
) -> tuple[jax.Array, jax.Array]:
    """Candidates for the tokens after position `last` of each sequence.

    Args:
      history: int32 [batch, length].
      last: int32 [batch], position of each sequence's last token.

    Returns:
      int32 [batch, settings.tokens], and bool [batch]: whether there was a match. Where the match
      is so near that its continuation runs into the end, it repeats: tokens since the match are
      taken to be a period.
    """
    place = jnp.arange(history.shape[1])
    # equal[b, e]: how many tokens up to position e are those up to the last one, at most ngram.
    equal = jnp.zeros(history.shape, jnp.int32)
    so_far = jnp.broadcast_to(place, history.shape) < last[:, None]
    for back in range(settings.ngram):
        wanted = jnp.take_along_axis(history, jnp.maximum(last - back, 0)[:, None], axis=1)
        # Rolled around, positions before the first one are out of the question.
        so_far &= (jnp.roll(history, back, axis=1) == wanted) & (place >= back)
        equal += so_far.astype(jnp.int32)
    longest = jnp.max(equal, axis=1, keepdims=True)
    end = jnp.max(jnp.where(equal == longest, place, -1), axis=1)
    found = longest[:, 0] >= settings.min_ngram
    end = jnp.where(found, end, last - 1)
    period = jnp.maximum(last - end, 1)
    ahead = jnp.arange(settings.tokens) % period[:, None]
    candidates = jnp.take_along_axis(history, jnp.maximum(end[:, None] + 1 + ahead, 0), axis=1)
    return candidates, found


def accept(
    own: jax.Array,
    candidates: jax.Array,
    found: jax.Array,
    end_ids: jax.Array,
    room: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How much of a step counts.

    Args:
      own: int32 [batch, tokens + 1], what the model chooses after the last token and after each
        candidate, given that those before it are right.
      candidates, found: of `propose`.
      end_ids: int32 [ends].
      room: int32 [batch], how many tokens a sequence may still get; 0 for those that have ended.

    Returns:
      int32 [batch], how many tokens of `own` become tokens of the sequence; int32 [batch], how
      many of those were candidates; bool [batch], whether the last of them is an end token.
    """
    right = (candidates == own[:, :-1]) & found[:, None]
    matched = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
    ends = is_end(own, end_ids)
    before_end = jnp.sum(jnp.cumprod((~ends).astype(jnp.int32), axis=1), axis=1)
    count = jnp.minimum(jnp.minimum(matched, before_end) + 1, room)
    return count, jnp.minimum(matched, count), before_end < count
