"""The reference model, end to end: what each format costs, and that generation is exact."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_generate import greedy_by_full_passes
from tiny import DISTINCT

import qjax
from qjax.checkpoint.format import FILE
from qjax.data import STDLIB, calibration_data
from qjax.decode import activation_dtype
from qjax.evaluate import compare, evaluate_perplexity
from qjax.text import held_out, token_windows
from qjax.tree import map_named

REFERENCE = ROOT / "checkpoints" / "reference"
PROMPTS = ["def fibonacci(n):\n", "import os\nimport ", "class Stack:\n    def __init__(self"]
SURE = [
    '# Licensed under the Apache License, Version 2.0 (the "License");\n# you may not use this',
    "# Permission is hereby granted, free of charge, to any person obtaining a copy\n# of this",
    "# Redistribution and use in source and binary forms, with or without\n# modification, are",
]
FORMATS = [None, *DISTINCT, "fp8_wo", "w4a8_static", "int8_sq", "int4_gptq"]


@pytest.fixture(scope="module")
def lm() -> qjax.LanguageModel:
    return qjax.load(REFERENCE)


def test_the_checkpoint_is_what_the_project_says(lm):
    size = sum(f.stat().st_size for f in REFERENCE.rglob("*") if f.is_file())
    assert size <= 24 * 2**20
    leaves = dict(qjax.tree.named_leaves(lm.split()[1]))
    assert 8e6 <= sum(leaf.size for leaf in leaves.values()) <= 11e6
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves.values())
    for name, leaf in leaves.items():
        if name.endswith(".weight"):
            assert leaf.shape[1] % 128 == 0, name
    assert lm.config.num_key_value_heads < lm.config.num_attention_heads
    manifest = json.loads((REFERENCE / FILE).read_text())
    assert manifest["model"]["model_type"] == "llama"


def test_the_tokenizer_round_trips_source(lm):
    for document in held_out().documents[:6]:
        assert lm.tokenizer.decode(lm.tokenizer(document)["input_ids"]) == document


def test_the_model_writes_python(lm):
    text = lm.generate("import os\nimport sys\n\ndef main(", max_new_tokens=24).text[0]
    assert ")" in text
    assert ":" in text


@pytest.mark.heavy
def test_what_each_format_costs(lm, tmp_path):
    """8-bit formats stay within 1 % of bfloat16 and of each other; int4 is visibly worse.

    The changes are paired: the interval is of the per-sequence difference of losses.
    """
    names = ["fp8", "int8_wo", "int8", "int4_wo"]
    result = compare(lm, names, sequences=64, seq_len=512, directory=tmp_path)
    rows = {row.preset: row for row in result.rows}
    assert list(rows) == names
    base = result.baseline
    eight_bit = [base.perplexity] + [rows[name].perplexity for name in names[:3]]
    assert max(eight_bit) / min(eight_bit) - 1 <= 0.01
    for name in names[:3]:
        low, high = rows[name].change_ci
        assert -0.01 <= low <= rows[name].change <= high <= 0.01, name
    assert rows["int4_wo"].change_ci[0] > 0.01
    assert rows["int4_wo"].change > 2 * max(rows[name].change for name in names[:3])
    # Scales counted: 16 bits for 128 weights; 32 bits for a channel of 256 inputs or more.
    assert 4 < rows["int4_wo"].bits_per_weight <= 4.25
    assert all(8 < rows[name].bits_per_weight <= 8 + 32 / 256 for name in names[:3])
    assert rows["int4_wo"].bytes_on_disk < rows["int8"].bytes_on_disk < base.bytes_on_disk
    assert all(len(row.layer_errors) == 7 * lm.config.num_hidden_layers for row in result.rows)
    assert all(row.decode_tokens_per_s > 0 for row in result.rows)
    assert {p.name for p in tmp_path.iterdir()} == {base.preset, *names}
    assert int4_bits_on_disk(tmp_path / "int4_wo") <= 4.25


def int4_bits_on_disk(path: Path) -> float:
    """Bits a weight that the quantized leaves add to a directory: saved alone, files counted."""
    state = qjax.restore(path)
    leaves = {name: leaf for name, leaf in state.items() if isinstance(leaf, qjax.QArray)}
    assert all(leaf.values.dtype == jnp.int4 for leaf in leaves.values())
    qjax.save(path.with_name("int4-leaves"), leaves)
    size = sum(f.stat().st_size for f in (path.with_name("int4-leaves") / "arrays").rglob("*"))
    path.with_name("int4-leaves").rename(path / "leaves")
    return size * 8 / sum(leaf.size for leaf in leaves.values())


@pytest.fixture(scope="module")
def batches(lm):
    return calibration_data(
        STDLIB, lm.tokenizer, qjax.CalibConfig(num_samples=8, max_seq_length=256)
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def original(request) -> qjax.LanguageModel:
    return qjax.load(REFERENCE, dtype=request.param)


@pytest.mark.heavy
@pytest.mark.parametrize("preset", FORMATS)
def test_greedy_equals_repeated_full_passes(preset, original, batches):
    """Token for token, in every format, where the model is sure of the next token and where not.

    Quantized activations are not continuous: a difference in the last bit of a sum now and then
    moves one of them to the next number of its format, and every later layer sees other numbers. So
    this holds only because a row's bits do not depend on the rows beside it.
    """
    lm = original if preset is None else qjax.quantize_model(original, preset, batches)
    for texts in (SURE, PROMPTS):
        prompts = [lm.tokenizer(text)["input_ids"] for text in texts]
        result = lm.generate(texts, max_new_tokens=32)
        expected = greedy_by_full_passes(lm, prompts, 32)
        assert [len(row) for row in expected] == result.lengths.tolist() == [32] * len(texts)
        for ids, row, other in zip(prompts, result.token_ids.tolist(), expected, strict=True):
            if activation_dtype(lm.model) == jnp.float32:
                assert row == other
            else:
                assert row == other or gap_at_divergence(lm, ids, row) <= 2


def gap_at_divergence(lm, ids: list[int], tokens: list[int]) -> float:
    """Where `tokens` first leave the greedy path of full passes: the distance of the top two
    logits, in bfloat16 ulps of the larger one."""
    logits = np.asarray(lm([ids + tokens]))[0, len(ids) - 1 : -1].astype(np.float64)
    first = np.flatnonzero(logits.argmax(-1) != np.asarray(tokens))[0]
    second, top = np.sort(logits[first])[-2:]
    return (top - second) / 2.0 ** (np.floor(np.log2(abs(top))) - 7)  # 8 bits of significand


def test_text_ends_at_stop_strings_and_streams_the_same(lm):
    prompt = "def fibonacci(n):\n"
    free = lm.generate(prompt, max_new_tokens=48)
    text = free.text[0]
    stop = text[len(text) // 2 :][:5]
    stopped = lm.generate(prompt, max_new_tokens=48, stop=[stop])
    assert stopped.text[0] == text[: text.index(stop)]
    # No token past the one that completes the stop string.
    assert stop in lm.tokenizer.decode(stopped.token_ids[0])
    assert stop not in lm.tokenizer.decode(stopped.token_ids[0][:-1])
    assert "".join(lm.stream(prompt, max_new_tokens=48)) == text
    assert "".join(lm.stream(prompt, max_new_tokens=48, stop=[stop])) == stopped.text[0]
    assert len(list(lm.stream(prompt, max_new_tokens=48))) > 10
    batch = lm.generate([prompt, "x = "], max_new_tokens=48, stop=stop)
    assert batch.text[0] == stopped.text[0]


def test_streaming_checks_its_arguments_at_once(lm):
    with pytest.raises(qjax.DataError, match="prompt 0 is empty"):
        lm.stream("")
    with pytest.raises(qjax.DataError, match="does not fit the model's context of 1024"):
        lm.stream("def f(x):\n" * 400)


def test_quantizing_twice_is_refused(lm, batches):
    quantized = qjax.quantize_model(lm, "int8_wo")
    with pytest.raises(qjax.DataError, match="quantized already, by 'int8_wo'"):
        qjax.quantize_model(quantized, "int8_wo")
    with pytest.raises(qjax.DataError, match="quantized already, by 'int8_wo'"):
        compare(quantized, ["int8"])
    with pytest.raises(qjax.DataError, match=r"qjax\.calibrate"):
        qjax.quantize_model(lm, "fp8")


@pytest.mark.heavy
def test_damage_shows_in_the_perplexity(lm):
    """One scale 1000 times too large: equality aside, the held-out loss must show it."""
    windows = token_windows(held_out(), lm.tokenizer, count=8, seq_len=256)
    quantized = qjax.quantize_model(lm, "int4_wo")

    def damage(name, leaf):
        if name != "layers.0.mlp.down_proj.weight":
            return leaf
        return dataclasses.replace(leaf, scale=leaf.scale.at[7, 0].multiply(jnp.bfloat16(1000)))

    damaged = map_named(damage, quantized.split()[1])
    before = evaluate_perplexity(quantized, windows)
    after = evaluate_perplexity(quantized.with_state(damaged, None), windows)
    assert after.change_from(before)[1][0] > 0.01
