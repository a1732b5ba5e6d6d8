"""What is in the repository, what a wheel would hold, and what `import qjax` promises."""

import ast
import fnmatch
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

import qjax

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def python(code, **environment):
    """Run code in a fresh interpreter in the repository root, which is then on sys.path."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def tracked():
    """The files that git tracks, as paths from the root."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if git.returncode:
        pytest.skip("not a git checkout")
    names = git.stdout.decode().split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


# ---------------------------------------------------------------- packages


def folders(root, prefix=""):
    """(dotted name, folder) of everything below root that could be imported."""
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name.isidentifier() and folder.name != "__pycache__":
            yield prefix + folder.name, folder
            yield from folders(folder, f"{prefix}{folder.name}.")


@cache
def discovered():
    """Packages by the rules of [tool.setuptools.packages.find]: every folder below `where` whose
    dotted name matches a pattern of `include`."""
    find = SETUPTOOLS["packages"]["find"]
    assert set(find) == {"where", "include"}
    return {
        name: folder
        for where in find["where"]
        for name, folder in folders(ROOT / where)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in find["include"])
    }


def test_the_top_levels_are_qjax_and_qjax_kernels():
    assert {name.partition(".")[0] for name in discovered()} == {"qjax", "qjax_kernels"}
    # And as setuptools itself found them when this environment was made.
    installed = importlib.metadata.distribution(PYPROJECT["project"]["name"])
    assert (installed.read_text("top_level.txt") or "").split() == ["qjax", "qjax_kernels"]


def test_every_source_file_is_in_a_package():
    packages = discovered()
    assert packages["qjax"] == ROOT / "qjax"
    assert packages["qjax_kernels"] == ROOT / "kernels" / "qjax_kernels"
    assert {n: ROOT / path for n, path in SETUPTOOLS["package-dir"].items()} == {
        name: folder for name, folder in packages.items() if "." not in name
    }
    holding = {
        path.parent for top in ("qjax", "qjax_kernels") for path in packages[top].rglob("*.py")
    }
    assert holding == set(packages.values())
    lacking = [str(f.relative_to(ROOT)) for f in holding if not (f / "__init__.py").is_file()]
    assert not lacking, f"these folders have no __init__.py: {lacking}"


def test_data_files_are_declared(tracked):
    """setuptools leaves out what is not Python, unless package-data names it."""
    declared = SETUPTOOLS.get("package-data", {})
    for path in tracked:
        for name, folder in discovered().items():
            if path.suffix != ".py" and (ROOT / path).parent == folder:
                patterns = [*declared.get(name, ()), *declared.get("*", ())]
                found = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
                assert found, f"{path} is in no wheel: declare it in package-data"


def test_the_command_exists():
    for target in PYPROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_the_installed_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", qjax.__version__)
    attribute = SETUPTOOLS["dynamic"]["version"]["attr"]
    module, _, name = attribute.rpartition(".")
    assert getattr(importlib.import_module(module), name) == qjax.__version__


@pytest.mark.parametrize("field", ["readme", "license-files"])
def test_files_that_pyproject_names_exist(field):
    names = PYPROJECT["project"][field]
    for name in [names] if isinstance(names, str) else names:
        assert (ROOT / name).is_file(), f"pyproject.toml names {name}"


# ---------------------------------------------------------------- imports


