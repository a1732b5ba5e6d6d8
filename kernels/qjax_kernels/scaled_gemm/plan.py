"""The best tiles for a shape, by a small model of the chip. Measured times overrule it."""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from qjax_kernels.scaled_gemm.config import BLOCK, Config
from qjax_kernels.scaled_gemm.memory import refusal
from qjax_kernels.scaled_gemm.tiling import Tiling

_MOST = 6
_WORST = 1.5  # times the best guess: no candidate
_COLUMNS = (8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
_WIDE = (128, 160, 192, 224, 256)
_CLOCK = 1.7e9  # a multiprocessor's, under load
_BANDWIDTH = 4.1e12  # device memory, bytes/s
_L2 = 7.0e12  # bytes/s that all multiprocessors together read of the cache
_INGEST = 60  # bytes a clock that one multiprocessor takes in
_STEP = 100  # clocks that a stage costs at least
_START = 2.0e-6  # launch, first loads, last stores
_MEETING = 1.0e-6  # exchange of sums with each other block of a cluster
_TILE = 1.0e-6  # end of a tile of 256 columns, which the next one's products wait for
_TRANSPOSED = 1.3  # the same where the result is transposed on the way
_GATE = 0.45e-6  # an activation of 64 x 256 sums, likewise
_COUPLING = 0.01  # of the time, lost for each doubling of the cluster
_FEW = 64  # tokens: up to so many, a product lasts as long as its weights take to arrive
_SLOWER = 1.07  # times the guess, for each trait that `_slower` counts
_LONG = 5  # stages that are left at least when some are joined to longer ones


def candidates(
    m: int,
    n: int,
    k: int,
    *,
    dtype: Any = jnp.float8_e4m3fn,
    out_dtype: Any = jnp.bfloat16,
    blocked: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    cores: int = 132,
) -> list[Config]:
    """At most 6 configurations for x [m, k] and weights [n, k], best guess first.

    Args:
      dtype: of the operands.
      out_dtype: of the result.
      blocked: whether there are scales for blocks of 128.
      bias, residual: whether there is one; each takes shared memory.
      activation: of gates and ups, the rows of the weight, or None.
      cores: multiprocessors.

    Raises:
      NotImplementedError: no configuration takes the call.
    """
    dtypes = jnp.dtype(dtype), jnp.dtype(out_dtype)
    return list(_ranked(m, n, k, *dtypes, blocked, bias, residual, activation, cores))


@functools.cache
def _ranked(
    m: int,
    n: int,
    k: int,
    dtype: Any,
    out_dtype: Any,
    blocked: bool,
    bias: bool,
    residual: bool,
    activation: str | None,
    cores: int,
) -> list[Config]:
    few = m <= _FEW and activation is None and not blocked
    found: dict[tuple, tuple[float, Config]] = {}
    for config in _structures(m, n, k, dtype.itemsize, blocked):
        if activation is not None:
            # Clusters of 4 were slow wherever they were measured, those of few tokens useless.
            if config.cluster > (1 if m <= _FEW else 2):
                continue
            # Half as many columns leave.
            config = dataclasses.replace(config, store=config.store * (2 - config.swap))
        tiling = _deepest(
            Tiling(
                m=m,
                n=n,
                k=k,
                config=config,
                dtype=dtype,
                out_dtype=out_dtype,
                blocked=blocked,
                bias=jnp.dtype(jnp.float32) if bias else None,
                residual=residual,
                activation=activation,
                cores=cores,
            )
        )
        # Clusters that share K and walk over several tiles were not seen to end on a GPU within the
        # time that a check was given: they are not chosen, only taken when they are asked for.
        if tiling is None or (config.splits > 1 and not tiling.once):
            continue
        key: tuple = (config.swap, config.warpgroups, config.splits, config.multicast)
        key = (*key, config.resident)
        if activation is not None:
            key = (*key, config.columns)
        guess = seconds(tiling) * (_slower(tiling) if few else 1)
        if key not in found or guess < found[key][0]:
            found[key] = guess, tiling.config
    if not found:
        raise NotImplementedError(f"no tiles fit M = {m}, N = {n}, K = {k}")
    ranked = sorted(found.values(), key=lambda pair: pair[0])
    near = [config for guess, config in ranked if guess <= _WORST * ranked[0][0]]
    if activation is not None and m <= _FEW:
        return _with_longer_stages(near)[:_MOST]
    if few:
        return _with_few_copies(near, k, dtype.itemsize)[:_MOST]
    return _with_walks(near, dtype.itemsize)[:_MOST] if m >= 1024 else near[:_MOST]


def seconds(t: Tiling) -> float:
    """A guess at a call's time: the slowest of four resources, and what does not overlap."""
    c = t.config
    waves = -(-t.tiles // t.clusters)
    crowd = min(c.resident, -(-t.blocks // t.cores))  # blocks that run side by side
    blocks = t.tiles * c.cluster
    k = -(-t.steps // c.splits) * c.k_tile * t.operand_bytes
    # A warpgroup's product of 64 x columns x 32 bytes takes columns / 2 clocks.
    clocks = k / BLOCK * max(_STEP, c.warpgroups * 2 * max(c.columns, 16))
    if t.chunk:  # what is added up outside the tensor cores, 128 lanes at a time
        clocks += k / BLOCK / t.chunk * c.columns * c.rows / 128
    products = waves * crowd * clocks / _CLOCK
    ingest = waves * crowd * k * (c.rows + c.columns) / _INGEST / _CLOCK
    cache = blocks * k * (c.rows + c.columns / c.multicast) / _L2
    result = jnp.dtype(t.out_dtype).itemsize * t.m * t.outputs
    operands = (t.n * t.k + t.m * t.k) * t.operand_bytes
    memory = (operands + result * (1 + t.residual)) / _BANDWIDTH
    # Too few multiprocessors cannot have enough bytes under way.
    memory *= max(1.0, 0.5 * t.cores / min(t.cores, blocks))
    end = _TILE * c.columns / 256 * (_TRANSPOSED if c.swap else 1)
    if t.activation:
        end += _GATE * c.warpgroups * c.columns / 256
    fixed = _START + waves * end + _MEETING * (c.splits - 1)
    return max(products, ingest, cache, memory) * (1 + _COUPLING * math.log2(c.cluster)) + fixed


def _slower(t: Tiling) -> float:
    """Times the guess: what the model does not see where the weights' arrival is all there is.

    On an H200 with Llama 3 8B's layers, four traits were slower nearly everywhere: stages
    that bring only 128 bytes of a row (by 3 to 17 %), several warpgroups in clusters that share K
    (5 to 12 %), one warpgroup in blocks that walk over several tiles (2 %), and blocks that load
    the tokens together (2 to 18 %).
    """
    c = _joined(t.config, t.k, t.operand_bytes, stages=_LONG)
    short = c.k_tile * t.operand_bytes < 2 * BLOCK
    shared = c.splits > 1 and c.warpgroups > 1
    walking = c.warpgroups == 1 and not t.once
    return _SLOWER ** sum((short, shared, walking, c.multicast > 1))


def _structures(m: int, n: int, k: int, width: int, blocked: bool) -> Iterator[Config]:
    """Everything worth a thought, with two stages. Width is of a number of an operand, in bytes."""
    tile = next((size for size in (BLOCK, 64, 32) if k * width % size == 0), 32) // width
    widths = {next(columns for columns in _COLUMNS if columns >= min(m, 256))}
    if m > 128:
        widths |= set(_WIDE)
    clusters = [(s, c) for s, c in itertools.product((1, 2, 3, 4), (1, 2, 4)) if s * c <= 4]
    for warpgroups, columns, (splits, multicast) in itertools.product((1, 2, 4), widths, clusters):
        if warpgroups * columns > 512 or (blocked and columns > 128):
            continue
        config = Config(
            swap=True,
            warpgroups=warpgroups,
            columns=columns,
            stages=2,
            k_tile=tile,
            splits=splits,
            multicast=multicast,
            store=64 if columns < 256 else 32,
        )
        yield config
        if m <= _FEW and (warpgroups, splits, multicast) == (1, 2, 1):
            yield dataclasses.replace(config, resident=2)
    for columns, multicast in itertools.product(_WIDE if m > _FEW else (), (1, 2, 4)):
        if blocked and columns > 128:
            continue
        yield Config(
            swap=False,
            warpgroups=2,
            columns=columns,
            stages=2,
            k_tile=tile,
            multicast=multicast,
            store=64 if columns < 256 else 32,
        )


def _deepest(t: Tiling) -> Tiling | None:
    """With as many stages as shared memory has room for; None: not even two fit."""

    def with_stages(stages: int) -> Tiling:
        return dataclasses.replace(t, config=dataclasses.replace(t.config, stages=stages))

    if refusal(with_stages(2)) is not None:
        return None
    # What follows the last that fits is refused, what comes before it is not.
    more = bisect.bisect(range(3, 33), 0, key=lambda count: refusal(with_stages(count)) is not None)
    return with_stages(2 + more)


def _with_longer_stages(ranked: list[Config]) -> list[Config]:
    """Each with half as many stages of twice the size, which were faster, then as it is."""
    return [
        dataclasses.replace(config, k_tile=times * config.k_tile, stages=config.stages // times)
        for config in ranked
        for times in (2, 1)
        if config.stages >= 3 * times
    ]


def _with_few_copies(ranked: list[Config], k: int, width: int) -> list[Config]:
    """Each with its stages joined to few long ones; the best one also with half as long ones.

    A copy costs the threads that ask for it some hundred clocks, however long it is.
    """
    found = [_joined(config, k, width, stages=_LONG) for config in ranked]
    half = _joined(ranked[0], k, width, stages=9)
    return list(dict.fromkeys([found[0], half, *found[1:]]))


def _joined(config: Config, k: int, width: int, stages: int) -> Config:
    """With stages of two or four times the length, but at least so many, and two for each block."""
    if config.k_tile * width != BLOCK:
        return config
    for times in (4, 2):
        length = times * config.k_tile
        if config.stages // times >= stages and k >= 2 * config.splits * length:
            return dataclasses.replace(config, k_tile=length, stages=config.stages // times)
    return config


def _with_walks(ranked: list[Config], width: int) -> list[Config]:
    """The best also with other walks through its many tiles.

    Operands of 16 bits fill the L2 cache with half as many tiles: bands of 4 took 1225 us where
    bands of 8 took 1311 (gate and up of 4096 tokens, 28672 x 4096).
    """
    bands = (8, 4, 16) if width == 1 else (4, 8, 16)
    best, *others = [dataclasses.replace(config, snake=bands[0]) for config in ranked]
    walks = [dataclasses.replace(best, snake=band) for band in bands[1:]]
    return [best, *others[: _MOST - 3], *walks]
