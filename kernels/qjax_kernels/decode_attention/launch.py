"""What the kernels of decode attention share: how they are called and how they end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.decode_attention.problem import Buffers, Problem, Ref


def call(
    body: Callable[..., None],
    inputs: Any,
    problem: Problem,
    out_type: Any,
    scratch: dict[str, Any],
    *,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    warpgroups: int = 1,
    cluster: int = 1,
) -> Any:
    """Run body(inputs, outs, scratch) as a kernel.

    Args:
      body: takes references where `inputs` has arrays, a reference or a list of them for
        `out_type`, and a dict of references for `scratch`.
      inputs: a dataclass of arrays, tuples of arrays, and None.
      problem: says whether to interpret.
      out_type: a type, or a list of types, of results.
      scratch: by name.
      grid, grid_names: of the blocks, or of their clusters.
      warpgroups: of a block; axis 'warpgroup' if there are several.
      cluster: blocks of a cluster; axis 'block' if there are several.
    """
    given, tree = jax.tree.flatten(dict(vars(inputs)))

    def flat(*refs: Ref, **scratch: Ref) -> None:
        outs = refs[len(given) :]
        body(
            dataclasses.replace(inputs, **jax.tree.unflatten(tree, refs[: len(given)])),
            outs[0] if len(outs) == 1 else outs,
            scratch,
        )

    flat.__name__ = body.__name__
    axes: dict[str, Any] = {}
    if warpgroups > 1:
        axes |= {"num_threads": warpgroups, "thread_name": "warpgroup"}
    if cluster > 1:
        axes |= {"cluster": (cluster,), "cluster_names": ("block",)}
    kernel = plgpu.kernel(
        flat,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=grid_names,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if problem.operands.interpret else None,
        **axes,
    )
    return kernel(*given)


def buffers(scratch: dict[str, Ref]) -> Buffers:
    """Those of `Buffers.scratch`."""
    names = [field.name for field in dataclasses.fields(Buffers) if field.name in scratch]
    return Buffers(**{name: scratch[name] for name in names})


def normalized(value_scale: jax.Array | None, total: jax.Array, mixed: jax.Array) -> jax.Array:
    """mixed / total with the value scale; 0 where nothing was seen."""
    factor = jnp.where(total > 0, 1.0 / total, 0.0)
    if value_scale is not None:
        factor = factor * value_scale
    return mixed * lax.broadcast_in_dim(factor, mixed.shape, [1])
