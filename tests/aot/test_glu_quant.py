"""The kernel compiles for every GPU, and for an H200 in every configuration."""

import re

import h200
import jax
import jax.numpy as jnp
import ptx
import pytest
from qjax_kernels.glu_quant import triton
from qjax_kernels.glu_quant.api import glu_quant
from qjax_kernels.glu_quant.config import Config, candidates


def compile_glu(rows, features, config, *, capability=90, activation="silu", out="float8_e4m3fn",
                sums=False, static=False, gated=True, more=0):  # fmt: skip
    (kernel,) = ptx.compile_triton(
        triton.glu_quant,
        jax.ShapeDtypeStruct((rows, more + (2 if gated else 1) * features), jnp.bfloat16),
        jax.ShapeDtypeStruct((), jnp.float32) if static else None,
        capability=capability,
        activation=activation,
        out_dtype=jnp.dtype(out),
        group_sums=sums,
        gated=gated,
        features=features,
        config=config,
    )
    return kernel


@pytest.mark.parametrize("features", [4096, 8192, 11008, 14336, 28672])
@pytest.mark.parametrize("rows", [1, 8192])
def test_candidates(rows, features):
    for config in candidates(rows, features):
        kernel = compile_glu(rows, features, config)
        assert kernel.spills == 0
        assert kernel.shared <= 48 * 1024
        assert kernel.registers * config.warps * 32 <= 65536
        # Two instructions of the special function unit an element, and 16 bytes a load.
        assert kernel.ptx.count("ex2.approx.ftz.f32") == 8 * config.vectors(features)
        assert kernel.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == 4 * config.vectors(features)
        assert re.search(r"ld\.global\S*\.v4\.b32", kernel.ptx)


@pytest.mark.parametrize("capability", ptx.KINDS)
def test_other_gpus(capability):
    for out in ("int8", "bfloat16", "float8_e4m3fn"):
        if out == "float8_e4m3fn" and capability < ptx.FP8:
            with pytest.raises(NotImplementedError, match="fp8"):
                compile_glu(64, 4096, Config(8), capability=capability, out=out)
            continue
        kernel = compile_glu(64, 4096, Config(8), capability=capability, out=out, sums=True)
        assert kernel.spills == 0


def test_variants():
    for kwargs in (
        {"static": True},
        {"static": True, "out": "int8", "sums": True},
        {"out": "bfloat16"},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
    ):
        assert compile_glu(64, 4096, Config(16), **kwargs).spills == 0


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "quick_gelu"])
def test_without_a_gate(activation):
    """GPT-J's, behind the queries, keys and values of one product."""
    for static in (False, True):
        config = candidates(1, 16384)[0]
        kernel = compile_glu(1, 16384, config, activation=activation, gated=False, more=12288,
                             static=static)  # fmt: skip
        assert kernel.spills == 0
        assert re.search(r"ld\.global\S*\.v4\.b32", kernel.ptx)


def test_rows_that_start_anywhere_are_not_loaded_as_vectors():
    kernel = compile_glu(64, 1001, Config(4))
    assert ".v2" not in kernel.ptx
    assert ".v4" not in kernel.ptx


def test_nothing_runs_beside_the_kernel():
    pytest.importorskip("jax_triton")
    x = h200.shape((2, 32, 28672), jnp.bfloat16)
    hlo = h200.compile_for_h200(lambda x: glu_quant(x, out_dtype=jnp.int8), x).hlo
    assert hlo.count(" custom-call(") == 1
    assert not any(f" {op}(" in hlo for op in ("fusion", "copy", "transpose"))
