"""The portable attention kernels compile for every GPU: memory that fits, tensor cores used."""

import functools

import h200
import jax
import jax.numpy as jnp
import ptx
import pytest
from qjax_kernels.decode_attention import triton as decode
from qjax_kernels.prefill_attention import triton as prefill
from qjax_kernels.prefill_attention.config import SHARED_MEMORY, Config, candidates

CORES, FP8 = 132, "float8_e4m3fn"
STATIC = {"scale": 0.1, "window": None, "soft_cap": None}
EVERYTHING = {"scale": 0.1, "window": 1000, "soft_cap": 30.0}
PLAIN_DOT = "mma.sync"
LARGE_DOT = {80: PLAIN_DOT, 86: PLAIN_DOT, 89: PLAIN_DOT, 90: "wgmma.mma_async",
             100: "tcgen05.mma"}  # fmt: skip


def prompt(make, *, batch=8, tokens=2048, heads=32, kv_heads=8, head_dim=128, slopes=False):
    """Arguments of `prefill_attention`."""
    q = make((batch, tokens, heads, head_dim), jnp.bfloat16)
    k = make((batch, tokens, kv_heads, head_dim), jnp.bfloat16)
    alibi = make((heads,), jnp.float32) if slopes else None
    return q, k, k, make((batch,), jnp.int32), alibi


def paged(make, *, batch=8, tokens=512, heads=32, kv_heads=8, head_dim=128, cache="bfloat16",
          page_size=64, pages=64, slopes=False):  # fmt: skip
    """Arguments of `paged_prefill_attention`; of `decode_attention` where tokens is None."""
    q = make((batch, *([tokens] if tokens else []), heads, head_dim), jnp.bfloat16)
    k = make((batch * pages, kv_heads, page_size, head_dim), jnp.dtype(cache))
    sizes = [make((batch,), jnp.int32)] * (2 if tokens else 1)
    scale = make((kv_heads,), jnp.float32) if k.dtype.itemsize == 1 else None
    alibi = make((heads,), jnp.float32) if slopes else None
    return q, k, k, make((batch, pages), jnp.int32), *sizes, scale, scale, alibi


def compiled(function, arguments, config=None, static=STATIC, *, capability=90):
    """The kernels, which fit."""
    kernels = ptx.compile_triton(
        function, *arguments, capability=capability, config=config, **static
    )
    for kernel in kernels:
        assert kernel.shared <= SHARED_MEMORY[capability]
    head_dim, itemsize = arguments[0].shape[-1], arguments[1].dtype.itemsize
    if config is not None:
        assert kernels[0].shared <= config.shared(head_dim, itemsize, capability)
        assert kernels[0].registers * config.warps * 32 <= 65536
    assert kernels[0].ptx.count("cp.async.c") >= 2
    return kernels


shapes = jax.ShapeDtypeStruct


def large(head_dim=128, itemsize=2, capability=90, page_size=0):
    sizes = (head_dim, itemsize, capability, CORES, page_size)
    return candidates(8192, 64, 2048, *sizes)


@pytest.mark.parametrize("config", large(), ids=str)
def test_prompts(config):
    (kernel,) = compiled(prefill.prefill_attention, prompt(shapes), config)
    assert kernel.spills == 0
    assert LARGE_DOT[90] in kernel.ptx


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_prompts_of_other_heads(head_dim):
    config = large(head_dim)[0]
    (kernel,) = compiled(prefill.prefill_attention, prompt(shapes, head_dim=head_dim), config)
    assert kernel.spills == 0


@pytest.mark.parametrize(
    ("page_size", "cache"),
    [(16, "bfloat16"), (64, "bfloat16"), (256, "bfloat16"), (64, FP8), (16, FP8), (64, "int8")],
)
def test_chunks(page_size, cache):
    arguments = paged(shapes, cache=cache, page_size=page_size)
    itemsize = arguments[1].dtype.itemsize
    config = large(itemsize=itemsize, page_size=page_size)[0]
    assert page_size < 64 or page_size % config.keys == 0
    (kernel,) = compiled(prefill.paged_prefill_attention, arguments, config)
    assert kernel.spills == 0
    assert LARGE_DOT[90] in kernel.ptx
    assert ("cvt.rn.f16x2.e4m3x2" in kernel.ptx) == (cache == FP8)


