"""The decode loop of a prepared model, compiled for an H200: what runs, and how many kernels."""

import itertools
import re

import h200
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from qjax_kernels.dispatch import forget, skipped

import qjax
from qjax.bench import random_model
from qjax.decode import decode, prefill
from qjax.lm import LanguageModel
from qjax.models.llama import LlamaConfig
from qjax.models.registry import abstract_model
from qjax.quantize import quantize
from qjax.sampling import How, Settings
from qjax.tree import named_leaves

pytest.importorskip("jax_triton")

shape = jax.ShapeDtypeStruct
LAYERS = 2


def llama3_8b(preset: str | None) -> qjax.LanguageModel:
    """Two layers of its sizes, without arrays."""
    cfg = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        eos_token_id=(128001,),
    )
    graphdef, state = abstract_model("llama", cfg, jnp.dtype(jnp.bfloat16))
    recipe = random_model.recipe(preset or "bf16")
    if recipe is not None:
        stats = {
            name: {"amax": shape(leaf.shape[1:], jnp.float32)}
            for name, leaf in named_leaves(state)
            if name.endswith("_proj.weight")
        }
        state = jax.eval_shape(lambda s, stats: quantize(s, recipe, stats), state, stats)
    return LanguageModel(nnx.merge(graphdef, state), cfg, model_type="llama", quantization=recipe)


def decode_step(preset: str | None, batch: int, kv_cache: str | None = None) -> list[str]:
    """Kernels of the loop's body, in the order they run, by name: a custom call by its kernel, an
    XLA kernel by the fusion's name. The embedding and what follows the last norm are left out."""
    prepared = qjax.prepare(llama3_8b(preset), kv_cache=kv_cache)
    assert not prepared.report.apart
    assert not prepared.report.canonical
    graphdef, state = prepared.split()
    floats, integers = shape((batch,), jnp.float32), shape((batch,), jnp.int32)
    settings = Settings(
        temperature=floats,
        top_k=integers,
        top_p=floats,
        min_p=floats,
        penalty=floats,
        seed=shape((batch,), jnp.uint32),
        min_tokens=integers,
        max_tokens=integers,
    )
    ends, prompts = shape((1,), jnp.int32), shape((batch, 1024), jnp.int32)

    def start(state, prompts, lengths, ends, settings):
        sizes = {"max_new": 128, "cache_length": 1152}
        return prefill(graphdef, state, prompts, lengths, ends, settings, how=How(), **sizes)[0]

    def loop(state, carry, ends, settings, limit):
        return decode(graphdef, state, carry, ends, settings, limit, how=How())

    carry = jax.eval_shape(start, state, prompts, integers, ends, settings)
    arguments = (state, carry, ends, settings, shape((), jnp.int32))
    forget()
    compiled = h200.compile_for_h200(
        loop, *jax.tree.map(lambda x: h200.shape(x.shape, x.dtype), arguments)
    )
    # Nothing fell back to XLA.
    assert skipped() == {}
    assert [kernel.spills for kernel in compiled.kernels] == [0] * len(compiled.kernels)
    assert is_one_graph(compiled.thunks)
    kernels = list(kernels_of(body(compiled.hlo)))
    # The cache stays in its place; what is copied is a position.
    assert [shape for name, _, shape in kernels if name == "copy" and "," in shape] == []
    return [
        name
        for name, place, _ in kernels
        if name != "copy" and (not place or "jit(decoder_layer)" in place)
    ]


def is_one_graph(thunks: str) -> bool:
    """Whether all that the loop's body launches is in one CUDA graph."""
    lines = thunks[thunks.index("  body:\n") :].splitlines()[1:]
    inside = list(itertools.takewhile(lambda line: line.startswith("    "), lines))
    outermost = [line for line in inside if not line.startswith("     ")]
    return len(outermost) == 1 and "kCommandBuffer" in outermost[0] and len(inside) > 8 * LAYERS


def body(hlo: str) -> str:
    """The computation with the layers."""
    computations = re.split(r"\n(?=[%E])", hlo)
    (found,) = [text for text in computations if '"mosaic_gpu_v2"' in text]
    return found


def kernels_of(computation: str):
    """(name, place in the program, shape) of each instruction that is a kernel."""
    for line in computation.splitlines():
        found = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) (custom-call|fusion|copy|dot)\(", line)
        if found:
            place = re.search(r'op_name="([^"]*)"', line)
            place = place[1] if place else ""
            name = re.sub(r"[.\d]+$", "", found[1])
            if found[3] == "custom-call":
                name = place.removesuffix("/triton_kernel_call").removesuffix("/mpmd_map")
                name = re.sub(r"jit\((.*)\)", r"\1", name.rpartition("/")[2])
            yield name, place, re.sub(r"\{.*?\}", "", found[2])


STREAM = "body"  # the weight-only product's kernel
ATTENTION = [STREAM, "rope_cache", "decode_attention_blocks", STREAM]


@pytest.mark.parametrize(
    ("preset", "batch", "kv_cache"),
    [
        ("int4_wo", 1, None),
        ("int4_wo", 64, "fp8_e4m3"),
        ("int8_wo", 8, None),
        ("fp8_wo", 64, "fp8_e4m3"),
    ],
)
def test_weight_only(preset, batch, kv_cache):
    """Norms are parts of the products around them: six kernels a layer."""
    expected = ["norm_quant", *[*ATTENTION, STREAM, STREAM] * LAYERS]
    assert decode_step(preset, batch, kv_cache) == expected


def test_weight_only_with_many_sequences():
    layer = ["norm_quant", *ATTENTION, "norm_quant", STREAM, STREAM]
    kernels = decode_step("int4_wo", 128)
    assert [name.partition("_gemm")[0] for name in kernels] == layer * LAYERS


def test_plain():
    """No product is cut in parts that a kernel more adds up."""
    product = "plain_gemm_bfloat16"
    attention = ["norm_quant", product, "rope_cache", "decode_attention_blocks", product]
    expected = [*attention, "norm_quant", "gemm_swiglu_bfloat16", product]
    assert decode_step(None, 1) == expected * LAYERS


@pytest.mark.parametrize(
    ("preset", "batch", "format"),
    [("fp8", 1, "float8_e4m3fn"), ("fp8", 64, "float8_e4m3fn"), ("int8_sq", 64, "int8")],
)
def test_static_scales(preset, batch, format):
    """Attention rounds what it writes."""
    product, gated = f"scaled_gemm_{format}", f"gemm_swiglu_{format}"
    attention = ["norm_quant", product, "rope_cache", "decode_attention_blocks"]
    expected = [*attention, product, "norm_quant", gated, product]
    assert decode_step(preset, batch) == expected * LAYERS


@pytest.mark.parametrize("preset", ["w4a8", "w4a8_static"])
def test_repacked_weights_with_fp8_activations(preset):
    """A kernel more: the gated product writes bfloat16. Another one where a token has its scale."""
    attention = ["norm_quant", STREAM, "rope_cache", "decode_attention_blocks"]
    attention += [] if preset == "w4a8_static" else ["quantize_rows"]
    mlp = ["norm_quant", STREAM, "quantize_rows", STREAM]
    assert decode_step(preset, 1) == [*attention, STREAM, *mlp] * LAYERS


def test_a_scale_for_each_token():
    """Two kernels more: the gate needs all of a row before it can be rounded."""
    product = "scaled_gemm_int8"
    attention = ["norm_quant", product, "rope_cache", "decode_attention_blocks"]
    mlp = ["norm_quant", product, "glu_quant", product]
    assert decode_step("int8", 1) == [*attention, "quantize_rows", product, *mlp] * LAYERS
