"""Every verb as a user runs it: output, JSON, exit codes, and one sentence for bad input."""

import json
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

import qjax
from qjax.cli import VERBS, build_parser, main

REFERENCE = ROOT / "checkpoints" / "reference"
SMALL = ["--sequences", "4", "--seq-len", "64"]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *argv):
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    return json.loads(out)


def test_quantize_then_info_eval_generate(capsys, tmp_path):
    out = tmp_path / "int4"
    summary = run_json(capsys, "quantize", "--preset", "int4_wo", "--out", out)
    assert summary["bytes_after"] < summary["bytes_before"] / 2
    info = run_json(capsys, "info", "--model", out)
    assert info["model"]["quantization"]["name"] == "int4_wo"
    assert info["model"]["leaves"]["int4"] == 7 * info["model"]["config"]["num_hidden_layers"]
    quality = run_json(capsys, "eval", "--model", out, *SMALL)
    assert quality["quantization"] == "int4_wo"
    low, high = quality["perplexity_ci"]
    assert low < quality["perplexity"] < high
    assert len(quality["text"]["sha256"]) == 64
    result = run_json(
        capsys, "generate", "--model", out, "--prompt", "import ", "def ", "--max-new-tokens", 4
    )
    assert [len(row) for row in result["token_ids"]] == [4, 4]
    assert len(result["text"]) == 2
    assert result["stats"]["new_tokens"] == 8
    code, _, err = run(capsys, "quantize", "--preset", "int4_wo", "--out", out)
    assert code == 2
    assert "exists already" in err
    assert run(capsys, "quantize", "--preset", "fp8_wo", "--out", out, "--overwrite")[0] == 0


def test_static_activations_are_calibrated(capsys, tmp_path):
    out = tmp_path / "fp8"
    arguments = ["--calib-samples", "4", "--calib-seq-len", "64"]
    assert run(capsys, "quantize", "--preset", "FP8", "--out", out, *arguments)[0] == 0
    leaf = qjax.restore(out)["layers.0.mlp.up_proj.weight"]
    assert leaf.input.format == "fp8_e4m3"
    assert float(leaf.input.scale) > 0


@pytest.mark.heavy
def test_block_by_block(capsys, tmp_path):
    """From disk to disk and in memory: the same checkpoint, and a report."""
    arguments = ["--preset", "int8_sq", "--kv", "fp8", "--calib-samples", "2",
                 "--calib-seq-len", "32", "--calib-batch-size", "2"]  # fmt: skip
    outs = [tmp_path / "streamed", tmp_path / "loaded"]
    for out, how in zip(outs, (["--stream", "--spill"], []), strict=True):
        summary = run_json(capsys, "quantize", *arguments, "--out", out, *how)
        assert summary["recipe"]["kv"] == "fp8_e4m3"
        rows = summary["report"]["weights"]
        assert len(rows) == 49
        assert {row["method"] for row in rows} == {"smoothquant+rtn"}
        assert summary["report"]["tokens"] == 64
    a, b = (qjax.restore(out) for out in outs)
    assert a.keys() == b.keys()
    assert "layers.0.self_attn.k_scale" in a
    for name in a:
        for x, y in zip(jax.tree.leaves(a[name]), jax.tree.leaves(b[name]), strict=True):
            assert bool((x == y).all()), name
    code, out, _ = run(
        capsys, "quantize", "--preset", "int4_wo", "--group-size", 3, "--skip-misfits", "--plan"
    )
    assert code == 2  # no weight of the model is left
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 40)
    arguments = ["--preset", "fp8", "--calib", text, "--calib-samples", 2, "--calib-seq-len", 16]
    code, out, _ = run(capsys, "quantize", *arguments, "--out", tmp_path / "fp8")
    assert code == 0
    assert "49 weights quantized (49 by rtn), 32 tokens" in out


def test_a_recipe_from_a_file(capsys, tmp_path):
    cfg = qjax.QuantConfig(
        rules=[qjax.Rule(path="mlp", weight="int8"), qjax.Rule(path="lm_head", weight="fp8_e4m3")],
        ignore=["down_proj"],
        name="mine",
    )
    (tmp_path / "recipe.json").write_text(cfg.to_json())
    plan = run_json(capsys, "quantize", "--config", tmp_path / "recipe.json", "--plan")
    after = {row["path"]: row["after"] for row in plan["rows"]}
    assert after["layers.0.mlp.up_proj.weight"] == "int8"
    assert after["layers.0.mlp.down_proj.weight"] == "bfloat16"
    assert after["lm_head.weight"] == "fp8_e4m3"
    code, out, _ = run(capsys, "quantize", "--preset", "int4_wo", "--group-size", 64, "--plan")
    assert code == 0
    assert "layers.0.mlp.up_proj.weight" in out
    assert "total" in out


