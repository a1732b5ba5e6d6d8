"""The kernel compiles for every GPU, and for an H200 in every configuration."""

import re

import h200
import jax
import jax.numpy as jnp
import ptx
import pytest
from qjax_kernels.quantize_rows import triton
from qjax_kernels.quantize_rows.api import quantize_rows
from qjax_kernels.quantize_rows.config import Config, candidates


def compile_rows(rows, features, config, *, capability=90, out="float8_e4m3fn", static=False):
    (kernel,) = ptx.compile_triton(
        triton.quantize_rows,
        jax.ShapeDtypeStruct((rows, features), jnp.bfloat16),
        jax.ShapeDtypeStruct((), jnp.float32) if static else None,
        capability=capability,
        out_dtype=jnp.dtype(out),
        config=config,
    )
    return kernel


@pytest.mark.parametrize("features", [128, 4096, 8192, 28672])
@pytest.mark.parametrize("rows", [1, 8192])
def test_candidates(rows, features):
    for config in candidates(rows, features):
        kernel = compile_rows(rows, features, config)
        assert kernel.spills == 0
        assert kernel.shared <= 48 * 1024
        assert kernel.registers * config.warps * 32 <= 65536
        # 16 bytes a load.
        assert kernel.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == 4 * config.vectors(features)
        assert re.search(r"ld\.global\S*\.v4\.b32", kernel.ptx)


@pytest.mark.parametrize("capability", ptx.KINDS)
def test_other_gpus(capability):
    for out in ("int8", "float8_e4m3fn"):
        if out == "float8_e4m3fn" and capability < ptx.FP8:
            with pytest.raises(NotImplementedError, match="fp8"):
                compile_rows(64, 4096, Config(8), capability=capability, out=out)
            continue
        for static in (False, True):
            kernel = compile_rows(
                64, 4096, Config(8), capability=capability, out=out, static=static
            )
            assert kernel.spills == 0


def test_nothing_runs_beside_the_kernel():
    pytest.importorskip("jax_triton")
    x = h200.shape((2, 32, 4096), jnp.bfloat16)
    compiled = h200.compile_for_h200(lambda x: quantize_rows(x, out_dtype=jnp.int8), x)
    assert compiled.hlo.count(" custom-call(") == 1
    assert not any(f" {op}(" in compiled.hlo for op in ("fusion", "copy", "transpose"))
