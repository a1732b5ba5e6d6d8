"""The dry run of a quantization: what each leaf becomes, and the bytes it takes."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.assign import assign
from qjax.config import QuantConfig
from qjax.errors import DataError
from qjax.qarray import bits_of, is_qarray
from qjax.quantize import quantize_leaf
from qjax.tree import is_array, named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One leaf of the tree in the dry run.

    Attributes:
      path: its dotted name.
      shape: of the leaf.
      before, after: format or dtype names; equal if the leaf stays as it is.
      bytes_before, bytes_after: bytes in memory, scales counted.
    """

    path: str
    shape: tuple[int, ...]
    before: str
    after: str
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The dry run of `quantize`: one row a leaf, and the totals."""

    rows: tuple[PlanRow, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"rows": rows, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def __str__(self) -> str:
        width = max(len(row.path) for row in self.rows)
        lines = [
            f"{row.path:{width}}  {row.before:>9} -> {row.after:9} "
            f"{row.bytes_before:>13,} -> {row.bytes_after:,} B"
            for row in self.rows
        ]
        lines.append(f"{'total':{width}}  {self.bytes_before:,} -> {self.bytes_after:,} B")
        return "\n".join(lines)


def plan(params: Any, cfg: QuantConfig) -> Plan:
    """Dry run of `quantize(params, cfg)`: what each leaf becomes, and the bytes it takes.

    Works on concrete and abstract trees; touches no array.

    Raises:
      ConfigError: whatever `quantize` would raise about the recipe.
    """
    assigned = assign(params, cfg)
    rows = []
    for name, leaf in named_leaves(params):
        if not is_array(leaf):
            continue
        before = after = leaf
        if name in assigned:
            amax = jax.ShapeDtypeStruct((leaf.shape[assigned[name].axis],), jnp.float32)
            quantized = partial(quantize_leaf, how=assigned[name])
            after = jax.eval_shape(quantized, leaf, input_amax=amax)
        rows.append(
            PlanRow(
                path=name,
                shape=tuple(leaf.shape),
                before=_kind(before),
                after=_kind(after),
                bytes_before=bits_of(before) // 8,
                bytes_after=bits_of(after) // 8,
            )
        )
    if not rows:
        raise DataError("the tree has no leaves to plan for")
    return Plan(tuple(rows))


def _kind(leaf: Any) -> str:
    return leaf.format if is_qarray(leaf) else str(leaf.dtype)
