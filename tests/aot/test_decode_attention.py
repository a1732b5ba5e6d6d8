"""The decode attention kernels compile for an H200: no spills, memory that fits, tensor cores."""

import math

import h200
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels.decode_attention import api, mosaic
from qjax_kernels.decode_attention.config import Config, candidates
from tuned_tables import tuned

pytestmark = pytest.mark.heavy

CORES, REGISTERS = 132, 65536
FP8 = "float8_e4m3fn"


def arguments(batch, heads, kv_heads, head_dim, pages, cache, page_size=64):
    """q, k_pages, v_pages, block_table, lengths, k_scale, v_scale; scales for 8 bits only."""
    shape = (batch * pages, kv_heads, page_size, head_dim)
    scales = [None, None]
    if np.dtype(cache).itemsize == 1:
        scales = [h200.shape((kv_heads,), jnp.float32)] * 2
    return (
        h200.shape((batch, heads, head_dim), jnp.bfloat16),
        h200.shape(shape, cache),
        h200.shape(shape, cache),
        h200.shape((batch, pages), jnp.int32),
        h200.shape((batch,), jnp.int32),
        *scales,
    )


def check(compiled, config, heads, kv_heads, head_dim, cache):
    main, *merge = compiled.kernels
    assert len(merge) == bool(config.persistent)
    assert [kernel.spills for kernel in compiled.kernels] == [0] * len(compiled.kernels)
    assert ".local" not in main.ptx
    columns = math.ceil(heads / kv_heads / 8) * 8
    assert main.shared <= config.shared(head_dim, columns, np.dtype(cache)) <= h200.SHARED_MEMORY
    # All blocks of the persistent kernel are there at once.
    threads = 128 * config.warpgroups * config.persistent
    assert math.ceil(main.registers / 8) * 8 * threads <= REGISTERS
    dtype = "bf16" if cache == "bfloat16" else "f16"
    assert f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}" in main.ptx
    assert "cp.async.bulk.tensor" in main.ptx
    # The blocks of a cluster send each other what they found.
    assert ("st.async" in main.ptx) == (config.cluster > 1 and config.push)
    assert ("ldmatrix.sync.aligned.m8n8.x4.trans" in main.ptx) == (dtype == "f16")
    # Nothing beside the kernels: every launch costs microseconds.
    assert compiled.hlo.count("custom-call(") == len(compiled.kernels)
    assert "fusion(" not in compiled.hlo


# Batch, query heads, KV heads, head_dim, pages of 64 tokens, cache; which candidates, without those
# that the tuned table has for such a group.
SHAPES = [
    ((64, 64, 8, 128, 64, "bfloat16"), slice(None)),
    ((64, 64, 8, 128, 64, FP8), slice(None)),
    ((64, 32, 8, 128, 64, "int8"), slice(2)),
    ((1, 32, 8, 128, 512, "bfloat16"), slice(3)),
    ((1, 32, 8, 128, 18, "bfloat16"), slice(1)),
    ((1, 32, 8, 128, 18, FP8), slice(3)),
    ((1, 32, 8, 128, 512, FP8), slice(1)),
    ((8, 32, 8, 128, 34, FP8), slice(1)),
    ((16, 32, 8, 128, 34, "bfloat16"), slice(2)),
    ((16, 32, 8, 128, 34, FP8), slice(1)),
    ((1, 128, 8, 128, 64, FP8), slice(1)),
    ((1, 128, 8, 256, 64, "bfloat16"), slice(1)),
    ((64, 128, 8, 128, 64, FP8), slice(1)),
    ((32, 16, 8, 256, 64, FP8), slice(1)),
    ((32, 32, 32, 80, 32, "bfloat16"), slice(1)),
    ((32, 32, 32, 96, 32, FP8), slice(1)),
    ((32, 32, 8, 64, 64, "bfloat16"), slice(1)),
    ((8, 71, 1, 64, 64, "bfloat16"), slice(1)),
]
CASES = [
    (shape, config)
    for (batch, heads, kv_heads, head_dim, pages, cache), chosen in SHAPES
    for shape in [(batch, heads, kv_heads, head_dim, pages, cache)]
    for config in candidates(
        batch, kv_heads, heads // kv_heads, head_dim, 64, pages, np.dtype(cache), CORES
    )[chosen]
    if config not in tuned("decode_attention", f"{cache}x{head_dim}", heads // kv_heads)
]


@pytest.mark.parametrize(("shape", "config"), CASES, ids=str)
def test_candidates(shape, config):
    _, heads, kv_heads, head_dim, _, cache = shape

    def attend(*arrays):
        static = {"scale": 0.1, "window": None, "soft_cap": None}
        return mosaic.decode_attention(*arrays, None, config=config, **static)

    compiled = h200.compile_for_h200(attend, *arguments(*shape))
    check(compiled, config, heads, kv_heads, head_dim, cache)


@pytest.mark.parametrize("cache", ["bfloat16", FP8])
def test_everything_at_once_on_a_contiguous_cache(cache):
    q, k, v, _, lengths, *_ = arguments(4, 8, 8, 128, 1, cache, page_size=1000)
    config = candidates(4, 8, 1, 128, 1000, 1, np.dtype(cache), CORES)[0]

    def attend(q, k, v, lengths, slopes, scale):
        return api.decode_attention(
            q,
            k,
            v,
            None,
            lengths,
            k_scale=scale,
            v_scale=scale,
            alibi_slopes=slopes,
            window=100,
            soft_cap=30.0,
            implementation="mosaic",
        )

    compiled = h200.compile_for_h200(
        attend, q, k, v, lengths, h200.shape((8,), jnp.float32), h200.shape((), jnp.float32)
    )
    check(compiled, config, 8, 8, 128, cache)


def test_small_pages():
    config = Config(stages=4)

    def attend(*arrays):
        static = {"scale": 0.1, "window": 512, "soft_cap": None}
        return mosaic.decode_attention(*arrays, None, config=config, **static)

    shape = (64, 32, 8, 64)
    compiled = h200.compile_for_h200(attend, *arguments(*shape, 64, "bfloat16", page_size=16))
    check(compiled, config, 32, 8, 64, "bfloat16")


@pytest.mark.parametrize("out_dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
    "config",
    [
        Config(cluster=8, warpgroups=3, stages=1),
        Config(cluster=8, warpgroups=2, stages=2, push=False),
        Config(stages=2),
        Config(persistent=2, stages=2),
    ],
    ids=str,
)
def test_a_quantized_result(config, out_dtype):
    cache = FP8 if out_dtype == jnp.int8 else "bfloat16"

    def attend(q, k, v, table, lengths, k_scale, v_scale, out_scale):
        return mosaic.decode_attention(
            *(q, k, v, table, lengths, k_scale, v_scale, None),
            scale=0.1,
            window=None,
            soft_cap=None,
            out_scale=out_scale,
            out_dtype=jnp.dtype(out_dtype),
            config=config,
        )

    compiled = h200.compile_for_h200(
        attend,
        *arguments(1, 32, 8, 128, 18, cache),
        h200.shape((1,), jnp.float32),
    )
    check(compiled, config, 32, 8, 128, cache)
    last = compiled.kernels[-1].ptx
    assert ("cvt.rni.s32.f32" if out_dtype == jnp.int8 else "cvt.rn.satfinite.e4m3x2") in last
    assert "div.rn.f32" in last
