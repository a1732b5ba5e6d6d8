"""Prepared models of every family: the numbers and the text of the canonical ones."""

import dataclasses
from functools import cache as remembered

import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, small_lm
from flax import nnx
from test_architectures import DATA, FORMS, STEPPING, assert_equal_to_transformers

import qjax
from qjax.bench.random_model import recipe
from qjax.lm import LanguageModel
from qjax.models.decoder import Decoder
from qjax.runtime.mixture import FEW, sort
from qjax.runtime.weights import INTERLEAVED, JOINED, PLAIN, STACKED
from qjax.tree import map_named

# An arrangement each, and what only these have; the others are longer tests.
QUICK = ("gptj", "gemma2")
PARAMETERS = [
    family if family in QUICK else pytest.param(family, marks=pytest.mark.heavy)
    for family in CONFIGS
]


@remembered
def canonical(family: str, preset: str = "bf16", dtype: str = "float32"):
    """Two layers, every gain and bias a number of its own: those of a random model are all 1, 0."""
    lm = small_lm(family, layers=2, dtype=jnp.dtype(dtype))

    def noise(name, leaf):
        if leaf.ndim > 1:
            return leaf
        rng = np.random.default_rng(sum(map(ord, name)))
        return leaf + jnp.asarray(rng.normal(size=leaf.shape) / 8, leaf.dtype)

    lm = lm.with_state(map_named(noise, lm.split()[1]), None)
    cfg = recipe(preset)
    if cfg is None:
        return lm
    return qjax.quantize_model(lm, cfg, [tokens(2, 24)] if cfg.needs_stats else None)


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (batch, length)).astype(np.int32)


def rms(x) -> np.ndarray:
    """Of each row."""
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axis=-1))


def assert_same_logits(lm, prepared) -> None:
    """Sums of at most 128 products, a few dozen behind each other, in another order: each is off by
    128 2^-24 of its absolute sum at most."""
    ids = tokens(2, 24)
    expected, got = np.asarray(lm(ids)), np.asarray(prepared(ids))
    assert (rms(got - expected) <= 24 * 128 * 2**-24 * rms(expected)).all()


@pytest.mark.parametrize("family", PARAMETERS)
def test_logits_and_text(family):
    """A prompt that ends in the second page, a short one, and one that steps into the second."""
    lm = canonical(family)
    prepared = qjax.prepare(lm)
    assert_same_logits(lm, prepared)
    prompts = [
        row.tolist()[:length] for row, length in zip(tokens(3, 70), (70, 5, 61), strict=True)
    ]
    expected = lm.generate(prompts, max_new_tokens=6).token_ids
    np.testing.assert_array_equal(prepared.generate(prompts, max_new_tokens=6).token_ids, expected)


@pytest.mark.heavy
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16(family):
    """How far each is from the model in float32 with the same weights.

    Prepared layers round less often, but for the weights of attention, which the canonical one does
    not round on a CPU. That is an error as large as that of the values, which both round: of random
    errors, sqrt(2) at most. The largest of 48 tokens' varies more than their mean.
    """
    lm, ids = canonical(family, dtype="bfloat16"), tokens(2, 24)
    exact = canonical(family)
    state = map_named(lambda _, leaf: leaf.astype(jnp.float32), lm.split()[1])
    exact = np.asarray(exact.with_state(state, None)(ids))
    one, two = (rms(np.asarray(model(ids)) - exact) for model in (lm, qjax.prepare(lm)))
    assert two.mean() <= 2**0.5 * one.mean()
    assert two.max() <= 2 * one.max()


