"""Compiling for GPUs takes a while: `make test-aot` runs these tests, `make test` does not."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.heavy)
            item.add_marker(pytest.mark.aot)
