"""The kernels compile for every GPU, and for an H200 in every configuration."""

import jax
import jax.numpy as jnp
import ptx
import pytest
from qjax_kernels.sampling import triton
from qjax_kernels.sampling.config import Config, argmax_candidates, candidates


def compile_sample(vocab, dtype, config, capability=90):
    rows = 4
    shape = jax.ShapeDtypeStruct
    floats = shape((rows,), jnp.float32)
    return ptx.compile_triton(
        triton.sample,
        shape((rows, vocab), jnp.dtype(dtype)),
        floats,
        floats,
        shape((rows,), jnp.int32),
        floats,
        capability=capability,
        config=config,
    )


@pytest.mark.parametrize(
    ("dtype", "config"),
    [*(("float32", c) for c in candidates(4, 128256)), ("bfloat16", candidates(4, 128256)[0])],
)
def test_candidates(dtype, config):
    tiles, draw = compile_sample(128256, dtype, config)
    assert (tiles.name, draw.name) == ("tiles", "draw")
    assert tiles.spills == draw.spills == 0
    assert draw.registers * config.warps * 32 <= 65536
    # A warp sorts its tile with shuffles; through shared memory go only the results.
    assert tiles.ptx.count("bar.sync") <= 4
    assert tiles.ptx.count("shfl.sync") > 20
    assert "ld.global.v4.b32" in tiles.ptx


@pytest.mark.parametrize("vocab", [1000, 50257])
def test_other_vocabularies(vocab):
    tiles, draw = compile_sample(vocab, "float32", candidates(4, vocab)[0])
    assert tiles.spills == draw.spills == 0


@pytest.mark.parametrize("capability", [c for c in ptx.KINDS if c != 90])
def test_other_gpus(capability):
    kernels = compile_sample(32000, "bfloat16", Config(), capability)
    kernels += ptx.compile_triton(
        triton.argmax, jax.ShapeDtypeStruct((4, 32000), jnp.bfloat16), capability=capability
    )
    assert [k.name for k in kernels] == ["tiles", "draw", "argmax_part", "argmax_whole"]
    assert all(kernel.spills == 0 for kernel in kernels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 64])
def test_argmax(rows, dtype):
    logits = jax.ShapeDtypeStruct((rows, 128256), jnp.dtype(dtype))
    for config in argmax_candidates(rows, 128256, 132):
        kernels = ptx.compile_triton(triton.argmax, logits, config=config)
        assert len(kernels) == (1 if config.parts == 1 else 2)
        assert all(kernel.spills == 0 for kernel in kernels)
        assert "ld.global.v4.b32" in kernels[0].ptx
