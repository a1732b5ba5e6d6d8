"""The reference model's training: resumes exactly, never sees held-out text, exports faithfully."""

import importlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from safetensors.flax import load_file
from tiny import tiny_config
from transformers import AutoTokenizer

from qjax.errors import ConfigError, DataError
from qjax.models.llama import HF_NAMES, Llama, LlamaConfig
from qjax.text import read_modules
from qjax.tree import named_leaves

UNSEEN = read_modules(("heapq.py", "html/parser.py"))
DOCUMENTS = read_modules(("ast.py", "codecs.py", "enum.py", "uuid.py")).documents
MODEL = tiny_config(
    vocab_size=320, hidden_size=32, intermediate_size=64, head_dim=8, num_hidden_layers=1
)
LICENSE = "".join(f"# Line {i} of a license that many files start with.\n" for i in range(20))
FOREIGN = "".join(f"def function_{i}(x):\n    return x + {i}\n\n" for i in range(40))


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float32
        yield


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("train_reference")


@pytest.fixture(scope="module")
def corpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("reference_corpus")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.train_tokenizer(DOCUMENTS, MODEL.vocab_size)


def training(example, corpus, tokenizer):
    """A Trainer with tiny sizes, the training tokens and the held-out windows."""
    cfg = example.TrainConfig(
        steps=12, batch=4, length=32, warmup=2, steps_per_dispatch=2, eval_every=4
    )
    tokens = np.concatenate(corpus.tokenize(tokenizer, DOCUMENTS))
    unseen = corpus.HeldOut(UNSEEN, corpus.tokenize(tokenizer, UNSEEN.documents), cfg.length)
    return example.Trainer(MODEL, cfg), tokens, unseen


