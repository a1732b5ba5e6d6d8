"""The results file: its schema, merging, and the table that is printed."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KEY = ("op", "m", "n", "k", "group_size", "implementation")
PEERS = ("torch", "humming", "gemlite")

_ROW = {
    "op": str,
    "m": int,
    "n": int,
    "k": int,
    "group_size": (int, type(None)),
    "implementation": str,
    "us": float,
    "bound_us": float,
    "row_error": (float, type(None)),
}
_DOCUMENT = {"device": str, "versions": dict, "commit": str, "date": str, "rows": list}
# Twice the worst that is right: bfloat16 results are off by 2^-9 of their size, and an fp8 tensor
# core that keeps 14 bits of a sum by about 1e-2 in a row of small results.
WRONG = 0.03


def check(document: Mapping[str, Any]) -> None:
    """See that a document is what the file holds.

    Raises:
      ValueError: naming what is wrong with it, and where.
    """
    _check_fields("the document", document, _DOCUMENT, optional={"merged": list})
    for i, row in enumerate(document["rows"]):
        _check_fields(f"row {i}", row, _ROW)
        if not (row["us"] > 0 and row["bound_us"] > 0):
            raise ValueError(f"row {i}: times must be positive: {row}")
        if row["implementation"] not in ("xla", *PEERS) and not row["implementation"].startswith(
            "qjax/"
        ):
            raise ValueError(f"row {i}: no implementation is called {row['implementation']!r}")
    keys = [key(row) for row in document["rows"]]
    if len(set(keys)) != len(keys):
        raise ValueError("two rows are of the same op, size and implementation")


def _check_fields(
    where: str, fields: Mapping[str, Any], schema: Mapping[str, Any], optional: Mapping = {}
) -> None:
    unknown = set(fields) - set(schema) - set(optional)
    absent = set(schema) - set(fields)
    if unknown or absent:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}, absent {sorted(absent)}")
    for name, kind in (dict(schema) | dict(optional)).items():
        value = fields.get(name)
        if name not in fields:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} is {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {name} is {value!r}")


def key(row: Mapping[str, Any]) -> tuple:
    """What a row is of; one row of a file has it."""
    return tuple(row[name] for name in KEY)


def order(row: Mapping[str, Any]) -> tuple:
    """Sorts rows by op, shape, m and group, then qjax, XLA, peers."""
    kind = row["implementation"]
    rank = 0 if kind.startswith("qjax/") else 1 if kind == "xla" else 2
    size = (row["op"], row["n"], row["k"], row["m"], row["group_size"] or 0)
    return (*size, rank, kind)


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The old rows with the new ones in place of those of the same key.

    `merged` lists the date and commit of every earlier run that rows may be from: compare rows of
    one run only, since machines differ by a few percent.

    Raises:
      ValueError: they are of different devices.
    """
    if old["device"] != new["device"]:
        raise ValueError(f"the file is of {old['device']}, this run of {new['device']}")
    rows = {key(row): row for row in (*old["rows"], *new["rows"])}
    before = [*old.get("merged", []), {"date": old["date"], "commit": old["commit"]}]
    versions = old["versions"] | new["versions"]
    rest = {"rows": sorted(rows.values(), key=order), "versions": versions, "merged": before}
    return {**new, **rest}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Check and write, one row a line, all of the file or nothing."""
    check(document)
    head = {name: value for name, value in document.items() if name != "rows"}
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document["rows"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text(text)
    whole.replace(path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row: time, bound, their ratio, the error, and the time over the best peer's."""
    columns = ["op", "m", "n", "k", "group", "implementation"]
    columns += ["us", "bound", "ratio", "row_error", "vs_peer"]
    lines = [columns, *(_line(row, rows) for row in sorted(rows, key=order))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    left = (0, 5)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    same = [other["us"] for other in rows if key(other)[:5] == key(row)[:5] and _peer(other)]
    error = "none: does not count" if row["row_error"] is None else f"{row['row_error']:.1e}"
    if row["row_error"] is not None and row["row_error"] > WRONG:
        error = f"WRONG {error}"
    return [
        *(str(row[name]) for name in ("op", "m", "n", "k")),
        str(row["group_size"] or "-"),
        row["implementation"],
        f"{row['us']:.1f}",
        f"{row['bound_us']:.1f}",
        f"{row['us'] / row['bound_us']:.2f}",
        error,
        f"{row['us'] / min(same):.2f}" if same else "-",
    ]


def _peer(row: Mapping[str, Any]) -> bool:
    return row["implementation"] in PEERS and row["row_error"] is not None
