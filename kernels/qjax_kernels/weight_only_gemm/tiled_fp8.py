"""The product of many fp8 tokens with int4 weights.

As `tiled`, with the weights converted to e4m3, where a group's scale cannot be applied: it
multiplies the sum of the group, in float32, which also spares the tensor cores' short accumulator.
The sums of one group are scaled and added up while the next group is multiplied.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.hopper import load_row
from qjax_kernels.weight_only_gemm.config import Config
from qjax_kernels.weight_only_gemm.convert import MMA, strided, to_fp8
from qjax_kernels.weight_only_gemm.layout import Prepared, words_per_tile
from qjax_kernels.weight_only_gemm.operands import Added, operands
from qjax_kernels.weight_only_gemm.walk import Place, walk

PART = 128  # columns whose products are summed by the tensor cores


def tiled_fp8(
    x: jax.Array,
    weight: Prepared,
    token_scale: jax.Array,
    added: Added,
    *,
    activation: str | None,
    out_dtype: jnp.dtype,
    config: Config,
    cores: int,
    interpret: bool = False,
) -> jax.Array:
    """x [tokens, in] @ weight.T * token_scale + bias + residual -> [tokens, out rounded up to 64].

    tokens is a multiple of 8, or fewer; token_scale is [tokens] or [1]. See `api.w4a8_gemm`.
    """
    grouped, tile = weight.groups > 1, config.tokens
    rows = words_per_tile(weight.format) * PART // 64
    parts = config.tiles * 64 // PART

    def step(place: Place, words_s, x_s, *rest):  # type: ignore[no-untyped-def]
        *scale_s, total = rest

        def products(*accumulators):  # type: ignore[no-untyped-def]
            def add(part, pending):  # type: ignore[no-untyped-def]
                added = plgpu.wgmma_accumulator_load(accumulators[part], wait_n=pending)
                if grouped:
                    of_group = part * PART // weight.group_size
                    scale = load_row(scale_s[0].at[place.warpgroup, of_group]).astype(jnp.float32)
                    added = added * lax.broadcast_in_dim(scale, added.shape, [0])
                return result + added

            result = total
            for part, acc in enumerate(accumulators):
                words = words_s.at[place.warpgroup, pl.ds(part * rows, rows)]
                words = plgpu.load(words, layout=strided(rows), optimized=False)
                a = to_fp8(words, interpret=interpret)
                plgpu.wgmma(acc, a, x_s.at[:, pl.ds(part * PART, PART)].T)
                if part > 0:
                    result = add(part - 1, 1)
            return add(parts - 1, 0)

        return pl.run_scoped(products, *[plgpu.ACC((64, tile), jnp.float32)] * parts)

    def sums(evaluate):  # type: ignore[no-untyped-def]
        return evaluate(plgpu.layout_cast(jnp.zeros((64, tile), jnp.float32), MMA))

    return walk(
        operands(x, weight, token_scale, added),
        weight,
        config,
        by_group=["scale"] * grouped,
        step=step,
        sums=sums,
        multiplier=512.0,  # weights are multiplied as w / 512
        memory_registers=24 if tile > 64 else 40,  # two sets of sums are under way
        activation=activation,
        out_dtype=out_dtype,
        cores=cores,
        interpret=interpret,
    )
