"""The decode loop of a prepared model, compiled for an H200: what runs, and how many kernels."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import h200
import jax
import jax.numpy as jnp
import pytest
from families import abstract_lm
from qjax_kernels.dispatch import forget, skipped

import qjax
from qjax.bench import shapes
from qjax.decode import decode, prefill
from qjax.models.llama import LlamaConfig
from qjax.sampling import How, Settings

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
    return abstract_lm(cfg, preset or "bf16")


def some_layers(name: str, preset: str | None, layers: int = LAYERS) -> qjax.LanguageModel:
    """The first layers of a model of `shapes.SHAPES`."""
    cfg = shapes.shape(name)
    return abstract_lm(dataclasses.replace(cfg, layers=cfg.layers[:layers]), preset or "bf16")


def decode_step(
    preset: str | None,
    batch: int,
    kv_cache: str | None = None,
    lm: qjax.LanguageModel | None = None,
    refused: Sequence[str] = (),
) -> list[str]:
    """Kernels of the loop's body, in the order they run, by name: a custom call by its kernel, an
    XLA kernel by the fusion's name. The embedding and what follows the last norm are left out."""
    prepared = qjax.prepare(lm or llama3_8b(preset), kv_cache=kv_cache)
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
    # Nothing fell back to XLA; of attention, `refused` says why.
    assert skipped() == ({"decode_attention": list(refused)} if refused else {})
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


# ---------------------------------------------------------------- other families


@pytest.mark.parametrize(
    ("preset", "batch", "product"),
    [
        (None, 1, "plain_gemm_bfloat16"),
        (None, 8, "plain_gemm_bfloat16"),
        ("fp8", 1, "scaled_gemm_float8_e4m3fn"),
        ("fp8", 8, "scaled_gemm_float8_e4m3fn"),
        ("int8_sq", 1, "scaled_gemm_int8"),
        ("int8_sq", 8, "scaled_gemm_int8"),
        ("int4_wo", 1, STREAM),
        ("int4_wo", 8, STREAM),
    ],
)
def test_attention_beside_the_mlp(preset, batch, product):
    """GPT-J: one product for all that reads the norm, and the last two add to the residual."""
    lm = some_layers("gptj-6b", preset)
    inside = ["rope_cache", "decode_attention_blocks", product, "glu_quant", product]
    expected = ["norm_quant", product, *inside]
    assert decode_step(preset, batch, lm=lm) == expected * LAYERS


def test_a_norm_each_for_attention_and_the_mlp():
    """Falcon-40B: the second norm reads the same rows."""
    product = "scaled_gemm_int8"
    attention = [product, "rope_cache", "decode_attention_blocks", product]
    expected = ["norm_quant", "norm_quant", *attention, product, "glu_quant", product]
    kernels = decode_step("int8_sq", 1, lm=some_layers("falcon-40b", "int8_sq"))
    # Nothing says in which order the two products with the rows of the norms run.
    assert sorted(kernels) == sorted(expected * LAYERS)


@pytest.mark.parametrize("preset", ["fp8", "int4_wo"])
def test_no_rotation(preset):
    """MPT-30B: ALiBi, of which attention has the slopes; heads of 112, which Triton's takes."""
    product = STREAM if preset == "int4_wo" else "scaled_gemm_float8_e4m3fn"
    rounding = ["quantize_rows"] if preset == "fp8" else []
    attention = ["norm_quant", product, "rope_cache", *["decode_attention"] * 2, *rounding]
    expected = [*attention, product, "norm_quant", product, "glu_quant", product]
    reason = "mosaic: head_dim must be 64, 128, 192 or 256, not 112"
    kernels = decode_step(preset, 8, lm=some_layers("mpt-30b", preset), refused=[reason])
    assert kernels == expected * LAYERS


@pytest.mark.parametrize("preset", ["int4_wo", "fp8"])
def test_norms_of_heads(preset):
    """Qwen3-8B: as many kernels as Llama has."""
    lm = some_layers("qwen3-8b", preset)
    assert decode_step(preset, 1, lm=lm) == decode_step(preset, 1)


@pytest.mark.parametrize("preset", [None, "fp8", "int4_wo"])
def test_a_mixture_of_experts(preset):
    """Mixtral-8x7B: ten kernels, one more where rows of the norm are rounded after the router has
    read them, and eight of XLA's that choose experts, sort rows and add them up; two more give each
    row of both products the static scale."""
    kernels = decode_step(preset, 1, lm=some_layers("mixtral-8x7b", preset))
    xla = ("fusion", "softmax", "wrapped")
    mine = [name for name in kernels if not any(word in name for word in xla)]
    product = {None: "plain_gemm_bfloat16", "int4_wo": STREAM}.get(
        preset, "scaled_gemm_float8_e4m3fn"
    )
    attention = [product, "rope_cache", "decode_attention_blocks", product]
    rounded = ["quantize_rows"] if preset == "fp8" else []
    grouped = "prepared_grouped_gemm" if preset == "int4_wo" else "grouped_gemm"
    mlp = ["norm_quant", "plain_gemm_bfloat16", *rounded, grouped, "glu_quant", grouped]
    assert sorted(mine) == sorted(["norm_quant", *attention, *mlp] * LAYERS)
    assert len(kernels) - len(mine) == (10 if preset == "fp8" else 8) * LAYERS
