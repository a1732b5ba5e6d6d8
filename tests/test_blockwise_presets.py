"""Every preset that runs block by block, from calibration to text; caches and rotations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, small_lm
from test_generate import greedy_by_full_passes
from tiny import PLAIN, tiny_lm, token_batches

import qjax
from qjax.blockwise.blocks import specs
from qjax.blockwise.rotation import refusal, rotation
from qjax.cache import PagedCache
from qjax.checkpoint.orbax import fill
from qjax.errors import ConfigError
from qjax.evaluate import evaluate_perplexity
from qjax.evaluate.compare import trees_equal
from qjax.presets import KV
from qjax.tree import leaves_by_name, named_leaves

BLOCKWISE = [name for name in qjax.PRESETS if name not in PLAIN]
BATCHES = token_batches(6)
PROMPTS = [[5, 9, 60, 3], [7, 7, 8]]


def test_these_are_the_presets():
    assert {"int8_sq", "int8_sq_per_token", "int4_awq", "int4_gptq", "w4a8_awq"} <= set(BLOCKWISE)


def each(names, light):
    """All but those of `light` take long."""
    return [n if n in light else pytest.param(n, marks=pytest.mark.heavy) for n in names]


@pytest.mark.parametrize("preset", each(BLOCKWISE, ["int4_gptq"]))
def test_end_to_end(preset, tmp_path):
    """Calibrated, quantized, saved, restored; it generates what full passes say, and evaluates."""
    lm = tiny_lm(eos_token_id=(), num_hidden_layers=1)
    quantized = qjax.quantize_model(lm, preset, BATCHES)
    quantized.save(tmp_path / "q")
    loaded = qjax.load(tmp_path / "q")
    assert trees_equal(loaded.split()[1], quantized.split()[1])
    assert loaded.quantization == qjax.preset(preset)
    text = loaded.generate(PROMPTS, max_new_tokens=4).token_ids
    assert text.tolist() == greedy_by_full_passes(loaded, PROMPTS, 4)
    windows = token_batches(1, batch=4, seed=9)[0]
    base = evaluate_perplexity(lm, windows, batch_size=4)
    change, _ = evaluate_perplexity(loaded, windows, batch_size=4).change_from(base)
    # Random weights: 8 bits change the loss by little, 4 by more, and broken ones by a lot.
    assert abs(change) < (0.05 if preset.startswith("int8") else 0.3)
    rows = quantized.quantization_report.weights
    assert len(rows) == 7
    assert all(row.error < 0.02 and row.tokens == 384 and not row.note for row in rows)


# Caches ------------------------------------------------------------------------------------------

FORMATS = {"fp8_e4m3": (448.0, jnp.float8_e4m3fn), "int8": (127.0, jnp.int8)}


@pytest.mark.parametrize("kv", each(KV, ["int8_per_head"]))
def test_scales_of_the_cache(kv, tmp_path):
    """Largest keys and values of the calibration, each head's or all, over the largest number."""
    lm = tiny_lm(eos_token_id=(), num_hidden_layers=1)
    cfg = qjax.preset("int8_wo", kv=kv)
    q = qjax.quantize_model(lm, cfg, BATCHES)
    attention = q.model.layers[0].self_attn
    top, dtype = FORMATS[cfg.kv]
    amax = {"k": np.zeros(2), "v": np.zeros(2)}
    for batch in BATCHES:
        cache = lm.model.init_cache(2, 32)
        positions = jnp.broadcast_to(jnp.arange(32), (2, 32))
        _, (entry,) = jax.jit(lambda m, b, p, c: m.hidden(b, p, c))(
            lm.model, jnp.asarray(batch), positions, cache
        )
        for name, part in (("k", entry.k), ("v", entry.v)):
            amax[name] = np.maximum(amax[name], np.abs(np.asarray(part)).max(axis=(0, 2, 3)))
    for name, scale in (("k", attention.k_scale), ("v", attention.v_scale)):
        expected = amax[name] if "head" in kv else amax[name].max()
        # The two compute the same numbers in programs of their own: some roundings.
        np.testing.assert_allclose(scale.get_value(), expected / top, rtol=1e-5)
    assert q.model.init_cache(1, 8)[0].k.dtype == dtype
    q.save(tmp_path / "q")
    loaded = qjax.load(tmp_path / "q")
    assert trees_equal(loaded.split()[1], q.split()[1])
    text = loaded.generate(PROMPTS, max_new_tokens=4).token_ids
    assert text.tolist() == greedy_by_full_passes(loaded, PROMPTS, 4)