@pytest.mark.heavy
@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_compute_what_transformers_does(form):
    """Windows, tables, offsets, scales: what a small random model does not tell apart."""
    reference = np.load(DATA / form / "reference.npz")
    lm = qjax.load(DATA / form, dtype="float32")
    prepared = qjax.prepare(lm)
    assert_equal_to_transformers(prepared, reference)
    if form in STEPPING:
        result = prepared.generate(reference["input_ids"][:, :12], max_new_tokens=8)
        np.testing.assert_array_equal(result.token_ids, reference["greedy"])


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("gptj", "int8_sq"),
        pytest.param("gptj", "int4_wo", marks=pytest.mark.heavy),
        pytest.param("gptj", "fp8", marks=pytest.mark.heavy),
        pytest.param("gptj", "int8", marks=pytest.mark.heavy),
        pytest.param("gptj", "w4a8", marks=pytest.mark.heavy),
        pytest.param("gemma2", "fp8", marks=pytest.mark.heavy),
        pytest.param("falcon", "int8", marks=pytest.mark.heavy),
        pytest.param("opt", "fp8", marks=pytest.mark.heavy),
        pytest.param("qwen3", "int4_wo", marks=pytest.mark.heavy),
        *(
            pytest.param("mixtral", preset, marks=pytest.mark.heavy)
            for preset in ("int4_wo", "int8_wo", "fp8_wo", "fp8", "int8", "int8_sq", "w4a8")
        ),
    ],
)
def test_formats(family, preset):
    """Where activations are quantized, a difference in the last bit moves a few of them to the next
    number: less than rounding all of them did, half a step each at most."""
    lm = canonical(family, preset)
    prepared = qjax.prepare(lm)
    assert prepared.report.apart == prepared.report.canonical == {}
    if preset.endswith("_wo"):
        assert_same_logits(lm, prepared)
    ids = tokens(2, 24)
    expected = np.asarray(lm(ids))
    error = rms(expected - np.asarray(canonical(family)(ids)))
    assert (rms(np.asarray(prepared(ids)) - expected) <= error).all()
    text = lm.generate(ids[:, :7], max_new_tokens=4).token_ids
    np.testing.assert_array_equal(prepared.generate(ids[:, :7], max_new_tokens=4).token_ids, text)


def test_a_narrow_cache():
    """The same text as with keys and values as they are, in all but a few places."""
    lm = canonical("gptj")
    prompts = tokens(4, 12)
    plain, narrow = (
        qjax.prepare(lm, kv_cache=kv).generate(prompts, max_new_tokens=8).token_ids
        for kv in (None, "fp8_e4m3")
    )
    assert (plain == narrow).mean() > 0.7
    assert (
        qjax.prepare(lm, kv_cache="fp8_e4m3").model.init_cache(1, 8).k_pages[0].dtype.itemsize == 1
    )


# ---------------------------------------------------------------- what is fused


@pytest.mark.parametrize(
    ("family", "preset", "gated", "fused"),
    [
        ("gptj", "bf16", JOINED, ["qkv_up_proj"]),
        ("gptj", "int8", JOINED, ["qkv_up_proj"]),
        ("falcon", "bf16", PLAIN, ["self_attn.qkv_proj"]),
        ("opt", "fp8", PLAIN, ["self_attn.qkv_proj"]),
        ("gemma2", "bf16", INTERLEAVED, ["self_attn.qkv_proj", "mlp.gate_up_proj"]),
        ("gemma2", "int8", STACKED, ["self_attn.qkv_proj", "mlp.gate_up_proj"]),
        ("mixtral", "bf16", STACKED, ["self_attn.qkv_proj", "mlp.experts.gate_up_proj"]),
    ],
)
def test_what_lies_how(family, preset, gated, fused):
    prepared = qjax.prepare(canonical(family, preset))
    assert sorted(prepared.report.fused) == sorted(
        f"layers.{i}.{n}" for i in range(2) for n in fused
    )
    assert [layer.get_value().gated for layer in prepared.model.layers] == [gated] * 2
    for layer in prepared.model.layers:
        weights = layer.get_value()
        assert weights.config in canonical(family).config.layers
        if gated == JOINED:
            rows = (weights.config.attention.heads * 3 * 32) + weights.config.mlp.features
            assert weights.qkv[0].weight.shape == (rows, 128)
            # q, k and v have no bias, up has one.
            assert not np.asarray(weights.qkv[0].bias[: 3 * 128]).any()
            assert np.asarray(weights.qkv[0].bias[3 * 128 :]).all()