def test_short_chunks_are_split():
    arguments = paged(shapes, batch=1, tokens=4, pages=512)
    kernel, merge = compiled(prefill.paged_prefill_attention, arguments)
    assert (kernel.spills, merge.spills) == (0, 0)


@pytest.mark.parametrize("cache", ["bfloat16", FP8, "int8"])
def test_decode_candidates(cache):
    arguments = paged(shapes, batch=64, tokens=None, cache=cache)
    itemsize = arguments[1].dtype.itemsize
    found = candidates(4, 512, 4096, 128, itemsize, 90, CORES, 64)
    for config in found[:1] if cache == "int8" else found:
        kernel, *merge = compiled(decode.decode_attention, arguments, config)
        assert [k.spills for k in (kernel, *merge)] == [0] * (1 + len(merge))
        assert PLAIN_DOT in kernel.ptx
        # Matrices come from shared memory as tensor cores want them, also those of 8 bits.
        assert "ldmatrix.sync.aligned.m8n8.x4.trans" in kernel.ptx
        assert "ld.shared.b8" not in kernel.ptx
        # Enough blocks that bytes under way cover the latency of memory.
        blocks = min(65536 // (kernel.registers * config.warps * 32), 232448 // kernel.shared)
        assert blocks * (config.stages - 1) * config.keys * 128 * 2 * itemsize >= 32 * 1024


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_decode_of_other_heads(head_dim):
    for cache in ("bfloat16", FP8):
        arguments = paged(shapes, tokens=None, head_dim=head_dim, cache=cache)
        kernel, merge = compiled(decode.decode_attention, arguments)
        assert (kernel.spills, merge.spills) == (0, 0)


@pytest.mark.parametrize("capability", [c for c in ptx.KINDS if c != 90])
def test_other_gpus(capability):
    for cache in ("bfloat16", FP8):
        arguments = paged(shapes, tokens=None, cache=cache)
        kernel, merge = compiled(decode.decode_attention, arguments, capability=capability)
        assert (kernel.spills, merge.spills) == (0, 0)
        assert PLAIN_DOT in kernel.ptx
        converts = cache == FP8 and capability >= ptx.FP8
        assert ("cvt.rn.f16x2.e4m3x2" in kernel.ptx) == converts
        (kernel,) = compiled(
            prefill.paged_prefill_attention, paged(shapes, cache=cache), capability=capability
        )
        assert LARGE_DOT[capability] in kernel.ptx
    (kernel,) = compiled(prefill.prefill_attention, prompt(shapes), capability=capability)
    assert kernel.spills == 0


@pytest.mark.parametrize("capability", [86, 100])
def test_other_heads_on_other_gpus(capability):
    arguments = paged(shapes, head_dim=256, cache=FP8)
    compiled(prefill.paged_prefill_attention, arguments, capability=capability)


def test_everything_at_once():
    arguments = paged(shapes, cache="int8", page_size=16, slopes=True)
    (kernel,) = compiled(prefill.paged_prefill_attention, arguments, None, EVERYTHING)
    assert kernel.spills == 0
    (kernel,) = compiled(prefill.prefill_attention, prompt(shapes, slopes=True), None, EVERYTHING)
    assert kernel.spills == 0
    arguments = paged(shapes, tokens=None, cache=FP8, page_size=24, slopes=True)
    kernel, merge = compiled(decode.decode_attention, arguments, None, EVERYTHING)
    assert (kernel.spills, merge.spills) == (0, 0)


@pytest.mark.parametrize("cache", ["bfloat16", FP8])
def test_nothing_runs_beside_the_kernels(cache):
    pytest.importorskip("jax_triton")
    call = functools.partial(decode.decode_attention, **STATIC)
    hlo = h200.compile_for_h200(call, *paged(h200.shape, tokens=None, cache=cache)).hlo
    assert hlo.count(" custom-call(") == 2
    assert not any(f" {op}(" in hlo for op in ("fusion", "copy", "transpose"))
    call = functools.partial(prefill.paged_prefill_attention, **STATIC)
    hlo = h200.compile_for_h200(call, *paged(h200.shape, cache=cache)).hlo
    assert hlo.count(" custom-call(") == 1
    assert not any(f" {op}(" in hlo for op in ("fusion", "copy", "transpose"))


def test_configurations_that_do_not_fit_are_no_candidates():
    assert Config(128, 128, 8, 3).shared(256, 2, 90) > SHARED_MEMORY[90]
    assert Config(128, 128, 8, 3) not in large(256)
