"""The file of measurements: rows, and what they were measured on. Runs add up in one file."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qjax._version import __version__
from qjax.errors import ConfigError

KEY = ("shape", "preset", "kv", "batch", "input", "output", "implementation")
_PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "jax-triton", "triton")


def document(rows: Sequence[Any], commit: str) -> dict[str, Any]:
    """What a file of these rows holds: device, versions, commit, date, rows."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {"qjax": __version__, "python": platform.python_version()} | _versions(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The old rows with the new ones in place of those of the same KEY, sorted by it.

    `merged` lists commit and date of the earlier runs that rows may be from: compare rows of one
    run only, since machines differ by a few percent.

    Raises:
      ConfigError: they are of different devices.
    """
    if old["device"] != new["device"]:
        raise ConfigError(
            f"the file is of {old['device']}, this run of {new['device']}; give another --out"
        )
    rows = {_key(row): row for row in (*old["rows"], *new["rows"])}
    before = [*old.get("merged", []), {"commit": old["commit"], "date": old["date"]}]
    before = [run for i, run in enumerate(before) if run not in before[:i]]
    return {
        **new,
        "versions": old["versions"] | new["versions"],
        "merged": before,
        "rows": [rows[key] for key in sorted(rows)],
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def read(path: Path) -> dict[str, Any]:
    """A file that `write` wrote.

    Raises:
      ConfigError: it is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for name in ("device", "versions", "commit", "date"):
            data[name]
        for row in data["rows"]:
            _key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no file of measurements to add to: {error!r}") from error
    return dict(data)


def write(path: Path, data: Mapping[str, Any]) -> None:
    """One row a line; all of the file or nothing."""
    head = {name: value for name, value in data.items() if name != "rows"}
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)
