"""The product for few tokens, which lasts as long as the weights take to arrive.

A block of threads owns 64 rows of the weight. Its warpgroups split the columns (and so may the
blocks of a cluster); each copies its part through a ring of stages of its own, converts it in
registers and multiplies it with the tokens, and the partial sums are added through shared memory at
the end. The operands are swapped: weights are the 64 rows of `wgmma`, tokens its 8 to 256 columns,
so that few tokens waste nothing. With groups of 64 columns or more the scale multiplies the sum of
a group, not the weights: fewer instructions, and no rounding.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.hopper import load_row, swizzled
from qjax_kernels.weight_only_gemm.config import Config, stream_steps
from qjax_kernels.weight_only_gemm.convert import MMA, strided, to_registers
from qjax_kernels.weight_only_gemm.layout import LANES, Prepared, words_per_tile


def stream(
    x: jax.Array,
    weight: Prepared,
    bias: jax.Array | None,
    *,
    out_dtype: jnp.dtype,
    config: Config,
    interpret: bool = False,
) -> jax.Array:
    """x [tokens, in] @ weight.T + bias -> [tokens, out rounded up to 64].

    tokens is a multiple of 8, or fewer; in is padded to 64. See `api.prepared_gemm`.
    """
    tokens = x.shape[0]
    tile, wgs, tiles, stages = config.tokens, config.warpgroups, config.tiles, config.stages
    steps = stream_steps(config, weight)
    width = tiles * 64  # columns of a stage
    rows = words_per_tile(weight.format) * tiles  # of `words`
    group = weight.group_size
    grouped, zeros = weight.groups > 1, weight.zero_point is not None
    # The columns whose products are summed before the scale: a stage, or a group within it.
    in_sum = grouped and group % 64 == 0
    part = min(group, width) if in_sum else width
    groups = -(-steps * width // group)  # of a warpgroup
    slots = wgs * stages

    def body(*refs, **scratch):  # type: ignore[no-untyped-def]
        words_g, x_g, scale_g, *optional, out_g = refs
        zero_g = optional[0] if zeros else None
        bias_g = optional[-1] if bias is not None else None
        words_s, x_s, sums_s, out_s = (scratch[k] for k in ("words", "x", "sums", "out"))
        full, ready, summed = (scratch[k] for k in ("full", "ready", "summed"))
        n, m, wg = (lax.axis_index(name) for name in ("rows", "tokens", "wg"))
        member = lax.axis_index("cluster")
        first = (member * wgs + wg) * steps * width  # column of this warpgroup

        def fetch(step, slot):  # type: ignore[no-untyped-def]
            at = first + step * width
            source = words_g.at[n, pl.ds(at // 64 * (rows // tiles), rows), :]
            plgpu.copy_gmem_to_smem(source, words_s.at[wg, slot], full.at[wg * stages + slot])
            source = x_g.at[pl.ds(m * tile, tile), pl.ds(at, width)]
            plgpu.copy_gmem_to_smem(source, x_s.at[wg, slot], full.at[wg * stages + slot])

        per_group = [(scale_g, "scale")] * grouped + [(zero_g, "zero")] * zeros
        for ref, name in per_group:
            source = ref.at[n, pl.ds(first // group, groups), :]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[wg], ready.at[wg])
        for step in range(min(stages, steps)):
            fetch(step, step)
        if per_group:
            plgpu.barrier_wait(ready.at[wg])

        def of_groups(name, step, start, columns):  # type: ignore[no-untyped-def]
            """Numbers of the groups of some columns of a stage."""
            count = max(1, columns // group)
            at = step * (width // group) if group <= width else step * width // group
            return [
                load_row(scratch[name].at[wg, at + start // group + i]).astype(x.dtype)
                for i in range(count)
            ]

        def step(i, total):  # type: ignore[no-untyped-def]
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(full.at[wg * stages + slot])
            words = plgpu.load(words_s.at[wg, slot], layout=strided(rows), optimized=False)
            a = to_registers(
                words, weight.format, x.dtype,
                of_groups("zero", i, 0, width) if zeros else (),
                of_groups("scale", i, 0, width) if grouped and not in_sum else (),
                interpret=interpret,
            )  # fmt: skip
            for start in range(0, width, part):
                columns = a if part == width else a[:, start : start + part]

                def multiply(acc, columns=columns, start=start):  # type: ignore[no-untyped-def]
                    tokens_s = x_s.at[wg, slot, :, pl.ds(start, part)]
                    plgpu.wgmma(acc, columns, tokens_s.T)
                    return acc[...]

                added = pl.run_scoped(multiply, plgpu.ACC((64, tile), jnp.float32))
                if in_sum:
                    at = (i * width + start) // group
                    scale = load_row(scratch["scale"].at[wg, at]).astype(jnp.float32)
                    added = added * lax.broadcast_in_dim(scale, added.shape, [0])
                total = total + added

            @pl.when(i + stages < steps)
            def _():  # type: ignore[no-untyped-def]
                fetch(i + stages, slot)

            return total

        zero = plgpu.layout_cast(jnp.zeros((64, tile), jnp.float32), MMA)
        total = lax.fori_loop(0, steps, step, zero)

        @pl.when(wg > 0)
        def _():  # type: ignore[no-untyped-def]
            sums_s[wg - 1] = total
            plgpu.barrier_arrive(summed)

        def share(y):  # type: ignore[no-untyped-def]
            """Add the sums of the cluster's blocks, in the first of them."""
            partial_s, written, read = (scratch[k] for k in ("partial", "written", "read"))
            partial_s[...] = y
            plgpu.barrier_arrive(written)
            plgpu.barrier_wait(written)

            @pl.when(member == 0)
            def _():  # type: ignore[no-untyped-def]
                everything = y
                for other in range(1, config.cluster):
                    theirs = plgpu.cluster_ref(partial_s, {"cluster": other})
                    everything = everything + plgpu.load(theirs, layout=MMA, optimized=False)
                finish(everything)

            # The memory of a block is there until all of it has been read.
            plgpu.barrier_arrive(read)
            plgpu.barrier_wait(read)

        def finish(y):  # type: ignore[no-untyped-def]
            if not grouped:
                scale = load_row(scale_g.at[n, 0]).astype(jnp.float32)
                y = y * lax.broadcast_in_dim(scale, y.shape, [0])
            if bias_g is not None:
                offset = load_row(bias_g.at[pl.ds(n * 64, 64)]).astype(jnp.float32)
                y = y + lax.broadcast_in_dim(offset, y.shape, [0])
            out_s.T[...] = plgpu.layout_cast(y.astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            target = out_g.at[pl.ds(m * tile, tile), pl.ds(n * 64, 64)]
            plgpu.copy_smem_to_gmem(out_s, target)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 0)
        def _():  # type: ignore[no-untyped-def]
            y = total
            if wgs > 1:
                plgpu.barrier_wait(summed)
            for other in range(wgs - 1):
                y = y + plgpu.load(sums_s.at[other], layout=MMA, optimized=False)
            if config.cluster == 1:
                finish(y)
            else:
                share(y)

    scratch = {
        "words": plgpu.SMEM((wgs, stages, rows, LANES), jnp.int32),
        "x": plgpu.SMEM((wgs, stages, tile, width), x.dtype, transforms=swizzled(width, 16)),
        "sums": plgpu.SMEM((max(1, wgs - 1), 64, tile), jnp.float32),
        "out": plgpu.SMEM(
            (tile, 64), out_dtype, transforms=swizzled(64, jnp.dtype(out_dtype).itemsize * 8)
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "ready": plgpu.Barrier(num_arrivals=max(1, grouped + zeros), num_barriers=wgs),
        "summed": plgpu.Barrier(num_arrivals=max(1, wgs - 1)),
    }
    if grouped:
        scratch["scale"] = plgpu.SMEM((wgs, groups, 64), weight.scale.dtype)
    if zeros:
        scratch["zero"] = plgpu.SMEM((wgs, groups, 64), jnp.bfloat16)
    if config.cluster > 1:
        scratch["partial"] = plgpu.SMEM((64, tile), jnp.float32)
        scratch["written"] = plgpu.ClusterBarrier(collective_axes=("cluster",))
        scratch["read"] = plgpu.ClusterBarrier(collective_axes=("cluster",))
    operands = [weight.words, x, weight.scale]
    operands += [array for array in (weight.zero_point, bias) if array is not None]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, 64 * weight.words.shape[0]), out_dtype),
        grid=(weight.words.shape[0], -(-tokens // tile)),
        grid_names=("rows", "tokens"),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=wgs,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*operands)
