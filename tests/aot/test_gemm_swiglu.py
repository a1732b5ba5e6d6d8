"""The Mosaic gated linear unit, compiled for an H200: registers, memory, PTX."""

from typing import Any

import h200
import jax.numpy as jnp
import pytest
from qjax_kernels.gemm_swiglu import mosaic
from qjax_kernels.scaled_gemm import plan
from qjax_kernels.scaled_gemm.config import Config
from qjax_kernels.scaled_gemm.memory import shared_memory
from qjax_kernels.scaled_gemm.tiling import Tiling

E4M3, INT8, BF16 = jnp.float8_e4m3fn, jnp.int8, jnp.bfloat16
NAMES = {
    E4M3: "k32.f32.e4m3.e4m3",
    jnp.float8_e5m2: "k32.f32.e5m2.e5m2",
    INT8: "k32.s32.s8.s8",
    BF16: "k16.f32.bf16.bf16",
    jnp.float16: "k16.f32.f16.f16",
}
N, K = 2 * 14336, 4096


def compile_and_check(
    m: int,
    n: int,
    k: int,
    config: Config,
    dtype: Any = E4M3,
    out: Any = BF16,
    activation: str = "silu",
) -> None:
    """One kernel, alone in its program unless rows are to be padded; no spills; wgmma."""
    scaled = dtype in (E4M3, jnp.float8_e5m2, INT8)
    narrow = out in (E4M3, INT8)
    shapes = (
        h200.shape((m, k), dtype),
        h200.shape((m, 1), jnp.float32) if scaled else None,
        h200.shape((n, k), dtype),
        h200.shape((n, 1), jnp.float32) if scaled else None,
        h200.shape((), jnp.float32) if narrow else None,
    )
    compiled = h200.compile_for_h200(
        lambda *arrays: mosaic.gemm_swiglu(
            *arrays, out_dtype=jnp.dtype(out), activation=activation, config=config
        ),
        *shapes,
    )
    [kernel] = compiled.kernels
    tiling = Tiling(
        m=m,
        n=n,
        k=k,
        config=config,
        dtype=jnp.dtype(dtype),
        out_dtype=jnp.dtype(out),
        token_scales=scaled and m > 1,
        output_scales=scaled,
        activation=activation,
        requantized=narrow,
    )
    check_kernel(kernel, compiled.hlo, tiling, padded=m > 8 and m % 8 != 0)
    if activation != "gelu":  # two exponentials and one division for two of a thread's outputs
        outputs = config.owned // 4
        assert kernel.ptx.count("ex2.approx") == outputs
        assert kernel.ptx.count("rcp.approx") == outputs // 2 + narrow
    if tiling.swizzled and jnp.dtype(out).itemsize == 2:
        assert "stmatrix" in kernel.ptx


def check_kernel(kernel: h200.Kernel, hlo: str, tiling: Tiling, padded: bool) -> None:
    """What every kernel of this kind has."""
    config = tiling.config
    assert kernel.spills == 0
    need = shared_memory(tiling)  # with barriers, which the report leaves out
    assert kernel.shared < need < min(kernel.shared + 1024, h200.SHARED_MEMORY + 1)
    size = f"m64n{config.columns}"
    assert f"wgmma.mma_async.sync.aligned.{size}{NAMES[tiling.dtype.type]}" in kernel.ptx
    assert (".multicast::cluster" in kernel.ptx) == (config.multicast > 1)
    assert "multimem" not in kernel.ptx
    assert ("fusion(" in hlo or "pad(" in hlo) == padded


def _candidates() -> list[tuple[int, Config, Any]]:
    """All guesses for fp8 and the first ones of the others, at the size of Llama 3 8B."""
    return [
        (m, config, dtype)
        for dtype, count in ((E4M3, 6), (BF16, 1), (INT8, 1))
        for m in (1, 256, 4096)
        for config in plan.candidates(m, N, K, dtype=dtype, activation="silu")[:count]
    ]


@pytest.mark.parametrize(("m", "config", "dtype"), _candidates())
def test_candidates(m, config, dtype):
    compile_and_check(m, N, K, config, dtype)


WIDE = Config(swap=False, warpgroups=2, columns=256, stages=3, multicast=2)
FEW = Config(columns=16, stages=8)
OTHERS = [
    ((16, N, K, FEW), {"out": E4M3}),
    ((16, N, K, FEW), {"out": INT8, "dtype": INT8}),
    ((16, N, K, FEW), {"out": jnp.float32, "activation": "gelu_tanh"}),
    ((16, N, K, FEW), {"out": jnp.float16, "dtype": jnp.float16} | {"activation": "gelu"}),
    ((2048, N, K, WIDE), {"out": E4M3}),
    ((2048, N, K, WIDE), {"out": INT8, "dtype": INT8, "activation": "gelu_tanh"}),
    ((2048, N, K, WIDE), {"activation": "gelu", "dtype": jnp.float8_e5m2}),
    ((64, 4096, K, Config(columns=64, warpgroups=2, stages=4, splits=2)), {}),
    # Sizes that no tile divides.
    ((5, 1008, 2752, Config(stages=4, k_tile=64)), {}),
    ((77, 1040, 2752, Config(stages=4, k_tile=64, columns=32)), {"dtype": BF16}),
    ((777, 1040, 2784, Config(**vars(WIDE) | {"k_tile": 32, "multicast": 1})), {}),
]


@pytest.mark.parametrize(("call", "options"), OTHERS)
def test_other_calls(call, options):
    compile_and_check(*call, **options)
