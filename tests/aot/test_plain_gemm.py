"""The Mosaic product of bfloat16, compiled for an H200: registers, memory, PTX."""

from typing import Any

import h200
import jax.numpy as jnp
import pytest
from qjax_kernels.plain_gemm import mosaic
from qjax_kernels.scaled_gemm import plan
from qjax_kernels.scaled_gemm.config import Config
from qjax_kernels.scaled_gemm.memory import shared_memory
from qjax_kernels.scaled_gemm.tiling import Tiling

BF16 = jnp.bfloat16
REGISTERS = 65536  # of a multiprocessor


def compile_and_check(
    m: int, n: int, k: int, config: Config, dtype: Any = BF16, out: Any = BF16, **given: Any
) -> None:
    """One kernel, alone in its program; no spills; as many blocks fit as are to be side by side."""
    shapes = {"x": h200.shape((m, k), dtype), "weight": h200.shape((n, k), dtype)}
    compiled = h200.compile_for_h200(
        lambda arrays: mosaic.plain_gemm(**arrays, out_dtype=jnp.dtype(out), config=config),
        shapes | given,
    )
    [kernel] = compiled.kernels
    assert kernel.name.startswith("plain_gemm")
    assert kernel.spills == 0
    threads = 128 * (config.warpgroups + 1)
    assert kernel.registers * threads * config.resident <= REGISTERS
    tiling = Tiling(
        m=m,
        n=n,
        k=k,
        config=config,
        dtype=jnp.dtype(dtype),
        out_dtype=jnp.dtype(out),
        token_scales=False,
        output_scales=False,
        bias=given["bias"].dtype if "bias" in given else None,
        residual="residual" in given,
    )
    need = shared_memory(tiling)  # with barriers, which the report leaves out
    assert kernel.shared < need < min(kernel.shared + 1024, config.memory + 1)
    name = f"m64n{config.columns}k16.f32.{'bf16.bf16' if dtype == BF16 else 'f16.f16'}"
    assert f"wgmma.mma_async.sync.aligned.{name}" in kernel.ptx
    assert (".multicast::cluster" in kernel.ptx) == (config.multicast > 1)
    assert ("ld.shared::cluster" in kernel.ptx) == (config.splits > 1)
    assert "multimem" not in kernel.ptx
    assert "fusion(" not in compiled.hlo


def _candidates() -> list[tuple[int, int, int, Config]]:
    """All guesses for two layers of Llama 3 8B, the first one for the others; each configuration
    once."""
    found = [
        (m, n, 4096, config)
        for m in (1, 64)
        for n in (4096, 6144)
        for config in plan.candidates(m, n, 4096, dtype=BF16)
    ]
    layers = [(4096, 14336), (28672, 4096), (128256, 4096), (1280, 8192)]
    for m in (8, 16):
        found += [(m, *layer, plan.candidates(m, *layer, dtype=BF16)[0]) for layer in layers]
    once = {config: (m, n, k) for m, n, k, config in reversed(found)}
    return [(*shape, config) for config, shape in once.items()]


@pytest.mark.parametrize(("m", "n", "k", "config"), _candidates())
def test_candidates(m, n, k, config):
    compile_and_check(m, n, k, config)


def test_other_calls():
    config = Config(stages=3, k_tile=64)
    compile_and_check(5, 1000, 2752, config, out=jnp.float32)
    compile_and_check(1, 1000, 2752, config, jnp.float16, bias=h200.shape((1000,), jnp.float32))
    config = Config(stages=5, k_tile=128, columns=16, resident=2)
    residual = h200.shape((16, 4096), BF16)
    compile_and_check(16, 4096, 4096, config, residual=residual)
