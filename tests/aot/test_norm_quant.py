"""The kernel compiles for every GPU, and for an H200 in every configuration."""

import re

import h200
import jax
import jax.numpy as jnp
import ptx
import pytest
from qjax_kernels.norm_quant import triton
from qjax_kernels.norm_quant.api import norm_quant
from qjax_kernels.norm_quant.config import Config, candidates


def compile_norm(rows, features, config, *, capability=90, kind="rms", out="float8_e4m3fn",
                 residual=True, sums=False, static=False):  # fmt: skip
    x = jax.ShapeDtypeStruct((rows, features), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((features,), jnp.bfloat16)
    (kernel,) = ptx.compile_triton(
        triton.norm_quant,
        x,
        vector,
        vector if kind == "layer" else None,
        x if residual else None,
        jax.ShapeDtypeStruct((), jnp.float32) if static else None,
        capability=capability,
        kind=kind,
        eps=1e-5,
        weight_offset=0.0,
        out_dtype=jnp.dtype(out),
        group_sums=sums,
        config=config,
    )
    return kernel


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("features", [128, 4096, 5120, 8192, 14336])
@pytest.mark.parametrize("rows", [1, 8192])
def test_candidates(rows, features, kind):
    for config in candidates(rows, features):
        kernel = compile_norm(rows, features, config, kind=kind)
        assert kernel.spills == 0
        assert kernel.shared <= 48 * 1024
        assert kernel.registers * config.warps * 32 <= 65536
        # 16 bytes at once from each input, 8 of fp8 results to each 16 read.
        assert kernel.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == 4 * config.vectors(features)
        assert re.search(r"ld\.global\S*\.v4\.b32", kernel.ptx)


def test_many_rows_fill_the_multiprocessor():
    """At least 64 KB in flight: bytes a block loads, times the blocks that registers allow."""
    for features in (4096, 8192):
        config = candidates(8192, features)[0]
        kernel = compile_norm(8192, features, config)
        blocks = min(65536 // (kernel.registers * config.warps * 32), 64 // config.warps)
        assert blocks * features * 2 * 2 >= 64 * 1024


@pytest.mark.parametrize("capability", ptx.KINDS)
def test_other_gpus(capability):
    for out in ("int8", "bfloat16", "float8_e4m3fn"):
        if out == "float8_e4m3fn" and capability < ptx.FP8:
            with pytest.raises(NotImplementedError, match="fp8"):
                compile_norm(64, 4096, Config(8), capability=capability, out=out)
            continue
        for kind in ("rms", "layer"):
            kernel = compile_norm(
                64, 4096, Config(8), capability=capability, out=out, kind=kind, sums=True
            )
            assert kernel.spills == 0


def test_variants():
    for kwargs in (
        {"static": True},
        {"static": True, "out": "int8"},
        {"sums": True},
        {"out": "bfloat16", "residual": False},
    ):
        assert compile_norm(64, 4096, Config(16), **kwargs).spills == 0


def test_rows_that_start_anywhere_are_not_loaded_as_vectors():
    kernel = compile_norm(64, 1001, Config(4))
    assert ".v2" not in kernel.ptx
    assert ".v4" not in kernel.ptx


def test_nothing_runs_beside_the_kernel():
    pytest.importorskip("jax_triton")
    x, weight = (h200.shape(shape, jnp.bfloat16) for shape in ((2, 32, 4096), (4096,)))

    def step(x, weight, residual):
        out = jnp.float8_e4m3fn
        return norm_quant(x, weight, residual=residual, eps=1e-5, out_dtype=out, group_sums=True)

    hlo = h200.compile_for_h200(step, x, weight, x).hlo
    assert hlo.count(" custom-call(") == 1
    assert not any(f" {op}(" in hlo for op in ("fusion", "copy", "transpose"))
