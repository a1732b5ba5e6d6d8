"""Perplexity, intervals, per-layer error, comparison and report, on models small enough to redo."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_lm, token_batches

import qjax
from qjax.evaluate import evaluate_perplexity, layer_errors, write_report
from qjax.evaluate.bootstrap import mean_interval
from qjax.evaluate.compare import Comparison, Row
from qjax.evaluate.perplexity import Perplexity
from qjax.evaluate.report import COLUMNS, table_rows
from qjax.text import CALIBRATION, HELD_OUT, calibration, held_out, read_modules, token_windows


def test_perplexity_equals_a_float64_recount():
    lm = tiny_lm()
    windows = np.concatenate(token_batches(3, batch=2, seq=16))[:5]  # no multiple of the batch
    seen = []
    result = evaluate_perplexity(
        lm, windows, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    logits = np.asarray(lm(windows), np.float64)
    top = logits.max(-1, keepdims=True)
    log_probability = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probability[:, :-1], windows[:, 1:, None], -1)[..., 0]
    # float32 logsumexp of logits of some 10: relative rounding 6e-8 of each, so 1e-5 is ample.
    np.testing.assert_allclose(result.nll, -chosen.mean(1), rtol=1e-5)
    assert result.perplexity == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)
    assert result.tokens == 5 * 15
    assert result.bits_per_byte is None
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_bits_per_byte():
    result = Perplexity(nll=np.array([1.0, 2.0]), tokens=10, bytes=30)
    assert result.bits_per_byte == pytest.approx(1.5 * 10 / 30 / np.log(2))


def test_bootstrap_interval_of_a_mean():
    """The percentile interval approaches mean +- 1.96 sd / sqrt(n) for many normal values."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    # 4000 resamples estimate a 2.5 % quantile to about 3 % of the half-width (normal theory).
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean_interval(values) == (low, high)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    base = Perplexity(nll=rng.normal(2, 0.5, 64), tokens=64, bytes=64)
    other = Perplexity(nll=base.nll + rng.normal(0.01, 0.005, 64), tokens=64, bytes=64)
    change, (low, high) = other.change_from(base)
    assert change == pytest.approx(np.expm1((other.nll - base.nll).mean()))
    assert 0 < low < change < high < 0.02
    wide = np.log(other.interval[1]) - np.log(other.interval[0])
    assert high - low < wide / 20
    with pytest.raises(qjax.DataError, match="same windows"):
        other.change_from(Perplexity(nll=base.nll[:3], tokens=64, bytes=64))


def test_broken_models_and_windows_are_refused():
    lm = tiny_lm()
    with pytest.raises(qjax.DataError, match="two tokens"):
        evaluate_perplexity(lm, np.zeros((1, 1), np.int32))
    with pytest.raises(qjax.DataError, match="context"):
        evaluate_perplexity(lm, np.zeros((1, 300), np.int32))
    broken = qjax.tree.map_named(lambda name, x: x * jnp.inf, lm.split()[1])
    with pytest.raises(qjax.DataError, match="window 0 is nan"):
        evaluate_perplexity(lm.with_state(broken, None), token_batches(1)[0])


def test_layer_errors_equal_a_numpy_recount():
    lm = tiny_lm()
    _, state = lm.split()
    quantized = qjax.quantize(state, qjax.preset("int4_wo"))
    errors = layer_errors(state, quantized)
    assert len(errors) == 14
    name = "layers.1.mlp.up_proj.weight"
    weight = np.asarray(dict(qjax.tree.named_leaves(state))[name], np.float64)
    q = dict(qjax.tree.named_leaves(quantized))[name]
    scale = np.repeat(np.asarray(q.scale, np.float64), 128, axis=1)
    error = np.linalg.norm(weight - np.asarray(q.values, np.float64) * scale)
    assert errors[name] == pytest.approx(error / np.linalg.norm(weight), rel=1e-4)
    # A step is 2 amax / 14 of a group; uniform rounding error is step / sqrt(12). For normal
    # weights amax of 128 is 2.6 sd, so the error is about 0.11 of the norm.
    assert 0.08 < errors[name] < 0.14


class Words:
    """A tokenizer of sorts: one token a word."""

    def __call__(self, text, **_):
        return {"input_ids": [hash(word) % 256 for word in text.split()]}


def test_token_windows():
    text = held_out()
    windows = token_windows(text, Words(), count=10, seq_len=32)
    assert windows.shape == (10, 32)
    words = [w for document in text.documents for w in document.split()]
    assert windows[0].tolist() == Words()(" ".join(words[:32]))["input_ids"]
    with pytest.raises(qjax.DataError, match="windows of 32 tokens, not 1000000"):
        token_windows(text, Words(), count=1_000_000, seq_len=32)
    with pytest.raises(qjax.DataError, match="2 or more tokens"):
        token_windows(text, Words(), count=1, seq_len=1)


def test_texts_are_disjoint_and_carry_their_provenance(tmp_path):
    assert not set(HELD_OUT) & set(CALIBRATION)
    text = held_out()
    assert len(text.documents) == len(HELD_OUT)
    assert re.fullmatch(r"[0-9a-f]{64}", text.sha256)
    assert text.sha256 == held_out().sha256 != calibration().sha256
    assert text.provenance()["bytes"] > 500_000
    (tmp_path / "cmd.py").write_text("x")
    changed = read_modules(("cmd.py",), tmp_path)
    (tmp_path / "cmd.py").write_text("y")
    assert read_modules(("cmd.py",), tmp_path).sha256 != changed.sha256
    with pytest.raises(qjax.DataError, match=r"lacks the source of csv\.py, wave\.py"):
        read_modules(("csv.py", "cmd.py", "wave.py"), tmp_path)


def row(name: str, perplexity: float, change: float, layers: dict[str, float]) -> Row:
    return Row(
        preset=name,
        perplexity=perplexity,
        perplexity_ci=(perplexity - 1, perplexity + 1),
        change=change,
        change_ci=(change - 0.001, change + 0.001),
        bits_per_byte=0.7,
        bits_per_weight=4.125,
        model_bits_per_weight=6.0,
        bytes_on_disk=8 * 2**20,
        prefill_tokens_per_s=100.0,
        decode_tokens_per_s=50.0,
        sample="<b>bold & brave</b>",
        layer_errors=layers,
    )


def test_report(tmp_path):
    comparison = Comparison(
        baseline=row("bfloat16", 5.0, 0.0, {}),
        rows=(row("int4_wo", 5.5, 0.1, {"layers.10.w": 0.1, "layers.2.w": 0.2}),),
        setup={
            "text": {"python": "3.12.1", "sha256": "ab" * 32},
            "sequences": 2,
            "seq_len": 8,
            "prompt": "def",
            "device": "cpu",
            "jax": "0",
        },
    )
    json.dumps(comparison.to_dict())
    cells = table_rows(comparison)
    assert [len(line) for line in cells] == [len(COLUMNS)] * 2
    assert cells[1][:4] == ("int4_wo", "4.125", "8.0 MiB", "5.5000")
    assert cells[1][5] == "+10.00%"
    files = write_report(comparison, tmp_path / "new" / "index.html")
    page = files[0].read_text()
    assert "&lt;b&gt;bold &amp; brave" in page
    assert "<b>bold" not in page
    assert page.count("data:image/png;base64,") == 2
    assert all(cell in page for cell in cells[1] if "<" not in cell)
    assert [f.name for f in files[1:]] == ["perplexity_vs_size.png", "layer_errors.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files[1:])
