"""Generation: the jitted loop against repeated full forward passes, ends, sampling, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tiny import KINDS, some_heavy, tiny_lm, token_batches

import qjax
from qjax.decode import decode

PROMPTS = [[5, 9, 13, 4, 8], [7, 6], [200, 100, 50, 25, 12, 6, 3, 77]]


def greedy_by_full_passes(lm, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The slow way: a full forward pass for every token, no cache.

    Rows are padded on the right to one width, which no causal model can see, so that one shape is
    compiled.
    """
    rows = [list(prompt) for prompt in prompts]
    width = max(map(len, rows)) + new
    for _ in range(new):
        logits = np.asarray(lm([row + [0] * (width - len(row)) for row in rows]))
        for index, row in enumerate(rows):
            row.append(int(logits[index, len(row) - 1].argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize("preset", some_heavy([None, *KINDS]))
def test_greedy_equals_repeated_full_passes(preset):
    lm = tiny_lm(eos_token_id=())
    if preset is not None:
        lm = qjax.quantize_model(lm, preset, token_batches(1))
    result = lm.generate(PROMPTS, max_new_tokens=12)
    assert result.token_ids.tolist() == greedy_by_full_passes(lm, PROMPTS, 12)


def test_a_row_does_not_depend_on_its_batch():
    lm = tiny_lm(eos_token_id=())
    together = lm.generate(PROMPTS, max_new_tokens=10).token_ids
    for index, prompt in enumerate(PROMPTS):
        alone = lm.generate([prompt], max_new_tokens=10).token_ids
        np.testing.assert_array_equal(together[index], alone[0])


def test_each_sequence_ends_at_its_own_end_token():
    lm = tiny_lm(eos_token_id=())
    free = lm.generate(PROMPTS, max_new_tokens=12).token_ids
    ends = (int(free[0, 3]), int(free[1, 6]))
    stopped = tiny_lm(eos_token_id=ends[:1]).generate(PROMPTS, max_new_tokens=12, stop=[ends[1]])
    for row, length, expected in zip(stopped.token_ids, stopped.lengths, free, strict=True):
        hits = [i for i, token in enumerate(expected) if token in ends]
        wanted = hits[0] + 1 if hits else 12
        assert length == wanted
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert not row[length:].any()
    assert stopped.token_ids.shape[1] == stopped.lengths.max()
    assert stopped.stats.new_tokens == stopped.lengths.sum()


def test_one_new_token_needs_no_decode_step():
    lm = tiny_lm(eos_token_id=())
    result = lm.generate(PROMPTS, max_new_tokens=1)
    assert result.token_ids.tolist() == greedy_by_full_passes(lm, PROMPTS, 1)
    assert result.stats.decode_tokens_per_s == 0


def test_array_prompts_and_statistics():
    lm = tiny_lm(eos_token_id=())
    # A batch size that no other test has: its executables are not there yet.
    prompts = token_batches(1, batch=5, seq=7)[0]
    result = lm.generate(prompts, max_new_tokens=5)
    stats = result.stats
    assert result.text is None
    assert (stats.prompt_tokens, stats.new_tokens) == (35, 25)
    assert stats.prefill_s > 0
    assert stats.decode_s > 0
    assert stats.prefill_tokens_per_s == pytest.approx(35 / stats.prefill_s)
    assert stats.decode_tokens_per_s == pytest.approx(20 / stats.decode_s)
    again = lm.generate(jnp.asarray(prompts), max_new_tokens=5)
    np.testing.assert_array_equal(again.token_ids, result.token_ids)
    # The same shapes are not compiled again.
    assert again.stats.compile_s < 0.1 < stats.compile_s


def test_sampling_is_reproducible_and_follows_its_settings():
    lm = tiny_lm(eos_token_id=())
    hot = {"max_new_tokens": 16, "temperature": 1.5}
    first = lm.generate(PROMPTS, **hot, seed=1).token_ids
    np.testing.assert_array_equal(first, lm.generate(PROMPTS, **hot, seed=1).token_ids)
    assert (first != lm.generate(PROMPTS, **hot, seed=2).token_ids).any()
    greedy = lm.generate(PROMPTS, 16).token_ids
    np.testing.assert_array_equal(lm.generate(PROMPTS, **hot, top_k=1).token_ids, greedy)
    np.testing.assert_array_equal(lm.generate(PROMPTS, **hot, top_p=1e-6).token_ids, greedy)
    # Equal prompts in one batch are drawn independently.
    twins = lm.generate([PROMPTS[0]] * 2, **hot).token_ids
    assert (twins[0] != twins[1]).any()


@pytest.mark.heavy
def test_a_sequence_depends_on_its_own_seed():
    """Neighbours, places and their settings change nothing; one number means consecutive seeds."""
    lm = tiny_lm(eos_token_id=())
    own = {"temperature": [1.2, 0, 0.8], "top_k": [None, 3, 20], "min_p": [0.02, None, 0]}
    own |= {"top_p": [0.9, None, None], "repetition_penalty": [1, 1.2, 1.1], "seed": [7, 7, 9]}
    together = lm.generate(PROMPTS, 16, **own).token_ids
    for rows in ([0], [2], [2, 0], [2, 1, 0]):
        chosen = {name: [values[i] for i in rows] for name, values in own.items()}
        some = lm.generate([PROMPTS[i] for i in rows], 16, **chosen).token_ids
        np.testing.assert_array_equal(some, together[rows])
    np.testing.assert_array_equal(
        lm.generate(PROMPTS, 16, temperature=1.0, seed=5).token_ids,
        lm.generate(PROMPTS, 16, temperature=1.0, seed=[5, 6, 7]).token_ids,
    )
    same = lm.generate([PROMPTS[0]] * 2, 16, temperature=1.0, seed=[5, 5]).token_ids
    np.testing.assert_array_equal(same[0], same[1])


@pytest.mark.heavy
def test_logprobs_are_those_of_full_passes():
    lm = tiny_lm(eos_token_id=())
    end = int(lm.generate(PROMPTS, 12).token_ids[0, 4])
    # The model's own probabilities, whatever the tokens were drawn from.
    for chosen in ({}, {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.5}):
        result = lm.generate(PROMPTS, 12, stop=end, logprobs=4, **chosen)
        assert result.logprobs.shape == result.token_ids.shape
        assert result.top_ids.shape == result.top_logprobs.shape == (*result.token_ids.shape, 4)
        for i, (prompt, n) in enumerate(zip(PROMPTS, result.lengths, strict=True)):
            row = result.token_ids[i, :n]
            logits = np.asarray(lm([prompt + row.tolist()]), np.float64)[0, len(prompt) - 1 : -1]
            logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            # The logits have the same bits; the logarithm of a sum of 256 terms does not.
            bound = 2.0**-24 * (2 * 256 + 4 * np.abs(logits).max())
            taken = np.take_along_axis(logs, row[:, None], axis=1)[:, 0]
            assert np.abs(result.logprobs[i, :n] - taken).max() <= bound
            best = np.argsort(-logits, axis=1, kind="stable")[:, :4]
            np.testing.assert_array_equal(result.top_ids[i, :n], best)
            top = np.take_along_axis(logs, best, axis=1)
            assert np.abs(result.top_logprobs[i, :n] - top).max() <= bound
            assert not result.logprobs[i, n:].any()
            assert not result.top_ids[i, n:].any()
    only = lm.generate(PROMPTS, 12, logprobs=0)
    assert only.logprobs.shape == (3, 12)
    assert only.top_ids.shape == (3, 12, 0)
    free = lm.generate(PROMPTS, 12)
    assert free.logprobs is free.top_ids is free.top_logprobs is None
    np.testing.assert_array_equal(free.token_ids, only.token_ids)


def test_the_repetition_penalty_counts_prompt_and_new_tokens():
    lm = tiny_lm(eos_token_id=())
    penalty = 1.7
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(10):
        width = max(map(len, PROMPTS)) + 10
        padded = [row + [0] * (width - len(row)) for row in rows]
        logits = np.asarray(lm(padded)).astype(np.float32)
        for index, row in enumerate(rows):
            mine = logits[index, len(row) - 1].copy()
            for token in set(row):
                factor = np.float32(penalty)
                mine[token] = mine[token] / factor if mine[token] > 0 else mine[token] * factor
            row.append(int(mine.argmax()))
    expected = [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]
    result = lm.generate(PROMPTS, 10, repetition_penalty=penalty)
    assert result.token_ids.tolist() == expected
    assert (result.token_ids != lm.generate(PROMPTS, 10).token_ids).any()


def test_other_numbers_compile_nothing_again():
    from qjax.generate import _COMPILED

    lm = tiny_lm(eos_token_id=())
    first = {"temperature": 1.0, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    lm.generate(PROMPTS, 8, **first)
    before = set(_COMPILED)
    lm.generate(PROMPTS, 8, temperature=0.7, top_p=0.9, min_p=0.3, repetition_penalty=2, seed=9)
    lm.generate(PROMPTS, 12, **first | {"temperature": [0, 1, 2]}, stop=[1, 2, 3])
    assert set(_COMPILED) == before
    lm.generate(PROMPTS, 8, **first | {"min_p": None})  # another feature set
    assert len(set(_COMPILED) - before) == 2  # its prefill and its loop


@pytest.fixture(scope="module")
def reference():
    return qjax.load(ROOT / "checkpoints" / "reference")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_strings_never_appear(reference, temperature):
    """Whatever the string and however it is cut into tokens, generated or streamed."""
    texts = ["def main(args):\n", "import os\nimport sys\n", "x = "]
    free = reference.generate(texts, 40, temperature=temperature, seed=3)
    assert not any(text.endswith("\ufffd") for text in free.text)
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 9):
        stops = []
        for text in free.text:
            at = int(rng.integers(0, len(text) - size))
            stops.append(text[at : at + size])
        result = reference.generate(texts, 40, temperature=temperature, seed=3, stop=stops)
        for text, whole in zip(result.text, free.text, strict=True):
            assert not any(stop in text for stop in stops)
            # It is the text without stops, cut before the first one.
            assert text == whole[: min(whole.index(stop) for stop in stops if stop in whole)]
        pieces = reference.stream(texts[0], 40, temperature=temperature, seed=3, stop=stops)
        assert "".join(pieces) == result.text[0]


def test_stop_tokens_end_the_text_and_stay_out_of_it(reference):
    text = "def main(args):\n"
    free = reference.generate(text, 24)
    stop = int(free.token_ids[0, 10])
    result = reference.generate(text, 24, stop=stop)
    n = free.token_ids[0].tolist().index(stop) + 1
    assert result.token_ids[0].tolist() == free.token_ids[0, :n].tolist()
    ids = result.token_ids[0, :-1]
    assert result.text[0] == reference.tokenizer.decode(ids)
    assert "".join(reference.stream(text, 24, stop=stop)) == result.text[0]


def test_the_decode_loop_is_one_while_and_donates_its_cache():
    """The program has one loop, and the caches that come out are the buffers that went in."""
    from qjax.decode import prefill
    from qjax.sampling import Sampling

    lm = tiny_lm()
    graphdef, state = lm.split()
    ids, ends = jnp.ones((2, 8), jnp.int32), jnp.asarray([2], jnp.int32)
    how, settings = Sampling().how, Sampling().settings(2, 4)
    carry, _ = prefill(
        graphdef, state, ids, jnp.full(2, 8), ends, settings, max_new=4, cache_length=16, how=how
    )
    traced = decode.trace(graphdef, state, carry, ends, settings, jnp.int32(4), how=how)
    # The batch of per-sequence writes lowers to scatters, not loops: one while in all. (On a CPU
    # attention has loops of its own.)
    for_gpu = traced.lower(lowering_platforms=("cuda",))
    assert for_gpu.as_text().count("stablehlo.while") == 1
    shapes = [f"{x.shape}" for x in jax.tree.leaves(carry.cache)]
    assert len(shapes) == 4
    cache_pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carry.cache)}
    after = decode(graphdef, state, carry, ends, settings, jnp.int32(4), how=how)
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.cache)} == cache_pointers
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry.cache))


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompts"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 250], {"max_new_tokens": 10}, "prompt 0 has 250 tokens.*context of 256"),
        ([[1] * 300], {"max_new_tokens": 1}, "prompt 0 has 300 tokens.*context of 256"),
        ([[256]], {}, "outside the vocabulary"),
        ([[-1]], {}, "outside the vocabulary"),
        ([[0.5]], {}, "must be non-empty integers"),
        ("text", {}, "no tokenizer"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 8.5}, "max_new_tokens is 8.5"),
        ([5, 6, 7], {}, r"prompts\[0\] is 5; give strings"),
        ([[1]], {"seed": 2**70}, "seed is"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"stop": True}, "token ids and non-empty strings"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": 1e-45}, "temperature is 1e-45"),
        ([[1]], {"top_k": 1.5}, "top_k is 1.5"),
        ([[1]], {"stop": [256]}, "stop token 256 is outside"),
        (None, {}, "prompts is NoneType"),
        (5, {}, "prompts is int"),
        ([[1], [2, [3]]], {}, "prompt|input_ids"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"stop": [""]}, "non-empty strings"),
        ([[1]], {"stop": "x"}, "stop strings need a tokenizer"),
        ([[1]], {"min_p": 2}, "min_p is 2"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty is 0"),
        ([[1]], {"seed": [1, 2]}, "seed has 2 entries for 1 prompts"),
        ([[1]], {"temperature": [1, 2]}, "temperature has 2 entries for 1 prompts"),
        ([[1]], {"logprobs": 257}, "logprobs is 257; the vocabulary has 256 tokens"),
    ],
)
def test_bad_requests_are_refused(prompts, settings, message):
    with pytest.raises(qjax.DataError, match=message):
        tiny_lm().generate(prompts, **settings)


