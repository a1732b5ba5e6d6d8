"""Measurements -> a tuned table, written after each of them."""

import dataclasses
import datetime
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax_kernels.tuned import schema
from qjax_kernels.tuned.schema import Entry, Table
from qjax_kernels.tuning.jobs import Job

CLOSE = 1.02  # times the best: of such configurations one that is in the table already is taken


@dataclasses.dataclass
class Record:
    """A table that grows.

    Attributes:
      path: its file.
      commit: of the code measured.
      entries: by key and size.
      device, versions: of the workers; empty before one has said them.
    """

    path: Path
    commit: str
    entries: dict[tuple, Entry] = dataclasses.field(default_factory=dict)
    device: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @staticmethod
    def at(path: Path, commit: str, keep: bool = True) -> "Record":
        """A record that starts with what the file has, if there is one and `keep` is set.

        Raises:
          TableError: it is not a table.
        """
        record = Record(path, commit)
        if keep and path.is_file():
            table = schema.parse(path.read_text(encoding="utf-8"), str(path))
            record.device, record.versions = table.device, table.versions
            record.entries = {(entry.key, entry.size): entry for entry in table.entries}
        return record

    def check_writable(self) -> None:
        """Make the directory, and a file in it: better now than after the first measurement.

        Raises:
          OSError: that cannot be.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path.parent).close()

    def of_device(self, device: str, versions: Mapping[str, str]) -> None:
        """Say what is measured.

        Raises:
          TableError: the file is another device's.
        """
        if self.device not in ("", device):
            raise schema.TableError(f"{self.path} is of {self.device}; this device is {device}")
        self.device, self.versions = device, versions

    def has(self, job: Job, m: int, op: str, format: str) -> bool:
        """Whether a size is there."""
        return ((op, format, job.group_size), (m, job.n, job.k)) in self.entries

    def add(self, result: Mapping[str, Any]) -> Entry | None:
        """Take the best of a size and write the file; None if no candidate was timed."""
        entry = self.best(result)
        if entry is not None:
            self.entries[entry.key, entry.size] = entry
            self.write()
        return entry

    def best(self, result: Mapping[str, Any]) -> Entry | None:
        """The fastest candidate, or one as good that other sizes use: fewer are to be compiled
        and checked."""
        timed = [one for one in result["candidates"] if one["us"] is not None]
        timed = sorted((one for one in timed if not one["dropped"]), key=lambda one: one["us"])
        if not timed:
            return None
        used = self.distinct()
        close = [one for one in timed if one["us"] <= CLOSE * timed[0]["us"]]
        known = [one for one in close if _distinct(result["op"], one) in used]
        chosen = (known or close)[0]
        names = ("op", "format", "m", "n", "k", "group_size", "bound_us")
        return Entry(
            **{name: result[name] for name in names},
            implementation=chosen["implementation"],
            config=chosen["config"],
            us=round(chosen["us"], 3),
            row_error=chosen["row_error"],
        )

    def distinct(self) -> set[tuple]:
        """The different configurations in the table."""
        return {_distinct(entry.op, vars(entry)) for entry in self.entries.values()}

    def write(self) -> None:
        """The file as a whole, or not at all."""
        ordered = sorted(
            self.entries.values(),
            key=lambda e: (e.op, e.format, e.group_size or 0, e.n, e.k, e.m),
        )
        table = Table(
            device=self.device,
            versions=dict(self.versions),
            commit=self.commit,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            entries=tuple(ordered),
        )
        schema.write(self.path, table)


def _distinct(op: str, fields: Mapping[str, Any]) -> tuple:
    return op, fields["implementation"], tuple(sorted(fields["config"].items()))