def test_generate_streams_text(capsys):
    code, out, _ = run(capsys, "generate", "--prompt", "def add(a, b):", "--max-new-tokens", 12)
    assert code == 0
    lm = qjax.load(REFERENCE)
    assert out == "def add(a, b):" + lm.generate("def add(a, b):", 12).text[0] + "\n"
    code, out, _ = run(
        capsys, "generate", "--prompt", "def f(x):", "--max-new-tokens", 40, "--stop", "\\n"
    )
    assert out.count("\n") == 1


def test_generate_takes_the_settings_of_the_library(capsys):
    prompts = ["def add(a, b):", "import os\n"]
    lm = qjax.load(REFERENCE)
    drawn = run_json(
        capsys, "generate", "--prompt", *prompts, "--max-new-tokens", 8, "--temperature", 0.9,
        "--top-k", 50, "--min-p", 0.01, "--repetition-penalty", 1.2, "--seed", 3, 5,
        "--stop-id", 7, 8, "--logprobs", 2,
    )  # fmt: skip
    expected = lm.generate(
        prompts, 8, temperature=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=[3, 5],
        stop=[7, 8], logprobs=2,
    )  # fmt: skip
    assert drawn["text"] == expected.text
    for i, n in enumerate(expected.lengths):
        assert drawn["logprobs"][i] == expected.logprobs[i, :n].tolist()
        assert drawn["top_ids"][i] == expected.top_ids[i, :n].tolist()
        assert drawn["top_logprobs"][i] == expected.top_logprobs[i, :n].tolist()
    arguments = ["generate", "--prompt", prompts[0], "--max-new-tokens", 24]
    plain = run_json(capsys, *arguments)
    assert "logprobs" not in plain
    assert plain["stats"]["speculation"] is None
    guessed = run_json(capsys, *arguments, "--speculate", 4, "--ngram", 2)
    assert guessed["text"] == plain["text"]
    stats = guessed["stats"]["speculation"]
    assert stats["proposed"][0] % 4 == 0
    assert stats["passes"][0] + stats["accepted"][0] >= 23
    code, out, _ = run(capsys, *arguments, "--speculate")
    assert code == 0
    assert out == prompts[0] + plain["text"][0] + "\n"


def test_compare_prints_the_promised_json(capsys, tmp_path):
    page = tmp_path / "page.html"
    data = run_json(capsys, "compare", "--presets", "int8_wo,int4_wo", *SMALL, "--html", page)
    assert set(data) >= {"baseline", "rows"}
    assert [row["preset"] for row in data["rows"]] == ["int8_wo", "int4_wo"]
    keys = {"preset", "perplexity", "perplexity_ci", "bits_per_weight", "bytes_on_disk"}
    assert all(keys <= set(row) for row in [data["baseline"], *data["rows"]])
    assert page.is_file()


