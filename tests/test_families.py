"""Every recipe works on every family: what it reaches, generation, evaluation, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, config_of, small_lm
from tiny import KINDS, PLAIN, some_heavy

import qjax
from qjax.assign import assign
from qjax.evaluate.perplexity import evaluate_perplexity
from qjax.models.registry import abstract_model
from qjax.presets import PRESETS
from qjax.qarray import is_qarray
from qjax.quantize import dequantize_tree
from qjax.tree import named_leaves

# A recipe each, so that every one runs on some family.
TURNS = {family: PLAIN[i % len(PLAIN)] for i, family in enumerate(CONFIGS)}
# Other families are generated with in test_architectures.py.
GENERATE = ("gptj", "mixtral", "gemma3_text", "mpt")
SPARED = ("embed_tokens", "embed_positions", "norm", "lm_head", "router", "bias")


@pytest.mark.parametrize("family", CONFIGS)
def test_recipes_reach_the_linear_layers_and_spare_the_rest(family):
    _, abstract = abstract_model(family, config_of(family), jnp.bfloat16)
    names = {name for name, leaf in named_leaves(abstract) if leaf.ndim > 1}
    for preset in PRESETS:
        reached = set(assign(abstract, qjax.preset(preset)))
        assert reached == {name for name in names if not any(word in name for word in SPARED)}
        projections = {name.split(".")[-2] for name in reached}
        assert projections >= {*(f"{p}_proj" for p in "qkvo"), "up_proj", "down_proj"}


def test_a_router_is_reached_by_its_name():
    _, abstract = abstract_model("mixtral", config_of("mixtral"), jnp.bfloat16)
    cfg = qjax.QuantConfig(rules=[qjax.Rule(path="router", weight="int8")])
    assert set(assign(abstract, cfg)) == {f"layers.{i}.mlp.router.weight" for i in range(2)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.heavy
def test_quantized_models_generate_and_are_saved(family, tmp_path):
    preset = TURNS[family]
    lm = small_lm(family)
    ids = np.random.default_rng(0).integers(0, 64, (2, 16)).astype(np.int32)
    batches = [ids] if qjax.preset(preset).needs_stats else None
    quantized = qjax.quantize_model(lm, preset, batches)
    logits = quantized(ids)
    if family in GENERATE:
        assert quantized.generate(ids[:, :5], max_new_tokens=3).token_ids.shape == (2, 3)
    quantized.save(tmp_path / "model")
    loaded = qjax.load(tmp_path / "model")
    assert (loaded.model_type, loaded.config) == (family, lm.config)
    np.testing.assert_array_equal(loaded(ids), logits)


@pytest.mark.parametrize("family", ["gptj", "qwen3_moe"])
def test_perplexity(family):
    windows = np.random.default_rng(0).integers(0, 64, (3, 16)).astype(np.int32)
    result = evaluate_perplexity(small_lm(family), windows, batch_size=2)
    assert 10 < float(np.exp(result.nll.mean())) < 1000


@pytest.mark.parametrize("preset", some_heavy(KINDS))
def test_experts_are_quantized_one_by_one(preset):
    """Scales of each expert are those of its own matrix quantized alone, and products with all
    experts are those of the dequantized weights, wherever activations stay as they are."""
    lm = small_lm("mixtral")
    ids = np.random.default_rng(0).integers(0, 64, (2, 16)).astype(np.int32)
    cfg = qjax.preset(preset)
    quantized = qjax.quantize_model(lm, cfg, [ids] if cfg.needs_stats else None)
    plain = dict(named_leaves(lm.split()[1]))
    leaves = dict(named_leaves(quantized.split()[1]))
    name = "layers.0.mlp.experts.down_proj.weight"
    leaf = leaves[name]
    assert is_qarray(leaf)
    assert leaf.values.shape == plain[name].shape == (4, 128, 128)
    for expert in range(4):
        weights = {"weight": plain[name][expert]}
        weight_only = qjax.preset(
            preset,
            act=None,
            act_granularity="per_token",
            act_group_size=-1,
            act_scale_dtype="float32",
            act_scale="dynamic",
        )
        alone = qjax.quantize(weights, weight_only)["weight"]
        np.testing.assert_array_equal(leaf.values[expert], alone.values)
        np.testing.assert_array_equal(leaf.scale[expert], alone.scale)
        if leaf.global_scale is not None:
            np.testing.assert_array_equal(leaf.global_scale[expert], alone.global_scale)
    if cfg.rules[0].act is None:
        dense = quantized.with_state(dequantize_tree(quantized.split()[1]), None)
        # Sums of 128 terms in float32, in another order where scales leave the sum.
        np.testing.assert_allclose(quantized(ids), dense(ids), atol=2e-5, rtol=2e-5)


def test_static_scales_of_experts_come_from_all_their_inputs():
    lm = small_lm("mixtral")
    ids = np.random.default_rng(0).integers(0, 64, (2, 16)).astype(np.int32)
    stats = qjax.calibrate(lm.model, [ids])
    name = "layers.0.mlp.experts.{}_proj.weight"
    assert stats[name.format("down")]["amax"].shape == (128,)
    np.testing.assert_array_equal(
        stats[name.format("gate")]["amax"], stats[name.format("up")]["amax"]
    )
    # The router reads the same, which is the output of a norm.
    np.testing.assert_array_equal(
        stats[name.format("gate")]["amax"], stats["layers.0.mlp.router.weight"]["amax"]
    )


def test_the_widest_type_of_a_family_is_that_of_its_embedding():
    for family in ("gpt2", "gemma2", "mixtral"):
        lm = small_lm(family, dtype=jnp.bfloat16)
        hidden, _ = jax.eval_shape(
            lambda ids, lm=lm: lm.model.hidden(ids, jnp.zeros((1, 3), jnp.int32)),
            jnp.zeros((1, 3), jnp.int32),
        )
        assert hidden.dtype == jnp.bfloat16
