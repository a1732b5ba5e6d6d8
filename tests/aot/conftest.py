"""Compiling for GPUs takes a while: `make test-aot` runs these tests, `make test` does not."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.heavy)
            item.add_marker(pytest.mark.aot)


@pytest.fixture(autouse=True, scope="session")
def without_text_of_layouts():
    """What a kernel compiles to is dumped together with the constraints on its layouts, which
    nobody reads, and whose text takes a fifth of all the time."""
    with pytest.MonkeyPatch.context() as patch:
        system = "jax.experimental.mosaic.gpu.constraints.ConstraintSystem"
        patch.setattr(f"{system}.__str__", lambda self: "")
        yield