def test_formats_that_differ_share_a_norm_but_no_product():
    """Attention in int8 with a scale of each token, the MLP as it is."""
    rules = (qjax.Rule(path=".*self_attn.*", weight="int8", act="int8"),)
    lm = qjax.quantize_model(canonical("gptj"), qjax.QuantConfig(rules=rules))
    prepared = qjax.prepare(lm)
    assert prepared.report.apart["layers.0.qkv_up_proj"] == "only some are quantized"
    assert prepared.model.layers[0].get_value().gated == PLAIN
    ids = tokens(2, 24)
    error = rms(np.asarray(lm(ids)) - np.asarray(canonical("gptj")(ids)))
    assert (rms(np.asarray(prepared(ids)) - np.asarray(lm(ids))) <= error).all()


@pytest.mark.parametrize(
    ("family", "lines"),
    [
        ("gptj", ["fused: layers.*.qkv_up_proj (2 layers)"]),
        (
            "mixtral",
            ["by XLA: layers.*.mlp.router (2 layers): no kernel chooses experts and sorts tokens "
             "by them", "fused: layers.*.mlp.experts.gate_up_proj (2 layers)"],
        ),
    ],
)  # fmt: skip
def test_reports(family, lines):
    report = str(qjax.prepare(canonical(family)).report).splitlines()
    assert [line for line in lines if line not in report] == []


@pytest.mark.parametrize("rows", [2, 16, FEW, FEW + 3])
@pytest.mark.parametrize("experts", [4, 128])
def test_rows_are_sorted_by_expert(rows, experts):
    """Few by comparing each with each, many by a sort: the same, equal ones in their order."""
    chosen = np.random.default_rng(rows).integers(0, experts, rows).astype(np.int32)
    found = sort(jnp.asarray(chosen), experts)
    expected = np.argsort(chosen, kind="stable")
    np.testing.assert_array_equal(found.order, expected)
    np.testing.assert_array_equal(np.asarray(found.place)[expected], np.arange(rows))
    np.testing.assert_array_equal(found.group_sizes, np.bincount(chosen, minlength=experts))
    assert {x.dtype for x in found} == {jnp.dtype(jnp.int32)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weight": "int8"}, "int8 with more than a scale an output"),
        ({"weight": "int4", "group_size": 8}, "groups of 8"),
        ({"weight": "fp4_e2m1", "act": "fp8_e4m3", "group_size": 32},
         "no kernel multiplies experts in fp4_e2m1 by fp8_e4m3"),
    ],
)  # fmt: skip
def test_experts_that_no_kernel_reads_are_left_to_xla(settings, reason):
    rule = {"granularity": "per_group", "group_size": 64, "path": ".*experts.*"} | settings
    lm = qjax.quantize_model(canonical("mixtral"), qjax.QuantConfig(rules=(qjax.Rule(**rule),)))
    prepared = qjax.prepare(lm)
    assert len(prepared.report.canonical) == 2 * 2
    assert reason in prepared.report.canonical["layers.0.mlp.experts.down_proj"]
    if "act" not in settings:
        assert_same_logits(lm, prepared)


def test_what_no_kernel_has():
    """A gate with relu, and queries, keys and values that are bounded."""
    lm = canonical("llama")
    config = lm.model.decoder_config
    layer = config.layers[0]
    layer = dataclasses.replace(
        layer,
        mlp=dataclasses.replace(layer.mlp, activation="relu"),
        attention=dataclasses.replace(layer.attention, clip_qkv=0.5),
    )
    changed = with_layers(lm, layer)
    prepared = qjax.prepare(changed)
    between = prepared.report.between
    assert between["layers.0.self_attn.clip_qkv"] == "no kernel bounds queries, keys and values"
    assert "a gate with relu" in between["layers.1.mlp.activation"]
    assert prepared.model.layers[0].get_value().gated == STACKED
    assert_same_logits(changed, prepared)


def with_layers(lm, layer):
    """A Decoder of the same weights whose layers have another config."""
    config = lm.model.decoder_config
    config = dataclasses.replace(config, layers=(layer,) * len(config.layers))
    model = Decoder(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    nnx.update(model, lm.split()[1])
    return LanguageModel(model, config, model_type="mistral")
