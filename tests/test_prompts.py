"""Prompts are read in groups: the same text, in memory that does not grow with the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import small_lm
from flax import nnx

import qjax
from qjax import prompts
from qjax.prompts import group_size


@pytest.mark.parametrize(
    ("batch", "tokens", "expected"),
    [(1, 8, 1), (8, 8192, 8), (64, 2048, 32), (6, 20_000, 3), (7, 20_000, 1), (3, 10**6, 1)],
)
def test_the_size_of_a_group(batch, tokens, expected):
    assert group_size(batch, tokens) == expected


@pytest.mark.parametrize("kv_cache", [None, "fp8_e4m3"])
def test_groups_read_what_one_pass_reads(monkeypatch, kv_cache):
    """Bit by bit: on a CPU a row's bits do not depend on the rows beside it."""
    prepared = qjax.prepare(small_lm("llama"), kv_cache=kv_cache)
    rng = np.random.default_rng(0)
    lengths = jnp.asarray([70, 3, 65, 1, 64, 17], jnp.int32)
    ids = jnp.asarray(rng.integers(0, prepared.config.vocab_size, (6, 70)), jnp.int32)

    graphdef, state = prepared.split()

    def read():
        def run(state, ids):
            model = nnx.merge(graphdef, state)
            return prompts.read_prompts(model, ids, lengths, model.init_cache(6, 80))

        return jax.jit(run)(state, ids)

    whole = read()
    monkeypatch.setattr(prompts, "GROUP_TOKENS", 2 * 70)
    assert group_size(6, 70) == 2
    for found, expected in zip(jax.tree.leaves(read()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.heavy
def test_generation_in_groups(monkeypatch):
    prepared = qjax.prepare(small_lm("llama"))
    texts = np.random.default_rng(1).integers(0, prepared.config.vocab_size, (4, 33))
    whole = prepared.generate(texts, 9).token_ids
    jax.clear_caches()
    monkeypatch.setattr(prompts, "GROUP_TOKENS", 40)
    np.testing.assert_array_equal(prepared.generate(texts, 9).token_ids, whole)
