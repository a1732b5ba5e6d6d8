"""Checkpoints that are written a block at a time, and survive interruptions.

Each finished block is a small checkpoint of its own in a work folder, atomic and verified like any
other. `finish` makes one checkpoint of them: their files are linked, not copied, into
`arrays/<block>/`, and qjax.json comes last.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from qjax._version import __version__
from qjax.checkpoint import format as fmt
from qjax.checkpoint.orbax import ARRAYS, OrbaxReader, replacing, save
from qjax.config import QuantConfig
from qjax.errors import CheckpointError

RUN = "run.json"  # what the work folder is of
NOTES = "block.json"  # what is known of a block besides its leaves


class WorkFolder:
    """Finished blocks of one run.

    Attributes:
      path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
          identity: what makes the run what it is, JSON: recipe, model, data. Equal for the runs
            that may go on with each other's blocks.

        Raises:
          CheckpointError: it is of another run, naming what differs; or something else is there.
        """
        self.path = Path(path).resolve()
        identity = json.loads(json.dumps(identity | {"qjax_version": __version__}))
        run = self.path / RUN
        if run.is_file():
            self._compare(_read_json(run), identity)
        elif self.path.exists() and any(self.path.iterdir()):
            raise CheckpointError(f"{self.path} is no work folder of qjax; choose another path")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            unfinished = run.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(identity, indent=1), encoding="utf-8")
            unfinished.rename(run)

    def put(self, block: str, leaves: Mapping[str, Any], notes: dict[str, Any]) -> None:
        """Write a finished block."""

        def add_notes(directory: Path) -> None:
            (directory / NOTES).write_text(json.dumps(notes), encoding="utf-8")

        save(self.path / block, dict(leaves), overwrite=True, extra=add_notes)

    def read(self, block: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Leaves on the device and notes of a finished block; None: it is not finished.

        Raises:
          CheckpointError: it is damaged.
        """
        folder = self.path / block
        if not (folder / fmt.FILE).is_file():
            return None
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        reader = OrbaxReader(folder)
        leaves = reader.leaves(list(reader.manifest.leaves), lambda name, spec: sharding)
        return leaves, _read_json(folder / NOTES)

    def finish(
        self,
        path: str | os.PathLike[str],
        blocks: list[str],
        *,
        config: QuantConfig,
        model: dict[str, Any],
        overwrite: bool = False,
        extra: Callable[[Path], None] | None = None,
    ) -> None:
        """Make a checkpoint of the finished blocks, and remove the work folder.

        Args:
          path, config, model, overwrite, extra: as those of `qjax.save`.

        Raises:
          CheckpointError: a block is missing or damaged, or `path` exists.
        """
        leaves: dict[str, Any] = {}
        files: dict[str, Any] = {}
        with replacing(Path(path).resolve(), overwrite) as unfinished:
            for block in blocks:
                manifest = fmt.Manifest.read(self.path / block)
                fmt.verify_files(self.path / block, ARRAYS, manifest.files)
                leaves |= {n: record | {"folder": block} for n, record in manifest.leaves.items()}
                for name, record in manifest.files.items():
                    inside = f"{ARRAYS}/{block}/{name.removeprefix(f'{ARRAYS}/')}"
                    files[inside] = record
                    _link(self.path / block / name, unfinished / inside)
            if extra is not None:
                extra(unfinished)
            manifest = fmt.Manifest(
                leaves=leaves,
                files=files,
                model=model,
                quantization=config.to_dict(),
                qjax_version=__version__,
            )
            (unfinished / fmt.FILE).write_text(manifest.to_json(), encoding="utf-8")
        self.remove()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)

    def _compare(self, found: dict[str, Any], identity: dict[str, Any]) -> None:
        differ = [k for k in identity | found if found.get(k) != identity.get(k)]
        if differ:
            raise CheckpointError(
                f"{self.path} has the blocks of another run: its {', '.join(sorted(differ))} "
                "differ; delete the folder, or choose another"
            )


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return data
