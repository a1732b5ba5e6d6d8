"""What a tuned table holds, and the strict reader and the writer of its file."""

import dataclasses
import functools
import importlib
import json
import math
import os
import tempfile
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

IMPLEMENTATIONS = ("mosaic", "xla")
Key = tuple[str, str, int | None]  # op, format, group_size


@dataclasses.dataclass(frozen=True)
class Op:
    """An op that can be tuned.

    Attributes:
      module: where its `Config` is.
      values: what its fields may be; a field that is not here may be what its type allows.
      tiles: m is covered by tiles of tokens, so that it counts as rounded up to one of these, or
        else to a multiple of the last. None: it counts as it is.
    """

    module: str
    values: Mapping[str, Iterable[Any]]
    tiles: Sequence[int] | None


_PRODUCT = Op(
    "qjax_kernels.scaled_gemm.config",
    {
        "warpgroups": range(1, 5),
        "columns": range(8, 257, 8),
        "stages": range(2, 33),
        "k_tile": (16, 32, 64, 128, 256, 512),
        "splits": range(1, 9),
        "multicast": range(1, 9),
        "resident": range(1, 3),
    },
    tiles=(8, 16, 32, 64, 128, 160, 192, 224, 256),
)
_WEIGHT_ONLY = Op(
    "qjax_kernels.weight_only_gemm.config",
    {"tokens": range(8, 257, 8), "warpgroups": range(1, 5), "cluster": (1, 2, 4, 8)},
    # What serves 64 tokens best needs memory that is free for 48.
    tiles=(8, 16, 24, 32, 40, 48, 64, 128, 256),
)
OPS = {
    "scaled_gemm": _PRODUCT,
    "plain_gemm": _PRODUCT,
    "gemm_swiglu": _PRODUCT,
    "prepared_gemm": _WEIGHT_ONLY,
    "w4a8_gemm": _WEIGHT_ONLY,
    "decode_attention": Op(
        "qjax_kernels.decode_attention.config",
        {
            "tokens": (64, 128),
            "stages": range(1, 9),
            "warpgroups": range(1, 5),
            "cluster": range(1, 9),
            "persistent": range(0, 5),
        },
        tiles=None,
    ),
}


class TableError(ValueError):
    """A tuned table that cannot be read; says the file, the entry and what is allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """The best that was measured for one size.

    Attributes:
      op: of OPS.
      format: dtype of the weights or operands; of decode_attention dtype of the cache and
        head_dim, 'bfloat16x128'.
      m, n, k: tokens, outputs, inputs. Of decode_attention: sequences, KV heads times head_dim,
        tokens that a sequence may have.
      group_size: inputs that share a scale, None for all of them. Of decode_attention: query
        heads of a KV head.
      implementation: 'mosaic', or 'xla' where that is faster.
      config: fields of the op's Config; empty for 'xla'.
      us: median microseconds of a call.
      bound_us: the least that the chip allows.
      row_error: the largest relative error of a row of the result.
    """

    op: str
    format: str
    m: int
    n: int
    k: int
    group_size: int | None
    implementation: str
    config: Mapping[str, Any]
    us: float
    bound_us: float
    row_error: float

    @property
    def key(self) -> Key:
        """What must be the same for an entry to serve another size."""
        return self.op, self.format, self.group_size

    @property
    def size(self) -> tuple[int, int, int]:
        """(m, n, k)."""
        return self.m, self.n, self.k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A file. Attributes: see `Entry`; commit and date are those of the last run that wrote."""

    device: str
    versions: Mapping[str, str]
    commit: str
    date: str
    entries: tuple[Entry, ...]


_HEAD = {"device": str, "versions": dict, "commit": str, "date": str, "entries": list}
_ENTRY = {
    "op": str,
    "format": str,
    "m": int,
    "n": int,
    "k": int,
    "group_size": (int, type(None)),
    "implementation": str,
    "config": dict,
    "us": float,
    "bound_us": float,
    "row_error": float,
}


