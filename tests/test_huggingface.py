"""Hugging Face directories: logits and greedy tokens equal transformers'; bad ones are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import qjax

DATA = Path(__file__).parent / "data"


def relative_errors(logits, reference) -> tuple[float, float]:
    """Relative error over all, and the largest over rows (one token's logits)."""
    logits, reference = np.asarray(logits, np.float64), np.asarray(reference, np.float64)
    rows = np.linalg.norm(logits - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    return np.linalg.norm(logits - reference) / np.linalg.norm(reference), rows.max()


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_logits_equal_transformers(fixtures, name):
    """tests/data holds the float32 logits of AutoModelForCausalLM.from_pretrained(dtype=float32).

    Both sum in float32; a logit is a sum of about 1000 rounded terms over 2 layers, so errors of
    some 1e-6 are expected and 1e-4 is far above them and far below any mistake.
    """
    reference = np.load(fixtures / name / "reference.npz")
    lm = qjax.load(fixtures / name, dtype="float32")
    logits = lm(reference["input_ids"])
    assert logits.dtype == np.float32
    total, worst_row = relative_errors(
        logits, np.load(DATA / f"{name}_from_pretrained.npz")["logits"]
    )
    assert total <= 1e-4
    assert worst_row <= 1e-4


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_logits_equal_a_model_cast_as_a_whole(fixtures, name):
    """The logits stored with the checkpoint came from a model whose rotary frequencies had been
    cast to bfloat16 with its weights (model.bfloat16().float()). With those frequencies the logits
    agree; with exact ones, as transformers loads them, they differ by 1e-3."""
    reference = np.load(fixtures / name / "reference.npz")
    lm = qjax.load(fixtures / name, dtype="float32", hf_overrides={"rope_dtype": "bfloat16"})
    total, worst_row = relative_errors(lm(reference["input_ids"]), reference["logits"])
    assert total <= 1e-4
    assert worst_row <= 1e-4


@pytest.mark.parametrize("rope_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_greedy_tokens_equal_transformers(fixtures, name, rope_dtype):
    reference = np.load(fixtures / name / "reference.npz")
    lm = qjax.load(fixtures / name, dtype="float32", hf_overrides={"rope_dtype": rope_dtype})
    # The stored tokens continue the first 12 of the 24 input tokens.
    result = lm.generate(reference["input_ids"][:, :12], max_new_tokens=8)
    np.testing.assert_array_equal(result.token_ids, reference["greedy"])
    if rope_dtype == "float32":
        # These run on past the end token.
        lm = qjax.load(fixtures / name, dtype="float32", hf_overrides={"eos_token_id": None})
        full = lm.generate(reference["input_ids"], max_new_tokens=8)
        expected = np.load(DATA / f"{name}_from_pretrained.npz")["greedy"]
        np.testing.assert_array_equal(full.token_ids, expected)


@pytest.fixture
def copy(fixtures, tmp_path) -> Path:
    shutil.copytree(fixtures / "llama3", tmp_path / "hf")
    for file in (tmp_path / "hf").iterdir():
        file.chmod(0o644)
    (tmp_path / "hf").chmod(0o755)
    return tmp_path / "hf"


def edit(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "unknown model_type 'mamba'; choose one of: .*llama"),
        ({"model_type": None}, "names no model_type"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vocab_size": None}, "lacks the key 'vocab_size'"),
        ({"rope_parameters": {"rope_type": "axial"}}, "unknown rope_type 'axial'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; it must be a positive integer"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"tie_word_embeddings": "false"}, "must be true or false"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1.0"),
        ({"rope_parameters": 5}, "malformed"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope factor is 0.0"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"num_hidden_layers": 3}, r"lacks layers\.2\."),
        ({"num_hidden_layers": 1}, r"has layers\.1\..*which the model lacks"),
        ({"intermediate_size": 128}, r"of shape \(256, 128\), the model \(128, 128\)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already.*awq"),
    ],
)
def test_a_wrong_config_is_refused(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(qjax.CheckpointError, match=message):
        qjax.load(copy)


def test_older_rope_keys_mean_the_same(copy):
    ids = np.arange(24)[None] % 256
    expected = qjax.load(copy)(ids)
    rope = json.loads((copy / "config.json").read_text())["rope_parameters"]
    edit(copy, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    np.testing.assert_array_equal(qjax.load(copy)(ids), expected)


def test_damaged_files_are_refused(copy):
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(qjax.CheckpointError, match=r"model\.safetensors is truncated"):
        qjax.load(copy)
    weights.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(qjax.CheckpointError, match="pickle, which qjax never opens"):
        qjax.load(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(qjax.CheckpointError, match="not a JSON object"):
        qjax.load(copy)


def test_an_index_that_leaves_the_directory_is_refused(copy):
    index = copy / "model.safetensors.index.json"
    for name in ("../model.safetensors", "missing.safetensors"):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(qjax.CheckpointError, match="which is not in"):
            qjax.load(copy)


def test_sharded_and_unknown_tensors(copy):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    expected = qjax.load(copy)(np.arange(8)[None])
    names = sorted(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, copy / file)
    (copy / "model.safetensors").unlink()
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    seen = []
    lm = qjax.load(copy, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(lm(np.arange(8)[None]), expected)
    assert seen == [(1, 2), (2, 2)]
    index.unlink()
    save_file(tensors | {"vision.weight": tensors[names[0]]}, copy / "model.safetensors")
    with pytest.raises(qjax.CheckpointError, match=r"'vision\.weight' belongs to no part"):
        qjax.load(copy)


def test_end_tokens_come_from_both_configs(copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert qjax.load(copy).config.eos_token_id == (2, 7, 9)


def test_a_tied_head_that_is_not_the_embedding_is_refused(copy):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(qjax.CheckpointError, match="is not its embedding"):
        qjax.load(copy)


def test_a_stored_tied_head_is_ignored(copy):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    expected = qjax.load(copy)(np.arange(8)[None])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, copy / "model.safetensors")
    np.testing.assert_array_equal(qjax.load(copy)(np.arange(8)[None]), expected)