def test_broken_weights_are_refused():
    lm = tiny_lm()
    broken = jax.tree.map(lambda x: x * jnp.nan, lm.split()[1])
    with pytest.raises(qjax.DataError, match="logits are NaN or infinite"):
        lm.with_state(broken, None).generate([[1, 2]], max_new_tokens=2)


@pytest.mark.parametrize("ids", [np.zeros((0, 3), int), np.zeros(3, int), np.zeros((1, 300), int)])
def test_bad_input_ids_are_refused(ids):
    with pytest.raises(qjax.DataError):
        tiny_lm()(ids)


def test_streaming_needs_a_tokenizer():
    with pytest.raises(qjax.DataError, match="no tokenizer"):
        tiny_lm().stream([1, 2])


# ---------------------------------------------------------------- ends that are put off


def test_the_models_own_end_can_be_ignored():
    free = tiny_lm(eos_token_id=()).generate(PROMPTS, max_new_tokens=12).token_ids
    lm = tiny_lm(eos_token_id=(int(free[0, 3]),))
    assert lm.generate(PROMPTS, max_new_tokens=12).lengths[0] < 12
    result = lm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    np.testing.assert_array_equal(result.token_ids, free)
    # Stop tokens of the caller still end.
    stop = int(free[0, 5])
    first = free[0].tolist().index(stop) + 1
    stopped = lm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, stop=[stop])
    assert stopped.lengths[0] == first


