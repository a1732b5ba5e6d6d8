"""Imports go one way, from formats up to the command line. Read with `ast`; nothing is run."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# A module or package may import those before it, and nothing behind it. A new file of qjax has
# to be given its place here. Within a package any order without cycles will do.
ORDER = (
    "_version",
    "errors",
    "compile_cache",
    # numbers and arrays
    "numerics",
    "packing",
    "blocks",
    "invariants",
    "qarray",
    "tree",
    # recipes
    "formats",
    "methods",
    "config",
    "presets",
    # pytree -> pytree
    "algorithms",
    "assign",
    "quantize",
    "arriving",
    "plan",
    # models
    "cache",
    "attention",
    "activations",
    "ops",
    "nn",
    "structure",
    "models",
    "runtime",
    # models and data
    "calibrate",
    "checkpoint",
    "blockwise",
    "text",
    "data",
    "sampling",
    "speculate",
    "prompts",
    "decode",
    "request",
    "result",
    "generate",
    "lm",
    "prepare",
    "quantize_model",
    "quantize_checkpoint",
    "evaluate",
    "bench",
    # the table of contents, and the entry points
    "__init__",
    "cli",
)
KERNELS = "qjax_kernels"
# Only here is qjax imported inside of functions: a command must not pay for the others.
LAZY = "cli"

SOURCES = {"qjax": ROOT / "qjax", KERNELS: ROOT / "kernels" / KERNELS}


def module_name(path: Path, package: str) -> str:
    parts = path.relative_to(SOURCES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path, package): path
    for package, root in SOURCES.items()
    for path in sorted(root.rglob("*.py"))
}


def place(module: str) -> int:
    """Index in ORDER; ValueError if the module has no place."""
    parts = module.split(".")
    return ORDER.index(parts[1] if len(parts) > 1 else "__init__")


def imported(node: ast.AST) -> list[str]:
    """Our modules that an import statement names; names of other packages are left out."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        # `from qjax import ops` means the module, `from qjax import Rule` the package.
        base = node.module or ""
        names = [
            name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names
        ]
    else:
        return []
    return [name for name in names if name.partition(".")[0] in SOURCES]


def imports_of(module: str) -> Iterator[tuple[str, int, bool]]:
    """(imported module of ours, line, whether inside of a function)."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            for name in imported(child):
                yield name, child.lineno, lazy
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, lazy or inside)

    yield from visit(ast.parse(MODULES[module].read_text(encoding="utf-8")), False)


IMPORTS = {module: list(imports_of(module)) for module in MODULES}
QJAX = [module for module in MODULES if module.partition(".")[0] == "qjax"]


def where(module: str, line: int) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{line}"


def test_every_module_has_a_place():
    missing = [m for m in QJAX if m.count(".") and m.split(".")[1] not in ORDER]
    assert not missing, f"give these a place in ORDER: {missing}"
    known = {m.split(".")[1] for m in QJAX if m.count(".")} | {"__init__"}
    gone = [name for name in ORDER if name not in known]
    assert not gone, f"these are in ORDER and not in qjax/: {gone}"


@pytest.mark.parametrize("module", QJAX)
def test_imports_go_one_way(module):
    for name, line, _ in IMPORTS[module]:
        if name.partition(".")[0] == KERNELS:
            continue
        inside = module.count(".") and name.split(".")[:2] == module.split(".")[:2]
        assert inside or place(name) < place(module), (
            f"{where(module, line)} imports {name}, which is not before it in ORDER"
        )


def test_there_are_no_cycles():
    graph = {
        module: {name for name, _, lazy in imports if not lazy and name != module}
        for module, imports in IMPORTS.items()
    }
    # A submodule's package runs before it: what __init__ imports of its own is no cycle.
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [m for m in QJAX if m.split(".")[1:2] != [LAZY]])
def test_qjax_is_not_imported_inside_of_functions(module):
    lazy = [where(module, line) for _, line, inside in IMPORTS[module] if inside]
    assert not lazy, f"import these at the top of the file: {lazy}"


def test_only_ops_imports_the_kernels():
    """And the commands that are about the kernels themselves, which no model code sees."""
    users = {m for m in QJAX for name, *_ in IMPORTS[m] if name.partition(".")[0] == KERNELS}
    assert users == {"qjax.ops", "qjax.cli.info", "qjax.cli.tune"}


def test_the_kernels_import_nothing_from_qjax():
    modules = [module for module in MODULES if module not in QJAX]
    assert len(modules) > 5
    for module in modules:
        for name, line, _ in IMPORTS[module]:
            assert name.partition(".")[0] == KERNELS, f"{where(module, line)} imports {name}"


def test_algorithms_know_no_models():
    """Arrays in, arrays out: an algorithm imports formats, arrays and rules only."""
    for module in QJAX:
        if module.startswith("qjax.algorithms"):
            for name, line, _ in IMPORTS[module]:
                allowed = place(name) <= place("qjax.algorithms")
                assert allowed, f"{where(module, line)} imports {name}"


def test_imports_are_absolute():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{where(module, node.lineno)} is a relative import"


# ---------------------------------------------------------------- the reader itself


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import qjax.ops", ["qjax.ops"]),
        ("from qjax import ops", ["qjax.ops"]),
        ("from qjax import Rule", ["qjax"]),
        ("from qjax.ops import linear, embed", ["qjax.ops", "qjax.ops"]),
        ("from qjax.nn import linear", ["qjax.nn.linear"]),
        ("import qjax_kernels.dispatch as d", ["qjax_kernels.dispatch"]),
        ("import qjaxlike, jax", []),
        ("from jax import numpy", []),
    ],
)
def test_import_statements_are_understood(source, expected):
    assert imported(ast.parse(source).body[0]) == expected
