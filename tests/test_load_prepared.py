"""Models that are quantized and laid out as they are loaded: the same numbers, in little memory."""

import gc
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_lm, token_batches

import qjax
from qjax import arriving
from qjax.lm import LanguageModel
from qjax.qarray import bits_of
from qjax.runtime import layout
from qjax.tree import named_leaves

PROMPTS = [[5, 9, 13, 4, 8], [7, 6]]
SIZES = {"num_hidden_layers": 4, "eos_token_id": ()}


def original() -> LanguageModel:
    return tiny_lm(dtype=jnp.bfloat16, **SIZES)


@pytest.fixture
def huggingface(tmp_path):
    """The model's directory, as transformers writes it."""
    lm = original()
    folder = tmp_path / "hf"
    folder.mkdir()
    names = {"embed_tokens.embedding": "model.embed_tokens.weight"}
    names["norm.scale"] = "model.norm.weight"
    tensors = {}
    for name, leaf in named_leaves(lm.split()[1]):
        theirs = name.replace("layernorm.scale", "layernorm.weight")
        theirs = names.get(name, theirs if name.startswith("lm_head") else f"model.{theirs}")
        tensors[theirs] = np.asarray(leaf).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    cfg = lm.config
    sizes = {
        name: getattr(cfg, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
        )
    }
    (folder / "config.json").write_text(json.dumps(sizes | {"model_type": "llama"}))
    return folder


class Live:
    """Bytes of arrays that came since `start`, seen around each quantization and each layout."""

    def start(self) -> None:
        gc.collect()
        self.before = {id(x): x for x in jax.live_arrays()}
        self.most = 0

    def look(self) -> None:
        new = [x for x in jax.live_arrays() if id(x) not in self.before]
        # An array made of shards, as Orbax makes them, is listed beside them.
        own = {x.unsafe_buffer_pointer(): x for x in new}.values()
        self.most = max(self.most, bits_of(list(own)) // 8)

    def watched(self, function):
        def call(*args, **kwargs):
            self.look()
            result = function(*args, **kwargs)
            self.look()
            return result

        return call


@pytest.fixture
def live(monkeypatch) -> Live:
    seen = Live()
    seen.start()
    monkeypatch.setattr(arriving, "quantize_leaf", seen.watched(arriving.quantize_leaf))
    monkeypatch.setattr(layout, "_laid_out", seen.watched(layout._laid_out))
    return seen


def size_of(lm: LanguageModel) -> int:
    return bits_of(lm.split()[1]) // 8


def largest(lm: LanguageModel) -> int:
    return max(bits_of(leaf) // 8 for _, leaf in named_leaves(lm.split()[1]))


@pytest.mark.parametrize("kind", ["huggingface", "own", "quantized"])
def test_originals_are_never_all_there(kind, huggingface, live, tmp_path):
    """At most: what the model becomes, one layer twice, and one original weight."""
    lm = original()
    whole, weight = size_of(lm), largest(lm)
    expected = qjax.prepare(qjax.quantize_model(lm, "int4_wo"))
    numbers = [np.array(x) for x in jax.tree.leaves(expected.split()[1])]
    final = size_of(expected)
    layer = max(bits_of(x.get_value()) // 8 for x in expected.model.layers)
    del expected
    path, recipe = huggingface, "int4_wo"
    if kind != "huggingface":
        path = tmp_path / "own"
        if kind == "quantized":
            recipe, lm = None, qjax.quantize_model(lm, "int4_wo")
        lm.save(path)
    del lm
    live.start()
    prepared = qjax.load_prepared(path, quantization=recipe)
    assert size_of(prepared) == final
    bound = final + layer + weight + 1024  # a few constants that JAX keeps
    assert bound < 0.75 * whole
    assert 0 < live.most <= bound
    assert prepared.quantization.name == "int4_wo"
    for x, y in zip(jax.tree.leaves(prepared.split()[1]), numbers, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["huggingface", "own"])
def test_the_numbers_are_those_of_quantize(kind, huggingface, tmp_path):
    """With static scales, and in another type."""
    lm = original()
    stats = qjax.calibrate(lm.model, token_batches(1))
    path = huggingface if kind == "huggingface" else tmp_path / "own"
    if kind == "own":
        lm.save(path)
    got = qjax.load(path, "float32", quantization="w4a8_static", stats=stats)
    whole = qjax.load(path, "float32")
    expected = qjax.quantize(whole.split()[1], qjax.preset("w4a8_static"), stats)
    for (name, leaf), (_, other) in zip(
        named_leaves(got.split()[1]), named_leaves(expected), strict=True
    ):
        assert jax.tree.structure(leaf) == jax.tree.structure(other), name
        for x, y in zip(jax.tree.leaves(leaf), jax.tree.leaves(other), strict=True):
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_another_device(huggingface):
    """Weights go there, and it generates there."""
    device = jax.devices()[1]
    tokens = qjax.load_prepared(huggingface, quantization="w4a8").generate(PROMPTS, 8).token_ids
    there = qjax.load_prepared(huggingface, quantization="w4a8", device=device)
    assert all(x.devices() == {device} for x in jax.tree.leaves(there.split()[1]))
    drawn = {"temperature": 1.0, "logprobs": 1, "stop": [3], "repetition_penalty": 1.1}
    assert there.generate(PROMPTS, 4, **drawn).logprobs.shape[0] == 2
    np.testing.assert_array_equal(there.generate(PROMPTS, 8).token_ids, tokens)


def test_what_cannot_be_quantized_on_the_way(huggingface, tmp_path):
    with pytest.raises(qjax.DataError, match=r"qjax\.calibrate"):
        qjax.load(huggingface, quantization="fp8")
    with pytest.raises(qjax.ConfigError, match="unknown preset 'int3'"):
        qjax.load(huggingface, quantization="int3")
    qjax.quantize_model(original(), "int8").save(tmp_path / "q")
    with pytest.raises(qjax.DataError, match="quantized already, by 'int8'"):
        qjax.load(tmp_path / "q", quantization="int4_wo")
    tensors = huggingface / "model.safetensors"
    broken = load_file(tensors)
    broken["model.layers.3.mlp.up_proj.weight"][4, 5] = np.nan
    save_file(broken, tensors)
    with pytest.raises(qjax.DataError, match=r"layers\.3\.mlp\.up_proj\.weight .*NaN"):
        qjax.load(huggingface, quantization="int4_wo")