@pytest.mark.heavy
def test_tables(capsys):
    code, out, _ = run(capsys, "compare", "--presets", "fp8", *SMALL, "--samples")
    assert code == 0
    assert "bits/weight" in out
    assert "fp8" in out
    assert "Speed on a CPU is not the point" in out
    code, out, _ = run(capsys, "eval", *SMALL)
    assert code == 0
    assert "perplexity" in out
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "W4A16" in out
    assert "weight_only_gemm" in out
    assert "mosaic: it needs an NVIDIA GPU of compute capability 9.0, not cpu (" in out
    assert "no tuned table for this device" in out
    assert "nvfp4: Hopper's tensor cores do not multiply fp4_e2m1 in groups of 16: the input" in out
    assert "\nnvfp4_wo: " not in out  # which a kernel takes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quantize", "--preset", "int5", "--out", "x"], "unknown preset 'int5'; choose one of"),
        (["quantize", "--preset", "int8"], "say where to write with --out"),
        (["quantize", "--config", "nowhere.json", "--out", "x"], "nowhere.json cannot be read"),
        (["quantize", "--preset", "int4_wo", "--group-size", "100", "--plan"], "does not divide"),
        (["quantize", "--preset", "int8", "--ignore", "nothing", "--plan"], "no weight matches"),
        (["quantize", "--preset", "int8", "--calib-samples", "0", "--plan"], "samples is 0"),
        (
            ["quantize", "--preset", "int4_gptq", "--calib", "nothing", "--out", "x"],
            "no calibration",
        ),
        (
            ["quantize", "--preset", "int8", "--stream", "--model", "nowhere", "--out", "x"],
            "nowhere",
        ),
        (["quantize", "--config", "x.json", "--kv", "fp8", "--plan"], "go with --preset"),
        (["generate", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "--prompt", "x" * 9999], "does not fit the model's context of 1024"),
        (["generate", "--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["eval", "--sequences", "1000000"], "ask for fewer"),
        (["eval", "--seq-len", "2000", "--sequences", "1"], "do not fit the model's context"),
        (["eval", "--model", "nowhere"], "no checkpoint directory nowhere"),
        (["eval", "--dtype", "int8"], "choose 'float32' or 'bfloat16'"),
        (["compare", "--presets", "int8,int9"], "unknown preset 'int9'"),
        (["compare", "--presets", ","], "name at least one preset"),
        (["compare", "--presets", "int8_wo, W8A16"], "asked for more than once"),
        (["compare", "--html", "/dev/null/x.html"], "check the path"),
        (["quantize", "--preset", "int8", "--out", "/dev/null/x"], "check the path"),
        (["quantize", "--preset", "int8", "--ignore", "weight", "--plan"], "leaves every weight"),
        (["eval", "--sequences", "1", "--seq-len", "32"], "two sequences or more"),
        (["generate", "--prompt", "x", "--seed", "99999999999999999999"], "seed is"),
        (["generate", "--prompt", "x", "--seed", "1", "2"], "seed has 2 entries for 1 prompts"),
        (["generate", "--prompt", "x", "--min-p", "2"], "min_p is 2.0"),
        (["generate", "--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["generate", "--prompt", "x", "--stop-id", "99999"], "stop token 99999 is outside"),
        (["generate", "--prompt", "x", "--logprobs", "2"], "add --json"),
        (["generate", "--prompt", "x", "--ngram", "2"], "add --speculate"),
        (["generate", "--prompt", "x", "--speculate", "0"], "tokens is 0"),
        (
            ["generate", "--prompt", "x", "--speculate", "--temperature", "1"],
            "set temperature=0 or speculate=None",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2
    sentence = err.strip().splitlines()[-1] if err.strip() else ""
    assert message in err.replace("\n", " ")
    assert sentence
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_ends_with_code_2():
    for argv in (["frobnicate"], ["quantize"], ["quantize", "--preset", "a", "--config", "b"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def test_every_verb_takes_json_and_shows_examples():
    parser = build_parser()
    actions = next(a for a in parser._actions if a.dest == "verb")
    for name in VERBS:
        text = actions.choices[name].format_help()
        assert "--json" in text
        # Tuning is of kernels, not of a model.
        assert ("--model" in text) == (name not in ("tune", "bench"))
        assert f"qjax {name}" in text


def test_the_installed_command():
    command = [sys.executable, "-m", "qjax.cli", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout)["qjax"] == qjax.__version__
    assert "torch" not in done.stderr


def test_narrow_terminals_get_fewer_columns(monkeypatch, capsys):
    from qjax.cli.common import print_table

    columns, row = ("name", "a wide column", "another"), ("x", "1", "2")
    monkeypatch.setenv("COLUMNS", "25")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    print_table(columns, [row], optional=("a wide column",))
    out = capsys.readouterr().out
    assert "another" in out
    assert "wide" not in out
    monkeypatch.setenv("COLUMNS", "60")
    print_table(columns, [row], optional=("a wide column",))
    assert "a wide column" in capsys.readouterr().out


def test_a_weight_that_is_not_finite_is_named(capsys, tmp_path):
    import jax.numpy as jnp

    lm = qjax.load(REFERENCE)
    name = "layers.3.self_attn.q_proj.weight"

    def damage(leaf_name, leaf):
        return leaf.at[1, 2].set(jnp.nan) if leaf_name == name else leaf

    broken = qjax.tree.map_named(damage, lm.split()[1])
    lm.with_state(broken, None).save(tmp_path / "broken")
    for argv in (
        ["quantize", "--preset", "fp8", "--out", tmp_path / "q"],
        ["quantize", "--preset", "int4_wo", "--out", tmp_path / "q"],
        ["compare", "--presets", "int8_wo", *SMALL],
    ):
        code, _, err = run(capsys, *argv, "--model", tmp_path / "broken")
        assert code == 2
        assert f"weight {name} (512, 256) holds NaN" in err.replace("\n", " ")
        assert not (tmp_path / "q").exists()
