"""Attention of prompts and of chunks over a cache, in Triton's interpreter and in XLA, against
float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from qjax_kernels.prefill_attention import api, cudnn, triton, xla
from qjax_kernels.prefill_attention.config import SHARED_MEMORY, Config, candidates

SMALL = Config(rows=16, keys=16, warps=4, stages=2)


def kernel(function, config):
    """A Triton kernel in the interpreter."""
    pytest.importorskip("triton")
    import triton_interpreter  # noqa: F401

    return functools.partial(function, config=config, interpret=True)


def check_chunks(case, *configs, reference=False):
    if reference:
        case.check(case.chunks(xla.paged_prefill_attention))
    for config in configs:
        run = kernel(triton.paged_prefill_attention, config)
        case.check(case.chunks(run), case.multiplied)


def check_prompts(case, *configs):
    case.check(case.prompts(xla.prefill_attention))
    for config in configs:
        run = kernel(triton.prefill_attention, config)
        case.check(case.prompts(run), case.multiplied)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("cache", ["bfloat16", "float8_e4m3fn", "int8"])
def test_every_format_and_head_dim(cache, head_dim):
    case = Case(cache=cache, head_dim=head_dim, context=(20, 0), lengths=(5, 3), tokens=5)
    check_chunks(case, Config(rows=16, keys=32))


VARIANTS = [
    Case(cache="float16", query="float16"),
    Case(cache="float8_e4m3fn", query="float16", scales="one"),
    Case(cache="int8", query="float32", scales=None, scale=0.003),
    Case(window=9),
    Case(window=1, cache="float8_e4m3fn"),
    Case(soft_cap=2.0, scale=0.3),
    Case(alibi=True, heads=6),
    Case(alibi=True, window=20, soft_cap=5.0, cache="int8"),
    Case(factor=30.0),
    Case(layout="cache", page_size=100),
    Case(page_size=8, window=25),
    Case(page_size=48, context=(37, 50, 0), lengths=(9, 1, 7)),
    Case(page_size=64, context=(0, 0, 100), lengths=(9, 9, 9)),
    Case(heads=3, kv_heads=1, head_dim=24),
    Case(heads=5, kv_heads=5, context=(3, 0), lengths=(1, 1), tokens=1),
]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants(case):
    check_chunks(case, SMALL, reference=True)


CONFIGS = [
    Config(rows=32, keys=16),
    Config(rows=16, keys=32, split=1),
    Config(rows=16, keys=16, split=2),
    Config(rows=64, keys=16, split=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("window", [None, 21])
def test_every_way_to_cut_the_work(config, window):
    case = Case(window=window, heads=6, context=(90, 3, 0, 17), lengths=(9, 0, 1, 6), page_size=16)
    check_chunks(case, config)


def test_more_parts_than_are_added_at_once():
    case = Case(heads=1, kv_heads=1, context=(330, 0), lengths=(2, 2), tokens=2)
    check_chunks(case, Config(rows=16, keys=16, split=1))


PROMPTS = [
    Case(layout="prompt", context=(0, 0, 0), lengths=(40, 0, 23), tokens=40),
    Case(layout="prompt", context=(0,), lengths=(48,), tokens=48, window=13),
    Case(layout="prompt", context=(0,), lengths=(33,), tokens=33, soft_cap=3.0, alibi=True),
    Case(layout="prompt", context=(0,), lengths=(20,), tokens=20, cache="float16", query="float16"),
    Case(layout="prompt", context=(0,), lengths=(17,), tokens=17, head_dim=80, heads=3, kv_heads=1),
    Case(layout="prompt", context=(0, 0), lengths=(9, 20), tokens=20, head_dim=96, factor=30.0),
]


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_prompts(case):
    check_prompts(case, SMALL, Config(rows=64, keys=32, split=1))


def test_prompts_without_lengths():
    case = PROMPTS[1]

    def without(function):
        return lambda q, k, v, lengths, *rest, **static: function(q, k, v, None, *rest, **static)

    case.check(case.prompts(without(xla.prefill_attention)))
    run = kernel(triton.prefill_attention, SMALL)
    case.check(case.prompts(without(run)), "bfloat16")


def test_many_blocks_of_queries_and_keys():
    # More than the reference takes at a time, and more pairs than are done together.
    case = Case(context=(300, 5), lengths=(150, 140), tokens=150, heads=1, kv_heads=1, head_dim=16)
    check_chunks(case, reference=True)
    case = Case(cache="float32", query="float32", context=(0, 9), lengths=(9, 4), alibi=True)
    check_chunks(case, reference=True)


def test_sections(monkeypatch):
    from qjax_kernels.prefill_attention import launch

    monkeypatch.setattr(launch, "SECTION_BYTES", 2 * 2 * 128 * 32 * 2)  # two pairs of 128 keys
    case = Case(kv_heads=1, heads=2, context=(60, 0, 64, 3, 117), lengths=(9, 3, 5, 0, 9))
    check_chunks(case, SMALL)


def test_without_a_config():
    check_chunks(Case(), None)
    check_prompts(PROMPTS[0], None)


def test_a_query_that_is_not_a_number_is_not_hidden():
    case = Case(context=(5,), lengths=(3,), tokens=3)
    q = np.array(case.arrays[0])
    q[0, 1, 2, 0] = np.nan
    broken = Case(context=(5,), lengths=(3,), tokens=3)
    broken.__dict__["arrays"] = (q, *case.arrays[1:])
    for function in (xla.paged_prefill_attention, kernel(triton.paged_prefill_attention, SMALL)):
        y = np.asarray(broken.chunks(function)).astype(np.float32)
        bad = np.isnan(y).any(axis=-1)
        assert bad[0, 1, 2]
        assert bad.sum() == 1


def test_candidates_fit():
    for capability, limit in SHARED_MEMORY.items():
        for head_dim in (64, 80, 96, 128, 256):
            for itemsize in (1, 2):
                for rows in (1, 4, 40, 64, 8192):
                    found = candidates(rows, 64, 4096, head_dim, itemsize, capability, 132)
                    assert 1 <= len(found) <= 6
                    for config in found:
                        assert config.shared(head_dim, itemsize, capability) <= limit
                        assert config.rows >= min(rows, 32)


def test_every_8_bit_number():
    """Two in a word, by the instructions that are for GPUs without a conversion."""
    from ptx_emulator import elementwise
    from qjax_kernels.prefill_attention import triton_words

    codes = np.arange(256).astype(np.uint8)
    words = np.stack([codes, np.roll(codes, 77)], axis=-1).view(np.int16)[:, 0]
    for code, dtype in ((triton_words.INT8, "int8"), (triton_words.E4M3, "float8_e4m3fn")):
        low, high = elementwise(code.value, [words], [np.float16, np.float16], 2)
        expected = codes.view(dtype).astype(np.float32)
        expected[np.isnan(expected)] = np.copysign(480, expected[np.isnan(expected)])
        assert (low == expected).all()
        assert (high == np.roll(expected, 77)).all()


def test_few_rows_are_spread_over_the_gpu():
    config = candidates(16, 8, 32768, 128, 2, 90, 132)[0]
    assert 32768 / config.keys / config.split * 8 >= 2 * 132
    assert candidates(8192, 64, 2048, 128, 2, 90, 132)[0].split == 0


def arguments(**changes):
    q = jnp.zeros((2, 3, 4, 16), jnp.bfloat16)
    pages = jnp.zeros((5, 2, 8, 16), jnp.bfloat16)
    sizes = jnp.zeros((2,), jnp.int32)
    table = jnp.zeros((2, 2), jnp.int32)
    found = {
        "q": q, "k_pages": pages, "v_pages": pages, "block_table": table, "context": sizes,
        "lengths": sizes,
    }  # fmt: skip
    return found | changes


def test_what_does_not_fit_together_is_refused():
    zeros = jnp.zeros
    for message, change in (
        ("q is", {"q": zeros((2, 4, 16), jnp.bfloat16)}),
        ("q is", {"q": zeros((2, 3, 4, 16), jnp.int8)}),
        ("must be alike", {"k_pages": zeros((4, 2, 8, 16), jnp.bfloat16)}),
        ("KV heads that divides", {"q": zeros((2, 3, 3, 16), jnp.bfloat16)}),
        ("first axis", {"block_table": None}),
        ("block_table is", {"block_table": zeros((3, 2), jnp.int32)}),
        ("context is", {"context": zeros((3,), jnp.int32)}),
        ("lengths is", {"lengths": zeros((2,), jnp.float32)}),
        ("k_scale is", {"k_scale": zeros((3,), jnp.float32)}),
        ("v_scale is", {"v_scale": zeros((), jnp.bfloat16)}),
        ("alibi_slopes is", {"alibi_slopes": zeros((2,), jnp.float32)}),
        ("window is", {"window": 0}),
        ("soft_cap is", {"soft_cap": 0.0}),
        ("no implementation", {"implementation": "cudnn"}),
    ):
        with pytest.raises(ValueError, match=message):
            api.paged_prefill_attention(**arguments(**change))
    q, k = zeros((2, 3, 4, 16), jnp.bfloat16), zeros((2, 3, 2, 16), jnp.bfloat16)
    for message, call in (
        ("must be alike", (q, k, k[:1])),
        ("must be alike", (q, k.astype(jnp.int8), k.astype(jnp.int8))),
        ("k is", (q, k[:, :2], k[:, :2])),
        ("k is", (q[:, :, :3], k, k)),
        ("lengths is", (q, k, k, zeros((3,), jnp.int32))),
    ):
        with pytest.raises(ValueError, match=message):
            api.prefill_attention(*call)


def test_dispatch_on_a_cpu():
    y = api.paged_prefill_attention(**arguments(), k_scale=jnp.float32(2))
    assert y.shape == (2, 3, 4, 16)
    q = jnp.ones((1, 3, 4, 16), jnp.bfloat16)
    assert api.prefill_attention(q, q, q).dtype == jnp.bfloat16
    for name in ("cudnn", "triton"):
        with pytest.raises(NotImplementedError, match="NVIDIA"):
            api.prefill_attention(q, q, q, implementation=name)


def test_what_the_kernels_refuse():
    float32 = jnp.zeros((5, 2, 8, 16), jnp.float32)
    with pytest.raises(NotImplementedError, match="keys are float32"):
        api.paged_prefill_attention(
            **arguments(k_pages=float32, v_pages=float32), implementation="triton"
        )
    with pytest.raises(NotImplementedError, match="positive"):
        api.paged_prefill_attention(**arguments(), scale=-1.0, implementation="triton")
    odd = jnp.zeros((5, 2, 8, 15), jnp.int8)
    q = jnp.zeros((2, 3, 4, 15), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="pairs"):
        api.paged_prefill_attention(
            **arguments(q=q, k_pages=odd, v_pages=odd), implementation="triton"
        )
    empty = jnp.zeros((0, 3, 4, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no queries"):
        api.prefill_attention(empty, empty, empty, implementation="triton")


def test_what_cudnn_refuses(monkeypatch):
    monkeypatch.setattr(cudnn.triton_launch, "capability", lambda: 80)
    q = jnp.zeros((1, 3, 4, 256), jnp.bfloat16)
    for message, x, static in (
        ("soft cap", q, {"soft_cap": 3.0}),
        ("ALiBi", q, {"alibi_slopes": jnp.zeros((4,), jnp.float32)}),
        ("float32", q.astype(jnp.float32), {}),
        ("head_dim 256", q, {}),
        ("head_dim 12", q[..., :12], {}),
        ("no queries", q[:0, :, :, :64], {}),
        ("cuDNN", q[..., :64], {}),  # which is not there
    ):
        with pytest.raises(NotImplementedError, match=message):
            api.prefill_attention(x, x, x, implementation="cudnn", **static)
