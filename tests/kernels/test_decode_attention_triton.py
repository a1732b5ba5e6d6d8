"""Decode attention by the portable kernels, in Triton's interpreter, against float64."""

import functools

import jax.numpy as jnp
import pytest
from attention_cases import Case
from qjax_kernels.decode_attention import api, triton
from qjax_kernels.prefill_attention.config import Config

pytest.importorskip("triton")
import triton_interpreter  # noqa: F401


def step(lengths, **fields):
    """A decode step of sequences with so many tokens."""
    context = tuple(max(n - 1, 0) for n in lengths)
    return Case(context=context, lengths=tuple(min(n, 1) for n in lengths), tokens=1, **fields)


def check(case, config):
    run = functools.partial(triton.decode_attention, config=config, interpret=True)
    case.check(case.steps(run), case.multiplied)


SMALL = Config(rows=16, keys=16, warps=4, stages=3, split=2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("cache", ["bfloat16", "float8_e4m3fn", "int8"])
def test_every_format_and_head_dim(cache, head_dim):
    check(step((70, 0, 33), cache=cache, head_dim=head_dim), SMALL)


@pytest.mark.parametrize("group", [1, 3, 8, 16, 71])
def test_groups(group):
    check(step((40, 5), heads=2 * group, kv_heads=2), SMALL)


VARIANTS = [
    dict(cache="float16", query="float16"),
    dict(cache="float8_e4m3fn", scales="one", query="float16"),
    dict(cache="int8", scales=None, scale=0.003, query="float32"),
    dict(window=20),
    dict(window=1, cache="float8_e4m3fn"),
    dict(soft_cap=2.0, scale=0.3),
    dict(alibi=True, heads=6),
    dict(alibi=True, window=33, soft_cap=5.0, cache="int8"),
    dict(factor=30.0),
    dict(layout="cache", page_size=100),
    dict(page_size=8, window=25),
    dict(page_size=24, cache="int8"),
    dict(page_size=128),
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_variants(fields):
    check(step((83, 0, 64, 1), **fields), SMALL)


@pytest.mark.parametrize("split", [0, 1, 3])
@pytest.mark.parametrize("keys", [16, 64])
def test_every_way_to_cut_the_work(keys, split):
    case = step((300, 0, 17, 129), heads=2, kv_heads=1, window=290)
    check(case, Config(rows=16, keys=keys, split=split))


def test_without_a_config():
    check(step((70, 0, 3)), None)


def test_a_cpu_is_refused():
    q, pages = jnp.zeros((1, 2, 16), jnp.bfloat16), jnp.zeros((3, 1, 8, 16), jnp.bfloat16)
    call = functools.partial(
        api.decode_attention,
        q,
        pages,
        pages,
        jnp.zeros((1, 2), jnp.int32),
        jnp.ones((1,), jnp.int32),
    )
    assert list(api.IMPLEMENTATIONS) == ["mosaic", "triton", "xla"]
    with pytest.raises(NotImplementedError, match="NVIDIA"):
        call(implementation="triton")
    with pytest.raises(NotImplementedError, match="positive"):
        call(implementation="triton", scale=-1.0)
    assert call().shape == q.shape