@pytest.mark.heavy
def test_an_interrupted_run_ends_in_the_same_weights(example, corpus, tokenizer, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    trainer, tokens, unseen = training(example, corpus, tokenizer)
    expected = trainer.start()
    example.train(trainer, expected, tokens, unseen, whole, until=math.inf)

    example.train(trainer, trainer.start(), tokens, unseen, parts, until=0)  # one dispatch
    trainer, tokens, unseen = training(example, corpus, tokenizer)
    resumed = trainer.start()
    resumed.restore(parts)
    assert resumed.step == 2
    example.train(trainer, resumed, tokens, unseen, parts, until=math.inf)

    assert resumed.step == expected.step == 12
    assert resumed.train == expected.train
    assert resumed.train[-1][1] < resumed.train[0][1]
    assert [step for step, *_ in resumed.held_out] == [2, 4, 8, 12]
    trees = (run.params for run in (resumed, expected))
    for (name, ours), (_, theirs) in zip(*map(named_leaves, trees), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_steps_must_fill_the_dispatches(example):
    with pytest.raises(ConfigError, match=r"steps=30 .* 20 steps"):
        example.TrainConfig(steps=30)


def test_the_learning_rate_rises_holds_and_falls(example):
    cfg = example.TrainConfig(steps=1000, warmup=100, decay=0.4, learning_rate=1.0)
    rates = [float(cfg.rate(jnp.int32(step))) for step in (0, 49, 100, 600, 800, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 0.5, 0])


def test_files_that_share_the_held_out_text_are_excluded(corpus, tmp_path):
    held_out = UNSEEN.documents[0]
    lines = held_out.splitlines(keepends=True)
    older = "".join(line for i, line in enumerate(lines) if i % 40)  # a line in 40 is not there
    files = {
        "heapq.py": held_out,
        "package/_vendor/queue.py": LICENSE + older,
        "package/part.py": FOREIGN + "".join(lines[200:240]),
        "package/foreign.py": LICENSE + FOREIGN,
        "package/copy.py": LICENSE + FOREIGN,
        "package/short.py": "pass\n",
        "package/latin.py": b"# \xe9\n" * 100,
        "qjax/ours.py": FOREIGN + "# ours\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    licensed = [LICENSE + held_out]  # a license in common says nothing
    built = corpus.build_corpus([tmp_path], licensed)
    assert built.documents == [LICENSE + FOREIGN]
    assert built.report["files"] == 1
    excluded = ["heapq.py", "package/_vendor/queue.py", "package/part.py"]
    assert built.report["excluded_sample"] == excluded
    with pytest.raises(DataError, match="no Python source"):
        corpus.build_corpus([tmp_path / "nothing"], licensed)


def test_held_out_windows_predict_each_token_once(corpus, tokenizer):
    documents = corpus.tokenize(tokenizer, UNSEEN.documents)
    unseen = corpus.HeldOut(UNSEEN, documents, length=32, batch=4)
    inputs, targets, real = np.moveaxis(unseen.batches, 2, 0).reshape(3, -1, 32)
    text = np.concatenate([ids[1:] for ids in documents])
    np.testing.assert_array_equal(targets[real == 1], text)
    assert unseen.tokens == text.size
    assert inputs[0, 0] == tokenizer.token_to_id(corpus.END_OF_TEXT)
    np.testing.assert_array_equal(inputs[0, 1:], targets[0, :-1])
    # A nat a token, in bits a byte.
    assert unseen.scores(unseen.tokens) == pytest.approx(
        (1, unseen.tokens / unseen.bytes / math.log(2))
    )


def test_the_export_holds_the_same_weights(example, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("reference_export"), "SHARD_BYTES", 20_000
    )  # several shards
    model = Llama(MODEL, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    example.export(tmp_path, MODEL, nnx.state(model), tokenizer)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    loaded = {}
    for shard in shards:
        for name, array in load_file(shard).items():
            assert index["weight_map"][name] == shard.name
            ours = [re.sub(a, b, name) for a, b in HF_NAMES if re.fullmatch(a, name)]
            assert len(ours) == 1, name
            loaded[ours[0]] = array
    weights = dict(named_leaves(nnx.state(model)))
    assert loaded.keys() == weights.keys()
    for name, array in loaded.items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, weights[name].astype(jnp.bfloat16), err_msg=name)

    back = example.load_exported(tmp_path, nnx.state(model))
    for name, array in named_leaves(back):
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, loaded[name].astype(jnp.float32), err_msg=name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert LlamaConfig.from_hf(config | {"eos_token_id": 2}) == MODEL


def test_the_exported_tokenizer_round_trips(example, corpus, tokenizer, tmp_path):
    model = Llama(MODEL, rngs=nnx.Rngs(0))
    example.export(tmp_path, MODEL, nnx.state(model), tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == loaded.pad_token == corpus.END_OF_TEXT
    assert loaded.eos_token_id == 0
    odd = "\tx = 'é漢🎉' \r\n  \n\n   y.z , 12345 n't ! <|endoftext|>"
    for text in (*UNSEEN.documents, odd, "def f(n):\n"):
        assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert loaded.tokenize("12") == ["1", "2"]
    # Text that spells the special token is text in the corpus.
    (ids,) = corpus.tokenize(tokenizer, [corpus.END_OF_TEXT])
    assert list(ids).count(0) == 1


def test_the_report_is_json_and_has_a_plot(example, corpus, tokenizer, tmp_path):
    trainer, _, unseen = training(example, corpus, tokenizer)
    run = trainer.start()
    run.step, run.train, run.held_out = 2, [[2, 5.0]], [[2, 4.0, 1.5]]
    calls = [{"command": "python", "steps": [0, 2], "seconds": 2.0, "training_seconds": 1.0}]
    report = example.make_report(MODEL, trainer.cfg, run, unseen, calls)
    example.write_report(tmp_path, report)
    read = json.loads((tmp_path / "training.json").read_text())
    assert read["result"]["tokens"] == 2 * 4 * 32
    assert read["result"]["perplexity"] == pytest.approx(math.exp(4), abs=1e-4)
    assert read["held_out"]["sha256"] == UNSEEN.sha256
    assert read["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
