"""Which entry of the device's table serves a call: the same size, or the nearest one."""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from qjax_kernels.target import Target, target
from qjax_kernels.tuned.schema import OPS, Entry, Table, TableError, parse

VARIABLE = "QJAX_TUNED"  # names another directory of tables
STAND_IN = "NVIDIA H200"  # whose table serves Hopper GPUs that have none of their own
# Tiles for more or fewer tokens say nothing: with them 100 tokens took twice the time of the first
# guess for 100 (measured). All prompts are alike.
PROMPT = 256.0
FAR_SEQUENCES = 4.0  # of ops without tiles for tokens


@dataclasses.dataclass(frozen=True)
class Found:
    """A table in use.

    Attributes:
      table: what it holds.
      path: its file.
      stands_in: it is another device's, that of STAND_IN.
    """

    table: Table
    path: Path
    stands_in: bool


def directory() -> Path:
    """Where the tables are: what QJAX_TUNED names, else those that come with the package.

    Raises:
      TableError: it names no directory.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return Path(__file__).parent
    if not Path(named).is_dir():
        raise TableError(f"{VARIABLE} is {named!r}, which is no directory")
    return Path(named)


def file_name(kind: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200.json'."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json"


def table_of(device: Target) -> Found | None:
    """The device's table; for a Hopper GPU without one the H200's; None if there is none.

    Raises:
      TableError: the file is not a table.
    """
    if device.platform != "gpu":
        return None
    kinds = [device.kind]
    if device.hopper and device.kind != STAND_IN:
        kinds.append(STAND_IN)
    for kind in kinds:
        path = directory() / file_name(kind)
        if path.is_file():
            return Found(read(path), path, kind != device.kind)
    return None


def read(path: Path) -> Table:
    """The table of a file, which is read again only if it has changed.

    Raises:
      TableError: it is not a table.
    """
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _read(path: Path, changed: int, size: int) -> Table:
    return parse(path.read_text(encoding="utf-8"), str(path))


def lookup(
    op: str,
    format: str,
    group_size: int | None,
    m: int,
    n: int,
    k: int,
    device: Target | None = None,
) -> Entry | None:
    """The first of `nearest`, or None."""
    found = nearest(op, format, group_size, m, n, k, device)
    return found[0] if found else None


def nearest(
    op: str,
    format: str,
    group_size: int | None,
    m: int,
    n: int,
    k: int,
    device: Target | None = None,
) -> list[Entry]:
    """The entries of an op, format and group size that are near a size, the nearest first.

    Args:
      op, format, group_size, m, n, k: see `Entry`.
      device: None: the one that the trace under way is for.

    Returns:
      Entries in the order of `distance`. None of another op, format or group size, and none that is
      `far`; an empty list if the device has no table.
    """
    found = table_of(target() if device is None else device)
    if found is None:
        return []
    same = [entry for entry in found.table.entries if entry.key == (op, format, group_size)]
    near = [entry for entry in same if not far(entry, m)]
    return sorted(near, key=lambda entry: distance(entry, m, n, k))


def far(entry: Entry, m: int) -> bool:
    """Whether an entry says nothing about m tokens."""
    tiles = OPS[entry.op].tiles
    if tiles is None:
        return max(entry.m, m) > min(entry.m, m) * FAR_SEQUENCES
    few, many = sorted((_tokens(entry.m, tiles), _tokens(m, tiles)))
    return few != many and few < PROMPT


def distance(entry: Entry, m: int, n: int, k: int) -> tuple[float, float, float]:
    """How far an entry is from a size: three numbers, of which the later ones decide ties.

    The first is 2 |log2(t(m') / t(m))| + |log2(n' / n)| + |log2(k' / k)|, with m', n', k' the
    entry's and t(m) the tokens that tiles for m have, see `Op.tiles`; of ops without such tiles m
    itself. Among equals the larger t decides, whose tiles fit, and last the nearest m.
    """
    tokens = functools.partial(_tokens, tiles=OPS[entry.op].tiles)
    apart = 2 * abs(math.log2(tokens(entry.m) / tokens(m)))
    apart += abs(math.log2(entry.n / n)) + abs(math.log2(entry.k / k))
    return round(apart, 6), -tokens(entry.m), abs(math.log2(entry.m / m))


def _tokens(m: int, tiles: Sequence[int] | None) -> float:
    if tiles is None:
        return float(m)
    return float(next((t for t in tiles if m <= t), tiles[-1] * math.ceil(m / tiles[-1])))
