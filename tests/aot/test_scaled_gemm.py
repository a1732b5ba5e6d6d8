"""The Mosaic product of int8 and fp8 operands, compiled for an H200: registers, memory, PTX."""

import itertools
from typing import Any

import h200
import jax.numpy as jnp
import pytest
from qjax_kernels.scaled_gemm import mosaic, plan
from qjax_kernels.scaled_gemm.config import Config
from qjax_kernels.scaled_gemm.memory import shared_memory
from qjax_kernels.scaled_gemm.tiling import Tiling
from tuned_tables import tuned

E4M3 = jnp.float8_e4m3fn
NAMES = {E4M3: "e4m3.e4m3", jnp.float8_e5m2: "e5m2.e5m2", jnp.int8: "s8.s8"}


def compile_and_check(
    m: int,
    n: int,
    k: int,
    config: Config,
    dtype: Any = E4M3,
    out: Any = jnp.bfloat16,
    scales: str = "vector",
    bias: Any = None,
    residual: bool = False,
    padded: bool = False,
) -> None:
    """One kernel, alone in its program unless rows are to be padded; no spills; wgmma."""
    x_scale, scale = {
        "vector": ((m, 1), (n, 1)),
        "one": ((), (1, 1)),
        "blocks": ((m, k // 128), (-(-n // 128), k // 128)),
    }[scales]
    shapes = {
        "x": h200.shape((m, k), dtype),
        "x_scale": h200.shape(x_scale, jnp.float32),
        "values": h200.shape((n, k), dtype),
        "scale": h200.shape(scale, jnp.float32),
        "bias": None if bias is None else h200.shape((n,), bias),
        "residual": h200.shape((m, n), out) if residual else None,
    }
    compiled = h200.compile_for_h200(
        lambda x, x_scale, values, scale, bias, residual: mosaic.scaled_gemm(
            x, x_scale, values, scale, out, bias=bias, residual=residual, config=config
        ),
        *shapes.values(),
    )
    [kernel] = compiled.kernels
    assert kernel.spills == 0
    tiling = Tiling(
        m=m,
        n=n,
        k=k,
        config=config,
        dtype=jnp.dtype(dtype),
        out_dtype=jnp.dtype(out),
        token_scales=scales == "vector" and m > 1,
        output_scales=scales == "vector",
        blocked=scales == "blocks",
        bias=None if bias is None else jnp.dtype(bias),
        residual=residual,
    )
    need = shared_memory(tiling)  # with barriers, which the report leaves out
    assert kernel.shared < need < min(kernel.shared + 1024, h200.SHARED_MEMORY + 1)
    sums = "s32" if dtype == jnp.int8 else "f32"
    size = f"m64n{config.columns}k32"
    assert f"wgmma.mma_async.sync.aligned.{size}.{sums}.{NAMES[dtype]}" in kernel.ptx
    assert (".multicast::cluster" in kernel.ptx) == (config.multicast > 1)
    assert ("ld.shared::cluster" in kernel.ptx) == (config.splits > 1)
    assert "multimem" not in kernel.ptx
    # The scales of blocks are transposed, which XLA does as part of what computes them.
    assert ("fusion(" in compiled.hlo) == (padded or scales == "blocks")


def _candidates() -> list[tuple[int, int, int, Config]]:
    """All guesses for the square shape, the first one for a model's layers; each configuration
    once, and none that is in the tuned table."""
    found = [
        (m, 8192, 8192, config)
        for m in (1, 64, 256, 8192)
        for config in plan.candidates(m, 8192, 8192)
    ]
    layers = [(6144, 4096), (4096, 14336), (128256, 4096), (2560, 8192), (8192, 2048)]
    for m, (n, k) in itertools.product((16, 2048), layers):
        found.append((m, n, k, plan.candidates(m, n, k)[0]))
    there = tuned("scaled_gemm", "float8_e4m3fn")
    once = {config: (m, n, k) for m, n, k, config in reversed(found) if config not in there}
    return [(*shape, config) for config, shape in once.items()]


@pytest.mark.parametrize(("m", "n", "k", "config"), _candidates())
def test_candidates(m, n, k, config):
    compile_and_check(m, n, k, config)


WIDE = Config(swap=False, warpgroups=2, columns=256, stages=3, multicast=2, store=32)
SMALL = Config(warpgroups=2, columns=64, stages=6, splits=2)
SCALED = Config(warpgroups=2, columns=128, stages=4)
ROWS = Config(swap=False, warpgroups=2, columns=128, stages=4)
OTHERS = [
    ((2048, 4096, 4096, WIDE), {"dtype": jnp.int8, "bias": jnp.bfloat16, "residual": True}),
    ((2048, 4096, 4096, WIDE), {"dtype": jnp.float8_e5m2, "out": jnp.float32, "scales": "one"}),
    ((64, 8192, 8192, SMALL), {"dtype": jnp.int8, "bias": jnp.float32, "residual": True}),
    ((64, 8192, 8192, SMALL), {"out": jnp.float16, "scales": "one"}),
    ((128, 4096, 7168, SCALED), {"scales": "blocks", "residual": True}),
    ((2048, 4096, 7168, ROWS), {"scales": "blocks"}),
    ((2048, 4096, 4096, Config(**vars(ROWS) | {"promote": 4})), {}),
    ((8, 4096, 4096, Config(stages=16, promote=4)), {}),
    # Sizes that no tile divides.
    ((5, 1000, 2752, Config(stages=4, k_tile=64)), {"out": jnp.float32}),
    ((77, 1000, 2752, Config(stages=4, k_tile=64, columns=32)), {"padded": True}),
    (
        (777, 1000, 2784, Config(**vars(WIDE) | {"k_tile": 32, "multicast": 1})),
        {"residual": True, "padded": True},
    ),
]


@pytest.mark.parametrize(("call", "options"), OTHERS)
def test_other_calls(call, options):
    compile_and_check(*call, **options)
