"""qjax bench: random models in a recipe's format, their bytes, and what a row says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import abstract_lm, config_of

from qjax.bench import latency, random_model, results, shapes
from qjax.cli import main
from qjax.errors import ConfigError
from qjax.models.llama import LlamaConfig
from qjax.models.registry import get_family
from qjax.prepare import prepare
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
    [
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("gptj-6b", 6_050_882_784),
        ("falcon-40b", 41_303_293_952),
        ("mpt-30b", 29_957_200_896),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_shapes_have_the_parameters_that_the_models_are_known_to_have(name, parameters):
    config = shapes.shape(name)
    _, state = random_model.abstract_model(config.model_type, config, jnp.bfloat16)
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
        # Rows differ by a factor of up to 2 in size: so do their scales, if not 128 rows share one.
        shared = scale.size == 1 or cfg.rules[0].granularity == "per_block"
        assert shared or float(scale.max() / scale.min()) > 1.5
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
    mixture = tiny_mixture()
    experts = 2 * 3 * 4 * 64 * 128 * 2  # two layers of four experts of 64 features
    lm = random_model.random_model(mixture, None)
    one, few, many = (latency.decode_bytes(lm, batch) for batch in (1, 2, 1000))
    assert many - one == experts // 2
    assert many - few == experts // 4
    assert latency.cache_bytes(TINY, 3, 10) == 2 * 2 * 2 * 32 * 2 * 3 * 10


def tiny_mixture():
    """A Mixtral whose tokens go through two of four experts."""
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_local_experts": 4, "max_position_embeddings": 64}
    return get_family("mixtral").from_hf(sizes)


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


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gptj-6b", "mixtral-8x7b") else pytest.param(name, marks=pytest.mark.heavy)
        for name in shapes.SHAPES
    ],
)
@pytest.mark.parametrize("preset", ["bf16", "fp8", "int8_sq", "int8", "int4_wo", "fp8_wo"])
def test_every_shape_is_laid_out_for_the_kernels(name, preset):
    """A layer of it, without arrays: nothing is left apart, or to XLA's dequantization."""
    cfg = shapes.shape(name)
    cfg = getattr(cfg, "decoder", lambda: cfg)()
    cfg = dataclasses.replace(cfg, layers=cfg.layers[:1])
    report = prepare(abstract_lm(cfg, preset)).report
    assert report.apart == report.canonical == {}
    assert report.fused


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("gptj", "int8_sq"),
        pytest.param("falcon", "fp8", marks=pytest.mark.heavy),
        pytest.param("mpt", "int4_wo", marks=pytest.mark.heavy),
        pytest.param("mixtral", "int8", marks=pytest.mark.heavy),
        pytest.param("qwen3", "bf16", marks=pytest.mark.heavy),
    ],
)
def test_families_are_measured_prepared(family, preset):
    rows = latency.measure(
        "tiny", preset, batches=(1, 2), input=5, output=3, repeats=1, config=config_of(family)
    )
    assert [(row.batch, row.implementation) for row in rows] == [(1, "qjax"), (2, "qjax")]


@pytest.fixture
def tiny(monkeypatch):
    """Every shape is the tiny one."""
    monkeypatch.setattr(shapes, "shape", lambda name: TINY)
    monkeypatch.setattr(latency, "shape", lambda name: TINY)


def test_the_command_writes_rows_and_prints_json(tmp_path, capsys, tiny):
    out = tmp_path / "new" / "latency.json"
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
    assert all(row["peak_gib"] > 0 for row in printed)
    assert (document["commit"], document["device"]) == ("abc", jax.devices()[0].device_kind)
    assert set(document) == {"device", "versions", "commit", "date", "rows"}
    assert document["versions"]["jax"] == jax.__version__
    assert not list(out.parent.glob("*.tmp"))


@pytest.mark.heavy
def test_runs_add_up_in_one_file(tmp_path, capsys, tiny):
    """Rows of the same key are replaced; others stay, with the commits that they may be of."""
    out = tmp_path / "latency.json"

    def run(asked: str) -> dict:
        words = f"--input 3 --output 2 --repeats 1 --out {out} --merge {asked}".split()
        assert main(["bench", "latency", *words]) == 0
        return json.loads(out.read_text())

    first = run("--shape llama3-8b,llama2-7b --presets int8 --commit one")
    second = run("--presets int8,int8_sq --commit two")
    shapes_and_presets = [(row["shape"], row["preset"]) for row in second["rows"]]
    assert shapes_and_presets == [
        ("llama2-7b", "int8"), ("llama3-8b", "int8"), ("llama3-8b", "int8_sq"),
    ]  # fmt: skip
    assert first["rows"][0] in second["rows"] or first["rows"][1] in second["rows"]
    assert second["commit"] == "two"
    assert [run["commit"] for run in second["merged"]] == ["one"]
    third = run("--presets int8 --kv int8 --commit two")
    assert [row["kv"] for row in third["rows"]] == ["bf16", "bf16", "int8", "bf16"]
    assert [run["commit"] for run in third["merged"]] == ["one", "two"]
    capsys.readouterr()
    out.write_text(json.dumps(third | {"device": "another"}))
    with pytest.raises(ConfigError, match="the file is of another"):
        results.merge(results.read(out), results.document([], "three"))
    out.write_text("{}")
    assert main(["bench", "latency", "--merge", "--out", str(out)]) == 2
    assert "is no file of measurements" in capsys.readouterr().err


def test_a_cache_in_int8_has_scales_of_its_keys_and_values():
    lm = random_model.random_model(TINY, None)
    scales = latency.cache_scales(lm)
    assert len(scales) == 2
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 64, (1, 64)), jnp.int32)
    cache = lm.model.init_cache(1, 64)
    _, cache = lm.model.hidden(ids, jnp.arange(64)[None], cache)
    for (k_scale, v_scale), layer in zip(scales, cache, strict=True):
        for scale, x in ((k_scale, layer.k), (v_scale, layer.v)):
            assert (scale.shape, scale.dtype) == ((2,), jnp.float32)
            largest = np.abs(np.asarray(x, np.float32)).max(axis=(0, 2, 3))
            # bfloat16 keys, computed in another order: they round apart by one step at most.
            np.testing.assert_allclose(scale * 127, largest, rtol=2**-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape llama9", "shape 'llama9'"),
        ("--presets int3", "preset 'int3'"),
        ("--implementations torch", "implementation 'torch'"),
        ("--kv int2", "kv 'int2'"),
        ("--merge", "--merge adds to a file"),
        ("--output 1", "--output is 1; it must be 2 or more"),
        ("--batch 0", "--batch is '0'; give positive numbers"),
        ("--input 9000", "do not fit the 8192 of llama3-8b"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, capsys):
    assert main(["bench", "latency", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
