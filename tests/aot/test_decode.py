"""What the decode loop adds to the model, compiled for an H200: one graph, tokens by kernels."""

import re

import h200
import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from qjax import PromptLookup
from qjax.decode import decode, prefill
from qjax.models.registry import abstract_model
from qjax.sampling import Sampling

pytest.importorskip("jax_triton")

EVERYTHING = Sampling(
    temperature=0.7, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.1, logprobs=2
)
GUESSES = PromptLookup(ngram=3, tokens=8)


def compile_loop(sampling: Sampling, speculate: PromptLookup | None) -> str:
    cfg = tiny_config(num_hidden_layers=1, vocab_size=32000)
    graphdef, state = abstract_model("llama", cfg, jnp.dtype(jnp.bfloat16))
    batch, shape = 4, jax.ShapeDtypeStruct
    settings = jax.tree.map(lambda x: shape(x.shape, x.dtype), sampling.settings(batch, 64))
    static = {"how": sampling.how, "speculate": speculate}

    def start(state, prompts, lengths, ends, settings):
        sizes = {"max_new": 128, "cache_length": 192}
        return prefill(graphdef, state, prompts, lengths, ends, settings, **sizes, **static)[0]

    def loop(state, carry, ends, settings, limit):
        return decode(graphdef, state, carry, ends, settings, limit, **static)

    ends, lengths = shape((8,), jnp.int32), shape((batch,), jnp.int32)
    prompts = shape((batch, 64), jnp.int32)
    carry = jax.eval_shape(start, state, prompts, lengths, ends, settings)
    arguments = (state, carry, ends, settings, shape((), jnp.int32))
    shapes = jax.tree.map(lambda x: h200.shape(x.shape, x.dtype), arguments)
    return h200.compile_for_h200(loop, *shapes).hlo


@pytest.mark.parametrize(
    ("sampling", "speculate", "chosen_by"),
    [
        (Sampling(), None, "argmax"),
        (EVERYTHING, None, "sample"),
        (Sampling(repetition_penalty=1.1), GUESSES, "argmax"),
    ],
    ids=["greedy", "everything", "speculation"],
)
def test_tokens_are_chosen_by_kernels_in_one_loop(sampling, speculate, chosen_by):
    hlo = compile_loop(sampling, speculate)
    calls = re.findall(r" custom-call\(.*op_name=\"([^\"]*)\"", hlo)
    mine = [call for call in calls if call.endswith(f"/body/jit({chosen_by})/triton_kernel_call")]
    assert len(mine) == 2  # tiles, then rows
    assert hlo.count(" while(") == 1
    # No sort of the vocabulary, and nothing that waits for the host.
    for operation in (" sort(", "infeed", "callback"):
        assert operation not in hlo


def test_greedy_adds_little():
    """Beside the choice itself: the token's place, whether it ends, the counts and the test."""
    hlo = compile_loop(Sampling(), None)
    body = max(hlo.split("\n\n"), key=lambda text: text.count("triton_kernel_call"))
    after = body[body.rindex("triton_kernel_call") :]
    assert len(re.findall(r" fusion\(", after)) <= 4
