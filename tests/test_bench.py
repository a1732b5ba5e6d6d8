"""qjax bench: random models in a recipe's format, their bytes, and what a row says."""

import json

import jax
import jax.numpy as jnp
import pytest

from qjax.bench import latency, random_model, shapes
from qjax.cli import main
from qjax.models.llama import LlamaConfig
from qjax.qarray import is_qarray
from qjax.tree import named_leaves

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)
WEIGHTS = 2 * (128 * 128 * 2 + 2 * 64 * 128 + 3 * 128 * 256)  # of the layers


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama2-7b", 6_738_415_616), ("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496)],
)
def test_shapes_have_the_parameters_that_the_models_are_known_to_have(name, parameters):
    _, state = random_model.abstract_model("llama", shapes.shape(name), jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == parameters


@pytest.mark.parametrize("preset", random_model.presets())
def test_a_random_model_is_in_the_format_of_its_preset(preset):
    cfg = random_model.recipe(preset)
    lm = random_model.random_model(TINY, cfg)
    quantized = {name: leaf for name, leaf in named_leaves(lm.split()[1]) if is_qarray(leaf)}
    assert len(quantized) == (0 if preset == "bf16" else 14)
    for leaf in quantized.values():
        assert leaf.format == cfg.rules[0].weight
        scale = leaf.scale.astype(jnp.float32)
        # Rows differ by a factor of up to 2 in size: so do their scales.
        assert scale.size == 1 or float(scale.max() / scale.min()) > 1.5
    logits = lm(jnp.arange(8)[None])
    assert bool(jnp.isfinite(logits).all())
    assert 0.1 < float(logits.std()) < 30


def test_the_output_head_has_a_recipe_of_its_own():
    lm = random_model.random_model(TINY, random_model.recipe("int4_wo", "fp8_wo"))
    leaves = dict(named_leaves(lm.split()[1]))
    assert leaves["lm_head.weight"].format == "fp8_e4m3"
    assert leaves["layers.0.mlp.up_proj.weight"].format == "int4"
    assert not is_qarray(leaves["embed_tokens.embedding"])


def test_bytes_are_those_of_the_weights_but_the_embedding():
    plain = latency.decode_bytes(random_model.random_model(TINY, None))
    norms = 2 * 5 * 128
    assert plain == 2 * (WEIGHTS + 64 * 128) + norms
    int4 = latency.decode_bytes(random_model.random_model(TINY, random_model.recipe("int4_wo")))
    assert int4 == WEIGHTS // 2 + 2 * WEIGHTS // 128 + 2 * 64 * 128 + norms
    assert latency.cache_bytes(TINY, 3, 10) == 2 * 2 * 2 * 32 * 2 * 3 * 10


@pytest.mark.parametrize("implementation", latency.IMPLEMENTATIONS)
def test_a_row_holds_the_medians_of_the_timed_runs(implementation):
    seen = []

    def generate(lm, prompts, new):
        seen.append(lm.generate(prompts, new))
        return seen[-1]

    (row,) = latency.measure(
        "tiny", "int8", batches=(2,), input=5, output=4, implementation=implementation,
        repeats=3, config=TINY, generate=generate,
    )  # fmt: skip
    assert len(seen) == 4
    assert all(one.token_ids.shape == (2, 4) for one in seen)
    decode = sorted(one.stats.decode_s for one in seen[1:])[1]
    first = sorted(one.stats.prefill_s for one in seen[1:])[1]
    assert row.ms_per_token == pytest.approx(1e3 * decode / 3)
    assert row.ttft_ms == pytest.approx(1e3 * first)
    assert row.tokens_per_s == pytest.approx(8 / (first + decode))
    assert (row.preset, row.kv, row.batch, row.implementation) == (
        "int8",
        "bf16",
        2,
        implementation,
    )
    assert row.bound_ms is None  # of a CPU nothing is known


def test_the_command_writes_rows_and_prints_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "shape", lambda name: TINY)
    monkeypatch.setattr(latency, "shape", lambda name: TINY)
    out = tmp_path / "latency.json"
    asked = (
        "--presets bf16,int4_wo --batch 1,2 --input 3 --output 2 --repeats 1 --commit abc --json"
    )
    assert main(["bench", "latency", *asked.split(), "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    document = json.loads(out.read_text())
    assert [(row["preset"], row["batch"]) for row in printed] == [
        ("bf16", 1), ("bf16", 2), ("int4_wo", 1), ("int4_wo", 2),
    ]  # fmt: skip
    assert document["rows"] == printed
    assert (document["commit"], document["device"]) == ("abc", jax.devices()[0].device_kind)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape llama9", "shape 'llama9'"),
        ("--presets int3", "preset 'int3'"),
        ("--implementations torch", "implementation 'torch'"),
        ("--kv int2", "kv 'int2'"),
        ("--output 1", "--output is 1; it must be 2 or more"),
        ("--batch 0", "--batch is '0'; give positive numbers"),
        ("--input 9000", "do not fit the 8192 of llama3-8b"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, capsys):
    assert main(["bench", "latency", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
