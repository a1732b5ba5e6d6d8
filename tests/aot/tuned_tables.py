"""What the package's tuned tables hold. tests/aot/test_tuned.py compiles all of it, so that other
tests need not compile the same."""

import dataclasses
import functools
from typing import Any

from qjax_kernels.scaled_gemm import choice as scaled
from qjax_kernels.tuned import lookup, schema
from qjax_kernels.weight_only_gemm import choice as weight_only

FITTED = {"prepared_gemm": weight_only.fitted, "w4a8_gemm": weight_only.fitted}
FITTED |= dict.fromkeys(("scaled_gemm", "plain_gemm", "gemm_swiglu"), scaled.fitted)
ENTRIES = [
    entry
    for path in sorted(lookup.directory().glob("*.json"))
    for entry in schema.parse(path.read_text(), path.name).entries
]


def distinct(entries: list[schema.Entry]) -> list[schema.Entry]:
    """One entry for each configuration of an op and format, the smallest that uses it, and one for
    each that is left of a configuration when the fewest tokens cut it."""
    mosaic = [entry for entry in entries if entry.implementation == "mosaic"]
    mosaic.sort(key=lambda entry: entry.m * entry.n * entry.k)
    found: dict[Any, schema.Entry] = {}
    for entry in [*mosaic, *map(with_fewest_tokens, mosaic)]:
        found.setdefault((*entry.key, str(schema.config_of(entry))), entry)
    return list(found.values())


def with_fewest_tokens(entry: schema.Entry) -> schema.Entry:
    """An entry as it serves the fewest tokens that it is near to."""
    if entry.op not in FITTED:
        return entry
    m = next(m for m in range(1, entry.m + 1) if not lookup.far(entry, m))
    config = FITTED[entry.op](schema.config_of(entry), m)
    return dataclasses.replace(entry, m=m, config=dataclasses.asdict(config))


@functools.cache
def tuned(op: str, format: str, group_size: int | None = None) -> list[Any]:
    """The configurations of an op and format that are in a table."""
    key = (op, format, group_size)
    return [schema.config_of(entry) for entry in distinct(ENTRIES) if entry.key == key]
