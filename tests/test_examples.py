"""examples/: what they print is what they promise."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import qjax

EXAMPLE = ROOT / "examples" / "your_own_model.py"
QUANTIZED = {"MLP": 3, "Transformer": 12}  # weights in fp8, see the models


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the example prints, by name of the model. Run as a user would, from elsewhere."""
    directory = tmp_path_factory.mktemp("elsewhere")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE)],
        cwd=directory,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list(directory.iterdir()) == []
    pattern = r"^(\w+): ([\d,]+) -> ([\d,]+) bytes, .* output ([\d.]+)%, .* bit for bit: (\w+)$"
    return {name: rest for name, *rest in re.findall(pattern, run.stdout, re.MULTILINE)}


def error_bound(products):
    """Relative error of the output after so many fp8 x fp8 products.

    e4m3 has 3 bits of mantissa: rounding is off by at most 2^-4 of a number, evenly spread, so by
    2^-4 / sqrt(3) in the root mean square. Both operands are rounded; a sum of products with
    random signs has the relative error of its terms; layers err independently, so squares add.
    """
    return (products * 2 * (2.0**-4) ** 2 / 3) ** 0.5


@pytest.mark.parametrize("name", QUANTIZED)
def test_your_own_model(printed, name):
    before, after, percent, bit_equal = printed[name]
    assert bit_equal == "True"
    # Rounding errors are half as large for a mantissa near 2, and the error of a single product
    # is there in any case, or nothing was quantized.
    assert error_bound(1) / 2 < float(percent) / 100 < error_bound(QUANTIZED[name])
    # float32 -> 8 bits, and what stays float32: biases, norms and the embedding.
    assert 0.25 < int(after.replace(",", "")) / int(before.replace(",", "")) < 0.40


def test_the_heart_is_fifteen_lines():
    """The promise: about 15 lines between a model of one's own and a quantized checkpoint."""
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    heart = functions["quantize_and_save"]
    assert heart.end_lineno - heart.lineno + 1 <= 15
    # Nothing of qjax is used outside of it.
    users = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "qjax"
    ]
    assert users
    assert all(heart.lineno < line <= heart.end_lineno for line in users)
    imports = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [line for line in imports if "qjax" in line] == ["import qjax"]


FAMILIES = {
    # file -> what it prints
    "quantize_int8.py": r"layers\.0\.mlp\.down_proj\.weight: alpha [\d.]+, its input is divided by "
    r"mlp\.up_proj\nperplexity [\d.]+, change [+-]0\.\d+%",
    "quantize_int4.py": r"int4_wo: perplexity \+[\d.]+%\nint4_awq: perplexity \+[\d.]+%\n"
    r"int4_gptq_imatrix: ",
    "quantize_large.py": r"block 8 of 8\n49 weights quantized \(49 by awq\+clip\+rtn\)",
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_methods(name, tmp_path):
    """As a user would run them; each leaves a checkpoint of the reference model that loads."""
    run = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name),
         str(ROOT / "checkpoints" / "reference"), str(tmp_path / "out")],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert re.search(FAMILIES[name], run.stdout), run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert qjax.load(tmp_path / "out").quantization is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_short(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 30