def test_the_kernels_folder_is_no_package():
    """`import kernels` is Hugging Face's package; transformers looks for it on sys.path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = """
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
"""
    assert python(code) == "False"


def test_importing_qjax_is_lean():
    """What only some calls need is imported by those calls."""
    lazy = ["transformers", "datasets", "matplotlib", "torch", "pandas"]
    code = f"import sys, qjax; print([name for name in {lazy} if name in sys.modules])"
    assert python(code) == "[]"


def test_importing_qjax_touches_no_device():
    """The first JAX computation fixes the backend, and flags set later do nothing."""
    python("import qjax", JAX_PLATFORMS="no_such_backend")
    with pytest.raises(AssertionError, match="no_such_backend"):
        python("import qjax.numerics, jax; jax.devices()", JAX_PLATFORMS="no_such_backend")


# ---------------------------------------------------------------- the tree

MIB = 2**20
# Put together here, so that this file does not mention them.
MACHINE_PATHS = ("/" + "work/",)
REGISTRIES = tuple(".".join(parts) for parts in (("pypi", "org"), ("files", "pythonhosted", "org")))
HUB = ".".join(("huggingface", "co"))


def test_the_tree_is_small(tracked):
    sizes = {path: (ROOT / path).stat().st_size for path in tracked}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) < 48 * MIB, f"the largest files: {largest}"


def test_no_file_names_a_machine_or_a_registry(tracked):
    for path in tracked:
        content = (ROOT / path).read_bytes()
        for text in (*MACHINE_PATHS, *REGISTRIES):
            assert text.encode() not in content, f"{path} mentions {text}"
        # The hub may be linked to from documents.
        links = rb"https://" + HUB.encode() if path.suffix == ".md" else b"(?!)"
        assert HUB.encode() not in re.sub(links, b"", content), f"{path} mentions {HUB}"


def test_no_build_output_is_tracked(tracked):
    for path in tracked:
        assert not {"__pycache__", "build", "dist", ".venv"} & set(path.parts), path
        assert not any(part.endswith(".egg-info") for part in path.parts), path


# ---------------------------------------------------------------- the public names


def exported(path):
    """Names that a module re-exports: `from x import y as y`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]


NAMES = [name for name in exported(ROOT / "qjax" / "__init__.py") if name != "__version__"]


def test_the_package_is_its_table_of_contents():
    assert len(NAMES) == len(set(NAMES)) > 20
    tree = ast.parse((ROOT / "qjax" / "__init__.py").read_text(encoding="utf-8"))
    assert isinstance(tree.body[0], ast.Expr)  # its docstring
    assert all(isinstance(node, ast.ImportFrom) for node in tree.body[1:])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "PRESETS"])
def test_public_names_have_docstrings(name):
    doc = getattr(qjax, name).__doc__ or ""
    # A dataclass without a docstring gets its signature for one.
    assert doc.strip(), f"qjax.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"qjax.{name} has no docstring of its own"


def test_what_public_functions_return_is_public():
    assert typing.get_type_hints(qjax.plan)["return"] is qjax.Plan
    assert typing.get_type_hints(qjax.LanguageModel.generate)["return"] is qjax.Generation
    assert typing.get_type_hints(qjax.preset)["return"] is qjax.QuantConfig
    assert typing.get_type_hints(qjax.load)["return"] is qjax.LanguageModel
    assert typing.get_type_hints(qjax.quantize_array)["return"] is qjax.QArray


def uses():
    """Names of qjax that tests and examples use: qjax.X, or from qjax import X."""
    used = set()
    for path in (*(ROOT / "tests").glob("*.py"), *(ROOT / "examples").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {node.attr} if node.value.id == "qjax" else set()
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qjax"):
                used |= {alias.name for alias in node.names} | set(node.module.split(".")[1:])
    return used


def test_public_names_are_used_by_a_test_or_an_example():
    missing = sorted(set(NAMES) - uses())
    assert not missing, f"no test and no example uses: {missing}"


# ---------------------------------------------------------------- the Makefile's Python


def find_python(**environment: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", str(ROOT / "scripts" / "find-python")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_the_makefile_takes_a_python_that_is_named(tmp_path):
    done = find_python(PATH="/bin:/usr/bin", HOME=str(tmp_path), PYTHON=sys.executable)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


def test_the_makefile_finds_a_python_of_pyenv(tmp_path):
    folder = tmp_path / ".pyenv" / "versions" / "3.12.0" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    (tmp_path / "bin").mkdir()
    for tool in ("ls", "cat"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    done = find_python(PATH=str(tmp_path / "bin"), HOME=str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, str(folder / "python"))


def test_the_makefile_says_what_is_missing(tmp_path):
    (tmp_path / "cat").symlink_to(shutil.which("cat"))
    done = find_python(PATH=str(tmp_path), HOME=str(tmp_path), PYTHON="/bin/false")
    assert done.returncode == 1
    assert "Python 3.12 or newer" in done.stderr
    assert "make PYTHON=" in done.stderr
