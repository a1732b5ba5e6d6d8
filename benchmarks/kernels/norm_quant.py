"""`python -m benchmarks.kernels.norm_quant`: every candidate, checked and timed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels.norm_quant import triton, xla
from qjax_kernels.norm_quant.config import candidates

from benchmarks.kernels import row_bench

EPS = 1e-5
FP8 = jnp.dtype(jnp.float8_e4m3fn)


def exact(arguments: tuple, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 rows of the norm and of the new residual."""
    x, weight, bias, residual, _ = arguments
    h = row_bench.some(x).astype(np.float64)
    if residual is not None:
        h = h + row_bench.some(residual).astype(np.float64)
    h = h.astype(x.dtype).astype(np.float64)
    centred = h - h.mean(axis=-1, keepdims=True) if kind == "layer" else h
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS)
    y = y * np.asarray(weight, np.float64)
    return (y if bias is None else y + np.asarray(bias, np.float64)), h


def check(result: Any, arguments: tuple, kind: str) -> str:
    """What `row_bench.against` says, and whether residual and sums are right."""
    y, h = exact(arguments, kind)
    values = row_bench.some(result.values)
    scale = None
    if result.scale is not None:
        scale = row_bench.some(result.scale) if result.scale.ndim else np.asarray(result.scale)
        scale = scale.astype(np.float64)
    said = row_bench.against(values, scale, y)
    if result.residual is not None:
        wrong = (row_bench.some(result.residual).astype(np.float64) != h).sum()
        said += f", residual {'ok' if not wrong else f'{wrong} WRONG'}"
    if result.group_sums is not None:
        groups = values.astype(np.float64).reshape(len(values), -1, 128)
        error = np.abs(row_bench.some(result.group_sums) - groups.sum(axis=-1))
        fine = (error <= 1e-5 * np.abs(groups).sum(axis=-1)).all()
        said += f", sums {'ok' if fine else 'WRONG'}"
    return said


def case(rows: int, features: int, asked: Any, *, kind: str = "rms", out: Any = FP8,
         residual: bool = True, sums: bool = False, static: bool = False) -> None:  # fmt: skip
    """One table."""

    def arguments(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 4)
        return (
            row_bench.rows(keys[0], (rows, features)),
            jax.random.normal(keys[1], (features,), jnp.bfloat16),
            jax.random.normal(keys[2], (features,), jnp.bfloat16) if kind == "layer" else None,
            row_bench.rows(keys[3], (rows, features)) if residual else None,
            jnp.float32(0.02) if static else None,
        )

    out = jnp.dtype(out)
    moved = rows * features * (2 + (4 if residual else 0) + out.itemsize) + 2 * features
    moved += rows * (4 if out.itemsize == 1 and not static else 0)
    moved += rows * features / 32 if sums else 0
    same = dict(kind=kind, eps=EPS, weight_offset=0.0, out_dtype=out, group_sums=sums)
    calls = [
        (f"triton warps {c.warps} rows {c.rows}", partial(triton.norm_quant, **same, config=c))
        for c in candidates(rows, features)
    ]
    calls.append(("xla", partial(xla.norm_quant, **same)))
    parts = [kind, out.name, "residual" * residual, "sums" * sums, "static" * static]
    title = f"norm_quant [{rows}, {features}] {' '.join(filter(None, parts))}"
    argument_sets = row_bench.sets(arguments, moved)
    row_bench.table(title, calls, argument_sets, moved, partial(check, kind=kind), asked)


def main() -> None:
    """All cases, the ones that bars are set for first."""
    asked = row_bench.options(__doc__)
    for features in (4096, 8192):
        for rows in (8192, 1, 64) if asked.quick else (8192, 1, 16, 64, 256, 2048):
            case(rows, features, asked)
    if asked.quick:
        return
    for rows in (1, 8192):
        case(rows, 4096, asked, out=jnp.int8)
        case(rows, 4096, asked, out=jnp.int8, sums=True)
        case(rows, 4096, asked, sums=True)
        case(rows, 4096, asked, static=True)
        case(rows, 4096, asked, out=jnp.bfloat16)
        case(rows, 4096, asked, out=jnp.bfloat16, residual=False)
        case(rows, 4096, asked, kind="layer")
        case(rows, 5120, asked)
        case(rows * 32, 128, asked, out=jnp.bfloat16, residual=False)
        case(rows, 1001, asked)


if __name__ == "__main__":
    main()
