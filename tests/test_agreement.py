"""The check of kernels against the reference path, on a model small enough for a CPU."""

import json

import jax
import numpy as np
import pytest
from qjax_kernels import dispatch
from tiny import tiny_lm, token_batches

import qjax
from benchmarks import agreement
from benchmarks.agreement import Row

PROMPTS = token_batches(1, batch=4, seq=6)[0]
WINDOWS = token_batches(1, batch=3, seq=16, seed=1)[0]
GOOD = {
    "preset": "x",
    "batch": 4,
    "positions": 100,
    "share": 0.99,
    "gap": 0.1,
    "perplexity": 7.0,
    "reference_perplexity": 7.0,
    "change": -1e-3,
    "floor_share": 1.0,
    "floor_gap": 0.0,
    "floor_change": 0.0,
}


@pytest.fixture(scope="module")
def lm() -> qjax.LanguageModel:
    return tiny_lm(eos_token_id=())


def test_the_reference_decodes_as_generation_does(lm):
    chosen, gaps = agreement.decode(*lm.split(), lm.check_ids(PROMPTS), None, 5)
    np.testing.assert_array_equal(chosen, lm.generate(PROMPTS.tolist(), 5).token_ids)
    logits = np.asarray(lm(np.concatenate([PROMPTS, chosen], axis=1)))[:, 5:-1]
    second, top = np.moveaxis(np.sort(logits, axis=-1)[..., -2:], -1, 0)
    np.testing.assert_allclose(gaps, top - second, atol=1e-4)


@pytest.mark.parametrize("batch", [4, 2])
@pytest.mark.heavy
def test_a_prepared_model_agrees(lm, batch):
    row = agreement.compare("bf16", lm, PROMPTS, WINDOWS, new=5, batch=batch)
    assert (row.share, row.gap, row.positions) == (1.0, 0.0, 20)
    assert abs(row.change) < 1e-5
    assert row.problems == []
    assert (row.floor_share, row.floor_gap) == (1.0, 0.0)
    # On a CPU everything is a reference.
    assert any("decode_attention: mosaic" in reason for reason in row.skipped)


@pytest.mark.heavy
def test_another_model_does_not(lm, monkeypatch):
    """What prepare returns is another model: all three measures show it."""
    other = qjax.prepare(tiny_lm(seed=1, eos_token_id=()))
    monkeypatch.setattr(agreement.qjax, "prepare", lambda lm: other)
    row = agreement.compare("bf16", lm, PROMPTS, WINDOWS, new=5, batch=4)
    assert len(row.problems) == 3
    chosen, gaps = (
        np.asarray(x) for x in agreement.decode(*lm.split(), lm.check_ids(PROMPTS), None, 5)
    )
    forced, _ = agreement.decode(*other.split(), lm.check_ids(PROMPTS), chosen, 5)
    differs = np.asarray(forced) != chosen
    assert row.share == 1 - differs.mean()
    assert row.gap == gaps[differs].max()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"share": 0.9899}, "1.01% of the tokens differ"),
        ({"share": float("nan")}, "tokens differ"),
        ({"gap": 0.101}, "by 0.10"),
        ({"change": 1.1e-3}, "changes by +0.110%"),
    ],
)
def test_what_is_a_problem(change, problem):
    problems = Row(**GOOD | change).problems
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_the_command_runs_a_process_a_preset(monkeypatch, capsys, tmp_path):
    """One that agrees, one that does not, one that ends without a row."""

    def apart(args, preset):
        rows = {"int8": Row(**GOOD), "fp8": Row(**GOOD | {"share": 0.5})}
        return rows.get(preset, "exit 1: out of memory")

    monkeypatch.setattr(agreement, "_apart", apart)
    out = tmp_path / "agreement.json"
    assert agreement.main(["--presets", "int8", "--out", str(out)]) == 0
    assert agreement.main(["--presets", "int8,fp8,int4_wo", "--out", str(out)]) == 1
    lines = capsys.readouterr().out
    assert "50.00% of the tokens differ" in lines
    assert "int4_wo        WRONG: exit 1: out of memory" in lines
    document = json.loads(out.read_text())
    assert len(document["rows"]) == 2
    assert document["device"] == jax.devices()[0].device_kind
    with pytest.raises(SystemExit):
        agreement.main(["--batch", "48"])


def test_references_take_the_place_of_kernels():
    """Also in functions that were traced before, and not afterwards."""
    implementations = {"kernel": lambda x: x + 1, "xla": lambda x: x + 2}
    run = jax.jit(lambda x: dispatch.dispatch("op", implementations, None, x))
    assert run(1) == 2
    with dispatch.references():
        assert run(1) == 3
        assert dispatch.dispatch("op", implementations, "kernel", 1) == 2
    assert run(1) == 2


@pytest.mark.heavy
def test_of_a_preset_in_a_process_of_its_own(capsys):
    assert agreement.main(["--presets", "bf16", "--new", "2"]) in (0, 1)
    assert "of 128, largest gap" in capsys.readouterr().out
