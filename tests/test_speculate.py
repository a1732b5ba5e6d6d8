"""Prompt lookup: candidates and acceptance against loops, and the same tokens as without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_lm, token_batches

import qjax
from qjax import PromptLookup
from qjax.speculate import accept, propose

FAST = settings(deadline=None, derandomize=True, max_examples=80)
jit_propose = jax.jit(propose, static_argnames="settings")
jit_accept = jax.jit(accept)

# One repeats itself, one does not, and one is shorter than an n-gram.
PROMPTS = [[5, 9, 13, 4, 8] * 4, [200, 100, 50, 25, 12, 6, 3, 77], [7]]


# Candidates --------------------------------------------------------------------------------------


def candidates_by_loop(tokens, ngram, min_ngram, count):
    """The longest run of last tokens that stood before, its latest place, and what followed; as
    many as asked for, by going on from what has been guessed."""
    for n in range(min(ngram, len(tokens) - 1), min_ngram - 1, -1):
        for end in range(len(tokens) - 2, n - 2, -1):
            if tokens[end - n + 1 : end + 1] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + 1 + i])
                return text[len(tokens) :]
    return None


@FAST
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=3, max_size=3),
    how=st.sampled_from([(3, 1, 8), (3, 2, 4), (1, 1, 5), (5, 5, 3)]),
    rubbish=st.integers(0, 3),
)
def test_candidates_agree_with_the_loop(rows, how, rubbish):
    ngram, min_ngram, count = how
    history = np.full((3, 24), rubbish, np.int32)
    for at, row in zip(history, rows, strict=True):
        at[: len(row)] = row
    last = np.asarray([len(row) - 1 for row in rows], np.int32)
    found_tokens, found = jit_propose(
        jnp.asarray(history),
        jnp.asarray(last),
        settings=PromptLookup(ngram=ngram, min_ngram=min_ngram, tokens=count),
    )
    for row, tokens, match in zip(rows, np.asarray(found_tokens), np.asarray(found), strict=True):
        expected = candidates_by_loop(row, ngram, min_ngram, count)
        assert bool(match) == (expected is not None)
        if match:
            assert tokens.tolist() == expected


def accepted_by_loop(own, candidates, found, ends, room):
    tokens, taken = [], 0
    for i, token in enumerate(own):
        if len(tokens) == room:
            return tokens, taken, False
        tokens.append(token)
        right = bool(found) and i < len(candidates) and candidates[i] == token
        taken += right
        if token in ends:
            return tokens, taken, True
        if not right:
            return tokens, taken, False
    return tokens, taken, False


@FAST
@given(
    own=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=3, max_size=3),
    right=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    found=st.lists(st.booleans(), min_size=3, max_size=3),
    room=st.lists(st.integers(0, 7), min_size=3, max_size=3),
)
def test_acceptance_agrees_with_the_loop(own, right, found, room):
    own = np.asarray(own, np.int32)
    candidates = own[:, :-1].copy()
    for row, n in zip(candidates, right, strict=True):
        row[n : n + 1] += 1  # the first wrong one
    ends = jnp.asarray([-1, 2], jnp.int32)
    count, taken, ended = jit_accept(
        jnp.asarray(own), jnp.asarray(candidates), jnp.asarray(found), ends, jnp.asarray(room)
    )
    for i in range(3):
        tokens, n, at_end = accepted_by_loop(
            own[i].tolist(), candidates[i].tolist(), found[i], {2}, room[i]
        )
        assert (int(count[i]), int(taken[i]), bool(ended[i])) == (len(tokens), n, at_end)


# Generation --------------------------------------------------------------------------------------


def both(lm, prompts, new, lookup=PromptLookup(), **chosen):  # noqa: B008 (frozen)
    plain = lm.generate(prompts, new, **chosen)
    fast = lm.generate(prompts, new, speculate=lookup, **chosen)
    np.testing.assert_array_equal(fast.token_ids, plain.token_ids)
    np.testing.assert_array_equal(fast.lengths, plain.lengths)
    assert plain.stats.speculation is None
    stats = fast.stats.speculation
    assert all(0 <= a <= p for a, p in zip(stats.accepted, stats.proposed, strict=True))
    for taken, passes, length in zip(stats.accepted, stats.passes, fast.lengths, strict=True):
        # The prefill's token, then one of the model's own each pass, but for the last one, where
        # room may end at a candidate.
        assert length - 1 - passes <= taken <= length - 1
    return plain, fast


@pytest.mark.parametrize(
    "preset", [None, *(pytest.param(p, marks=pytest.mark.heavy) for p in ("int8", "int4_wo"))]
)
def test_the_tokens_are_those_of_single_steps(preset):
    lm = tiny_lm(eos_token_id=())
    if preset is not None:
        lm = qjax.quantize_model(lm, preset, token_batches(1))
    _, fast = both(lm, PROMPTS, 40)
    stats = fast.stats.speculation
    assert sum(stats.passes) < 3 * 39  # it did save passes
    assert len(set(stats.accepted)) > 1  # rows went on at their own speed
    assert stats.acceptance == sum(stats.accepted) / sum(stats.proposed)
    assert stats.tokens_per_pass == pytest.approx(3 * 39 / sum(stats.passes))


def test_ends_limits_and_other_settings():
    lm = tiny_lm(eos_token_id=())
    free = lm.generate(PROMPTS, 40).token_ids
    # Ends in the middle of runs, at other places in each row.
    for end in {int(free[0, 13]), int(free[1, 9]), int(free[2, 30])}:
        both(lm, PROMPTS, 40, stop=[end])
    for new in (1, 2, 3, 17):
        both(lm, PROMPTS, new)
    for lookup in (PromptLookup(ngram=1, tokens=1), PromptLookup(ngram=5, min_ngram=2, tokens=15)):
        both(lm, PROMPTS, 40, lookup)


def test_at_the_end_of_the_context():
    """Candidates may lie past the last position of the model, but no token does."""
    lm = tiny_lm(eos_token_id=())
    both(lm, [[5, 9, 13] * 70, [4] * 200], 46)


def test_a_row_does_not_depend_on_its_batch():
    lm = tiny_lm(eos_token_id=())
    together = lm.generate(PROMPTS, 30, speculate=PromptLookup())
    stats = together.stats.speculation
    for index, prompt in enumerate(PROMPTS):
        alone = lm.generate([prompt], 30, speculate=PromptLookup())
        np.testing.assert_array_equal(alone.token_ids[0], together.token_ids[index])
        mine = alone.stats.speculation
        assert (mine.passes[0], mine.proposed[0], mine.accepted[0]) == (
            stats.passes[index],
            stats.proposed[index],
            stats.accepted[index],
        )


@pytest.mark.heavy
def test_with_penalty_and_logprobs():
    lm = tiny_lm(eos_token_id=())
    penalty = [1.0, 1.05, 1.4]
    plain, fast = both(lm, PROMPTS, 24, repetition_penalty=penalty, logprobs=3)
    without = lm.generate(PROMPTS, 24).token_ids
    np.testing.assert_array_equal(plain.token_ids[0], without[0])
    assert (plain.token_ids[1:] != without[1:]).any()
    # The same logits, and a sum over 256 of their exponentials in another order: 256 u of the sum
    # at most, and so of its logarithm, beside roundings of numbers below 64.
    bound = 2.0**-24 * (2 * 256 + 4 * 64)
    for name in ("logprobs", "top_logprobs"):
        assert np.abs(getattr(fast, name) - getattr(plain, name)).max() <= bound
    np.testing.assert_array_equal(fast.top_ids, plain.top_ids)


def test_one_loop_on_the_device():
    """A step needs nothing of the host: the program for GPUs has one loop."""
    from qjax.decode import decode, prefill
    from qjax.sampling import Sampling

    lm = tiny_lm()
    graphdef, state = lm.split()
    ids, ends = jnp.ones((2, 8), jnp.int32), jnp.asarray([2], jnp.int32)
    chosen = Sampling()
    static = {"how": chosen.how, "speculate": PromptLookup()}
    arguments = (graphdef, state, ids, jnp.full(2, 8), ends, chosen.settings(2, 4))
    carry, _ = jax.eval_shape(
        lambda *args: prefill(graphdef, *args, max_new=12, cache_length=32, **static),
        *arguments[1:],
    )
    traced = decode.trace(
        graphdef, state, carry, ends, chosen.settings(2, 4), jnp.int32(4), **static
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.while") == 1
    assert "callback" not in text


@pytest.mark.heavy
def test_real_text_on_the_reference_model():
    lm = qjax.load(ROOT / "checkpoints" / "reference")
    texts = [
        "def add(a, b):\n    return a + b\n\ndef add2(a, b):\n    return a + b\n\ndef add3(a, b):",
        "import os\nimport sys\n\ndef main(",
    ]
    lookup = PromptLookup()
    plain = lm.generate(texts, 48)
    fast = lm.generate(texts, 48, speculate=lookup)
    np.testing.assert_array_equal(fast.token_ids, plain.token_ids)
    assert fast.text == plain.text
    repeats, other = fast.stats.speculation.accepted
    assert repeats > other
    stop = plain.text[0][40:44]
    stopped = lm.generate(texts, 48, stop=stop, speculate=lookup)
    assert stopped.text == lm.generate(texts, 48, stop=stop).text
    assert all(stop not in text for text in stopped.text)
    pieces = list(lm.stream(texts[0], 48, speculate=lookup))
    assert "".join(pieces) == plain.text[0]
    assert len(pieces) < 24  # several tokens a piece
    assert "".join(lm.stream(texts[0], 48, stop=stop, speculate=lookup)) == stopped.text[0]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"ngram": 0}, "ngram is 0; it must be an integer from 1 to 64"),
        ({"ngram": 2.0}, "ngram is 2.0"),
        ({"ngram": 2, "min_ngram": 3}, "min_ngram is 3; it must be an integer from 1 to ngram, 2"),
        ({"tokens": 0}, "tokens is 0; it must be an integer from 1 to 64"),
        ({"tokens": 65}, "tokens is 65"),
    ],
)
def test_settings_out_of_range(chosen, message):
    with pytest.raises(qjax.DataError, match=message):
        PromptLookup(**chosen)


@pytest.mark.parametrize("temperature", [0.8, [0, 0.8, 0]])
def test_sampling_is_refused(temperature):
    with pytest.raises(qjax.DataError, match=r"temperature is 0.8 and speculate.*temperature=0 or"):
        tiny_lm().generate(PROMPTS, temperature=temperature, speculate=PromptLookup())


def test_other_ways_to_ask_are_refused():
    with pytest.raises(qjax.DataError, match=r"speculate is 8; give a qjax\.PromptLookup"):
        tiny_lm().generate(PROMPTS, speculate=8)
