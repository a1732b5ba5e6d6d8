"""Prefill and decode as pure, jitted functions: the engine room of `qjax.generate`."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import cache as kv
from qjax import speculate as lookup_decoding
from qjax.prompts import read_prompts
from qjax.sampling import How, Logprobs, Settings, greedy, is_end, logprobs, sample, withhold
from qjax.speculate import Lookup, PromptLookup


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "step",
        "tokens",
        "done",
        "broken",
        "counts",
        "positions",
        "cache",
        "seen",
        "logprobs",
        "lookup",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Everything a decode step reads and writes.

    Attributes:
      step: int32 [], passes of the model so far, which is how many tokens each sequence has got,
        or the least it has got if speculating.
      tokens: int32 [batch, max_new], the new tokens; what lies past `counts` is padding.
      done: bool [batch], sequences that have ended or have all the tokens they may get.
      broken: int32 [batch], the first new token whose logit was not finite, counted from 1; 0:
        none. Such a sequence is done.
      counts: int32 [batch], valid tokens of each sequence, its end token included.
      positions: int32 [batch], where the next token of each sequence goes in the cache.
      cache: what the model's `init_cache` makes: one KVCache a layer, or a PagedCache.
      seen: bool [batch, vocab], tokens of the prompt and new ones, or None if there is no
        repetition penalty.
      logprobs: [batch, max_new, ...], of the tokens, or None.
      lookup: what speculation needs, or None.
    """

    step: jax.Array
    tokens: jax.Array
    done: jax.Array
    broken: jax.Array
    counts: jax.Array
    positions: jax.Array
    cache: list[kv.KVCache] | kv.PagedCache
    seen: jax.Array | None
    logprobs: Logprobs | None
    lookup: Lookup | None


@partial(jax.jit, static_argnames=("graphdef", "max_new", "cache_length", "how", "speculate"))
def prefill(
    graphdef: nnx.GraphDef,
    state: Any,
    input_ids: jax.Array,
    lengths: jax.Array,
    end_ids: jax.Array,
    settings: Settings,
    *,
    max_new: int,
    cache_length: int,
    how: How,
    speculate: PromptLookup | None = None,
) -> tuple[DecodeState, jax.Array]:
    """Run the prompts and draw the first token of each sequence.

    Args:
      input_ids: int32 [batch, tokens], each prompt left-aligned and padded on the right. Padding
        is never attended to: its cache slots are overwritten before a query can see them.
      lengths: int32 [batch], 1 or more.
      end_ids: int32 [ends], tokens that end a sequence; may be empty, or hold numbers that are no
        tokens.
      settings: of each sequence.
      max_new: room for new tokens: at least settings.max_tokens, and speculate.tokens more.
      cache_length: positions in the cache, at least tokens and max(lengths) + max_new - 1.
      how: which features of `settings` are in use.
      speculate: None, or how `decode` is to speculate.

    Returns:
      the state after one token, and bool []: whether all logits used were finite.
    """
    model = nnx.merge(graphdef, state)
    batch = input_ids.shape[0]
    cache = model.init_cache(batch, cache_length)
    last, cache = read_prompts(model, input_ids, lengths, cache)
    logits = model.logits(last)
    seen = _mark_prompt(input_ids, lengths, logits.shape[-1]) if how.penalty else None
    none = jnp.zeros(batch, jnp.int32)
    allowed = withhold(logits, none, end_ids, settings, how)
    token = sample(allowed, jnp.int32(0), settings, how, seen)
    first = DecodeState(
        step=jnp.int32(1),
        tokens=jnp.zeros((batch, max_new), jnp.int32).at[:, 0].set(token),
        done=is_end(token, end_ids) | (settings.max_tokens <= 1),
        broken=none,
        counts=jnp.ones(batch, jnp.int32),
        positions=lengths,
        cache=cache,
        seen=None if seen is None else _mark(seen, token),
        logprobs=None
        if how.logprobs is None
        else jax.tree.map(
            lambda new: jnp.zeros((batch, max_new, *new.shape[1:]), new.dtype).at[:, 0].set(new),
            logprobs(logits, token, how.logprobs),
        ),
        lookup=None
        if speculate is None
        else lookup_decoding.start(input_ids, lengths, token, cache_length),
    )
    return first, jnp.isfinite(logits).all()


@partial(jax.jit, static_argnames=("graphdef", "how", "speculate"), donate_argnames="carry")
def decode(
    graphdef: nnx.GraphDef,
    state: Any,
    carry: DecodeState,
    end_ids: jax.Array,
    settings: Settings,
    limit: jax.Array,
    *,
    how: How,
    speculate: PromptLookup | None = None,
) -> DecodeState:
    """Decode until step `limit`, or until all sequences are done: one `lax.while_loop`.

    The limit is an argument, not a constant, so that the same compiled loop serves generation
    (limit = max_new), streaming (limit = step + 1) and stop strings (some steps at a time). A step
    gives each sequence one token; speculating, as many as are right.

    Args:
      carry: donated: the cache is updated in place.
      end_ids: int32 [ends].
      settings, how, speculate: as the prefill had them.
      limit: int32 []; without speculation at most max_new.
    """
    model = nnx.merge(graphdef, state)

    def unfinished(carry: DecodeState) -> jax.Array:
        return (carry.step < limit) & ~jnp.all(carry.done)

    def step(carry: DecodeState) -> DecodeState:
        if speculate is None:
            return _step(model, carry, end_ids, settings, how)
        return _speculative_step(model, carry, end_ids, settings, how, speculate)

    return jax.lax.while_loop(unfinished, step, carry)