@pytest.mark.parametrize("speculate", [None, qjax.PromptLookup(ngram=1, tokens=3)])
def test_no_sequence_ends_before_its_least_tokens(speculate):
    """The end token is not chosen, at each prompt's own place; the next best one is."""
    free = tiny_lm(eos_token_id=()).generate(PROMPTS, max_new_tokens=12).token_ids
    end = int(free[0, 2])
    lm = tiny_lm(eos_token_id=(end,))
    plain = lm.generate(PROMPTS, max_new_tokens=12, speculate=speculate)
    assert plain.lengths[0] == 3
    least = [8, 0, 12]
    result = lm.generate(PROMPTS, max_new_tokens=12, min_tokens=least, speculate=speculate)
    for row, length, n, prompt in zip(
        result.token_ids.tolist(), result.lengths, least, PROMPTS, strict=True
    ):
        assert length >= n
        assert end not in row[:n]
        logits = np.array(lm([prompt + row[:length]]))[0, len(prompt) - 1 : -1]
        logits[:n, end] = -np.inf
        assert logits.argmax(-1).tolist() == row[:length]
    assert result.token_ids[1].tolist() == plain.token_ids[1].tolist() + [0] * (
        result.token_ids.shape[1] - plain.token_ids.shape[1]
    )


def test_other_least_tokens_compile_nothing():
    lm = tiny_lm(eos_token_id=(7,))
    lm.generate(PROMPTS, max_new_tokens=4, min_tokens=2)
    assert lm.generate(PROMPTS, max_new_tokens=4, min_tokens=[1, 3, 0]).stats.compile_s < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": -1}, "min_tokens is -1; it must be an integer, 0 or more"),
        ({"min_tokens": [1, 9, 2]}, "min_tokens is 9, more than max_new_tokens, 8"),
        ({"min_tokens": [1]}, "min_tokens has 1 entries for 3 prompts"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
    ],
)
def test_wrong_ends_are_refused(settings, message):
    with pytest.raises(qjax.DataError, match=message):
        tiny_lm().generate(PROMPTS, max_new_tokens=8, **settings)


# ---------------------------------------------------------------- logits that are not finite


@pytest.mark.parametrize("speculate", [None, qjax.PromptLookup(ngram=1, tokens=3)])
def test_logits_that_break_in_the_loop_are_noticed(speculate):
    """Only the embedding of the fourth new token of the second prompt is broken."""
    lm = tiny_lm(eos_token_id=())
    free = lm.generate(PROMPTS, max_new_tokens=12, speculate=speculate).token_ids
    used = {token for row in (*PROMPTS, free[0].tolist(), free[2].tolist()) for token in row}
    at = next(i for i, t in enumerate(free[1].tolist()) if t not in used)
    assert at < 11
    table = lm.model.embed_tokens.embedding
    table.set_value(table.get_value().at[int(free[1, at])].set(jnp.nan))
    settings = {"max_new_tokens": 12, "speculate": speculate}
    with pytest.raises(qjax.DataError, match=rf"at new token {at + 2} of prompt 1; check its"):
        lm.generate(PROMPTS, **settings)
    # Others end as they did.
    np.testing.assert_array_equal(lm.generate(PROMPTS[:1], **settings).token_ids[0], free[0])
