"""The kernel compiles for every GPU, for an H200 in every configuration, and works in place."""

import h200
import jax
import jax.numpy as jnp
import ptx
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from qjax_kernels.rope_cache import triton
from qjax_kernels.rope_cache.config import Config, candidates

# Heads, key heads and head_dim of Llama-3-8B, Llama-2-7B, Llama-3-70B on 4 GPUs, GPT-J, Qwen2-7B.
MODELS = [(32, 8, 128), (32, 32, 128), (16, 2, 128), (16, 16, 256), (28, 4, 128)]


def operands(tokens, heads, kv_heads, head_dim, kv, make, half=None, more=0):
    half = head_dim // 2 if half is None else half
    pages = make((512, kv_heads, 64, head_dim), jnp.dtype(kv))
    angles = make((tokens, half), jnp.dtype("float32"))
    index = make((tokens,), jnp.dtype("int32"))
    scale = make((), jnp.dtype("float32")) if pages.dtype.itemsize == 1 else None
    qkv = make((tokens, (heads + 2 * kv_heads) * head_dim + more), jnp.dtype("bfloat16"))
    return qkv, angles, angles, pages, pages, index, index, scale, scale


def compile_rope(tokens, model, kv, config, *, capability=90, half=None, interleaved=False,
                 with_kv=False, more=0, norms=False):  # fmt: skip
    weight = jax.ShapeDtypeStruct((model[2],), jnp.bfloat16) if norms else None
    (kernel,) = ptx.compile_triton(
        triton.rope_cache,
        *operands(tokens, *model, kv, jax.ShapeDtypeStruct, half, more),
        weight,
        weight,
        capability=capability,
        heads=model[0],
        interleaved=interleaved,
        with_kv=with_kv,
        config=config,
    )
    return kernel


@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_candidates(tokens, model, kv):
    for config in candidates(tokens, *model):
        kernel = compile_rope(tokens, model, kv, config)
        assert kernel.spills == 0
        assert kernel.registers * config.warps * 32 <= 65536
        assert "ld.global.v4.b32" in kernel.ptx
        # 8 elements of a head at once: 16 bytes of bfloat16, 8 of an 8-bit number.
        assert "st.global.v4.b32" in kernel.ptx
        if kv != "bfloat16":
            assert "st.global.v2.b32" in kernel.ptx or "st.global.v4.b32" in kernel.ptx


@pytest.mark.parametrize("capability", ptx.KINDS)
def test_other_gpus(capability):
    model, config = MODELS[0], Config(4, 8, 2)
    for kv in ("int8", "bfloat16", "float8_e4m3fn"):
        if kv == "float8_e4m3fn" and capability < ptx.FP8:
            with pytest.raises(NotImplementedError, match="fp8"):
                compile_rope(64, model, kv, config, capability=capability)
            continue
        kernel = compile_rope(64, model, kv, config, capability=capability, with_kv=True)
        assert kernel.spills == 0


@pytest.mark.parametrize(("head_dim", "half"), [(80, 40), (80, 16), (96, 48), (256, 32)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_and_interleaved_rotation(head_dim, half, interleaved):
    model = (16, 16, head_dim)
    for tokens in (1, 8192):
        config = candidates(tokens, *model)[0]
        kernel = compile_rope(tokens, model, "int8", config, half=half, interleaved=interleaved)
        assert kernel.spills == 0


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_no_rotation_and_columns_behind_the_heads(kv):
    """MPT's and GPT-J's: what is not read costs nothing."""
    for model, half in (((64, 64, 112), 0), ((16, 16, 256), 32)):
        config = candidates(1, *model)[0]
        kernel = compile_rope(1, model, kv, config, half=half, more=16384)
        assert kernel.spills == 0
        assert "ld.global.v4.b32" in kernel.ptx


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [1, 8192])
def test_norms_of_heads(tokens, kv):
    """Qwen3-8B's and Gemma-3-12B's."""
    for model in ((32, 8, 128), (16, 8, 256)):
        for config in candidates(tokens, *model):
            kernel = compile_rope(tokens, model, kv, config, norms=True)
            assert kernel.spills == 0
            assert "ld.global.v4.b32" in kernel.ptx
            assert "rsqrt.approx" in kernel.ptx


def test_donated_pages_are_not_copied():
    """One kernel, whose results are the memory of its arguments."""
    pytest.importorskip("jax_triton")
    arguments = operands(64, *MODELS[0], "bfloat16", h200.shape)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")

    def step(*arguments):
        return triton.rope_cache(*arguments, heads=32, interleaved=False, with_kv=False)

    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(step, donate_argnums=(3, 4)).lower(*arguments)
    text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
    assert text.count(" custom-call(") == 1
    assert " copy(" not in text
    assert "fusion(" not in text
