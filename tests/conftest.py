"""Strict JAX in every test: no silent dtype promotion, and warnings are errors."""

import itertools
import os
from pathlib import Path

# Before JAX is imported: a CPU with several devices, so that shardings are real.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=4"
os.environ["QJAX_COMPILATION_CACHE"] = "0"  # nothing of a test stays in the user's folders
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Linux gives a process 65530 mappings, each compiled program takes a few, and XLA's compiler
# crashes where it gets no more. Thousands of tests in one process come near.
MOST_MAPPINGS = 40_000
CHECK_EVERY = 10  # tests

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Real checkpoints with reference logits, which lie beside the project, not in it."""
    path = SHARED / "fixtures" / "architectures"
    if not path.is_dir():
        pytest.skip(f"the reference checkpoints are not at {path}: a public clone has none")
    return path


_tests_run = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Drop compiled programs before there are too many for the process."""
    maps = Path("/proc/self/maps")
    if next(_tests_run) % CHECK_EVERY or not maps.exists():
        return
    with maps.open("rb") as lines:
        count = sum(1 for _ in lines)
    if count > MOST_MAPPINGS:
        jax.clear_caches()
