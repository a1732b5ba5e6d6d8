"""Blocks that are kept in a work folder, so that an interrupted run goes on where it was."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.blockwise.blocks import Leaves
from qjax.blockwise.pipeline import Job
from qjax.blockwise.report import WeightReport
from qjax.checkpoint.streamed import WorkFolder
from qjax.errors import CheckpointError


class FolderSink:
    """Finished blocks in a WorkFolder.

    Attributes:
      work: the folder.
      blocks: names of the finished ones, in order.
      leaves: of all of them, if they are kept in memory too.
    """

    def __init__(self, work: WorkFolder, *, keep: bool = False) -> None:
        self.work = work
        self.keep = keep
        self.blocks: list[str] = []
        self.leaves: dict[str, Any] = {}
        self._reports: list[WeightReport] = []

    def finished(self, block: str, original: Leaves) -> Leaves | None:
        found = self.work.read(block)
        if found is None:
            return None
        leaves, notes = found
        try:
            reports = [WeightReport(**row) for row in notes["reports"]]
            same = notes["original"] == checksum(original)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.work.path / block} is damaged: {error!r}") from error
        if not same:
            raise CheckpointError(
                f"{self.work.path / block} was made from other weights than the model has now; "
                "delete the work folder, or choose another"
            )
        self._add(block, leaves, reports)
        return leaves

    def put(
        self, block: str, original: Leaves, leaves: Leaves, reports: Sequence[WeightReport]
    ) -> None:
        notes = {
            "original": checksum(original),
            "reports": [dataclasses.asdict(row) for row in reports],
        }
        if leaves:
            self.work.put(block, leaves, notes)
            self._add(block, leaves, reports)

    def reports(self) -> list[WeightReport]:
        return self._reports

    def _add(self, block: str, leaves: Leaves, reports: Sequence[WeightReport]) -> None:
        self.blocks.append(block)
        self._reports += reports
        if self.keep:
            self.leaves |= dict(leaves)


def identity(job: Job, model_type: str, config: Any, dtype: str) -> dict[str, Any]:
    """What two runs must have in common to go on with each other's blocks, besides the weights."""
    tokens = hashlib.sha256()
    for batch in job.batches:
        ids = np.asarray(batch, np.int32)
        tokens.update(repr(ids.shape).encode() + ids.tobytes())
    return {
        "recipe": job.recipe.to_dict(),
        "model_type": model_type,
        "config": config.to_dict(),
        "dtype": dtype,
        "tokens": tokens.hexdigest(),
    }


def checksum(leaves: Leaves) -> dict[str, list[int]]:
    """Name -> two sums of the leaf's bits, each bit pattern times a weight of its place."""
    return {name: [int(part) for part in _checksum(leaf)] for name, leaf in leaves.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).reshape(-1).astype(jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    # Odd multipliers, so that no bit is lost modulo 2**32.
    first = jnp.sum(bits * (place * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)
    second = jnp.sum((bits + 1) * (place * jnp.uint32(40503) | jnp.uint32(1)), dtype=jnp.uint32)
    return jnp.stack([first, second])
