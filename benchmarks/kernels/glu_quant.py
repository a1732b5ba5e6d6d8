"""`python -m benchmarks.kernels.glu_quant`: every candidate, checked and timed."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels.glu_quant import triton, xla
from qjax_kernels.glu_quant.config import candidates

from benchmarks.kernels import row_bench

FP8 = jnp.dtype(jnp.float8_e4m3fn)


def exact(x: np.ndarray, activation: str) -> np.ndarray:
    """float64 rows."""
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu":
        return gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) * up
    return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def check(result: Any, arguments: tuple, activation: str) -> str:
    """What `row_bench.against` says, and whether sums are right."""
    y = exact(row_bench.some(arguments[0]), activation)
    values = row_bench.some(result.values)
    scale = None
    if result.scale is not None:
        scale = row_bench.some(result.scale) if result.scale.ndim else np.asarray(result.scale)
        scale = scale.astype(np.float64)
    said = row_bench.against(values, scale, y)
    if result.group_sums is not None:
        groups = values.astype(np.float64).reshape(len(values), -1, 128)
        error = np.abs(row_bench.some(result.group_sums) - groups.sum(axis=-1))
        fine = (error <= 1e-5 * np.abs(groups).sum(axis=-1)).all()
        said += f", sums {'ok' if fine else 'WRONG'}"
    return said


def case(rows: int, features: int, asked: Any, *, activation: str = "silu", out: Any = FP8,
         sums: bool = False, static: bool = False) -> None:  # fmt: skip
    """One table."""

    def arguments(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 2)
        gate = 3 * jax.random.normal(keys[0], (rows, features), jnp.bfloat16)
        up = row_bench.rows(keys[1], (rows, features))
        return jnp.concatenate([gate, up], axis=-1), jnp.float32(0.5) if static else None

    out = jnp.dtype(out)
    moved = rows * features * (4 + out.itemsize)
    moved += rows * (4 if out.itemsize == 1 and not static else 0)
    moved += rows * features / 32 if sums else 0
    same = dict(activation=activation, out_dtype=out, group_sums=sums)
    calls = [
        (f"triton warps {c.warps} rows {c.rows}", partial(triton.glu_quant, **same, config=c))
        for c in candidates(rows, features)
    ]
    calls.append(("xla", partial(xla.glu_quant, **same)))
    parts = [activation, out.name, "sums" * sums, "static" * static]
    title = f"glu_quant [{rows}, 2 * {features}] {' '.join(filter(None, parts))}"
    argument_sets = row_bench.sets(arguments, moved)
    checked = partial(check, activation=activation)
    row_bench.table(title, calls, argument_sets, moved, checked, asked)


def main() -> None:
    """All cases, the ones that bars are set for first."""
    asked = row_bench.options(__doc__)
    for features in (4096, 8192, 14336):
        for rows in (8192, 1, 64) if asked.quick else (8192, 1, 16, 64, 256, 2048):
            case(rows, features, asked)
    if asked.quick:
        return
    for rows in (1, 8192):
        case(rows, 14336, asked, out=jnp.int8)
        case(rows, 14336, asked, sums=True)
        case(rows, 14336, asked, static=True)
        case(rows, 14336, asked, out=jnp.bfloat16)
        case(rows, 11008, asked)
        case(rows, 28672, asked)
        case(rows, 14336, asked, activation="gelu")
        case(rows, 14336, asked, activation="gelu_tanh")


if __name__ == "__main__":
    main()
