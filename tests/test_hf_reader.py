"""Hugging Face directories read some weights at a time: what `qjax.load` reads at once."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import token_batches

import qjax
from qjax.checkpoint.hf_reader import HuggingFaceReader
from qjax.errors import CheckpointError
from qjax.evaluate.compare import trees_equal
from qjax.tree import leaves_by_name

# Fused weights, experts, transposed weights, tied heads, several files.
NAMES = ("llama3", "phi3", "mixtral", "gpt2", "gemma2", "falcon40b", "opt", "mpt", "qwen3_moe")


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_load(fixtures, name):
    expected = leaves_by_name(qjax.load(fixtures / name, dtype="float32").split()[1])
    reader = HuggingFaceReader(fixtures / name, "float32")
    abstract = reader.abstract()
    assert abstract.keys() == expected.keys()
    # In three parts, of which each is read for itself.
    names = list(abstract)
    for part in (names[::3], names[1::3], names[2::3]):
        found = reader.read(part)
        assert list(found) == part
        for leaf in part:
            assert abstract[leaf].shape == found[leaf].shape
            np.testing.assert_array_equal(found[leaf], expected[leaf], err_msg=leaf)


@pytest.fixture
def copy(fixtures, tmp_path):
    return shutil.copytree(fixtures / "llama2", tmp_path / "copy")


def test_streamed_from_hugging_face(copy, tmp_path):
    lm = qjax.load(copy, dtype="float32")
    vocabulary = lm.config.vocab_size
    batches = [batch % vocabulary for batch in token_batches(6)]
    cfg = qjax.preset("int4_gptq", group_size=-1)
    report = qjax.quantize_checkpoint(copy, tmp_path / "q", cfg, batches, dtype="float32")
    loaded = qjax.load(tmp_path / "q")
    expected = qjax.quantize_model(lm, cfg, batches)
    assert trees_equal(loaded.split()[1], expected.split()[1])
    assert report.weights == expected.quantization_report.weights
    assert jax.tree.leaves(loaded.split()[1])[0].dtype == "float32"


def test_files_that_are_no_model(copy):
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    missing = {n: tensor for n, tensor in tensors.items() if n != name}
    save_file(missing, file)
    with pytest.raises(CheckpointError, match=r"it lacks layers\.0\.mlp\.up_proj\.weight"):
        HuggingFaceReader(copy)
    save_file(tensors | {name: tensors[name][:-1]}, file)
    reader = HuggingFaceReader(copy)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight of shape"):
        reader.read(["layers.0.mlp.up_proj.weight"])
    save_file(tensors | {"model.layers.0.mlp.more.weight": tensors[name]}, file)
    with pytest.raises(CheckpointError, match="which the model lacks"):
        HuggingFaceReader(copy)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        HuggingFaceReader(copy)


def test_a_tied_model_with_another_head(copy):
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table}, file)
    reader = HuggingFaceReader(copy)
    assert "lm_head.weight" not in reader.abstract()
    assert reader.read(["embed_tokens.embedding"])["embed_tokens.embedding"].shape == table.shape
    save_file(tensors | {"lm_head.weight": table + 1}, file)
    with pytest.raises(CheckpointError, match="is tied"):
        HuggingFaceReader(copy).read(["embed_tokens.embedding"])