def test_keys_and_values_are_rounded():
    """Full passes see them rounded too: logits differ from those of the plain cache, a little."""
    lm = tiny_lm(num_hidden_layers=1)
    ids = token_batches(1)[0]
    plain = qjax.quantize_model(lm, "int8_wo")(ids)
    rounded = qjax.quantize_model(lm, qjax.preset("int8_wo", kv="int8"), BATCHES)(ids)
    error = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < 0.05


def test_prepare_takes_the_scales_of_the_model():
    lm = tiny_lm(eos_token_id=(), num_hidden_layers=1)
    q = qjax.quantize_model(lm, qjax.preset("int8_wo", kv="int8_per_head"), BATCHES)
    prepared = qjax.prepare(q)
    cache = prepared.model.init_cache(1, 8)
    assert isinstance(cache, PagedCache)
    assert cache.k_pages[0].dtype == jnp.int8
    attention = q.model.layers[0].self_attn
    np.testing.assert_array_equal(cache.k_scale[0], attention.k_scale.get_value())
    np.testing.assert_array_equal(cache.v_scale[0], attention.v_scale.get_value())
    assert prepared.generate(PROMPTS, max_new_tokens=3).token_ids.shape == (2, 3)


# Rotations ---------------------------------------------------------------------------------------

TURNABLE = ("llama", "falcon", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")


@pytest.mark.parametrize("family", each(CONFIGS, ["llama", "opt"]))
def test_rotations_leave_the_function_as_it_is(family):
    lm = small_lm(family, layers=2)
    cfg = lm.model.decoder_config
    reason = refusal(cfg)
    if family not in TURNABLE or reason is not None:
        assert reason is not None
        with pytest.raises(ConfigError, match=r"rotation 'hadamard' does not fit"):
            rotation(cfg)
        return
    rng = np.random.default_rng(0)
    _, state = lm.split()
    leaves = {
        n: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32) if leaf.ndim == 1
        else leaf
        for n, leaf in leaves_by_name(state).items()
    }  # fmt: skip
    lm = lm.with_state(fill(state, leaves, "x"), None)
    turn = rotation(cfg)
    turned = dict(leaves)
    turned |= turn.stem({"embed_tokens.embedding": leaves["embed_tokens.embedding"]})
    for prefix, spec in specs(cfg):
        own = {n.removeprefix(prefix): v for n, v in turned.items()
               if n.startswith(prefix or ("norm.", "lm_head."))}  # fmt: skip
        turned |= {f"{prefix}{n}": leaf for n, leaf in turn.block(spec, own).items()}
    ids = rng.integers(0, 64, (2, 12))
    before = np.asarray(lm(ids))
    after = np.asarray(lm.with_state(fill(state, turned, "x"), None)(ids))
    assert np.abs(after - before).max() <= 1e-3 * np.abs(before).max()
    for name, leaf in leaves.items():
        if name.endswith("_proj.weight"):
            assert (turned[name] != leaf).any(), name


@pytest.mark.heavy
def test_a_rotation_is_part_of_a_recipe(tmp_path):
    lm = tiny_lm(num_hidden_layers=1)
    cfg = qjax.preset("int4_wo", rotation="hadamard")
    q = qjax.quantize_model(lm, cfg)
    assert cfg.name == "int4_wo.hadamard"
    ids = token_batches(1)[0]
    errors = [
        np.linalg.norm(m(ids) - lm(ids)) / np.linalg.norm(lm(ids))
        for m in (q, qjax.quantize_model(lm, "int4_wo"))
    ]
    # Normal weights have no outliers for it to spread: about as good as without it.
    assert errors[0] < 1.5 * errors[1]
    q.save(tmp_path / "q")
    assert qjax.load(tmp_path / "q").quantization == cfg


# Observers ---------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_observers_of_static_scales():
    """Clipping the largest inputs: a smaller scale than the maximum's, in the order of the rest."""
    lm = tiny_lm(num_hidden_layers=1)
    scales = {}
    for observer in ("amax", "percentile", "mse", "entropy"):
        cfg = qjax.preset("fp8" if observer == "amax" else "int8_sq", observer=observer)
        rule = dataclasses.replace(
            cfg.rules[0], weight="int8", act="int8", granularity="per_channel", scaling=None
        )
        cfg = dataclasses.replace(cfg, rules=(rule,))
        leaves = dict(named_leaves(qjax.quantize_model(lm, cfg, BATCHES).split()[1]))
        scales[observer] = float(leaves["layers.0.mlp.down_proj.weight"].input.scale)
    assert 0.1 * scales["amax"] < scales["percentile"] < scales["amax"]
    assert 0.1 * scales["amax"] < scales["mse"] < scales["amax"]
    assert 0.1 * scales["amax"] < scales["entropy"] <= scales["amax"]