def parse(text: str, where: str) -> Table:
    """The table that a file holds.

    Args:
      text: of the file.
      where: its path, for messages.

    Raises:
      TableError: anything in it that is not known; the file, the entry and the allowed set.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise TableError(f"{where} is not JSON: {error}") from error
    _check_fields(where, document, _HEAD)
    for name, version in document["versions"].items():
        if not isinstance(version, str):
            raise TableError(f"{where}: versions: {name} is {version!r}; allowed: a string")
    entries = []
    for index, fields in enumerate(document["entries"]):
        at = f"{where}: entry {index}"
        _check_fields(at, fields, _ENTRY)
        entry = Entry(**fields)
        check(entry, at)
        entries.append(entry)
    seen = {(entry.key, entry.size) for entry in entries}
    if len(seen) != len(entries):
        raise TableError(f"{where}: two entries are of the same op, format, group size and size")
    return Table(**document | {"entries": tuple(entries)})


def check(entry: Entry, where: str) -> None:
    """See that values are of those allowed.

    Raises:
      TableError: they are not.
    """
    where = f"{where} ({entry.op} {entry.format} {entry.m}x{entry.n}x{entry.k})"
    _check_value(where, "op", entry.op, OPS)
    _check_value(where, "implementation", entry.implementation, IMPLEMENTATIONS)
    for name in ("m", "n", "k", "us", "bound_us"):
        if not getattr(entry, name) > 0:
            raise TableError(f"{where}: {name} is {getattr(entry, name)}; allowed: above 0")
    if entry.implementation == "xla":
        if entry.config:
            raise TableError(f"{where}: config is {entry.config}; allowed for 'xla': {{}}")
        return
    fields = config_fields(entry.op)
    for name, value in entry.config.items():
        _check_value(where, "field of config", name, fields)
        allowed = fields[name]
        if allowed is int:
            if type(value) is not int or value < 0:
                raise TableError(f"{where}: {name} is {value!r}; allowed: integers from 0 on")
        elif not any(type(value) is type(other) and value == other for other in allowed):
            raise TableError(f"{where}: {name} is {value!r}; allowed: {_listed(allowed)}")
    try:
        config_of(entry)
    except TypeError as error:
        raise TableError(f"{where}: config lacks a field; allowed: {_listed(fields)}") from error


def config_of(entry: Entry) -> Any:
    """The `Config` of an entry's op."""
    return _config_class(entry.op)(**entry.config)


def config_fields(op: str) -> dict[str, Any]:
    """Field -> the values it may have, or int for any integer from 0 on."""
    found: dict[str, Any] = {}
    kinds = typing.get_type_hints(_config_class(op))
    for field in dataclasses.fields(_config_class(op)):
        kind = kinds[field.name]
        if field.name in OPS[op].values:
            found[field.name] = OPS[op].values[field.name]
        elif typing.get_origin(kind) is typing.Literal:
            found[field.name] = typing.get_args(kind)
        else:
            found[field.name] = (False, True) if kind is bool else int
    return found


def write(path: Path, table: Table) -> None:
    """Check, then write one entry a line: a file is there as a whole or not at all."""
    head = {name: value for name, value in vars(table).items() if name != "entries"}
    lines = ",\n".join(f"  {json.dumps(dict(vars(entry)))}" for entry in table.entries)
    text = json.dumps(head, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n'
    parse(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not '.json', so that no reader takes it for a table; beside it, so that it can be renamed.
    handle, whole = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(whole, 0o644)
        os.replace(whole, path)
    except BaseException:
        os.unlink(whole)
        raise


@functools.cache
def _config_class(op: str) -> Any:
    return importlib.import_module(OPS[op].module).Config


def _check_fields(where: str, fields: Any, schema: Mapping[str, Any]) -> None:
    if not isinstance(fields, dict):
        raise TableError(f"{where} is {type(fields).__name__}; allowed: an object")
    for name in fields:
        _check_value(where, "field", name, schema)
    if absent := [name for name in schema if name not in fields]:
        raise TableError(f"{where} lacks {', '.join(absent)}; it must have {_listed(schema)}")
    for name, kind in schema.items():
        value = fields[name]
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            allowed = " or ".join(k.__name__ for k in kinds)
            raise TableError(f"{where}: {name} is {value!r}; allowed: {allowed}")


def _check_value(where: str, what: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        raise TableError(f"{where}: unknown {what} {value!r}; allowed: {_listed(allowed)}")


def _listed(allowed: Iterable[Any]) -> str:
    if isinstance(allowed, range) and len(allowed) > 8:
        return f"{allowed[0]}, {allowed[1]} ... {allowed[-1]}"
    return ", ".join(str(value) for value in allowed)