def _step(
    model: Any, carry: DecodeState, end_ids: jax.Array, settings: Settings, how: How
) -> DecodeState:
    """One token for each sequence that is not done."""
    last = jax.lax.dynamic_index_in_dim(carry.tokens, carry.step - 1, axis=1)
    hidden, cache = model.hidden(last, carry.positions[:, None], carry.cache)
    logits = model.logits(hidden[:, 0])
    allowed = withhold(logits, carry.counts, end_ids, settings, how)
    token = sample(allowed, carry.step, settings, how, carry.seen)
    wrong = ~jnp.isfinite(_chosen(logits, token)) & ~carry.done
    token = jnp.where(carry.done, 0, token)
    counts = carry.counts + (~carry.done).astype(jnp.int32)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(old, new, carry.step, axis=1)

    return DecodeState(
        step=carry.step + 1,
        tokens=put(carry.tokens, token),
        done=carry.done | is_end(token, end_ids) | (counts >= settings.max_tokens) | wrong,
        broken=jnp.where(wrong, counts, carry.broken),
        counts=counts,
        positions=carry.positions + 1,
        cache=cache,
        seen=None if carry.seen is None else _mark(carry.seen, token),
        logprobs=None
        if how.logprobs is None
        else jax.tree.map(put, carry.logprobs, logprobs(logits, token, how.logprobs)),
        lookup=None,
    )


def _speculative_step(
    model: Any,
    carry: DecodeState,
    end_ids: jax.Array,
    settings: Settings,
    how: How,
    speculate: PromptLookup,
) -> DecodeState:
    """One pass over the last token and its candidates; the tokens are those of single steps."""
    lookup = carry.lookup
    assert lookup is not None
    candidates, found = lookup_decoding.propose(lookup.history, carry.positions, speculate)
    last = jnp.take_along_axis(lookup.history, carry.positions[:, None], axis=1)
    inputs = jnp.concatenate([last, candidates], axis=1)
    positions = carry.positions[:, None] + jnp.arange(inputs.shape[1])
    # Keys and values of wrong candidates stay in the cache; like those of padding, they are
    # overwritten before a query can see them.
    hidden, cache = model.hidden(inputs, positions, carry.cache)
    logits = model.logits(hidden)
    seen = None if carry.seen is None else _mark_each(carry.seen, candidates)
    before = carry.counts[:, None] + jnp.arange(inputs.shape[1])
    own = greedy(withhold(logits, before, end_ids, settings, how), settings, how, seen)
    room = jnp.where(carry.done, 0, settings.max_tokens - carry.counts)
    count, accepted, ended = lookup_decoding.accept(own, candidates, found, end_ids, room)
    counts = carry.counts + count
    wrong = ~jnp.isfinite(_chosen(logits, own)) & (before < counts[:, None])
    first_wrong = carry.counts + 1 + jnp.argmax(wrong, axis=1)
    wrong = wrong.any(axis=1)
    running = (~carry.done).astype(jnp.int32)

    def put(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        # What is written past `count` is not read, and overwritten by the next step.
        def row(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0)

        return jax.vmap(row)(old, new, start)

    return DecodeState(
        step=carry.step + 1,
        tokens=put(carry.tokens, own, carry.counts),
        done=carry.done | ended | (counts >= settings.max_tokens) | wrong,
        broken=jnp.where(wrong, first_wrong, carry.broken),
        counts=counts,
        positions=carry.positions + count,
        cache=cache,
        seen=None if carry.seen is None else _mark_first(carry.seen, own, count),
        logprobs=None
        if how.logprobs is None
        else jax.tree.map(
            lambda old, new: put(old, new, carry.counts),
            carry.logprobs,
            logprobs(logits, own, how.logprobs),
        ),
        lookup=Lookup(
            history=put(lookup.history, own, carry.positions + 1),
            passes=lookup.passes + running,
            proposed=lookup.proposed + jnp.where(found, running * speculate.tokens, 0),
            accepted=lookup.accepted + accepted,
        ),
    )


def _chosen(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The logits [...] of tokens [...], which tell of all that the products before them met.

    A number that is not finite makes every logit behind it so, or is the largest itself. Looking at
    one logit of each row costs nothing; at all of them, a kernel of its own.
    """
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


def _mark(seen: jax.Array, token: jax.Array) -> jax.Array:
    """bool [batch, vocab] with int32 [batch] set; what is no token is left out."""
    return _mark_all(seen, token[:, None])


def _mark_all(seen: jax.Array, tokens: jax.Array) -> jax.Array:
    return seen.at[jnp.arange(seen.shape[0])[:, None], tokens].set(True, mode="drop")


def _mark_first(seen: jax.Array, tokens: jax.Array, count: jax.Array) -> jax.Array:
    """bool [batch, vocab] with the first `count` [batch] tokens of each row set."""
    inside = jnp.arange(tokens.shape[1]) < count[:, None]
    return _mark_all(seen, jnp.where(inside, tokens, seen.shape[1]))


def _mark_prompt(input_ids: jax.Array, lengths: jax.Array, vocab: int) -> jax.Array:
    return _mark_first(jnp.zeros((input_ids.shape[0], vocab), bool), input_ids, lengths)


def _mark_each(seen: jax.Array, candidates: jax.Array) -> jax.Array:
    """What is seen before each token of a step: bool [batch, candidates + 1, vocab]."""
    rows = [seen]
    for token in candidates.T:
        rows.append(_mark(rows[-1], token))
    return jnp.stack(rows, axis=1)


def activation_dtype(model: Any) -> jnp.dtype:
    """The type of a model's activations: the (logical) dtype of its embedding table."""
    return jnp.dtype(model.embed_tokens.embedding.get_value().dtype)
