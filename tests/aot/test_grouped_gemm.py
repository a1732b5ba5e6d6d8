"""The kernels compile for every GPU, and for an H200 in every configuration."""

import re

import h200
import jax
import jax.numpy as jnp
import ptx
import pytest
from qjax_kernels.grouped_gemm import triton
from qjax_kernels.grouped_gemm.api import grouped_gemm, prepared_grouped_gemm
from qjax_kernels.grouped_gemm.config import Config, Problem, candidates
from qjax_kernels.grouped_gemm.layout import Prepared

MIXTRAL = (8, 14336, 4096)
QWEN3 = (128, 768, 2048)
FORMATS = {  # x, weights, bits of both
    "bfloat16": ("bfloat16", "bfloat16", 16, 16),
    "fp8": ("float8_e4m3fn", "float8_e4m3fn", 8, 8),
    "int8": ("int8", "int8", 8, 8),
    "w8a16": ("bfloat16", "int8", 16, 8),
    "w4a16": ("bfloat16", "int4", 16, 4),
}


def arguments(fmt, rows, shape, *, group=128, zero=False, ids=True, make=jax.ShapeDtypeStruct):
    """Of `grouped_gemm` or `prepared_grouped_gemm` in triton.py."""
    experts, out, features = shape
    x_type, w_type, *_ = FORMATS[fmt]
    x = make((rows, features), jnp.dtype(x_type))
    sizes = make((experts,), jnp.dtype("int32"))
    ends = (
        make((rows,), jnp.dtype("int32")) if ids else None,
        make((rows,), jnp.dtype("float32")) if ids else None,
    )
    if w_type == "int4":
        weight = Prepared(
            words=make((experts, -(-features // 128), out, 16), jnp.dtype("int32")),
            scale=make((experts, features // group, out), jnp.dtype("int32")),
            in_features=features,
            has_zero_point=zero,
        )
        return x, weight, sizes, *ends
    values = make(shape, jnp.dtype(w_type))
    scale = make((experts, out, 1), jnp.dtype("float32")) if w_type != "bfloat16" else None
    x_scale = make((rows, 1), jnp.dtype("float32")) if x_type not in ("bfloat16",) else None
    return x, values, sizes, scale, None, x_scale, *ends


def compile_one(fmt, rows, shape, config, *, capability=90, **kwargs):
    function = triton.prepared_grouped_gemm if fmt == "w4a16" else triton.grouped_gemm
    (kernel,) = ptx.compile_triton(
        function,
        *arguments(fmt, rows, shape, **kwargs),
        capability=capability,
        out_dtype=jnp.dtype("bfloat16"),
        config=config,
    )
    return kernel


def problem(fmt, rows, shape, capability=90):
    experts, out, features = shape
    x_bits, bits = FORMATS[fmt][2:]
    return Problem(
        rows=rows, experts=experts, out=out, features=features, x_bits=x_bits, bits=bits,
        group=128, capability=capability, integer=fmt == "int8",
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "shape"), [(2, MIXTRAL), (256, MIXTRAL), (16384, MIXTRAL)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_candidates(fmt, rows, shape):
    for config in candidates(problem(fmt, rows, shape)):
        kernel = compile_one(fmt, rows, shape, config)
        assert kernel.spills == 0, config
        assert kernel.shared <= h200.SHARED_MEMORY, config
        assert kernel.registers * config.warps * 32 <= 65536, config
        converted = fmt in ("w8a16", "w4a16")
        left, right = config.rows, config.columns
        if config.swap or converted:
            left, right = right, left
        wide = left >= 64 and right >= 16 and config.warps >= 4
        assert ("wgmma.mma_async" in kernel.ptx) == wide, config
        if fmt == "int8":
            assert "s32.s8.s8" in kernel.ptx
        if fmt == "fp8" and wide:
            assert "f32.e4m3.e4m3" in kernel.ptx
        # Weights come in 16 bytes at a time and are in flight while others are multiplied.
        assert re.search(r"cp\.async\.cg\S* .*0x10", kernel.ptx), config


def test_int4_weights_go_from_shared_memory_to_their_registers():
    for kwargs in ({}, {"zero": True}, {"group": 32}, {"group": 4096}, {"zero": True, "group": 64}):
        for config in (
            Config(rows=16, columns=64, k_bytes=128),
            Config(rows=128, columns=128, k_bytes=64, warps=8, scale_sums=False),
        ):
            kernel = compile_one("w4a16", 4096, MIXTRAL, config, **kwargs)
            assert kernel.spills == 0
            # Two weights an instruction, four words of two rows a load, and no byte moves.
            weights = config.columns * 2 * config.k_bytes // (32 * config.warps)
            assert kernel.ptx.count("lop3.b32") == weights / 2
            assert kernel.ptx.count("ldmatrix.sync.aligned.m8n8.x4") == weights / 32
            assert kernel.ptx.count("wgmma.mma_async") == 2 * config.k_bytes / 16
            assert kernel.ptx.count("prmt.b32") == 0


@pytest.mark.parametrize("capability", ptx.KINDS)
def test_other_gpus(capability):
    for fmt in FORMATS:
        config = candidates(problem(fmt, 4096, QWEN3, capability))[0]
        if fmt == "fp8" and capability < ptx.FP8:
            with pytest.raises(NotImplementedError, match="fp8"):
                compile_one(fmt, 4096, QWEN3, config, capability=capability)
            continue
        assert compile_one(fmt, 4096, QWEN3, config, capability=capability).spills == 0, fmt


def test_nothing_runs_beside_the_kernel():
    pytest.importorskip("jax_triton")

    def only(function, *arrays, **kwargs):
        hlo = h200.compile_for_h200(
            lambda *a: function(*a, out_dtype=jnp.bfloat16, **kwargs), *arrays
        ).hlo
        assert hlo.count(" custom-call(") == 1
        assert not any(f" {op}(" in hlo for op in ("fusion", "copy", "transpose", "while"))

    x, values, sizes, *_ = arguments("bfloat16", 16, QWEN3, make=h200.shape)
    only(grouped_gemm, x, values, sizes)
    x, weight, sizes, *_ = arguments("w4a16", 16, QWEN3, make=h200.shape)
    only(prepared_grouped_gemm, x, weight, sizes)
