"""Every block of the README runs, and its tables are those of the code and of the recorded demo."""

import json
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

import qjax
from qjax.cli import main
from qjax.evaluate.compare import Comparison, Row
from qjax.evaluate.report import COLUMNS, table_rows

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


def test_all_blocks_are_of_a_kind_that_is_run():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert len(PYTHON) >= 2
    assert all(line.startswith(("qjax ", "make ")) for line in SHELL)


@pytest.mark.heavy
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.heavy
def test_qjax_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in SHELL:
        if line.startswith("qjax "):
            assert main(shlex.split(line)[1:]) == 0, line
    assert (tmp_path / "my-int4" / "qjax.json").is_file()


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_make_targets_exist(line):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def recorded() -> Comparison:
    data = json.loads((ROOT / "docs" / "demo" / "comparison.json").read_text())
    return Comparison(
        baseline=Row(**data["baseline"]),
        rows=tuple(Row(**row) for row in data["rows"]),
        setup=data["setup"],
    )


def markdown_rows(first_cell: str) -> list[list[str]]:
    """The cells of the README's table whose header starts with `first_cell`, header first."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    table = [line.strip("|").split("|") for line in lines[start:end] if "---" not in line]
    return [[cell.strip() for cell in row] for row in table]


def test_the_demo_table_is_the_recorded_one():
    header, *rows = markdown_rows("format")
    assert tuple(header) == COLUMNS
    assert [tuple(row) for row in rows] == table_rows(recorded())
    setup = recorded().setup
    assert f"{setup['sequences']} windows of {setup['seq_len']} tokens" in README
    assert f"Python {setup['text']['python']}" in README
    assert (ROOT / "docs" / "demo" / "perplexity_vs_size.png").is_file()


def test_the_preset_table_is_that_of_the_code():
    from qjax.presets import ALIASES

    _, *rows = markdown_rows("preset")
    assert [row[0].strip("`") for row in rows] == list(qjax.PRESETS)
    for name, weights, activations, aliases in rows:
        name = name.strip("`")
        rule = qjax.preset(name).rules[0]
        assert re.findall(r"`(\w+)`", aliases) == [a for a, to in ALIASES.items() if to == name]
        size, act_size = rule.group_size, rule.act_group_size
        assert rule.weight.rpartition("_")[2] in weights
        per = {
            "per_tensor": "a matrix",
            "per_channel": "a channel",
            "per_group": f"for {size} weights",
            "per_block": f"for {size} x {size} weights",
        }
        assert per[rule.granularity] in weights
        assert ("zero point" in weights) == (not rule.symmetric)
        scales = {"float8_e4m3fn": "e4m3 scale", "float8_e8m0fnu": "e8m0 scale"}
        assert scales.get(rule.scale_dtype, "scale") in weights
        if rule.act is None:
            assert activations == "as they are"
        else:
            assert rule.act_scale in activations
            assert ("a token" in activations) == (rule.act_granularity != "per_tensor")
            assert (f"{act_size} inputs" in activations) == (act_size != -1)
            assert scales.get(rule.act_scale_dtype, "scale") in activations


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
