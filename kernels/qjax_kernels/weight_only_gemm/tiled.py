"""The product for many tokens, which lasts as long as the tensor cores need.

The weights are converted and scaled in registers, where `wgmma` takes its first operand from. While
one warpgroup converts, the other multiplies.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.hopper import load_row
from qjax_kernels.weight_only_gemm.config import Config
from qjax_kernels.weight_only_gemm.convert import strided, to_registers
from qjax_kernels.weight_only_gemm.layout import Prepared, words_per_tile
from qjax_kernels.weight_only_gemm.operands import Added, operands
from qjax_kernels.weight_only_gemm.walk import Place, groups_per_step, walk


def tiled(
    x: jax.Array,
    weight: Prepared,
    added: Added,
    *,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: Config,
    cores: int,
    interpret: bool = False,
) -> jax.Array:
    """x [tokens, in] @ weight.T + bias + residual -> [tokens, out rounded up to 64].

    tokens is a multiple of 8, or fewer; in is padded to 64. See `api.prepared_gemm`.
    """
    grouped, zeros = weight.groups > 1, weight.zero_point is not None
    width, parts = config.tiles * 64, config.parts
    rows = words_per_tile(weight.format) * config.tiles // parts  # of a part
    per_step = groups_per_step(weight, config)

    def of_part(arrays, part):  # type: ignore[no-untyped-def]
        """Those of some arrays, each for an equal share of the columns."""
        return arrays[part * len(arrays) // parts :][: max(1, len(arrays) // parts)]

    def step(place: Place, words_s, x_s, *rest):  # type: ignore[no-untyped-def]
        *per_group, acc = rest

        def numbers(ref):  # type: ignore[no-untyped-def]
            loaded = [load_row(ref.at[place.warpgroup, i]) for i in range(per_step)]
            return [row.astype(x.dtype) for row in loaded]

        scale = numbers(per_group[0]) if grouped else ()
        zero = numbers(per_group[1]) if grouped and zeros else ()
        if zeros and not grouped:
            zero = [load_row(place.of["zero"].at[place.block, 0]).astype(x.dtype)]
        for part in range(parts):
            # While one part is multiplied, the next is converted.
            words = words_s.at[place.warpgroup, pl.ds(part * rows, rows)]
            a = to_registers(
                plgpu.load(words, layout=strided(rows), optimized=False),
                weight.format,
                x.dtype,
                of_part(zero, part),
                of_part(scale, part),
                interpret=interpret,
            )
            plgpu.wgmma(acc, a, x_s.at[:, pl.ds(part * width // parts, width // parts)].T)
        # Not later: registers of a product that runs on into the next step are overwritten there
        # (seen on an H200).
        plgpu.wgmma_wait(0)
        return acc

    def sums(evaluate):  # type: ignore[no-untyped-def]
        def with_accumulator(acc):  # type: ignore[no-untyped-def]
            evaluate(acc)
            return acc[...]

        return pl.run_scoped(with_accumulator, plgpu.ACC((64, config.tokens), jnp.float32))

    return walk(
        operands(x, weight, None, added),
        weight,
        config,
        by_group=["scale"] * grouped + ["zero"] * (grouped and zeros),
        step=step,
        sums=sums,
        activation=activation,
        out_dtype=out_dtype,
        cores=cores,
        interpret=interpret,
    )
