"""The Triton products compile for every GPU, and within what each has."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ptx
import pytest
from qjax_kernels.scaled_gemm import triton as scaled
from qjax_kernels.scaled_gemm import triton_config as scaled_config
from qjax_kernels.triton_gpus import gpu
from qjax_kernels.weight_only_gemm import portable, triton
from qjax_kernels.weight_only_gemm import triton_config as config

N = K = 4096
CORES = {80: 108, 86: 80, 89: 58, 90: 132, 100: 148}
Shape = jax.ShapeDtypeStruct


def packed(format="int4", group_size=128, zeros=False):
    groups = K // group_size if group_size else 1
    return jax.eval_shape(
        portable.prepare_portable,
        Shape((N, K), jnp.dtype(format)),
        Shape((N, groups), jnp.bfloat16),
        Shape((N, groups), jnp.int8) if zeros else None,
    )


def check(kernel, tiles, capability, estimate):
    """It has no more than a block may have, and runs on the tensor cores."""
    assert kernel.spills == 0
    assert kernel.registers * tiles.warps * 32 <= 65536
    assert kernel.shared <= estimate <= gpu(capability).shared
    units = re.findall(r"(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", kernel.ptx)
    assert units
    assert set(units) <= {
        90: {"mma.sync", "wgmma.mma_async"},
        100: {"mma.sync", "tcgen05.mma"},
    }.get(capability, {"mma.sync"})


def tiles_of(candidates, most):
    """Different ones; two parts are as many as more."""
    parts = [dataclasses.replace(c, splits=min(c.splits, 2)) for c in candidates]
    return list(dict.fromkeys(parts))[:most]


def compile_weight_only(tokens, weight, tiles, capability, dtype=jnp.bfloat16):
    (kernel,) = ptx.compile_triton(
        triton.packed_gemm, Shape((tokens, K), dtype), weight, Shape((N,), jnp.float32),
        capability=capability, out_dtype=jnp.dtype(dtype), config=tiles,
    )  # fmt: skip
    check(kernel, tiles, capability, config.shared_memory(tiles, weight, capability))
    return kernel


@pytest.mark.parametrize("capability", ptx.KINDS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 2048])
def test_int4(tokens, capability):
    weight = packed()
    found = config.candidates(tokens, weight, capability=capability, cores=CORES[capability])
    # What is to be tried where it can be timed, and what is taken elsewhere.
    for tiles in tiles_of(found, 3 if capability == 90 else 1):
        kernel = compile_weight_only(tokens, weight, tiles, capability)
        if tiles.tokens == 8:
            # Weights come out of shared memory as the product wants them, at least 8 bytes at a
            # time, and each is converted by one thread, in pairs.
            assert re.search(r"ld\.shared\.v[24]", kernel.ptx)
            pairs = tiles.outs * tiles.chunks * 64 // (tiles.warps * 32 * 2)
            assert len(re.findall(r"fma\.rn\.bf16x2", kernel.ptx)) == pairs


@pytest.mark.parametrize("capability", ptx.KINDS)
@pytest.mark.parametrize(
    ("format", "group_size", "zeros", "dtype"),
    [
        ("int4", 128, True, jnp.bfloat16),
        ("int4", 32, False, jnp.float16),
        ("int8", 0, False, jnp.bfloat16),
        ("int8", 128, True, jnp.float16),
        ("float8_e4m3fn", 0, False, jnp.bfloat16),
        ("float8_e5m2", 64, False, jnp.float16),
    ],
)
def test_other_formats(format, group_size, zeros, dtype, capability):
    weight = packed(format, group_size, zeros)
    for tokens in (1, 2048) if group_size != 64 else (1,):
        tiles = config.candidates(tokens, weight, capability=capability, cores=CORES[capability])[0]
        kernel = compile_weight_only(tokens, weight, tiles, capability, dtype)
        assert "cp.async" in kernel.ptx


@pytest.mark.parametrize("capability", ptx.KINDS)
@pytest.mark.parametrize("tokens", [1, 64, 2048])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "blocks"])
def test_scaled(dtype, tokens, capability):
    blocked = dtype == "blocks"
    dtype = jnp.dtype("float8_e4m3fn" if blocked else dtype)
    if dtype != jnp.int8 and capability < ptx.FP8:
        pytest.skip("no fp8")
    found = scaled_config.candidates(
        tokens, N, K, dtype=dtype, blocked=blocked, capability=capability, cores=CORES[capability]
    )
    x_scale, scale = (
        ((tokens, K // 128), (N // 128, K // 128)) if blocked else ((tokens, 1), (N, 1))
    )

    def product(x, x_scale, values, scale, bias, residual, tiles):
        return scaled.scaled_gemm(
            x, x_scale, values, scale, jnp.dtype(jnp.bfloat16), bias, residual, config=tiles
        )

    for tiles in tiles_of(found, 2 if tokens == 2048 else 1):
        (kernel,) = ptx.compile_triton(
            product,
            Shape((tokens, K), dtype),
            Shape(x_scale, jnp.float32),
            Shape((N, K), dtype),
            Shape(scale, jnp.float32),
            Shape((N,), jnp.bfloat16),
            Shape((tokens, N), jnp.bfloat16),
            capability=capability,
            tiles=tiles,
        )
        check(kernel, tiles, capability, scaled_config.shared_memory(tiles))
