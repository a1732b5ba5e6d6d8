"""The weight-only kernels compile for an H200: no spills, memory that fits, tensor cores."""

import functools
import itertools

import h200
import jax
import jax.numpy as jnp
import pytest
from qjax_kernels.weight_only_gemm import api, mosaic
from qjax_kernels.weight_only_gemm.config import candidates, fp8_candidates
from tuned_tables import tuned

pytestmark = pytest.mark.heavy

SHAPES = [(8192, 8192), (2560, 8192)]
FORMATS = [("int4", 128, False), ("int4", 128, True), ("int4", 32, False), ("int8", 0, False)]
FORMATS += [("float8_e4m3fn", 0, False)]


def prepared(out, features, format, group_size, zeros, operand="float16"):
    groups = features // group_size if group_size else 1
    of_group = jax.ShapeDtypeStruct((out, groups), jnp.bfloat16 if group_size else jnp.float32)
    zero = jax.ShapeDtypeStruct((out, groups), jnp.int32) if zeros else None
    shapes = jax.eval_shape(
        functools.partial(api.prepare, operand=operand),
        jax.ShapeDtypeStruct((out, features), format),
        of_group,
        zero,
    )
    return jax.tree.map(lambda leaf: h200.shape(leaf.shape, leaf.dtype), shapes)


def check(kernel):
    assert kernel.spills == 0
    assert kernel.shared <= h200.SHARED_MEMORY
    assert "wgmma.mma_async" in kernel.ptx
    assert ".local" not in kernel.ptx


@pytest.mark.parametrize(("format", "group_size", "zeros"), FORMATS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 2048])
def test_the_first_choice(tokens, format, group_size, zeros):
    weight = prepared(8192, 8192, format, group_size, zeros)
    x = h200.shape((tokens, 8192), jnp.bfloat16)

    def product(x, weight):
        return api.prepared_gemm(x, weight, out_dtype=jnp.bfloat16, implementation="mosaic")

    compiled = h200.compile_for_h200(product, x, weight)
    (kernel,) = compiled.kernels
    check(kernel)
    # One kernel and nothing beside it: every launch costs microseconds.
    assert compiled.hlo.count("custom-call(") == 1
    assert "fusion(" not in compiled.hlo


def _candidates():
    """Format, a shape that it is for, and each configuration that is not in the tuned table."""
    found = {}
    for format, group_size in (("int4", 128), ("int8", 0)):
        there = tuned("prepared_gemm", format, group_size or None)
        for (out, features), tokens in itertools.product(SHAPES, (1, 16, 64, 256, 2048)):
            for config in candidates(tokens, prepared(out, features, format, group_size, False)):
                if config not in there:
                    found.setdefault((format, config), (tokens, out, features, group_size))
    return [(*shape, *key) for key, shape in found.items()]


@pytest.mark.parametrize(
    ("tokens", "out", "features", "group_size", "format", "config"), _candidates(), ids=str
)
def test_every_candidate(tokens, out, features, group_size, format, config):
    weight = prepared(out, features, format, group_size, False)
    compiled = h200.compile_for_h200(
        mosaic.prepared_gemm,
        h200.shape((tokens, features), jnp.bfloat16),
        weight,
        out_dtype=jnp.bfloat16,
        config=config,
    )
    (kernel,) = compiled.kernels
    check(kernel)


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 2048])
def test_fp8_activations(tokens):
    weight = prepared(8192, 8192, "int4", 128, False, "float8_e4m3fn")

    def product(x, x_scale, weight):
        return api.w4a8_gemm(x, x_scale, weight, out_dtype=jnp.bfloat16, implementation="mosaic")

    compiled = h200.compile_for_h200(
        product,
        h200.shape((tokens, 8192), jnp.float8_e4m3fn),
        h200.shape((tokens, 1), jnp.float32),
        weight,
    )
    (kernel,) = compiled.kernels
    check(kernel)
    assert "e4m3.e4m3" in kernel.ptx
    assert "fusion(" not in compiled.hlo


@pytest.mark.parametrize(
    "config",
    fp8_candidates(256, prepared(8192, 8192, "int4", 128, False, "float8_e4m3fn")),
    ids=str,
)
def test_every_fp8_candidate(config):
    weight = prepared(8192, 8192, "int4", 128, False, "float8_e4m3fn")
    compiled = h200.compile_for_h200(
        mosaic.fp8_prepared_gemm,
        h200.shape((256, 8192), jnp.float8_e4m3fn),
        h200.shape((256, 1), jnp.float32),
        weight,
        out_dtype=jnp.bfloat16,
        config=config,
    )
    (kernel,) = compiled.kernels
    check(kernel)


@pytest.mark.parametrize("tokens", [1, 64, 256, 2048])
@pytest.mark.parametrize("residual", [False, True])
def test_fp4(tokens, residual):
    """nvfp4 is groups of 16."""
    weight = prepared(8192, 8192, "float4_e2m1fn", 16, False)
    out = h200.shape((tokens, 8192), jnp.bfloat16)

    def product(x, weight, residual=None):
        return api.prepared_gemm(
            x, weight, None, residual, out_dtype=jnp.bfloat16, implementation="mosaic"
        )

    compiled = h200.compile_for_h200(product, out, weight, *[out] * residual)
    (kernel,) = compiled.kernels
    check(kernel)


@pytest.mark.parametrize("tokens", [1, 64, 256, 4096])
def test_a_gated_unit(tokens):
    weight = prepared(2 * 14336, 4096, "int4", 128, False)

    def product(x, weight):
        return api.prepared_gemm(
            x, weight, out_dtype=jnp.bfloat16, activation="silu", implementation="mosaic"
        )

    compiled = h200.compile_for_h200(product, h200.shape((tokens, 4096), jnp.bfloat16), weight)
    (kernel,) = compiled.kernels
    check(kernel)
    assert "fusion(" not in compiled.hlo
