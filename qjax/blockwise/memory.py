"""Weights from a model in memory, and blocks that stay there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qjax.blockwise.blocks import Leaves
from qjax.blockwise.report import WeightReport


class MemorySource:
    """The leaves of a model that is loaded."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        self.leaves = leaves

    def abstract(self) -> dict[str, Any]:
        return {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in self.leaves.items()}

    def read(self, names: Sequence[str]) -> dict[str, jax.Array]:
        return {name: self.leaves[name] for name in names}


class MemorySink:
    """Finished leaves, by their full names, in `leaves`."""

    def __init__(self) -> None:
        self.leaves: dict[str, Any] = {}
        self._reports: list[WeightReport] = []

    def finished(self, block: str, original: Leaves) -> Leaves | None:
        return None

    def put(
        self, block: str, original: Leaves, leaves: Leaves, reports: Sequence[WeightReport]
    ) -> None:
        self.leaves |= dict(leaves)
        self._reports += reports

    def reports(self) -> list[WeightReport]:
        return self._reports
