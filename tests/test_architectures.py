"""Families of models compute what transformers does, in all forms of their configs."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from families import CONFIGS, config_of, small_lm
from flax import nnx
from safetensors.numpy import load_file, save_file

import qjax
from qjax.models.decoder import DecoderConfig
from qjax.models.registry import FAMILIES, get_family

# Checkpoints with vocabularies of 256, beside the project (llama's are in test_huggingface.py).
SHARED = (
    *("falcon40b", "falcon7b", "gemma2", "gemma3", "gpt2", "gptj", "mistral", "mixtral", "mpt"),
    *("opt", "phi3", "qwen2", "qwen3", "qwen3_moe"),
)
# Forms of the families that those are not: see make.py there.
DATA = Path(__file__).parent / "data" / "architectures"
FORMS = sorted(folder.name for folder in DATA.iterdir() if (folder / "config.json").is_file())
# Those in which a decode step has something of its own: windows, distances, tables, offsets.
STEPPING = ("falcon_alibi", "gemma3_pattern", "gpt2_inverse", "opt_post", "phi3_long", "phi3_short")
# The references beside the project came from models cast to bfloat16 as a whole: what they compute
# at first and store (frequencies; tables of GPT-J; a scale of Gemma) was rounded as well.
CAST = {"rope_dtype": "bfloat16"}


def errors(logits, reference) -> tuple[float, float]:
    """Relative error over all, and the largest over rows (one token's logits)."""
    logits, reference = np.asarray(logits, np.float64), np.asarray(reference, np.float64)
    rows = np.linalg.norm(logits - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    return np.linalg.norm(logits - reference) / np.linalg.norm(reference), rows.max()


def assert_equal_to_transformers(lm, reference) -> None:
    """Logits, and the greedy tokens that follow from them without a cache.

    Both sum in float32; a logit is a sum of about 1000 rounded terms over 2 or 3 layers, so errors
    of some 1e-6 are expected and 1e-4 is far above them and far below any mistake.
    """
    logits = lm(reference["input_ids"])
    assert logits.dtype == np.float32
    assert max(errors(logits, reference["logits"])) <= 1e-4
    # One shape for both: positions behind the last are not looked at.
    text = reference["input_ids"].copy()
    prompt, new = 12, reference["greedy"].shape[1]
    text[:, prompt : prompt + new] = reference["greedy"]
    best = np.asarray(lm(text)).argmax(axis=-1)
    np.testing.assert_array_equal(best[:, prompt - 1 : prompt + new - 1], reference["greedy"])


def assert_greedy_with_a_cache(lm, reference) -> None:
    result = lm.generate(reference["input_ids"][:, :12], max_new_tokens=8)
    np.testing.assert_array_equal(result.token_ids, reference["greedy"])


@pytest.mark.parametrize("name", SHARED)
def test_logits_and_greedy_tokens_equal_transformers(fixtures, name):
    reference = np.load(fixtures / name / "reference.npz")
    lm = qjax.load(fixtures / name, dtype="float32", hf_overrides=CAST)
    assert_equal_to_transformers(lm, reference)
    assert_greedy_with_a_cache(lm, reference)


@pytest.mark.parametrize("name", SHARED)
def test_logits_in_bfloat16(fixtures, name):
    """bfloat16 rounds to 4e-3 relative, some dozen times on the way: 3e-2 is the bar asked for."""
    reference = np.load(fixtures / name / "reference.npz")
    lm = qjax.load(fixtures / name, hf_overrides=CAST)
    assert errors(lm(reference["input_ids"]), reference["logits"])[0] <= 3e-2


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_equal_transformers(name):
    reference = np.load(DATA / name / "reference.npz")
    lm = qjax.load(DATA / name, dtype="float32")
    assert_equal_to_transformers(lm, reference)
    if name in STEPPING:
        assert_greedy_with_a_cache(lm, reference)


def test_the_readme_lists_the_families():
    readme = (DATA.parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| model_type |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(FAMILIES)


def test_there_is_a_form_of_each_family():
    types = {json.loads((DATA / form / "config.json").read_text())["model_type"] for form in FORMS}
    assert types == set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize("family", ["gptj", "mixtral", "gemma3_text", "mpt"])
def test_a_decode_step_has_the_bits_of_a_full_pass(family):
    """On a CPU. Other parts of a layer are shared with these families."""
    lm = small_lm(family, layers=2)
    ids = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
    full = lm(ids)
    graphdef, state = lm.split()

    @jax.jit
    def step(state, cache, token, position):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.hidden(token[:, None], position[:, None], cache)
        return model.logits(hidden[:, 0]), cache

    cache = lm.model.init_cache(2, 64)
    for at in range(ids.shape[1]):
        logits, cache = step(state, cache, ids[:, at], np.full(2, at, np.int32))
        np.testing.assert_array_equal(logits, full[:, at])


# Configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_a_config_survives_json(name):
    raw = json.loads((DATA / name / "config.json").read_text())
    family = get_family(raw["model_type"])
    config = family.from_hf(raw)
    assert family.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "llama"])
def test_unknown_fields_are_refused_and_null_ones_are_not(family):
    assert config_of(family, new_trick=None, other_trick=False) == config_of(family)
    with pytest.raises(qjax.CheckpointError, match=rf"{family} model has new_trick.*: None"):
        config_of(family, new_trick=3)
    with pytest.raises(qjax.CheckpointError, match="vocab_size is -1"):
        config_of(family, vocab_size=-1)
    with pytest.raises(qjax.CheckpointError, match=r"eos_token_id is \(64,\)"):
        config_of(family, eos_token_id=64)


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_have_no_defaults(family):
    for missing in CONFIGS[family].keys() & {"vocab_size", "hidden_size", "n_embd", "d_model"}:
        fields = {k: v for k, v in CONFIGS[family].items() if k != missing}
        with pytest.raises(qjax.CheckpointError, match=f"lacks the key '{missing}'"):
            get_family(family).from_hf(fields)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor rotates 16 of 32"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"hidden_act": "mish"}, "hidden_act is 'mish'; mistral models here use one of"),
        ("mistral", {"num_key_value_heads": 3}, "4 heads with 3 key-value heads"),
        ("mistral", {"rope_scaling": {"type": "linear", "facto": 2}}, "has facto in config.json"),
        ("mixtral", {"num_experts_per_tok": 5}, "goes through 5 experts, more than there are"),
        ("qwen2", {"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ("qwen2", {"layer_types": ["full_attention", "chunked"]}, "layer_types is"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
        ("qwen3", {"rope_scaling": {"type": "yarn"}}, "'yarn' needs factor"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        ("falcon", {"parallel_attn": False}, "parallel_attn is False"),
        ("falcon", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ("falcon", {"num_attention_heads": 3}, "it must divide 128"),
        ("mpt", {"no_bias": False}, "no_bias is False; mpt models here have True"),
        ("mpt", {"logit_scale": 2.0}, "logit_scale is 2.0"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln is True"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi is False"),
        ("mpt", {"attn_config": {"alibi_bias_max": 4}}, "alibi_bias_max is 4"),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type is"),
        ("mpt", {"attn_config": {"clip_qkv": -1}}, "clip_qkv is -1"),
        ("mpt", {"attn_config": {"sink": 3}}, "mpt model has sink"),
        ("gptj", {"rotary_dim": 15}, "15 dims of a head of 32 are rotated"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("gptj", {"rope_dtype": "int8"}, "unknown rope_dtype 'int8'"),
        ("gpt2", {"n_head": 5}, "n_head is 5; it must divide n_embd"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("opt", {"activation_function": "swiglu"}, "activation_function is 'swiglu'"),
        ("phi3", {"partial_rotary_factor": 0.03}, "an even number of them"),
        ("phi3", {"attention_bias": True}, "attention_bias is True"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "needs long_factor"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": "x"}}, "malformed.*'x'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(family, changes, message):
    with pytest.raises(qjax.CheckpointError, match=message):
        config_of(family, **changes)


def test_older_names_of_rotary_fields_mean_the_same():
    new = {"full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
           "sliding_attention": {"rope_theta": 2e4}}  # fmt: skip
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8.0}}
    old |= {"rope_local_base_freq": 2e4}
    assert config_of("gemma3_text", **old) == config_of("gemma3_text", rope_parameters=new)
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    for name in ("longrope", "su", "yarn"):
        config = config_of("phi3", rope_scaling=factors | {"type": name})
        assert config.ropes[0].type == "longrope"


def test_defaults_are_those_of_transformers():
    assert config_of("mistral").layers[0].attention.window == 6
    absent = {k: v for k, v in CONFIGS["mistral"].items() if k != "sliding_window"}
    assert get_family("mistral").from_hf(absent).layers[0].attention.window == 4096
    assert config_of("mistral", sliding_window=None).layers[0].attention.window is None
    assert config_of("mixtral").ropes[0].theta == 1e6
    windows = [layer.attention.window for layer in config_of("gemma2").layers]
    assert windows == [6, None]


def test_longrope_changes_over_with_the_length_that_a_sequence_may_have():
    from qjax.models.rope import RopeConfig, inverse_frequencies

    cfg = RopeConfig(type="longrope", short_factor=(1.0, 1.0), long_factor=(2.0, 4.0),
                     original_max_position=64)  # fmt: skip
    short, long = (inverse_frequencies(cfg, 4, length) for length in (64, 65))
    np.testing.assert_allclose(short / long, [2.0, 4.0])
    with pytest.raises(ValueError, match="needs the length"):
        inverse_frequencies(cfg, 4)
    with pytest.raises(qjax.CheckpointError, match="short_factor has 2 numbers; 8 dims"):
        inverse_frequencies(cfg, 8, 64)


# Tensors -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A function: form -> its directory, copied, and its tensors."""

    def copied(form):
        shutil.copytree(DATA / form, tmp_path / form)
        return tmp_path / form, load_file(DATA / form / "model.safetensors")

    return copied


def test_a_missing_expert_is_named(copy):
    folder, tensors = copy("mixtral_window")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        qjax.CheckpointError, match=r"lacks layers\.1\.mlp\.experts\.down_proj\.weight\[2\]$"
    ):
        qjax.load(folder)


def test_an_expert_of_another_shape_is_named(copy):
    folder, tensors = copy("mixtral_window")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name][:, :-1].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        qjax.CheckpointError, match=r"has layers\.0\.mlp\.experts\.gate_proj\.weight\[1\] of"
    ):
        qjax.load(folder)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("falcon_11b", "transformer.h.0.self_attention.query_key_value.weight"),
        ("mpt_clip", "transformer.blocks.0.attn.Wqkv.weight"),
        ("phi3_long", "model.layers.1.mlp.gate_up_proj.weight"),
        ("gpt2_inverse", "transformer.h.0.attn.c_attn.bias"),
    ],
)
def test_a_fused_tensor_that_cannot_be_split_is_named(copy, form, name):
    folder, tensors = copy(form)
    tensors[name] = tensors[name][..., :-1].copy() if "gpt2" in form else tensors[name][:-1].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(qjax.CheckpointError, match=rf"{name}' of shape .* does not fit"):
        qjax.load(folder)


def test_older_names_and_buffers(copy):
    """The first GPT-2 files have no 'transformer.' in front, and masks among their tensors."""
    folder, tensors = copy("gpt2_inverse")
    expected = qjax.load(folder)(np.arange(8)[None])
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(older, folder / "model.safetensors")
    np.testing.assert_array_equal(qjax.load(folder)(np.arange(8)[None]), expected)


def test_llama_is_described_like_the_others():
    """`decoder()` of a LlamaConfig, which has a form of its own on disk."""
    config = config_of("llama", attention_bias=True)
    described = config.decoder()
    assert isinstance(described, DecoderConfig)
    assert DecoderConfig.from_dict(json.loads(json.dumps(described.to_dict()))) == described
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(described, name) == getattr(config, name)
