"""Decode attention in the interpreter and in XLA against float64, and what the interpreter cannot
see: the code for single threads, run here on NumPy, and the division of the work."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import plgpu_shim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from qjax_kernels.decode_attention import api, mosaic, narrow, places, strips, threads
from qjax_kernels.decode_attention import xla as xla_kernel
from qjax_kernels.decode_attention.config import SHARED_MEMORY, Config, candidates
from qjax_kernels.decode_attention.operands import Operands
from qjax_kernels.decode_attention.problem import Buffers, Problem
from qjax_kernels.decode_attention.schedule import Schedule
from qjax_kernels.quantize_rows.api import quantize_rows

if jax.__version_info__ >= (0, 12):
    # The race detector and the exchange between threads read private parts of the interpreter.
    pytest.skip("the interpreter's private parts are those of jax 0.11", allow_module_level=True)

# The largest relative error of a rounding.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, with every row and entry that must not be used filled with NaN or nonsense."""

    cache: str = "bfloat16"
    query: str = "bfloat16"
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 64
    lengths: tuple[int, ...] = (150, 0, 64)
    paged: bool = True
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    scale: float | None = None
    scales: str | None = "heads"
    factor: float = 1.0  # of the queries: large ones make softmax choose

    @functools.cached_property
    def arrays(self):
        """q, k_pages, v_pages, block_table, lengths, k_scale, v_scale, alibi_slopes in NumPy."""
        rng = np.random.default_rng(0)
        batch, lengths = len(self.lengths), np.array(self.lengths, np.int32)
        most = max(1, -(-max(self.lengths) // self.page_size))
        pages = batch * most + 3 if self.paged else batch
        table = rng.permutation(pages)[: batch * most].reshape(batch, most).astype(np.int32)
        if not self.paged:
            table = np.arange(batch, dtype=np.int32)[:, None]
        shape = (pages, self.kv_heads, self.page_size, self.head_dim)
        used = np.zeros((pages, self.page_size), bool)
        for b, t in self.seen():
            used[table[b, t // self.page_size], t % self.page_size] = True
        caches = []
        for _ in range(2):
            if self.cache == "int8":
                x = rng.integers(-128, 128, shape).astype(np.int8)
            else:
                x = rng.normal(size=shape)
                x[..., ::7] *= np.exp(rng.normal(size=shape[:-1]))[..., None]  # outliers
                x = x.astype(np.float32).astype(self.cache)
                x[~np.broadcast_to(used[:, None, :, None], shape)] = np.nan
            caches.append(x)
        needed = {(b, t // self.page_size) for b, t in self.seen()}
        for b, i in np.ndindex(*table.shape):
            if (b, i) not in needed and self.paged:
                table[b, i] = rng.choice([-1, 2**31 - 1])
        q = self.factor * rng.normal(size=(batch, self.heads, self.head_dim))
        scales = [None, None]
        if np.dtype(self.cache).itemsize == 1 and self.scales:
            size = self.kv_heads if self.scales == "heads" else ()
            scales = [np.float32(rng.uniform(0.5, 2, size)) for _ in range(2)]
            scales[0] = scales[0] / np.float32(64 if self.cache == "int8" else 1)
        slopes = np.float32(rng.uniform(0.01, 0.5, self.heads)) if self.alibi else None
        query = q.astype(np.float32).astype(self.query)
        return query, *caches, table if self.paged else None, lengths, *scales, slopes

    def seen(self):
        for b, n in enumerate(self.lengths):
            for t in range(0 if self.window is None else max(0, n - self.window), n):
                yield b, t

    def expected(self):
        """In float64: (the result, the sum of the weights times |values|)."""
        q, keys, values, table, lengths, k_scale, v_scale, slopes = self.arrays
        y, size = np.zeros(q.shape), np.zeros(q.shape)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        for b, h in np.ndindex(*q.shape[:2]):
            n, g = lengths[b], h // (self.heads // self.kv_heads)
            at = [t for sequence, t in self.seen() if sequence == b]
            if not at:
                continue
            page = [b if table is None else table[b, t // self.page_size] for t in at]
            row = [t % self.page_size for t in at]
            k, v = (x[page, g, row].astype(np.float64) for x in (keys, values))
            k = k * (1.0 if k_scale is None else np.broadcast_to(k_scale, self.kv_heads)[g])
            v = v * (1.0 if v_scale is None else np.broadcast_to(v_scale, self.kv_heads)[g])
            s = scale * (k @ q[b, h].astype(np.float64))
            if self.soft_cap is not None:
                s = self.soft_cap * np.tanh(s / self.soft_cap)
            if slopes is not None:
                s = s + slopes[h] * (np.array(at) - (n - 1))
            weights = np.exp(s - s.max())
            weights /= weights.sum()
            y[b, h], size[b, h] = weights @ v, weights @ np.abs(v)
        return y, size

    def check(self, function, rounded_weights=None):
        """Call function(*arrays, **static) and compare.

        Weights are rounded once to the type that is multiplied, results once to that of q. Sums
        are float32 and the GPU's 2 ** x has 22 bits: scores below 100 are off by less than 2^-14,
        which is then the relative error of a weight. float16 weights below 2^-14 lose bits: 2^-25
        of the largest weight each, less than 2^-14 of their sum for 2000 tokens.
        """
        static = {"window": self.window, "soft_cap": self.soft_cap, "scale": self.scale}
        arrays = [None if x is None else jnp.asarray(x) for x in self.arrays]
        y = np.asarray(function(*arrays, **static)).astype(np.float64)
        reference, size = self.expected()
        assert y.shape == reference.shape
        unit = UNIT[self.query]
        weights = 0.0 if rounded_weights is None else UNIT[rounded_weights] + 2.0**-14
        weights += 2.0**-16
        assert (np.abs(y - reference) <= 1.1 * (weights * size + unit * np.abs(reference))).all()
        rows = np.linalg.norm(reference, axis=-1)
        error = np.linalg.norm(y - reference, axis=-1) / np.where(rows > 0, rows, 1)
        # Roundings do not conspire: by row they add up like random numbers.
        assert error.max() <= 0.75 * (unit + weights)

    def check_kernel(self, config=None):
        def kernel(*arrays, scale, **static):
            scale = self.head_dim**-0.5 if scale is None else scale
            arrays = [x if x is None or x.ndim else x.reshape(1) for x in arrays]
            return mosaic.decode_attention(
                *arrays, scale=scale, config=config, interpret=True, **static
            )

        try:
            self.check(kernel, "float16" if np.dtype(self.cache).itemsize == 1 else self.cache)
        except Exception:
            plgpu_shim.reset()
            raise


def xla(q, k, v, table, lengths, k_scale, v_scale, slopes, **static):
    scales = {"k_scale": k_scale, "v_scale": v_scale, "alibi_slopes": slopes}
    return api.decode_attention(q, k, v, table, lengths, implementation="xla", **scales, **static)


CACHES = ["bfloat16", "float8_e4m3fn", "int8"]
VARIANTS = [
    Case(query="float16", cache="float16"),
    Case(query="float16", cache="float8_e4m3fn", scales="one"),
    Case(scales=None, cache="float8_e4m3fn"),
    Case(window=70),
    Case(window=1, cache="float8_e4m3fn"),
    Case(soft_cap=2.0, scale=0.3),
    Case(alibi=True, heads=12),
    Case(alibi=True, window=70, soft_cap=5.0, cache="int8"),
    Case(factor=30.0),
    Case(page_size=200, lengths=(200, 3, 130), paged=False),
    Case(page_size=16, window=50, lengths=(150, 60)),
    Case(page_size=32, cache="float8_e4m3fn"),
    Case(page_size=128, lengths=(150, 300)),
]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("cache", CACHES)
def test_every_format_and_head_dim(cache, head_dim):
    case = Case(cache=cache, head_dim=head_dim, heads=4, kv_heads=1, lengths=(150, 0))
    case.check_kernel(Config(stages=2))


@pytest.mark.parametrize("group", [1, 3, 8, 16, 71])
def test_groups(group):
    Case(heads=group, kv_heads=1, lengths=(70, 5)).check_kernel(Config(stages=2))


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants(case):
    case.check(xla)
    case.check_kernel(Config(stages=2))


CONFIGS = [
    Config(tokens=128, stages=2),
    Config(warpgroups=2),
    Config(cluster=2),
    Config(persistent=1, least=1),
    Config(persistent=1, least=3, warpgroups=2),
    Config(persistent=2, tokens=128, least=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_way_to_cut_the_work(config):
    lengths = (0, 300, 0, 64, 1)
    Case(lengths=lengths, page_size=128, window=200).check_kernel(config)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("config", [None, Config(stages=2), *CONFIGS[1:4]], ids=str)
def test_a_quantized_result_is_what_a_kernel_of_its_own_makes_of_it(config, dtype):
    case = Case(lengths=(0, 130, 64), head_dim=80, heads=4, kv_heads=1, cache="float8_e4m3fn")
    q, k, v, table, lengths, k_scale, v_scale, _ = (
        x if x is None else jnp.asarray(x) for x in case.arrays
    )
    # Large enough for some of the result to be clipped.
    out_scale = jnp.float32([0.004 if dtype == "int8" else 0.0017])
    arrays = (q, k, v, table, lengths, k_scale, v_scale, None)
    static = {"scale": 0.1, "window": None, "soft_cap": None}
    function = xla_kernel.decode_attention
    if config is not None:
        function = functools.partial(mosaic.decode_attention, config=config, interpret=True)
    plain = function(*arrays, **static)
    found = function(*arrays, **static, out_scale=out_scale, out_dtype=np.dtype(dtype))
    expected = quantize_rows(
        plain.reshape(3, -1),
        out_dtype=np.dtype(dtype),
        scale=out_scale.reshape(()),
        implementation="xla",
    ).values
    assert found.dtype == np.dtype(dtype)
    assert (found.view(jnp.uint8).reshape(3, -1) == expected.view(jnp.uint8)).all()
    largest = np.abs(np.asarray(found).astype(np.float32)).max()
    assert largest == ml_dtypes.finfo(dtype).max if dtype != "int8" else largest == 128


@pytest.mark.parametrize("config", CONFIGS[2:4], ids=str)
def test_cut_with_8_bits(config):
    case = Case(cache="float8_e4m3fn", head_dim=80, heads=4, kv_heads=1, lengths=(0, 200))
    case.check_kernel(config)


def test_without_a_config():
    Case(heads=4, kv_heads=1, lengths=(70,)).check_kernel()


def test_many_short_sequences():
    # More than the schedule reads at a time, and workers that begin and end within them.
    lengths = tuple(37 * i % 100 for i in range(19))
    Case(lengths=lengths, heads=2, kv_heads=1).check_kernel(Config(persistent=1, least=1))


@pytest.mark.parametrize("config", [Config(stages=2), Config(persistent=1, least=1)], ids=str)
def test_no_races(config, monkeypatch):
    careful = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", careful)
    Case(lengths=(300, 70), heads=4, kv_heads=1).check_kernel(config)
    assert not plgpu_shim.races_found()


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_xla_over_many_blocks(cache):
    query = "float32" if cache == "float32" else "bfloat16"
    Case(query=query, cache=cache, head_dim=80, lengths=(700, 3)).check(xla)


@functools.cache
def runs_of_workers(batch, kv_heads, window, most=64):
    """A function of lengths, workers and least that says what worker 0, 1 ... 11 does: rows of
    (sequence, head, first step, steps, segment), with 0 steps behind the last."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    operands = Operands(64, 64, 8, bfloat16, bfloat16)
    problem = Problem(operands, batch, kv_heads, kv_heads, 64, 8, 1.0, window, None, bfloat16)

    def runs(lengths, workers, least):
        schedule = Schedule(problem, lengths, workers, least)
        share, total = schedule.share()

        def of_worker(worker):
            begin = worker * share
            end = jnp.where(worker < workers, jnp.minimum(begin + share, total), 0)

            def segment(i, carry):
                step, sequence, start, out = carry
                run, index = schedule.run(step, end, sequence, start)
                row = jnp.stack([run.sequence, run.head, run.first, run.count, index])
                step = step + run.count
                out = out.at[i].set(row)
                return step, *schedule.next_at(step, sequence, start), out

            out = jnp.zeros((most, 5), jnp.int32)
            place = schedule.find(jnp.minimum(begin, total - 1))
            return jax.lax.fori_loop(0, most, segment, (begin, *place, out))[-1]

        before = jax.vmap(schedule.before)(jnp.arange(batch))
        return jax.vmap(of_worker)(jnp.arange(12)), share, before

    return jax.jit(runs)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 500), min_size=19, max_size=19),
    batch=st.sampled_from([3, 19]),
    workers=st.integers(1, 12),
    least=st.integers(1, 5),
    heads_and_window=st.sampled_from([(1, None), (3, 70)]),
)
def test_every_step_is_done_once(lengths, batch, workers, least, heads_and_window):
    (kv_heads, window), lengths = heads_and_window, lengths[:batch]
    function = runs_of_workers(batch, kv_heads, window)
    found, share, before = function(
        jnp.array(lengths, jnp.int32), jnp.int32(workers), jnp.int32(least)
    )
    done, slots = {}, set()
    for worker, rows in enumerate(np.asarray(found)):
        for sequence, head, first, count, segment in rows[rows[:, 3] > 0]:
            assert worker < workers
            assert segment == sequence * kv_heads + head
            assert segment + worker not in slots
            slots.add(segment + worker)
            for i in range(first, first + count):
                assert (sequence, head, i) not in done
                done[sequence, head, i] = worker
    assert not slots or max(slots) < batch * kv_heads + workers - 1
    wanted = set()
    for b, n in enumerate(lengths):
        seen = range(0 if window is None else max(0, n - window), n)
        wanted |= {(b, h, t // 64) for h in range(kv_heads) for t in seen}
    assert set(done) == wanted
    # What the merge reads: consecutive shares of a segment, from the one where its steps begin.
    for b, h in itertools.product(range(batch), range(kv_heads)):
        workers_of = [w for key, w in sorted(done.items()) if key[:2] == (b, h)]
        step = before[b] + h * len(workers_of)
        assert workers_of == [(step + i) // share for i in range(len(workers_of))]


class Simulated(threads.Threads):
    """`Threads` that computes, with an array of 128 for every value. Memory is bytes."""

    def __init__(self, dtype=np.float16):
        self.masks, self.dtype = [np.ones(128, bool)], np.dtype(dtype)

    def index(self):
        return np.arange(128)

    def constant(self, x):
        return np.full(128, x)

    def add(self, x, y):
        return x + y

    def mul(self, x, y):
        return x * y

    def divmod(self, x, y):
        return x // y, x % y

    def xor(self, x, y):
        return x ^ y

    def less(self, x, y):
        return x < y

    def either(self, x, y):
        return x | y

    @contextlib.contextmanager
    def when(self, predicate):
        self.masks.append(self.masks[-1] & predicate)
        yield
        self.masks.pop()

    def load_pair(self, memory, byte):
        at = np.where(self.masks[-1], byte, 0)
        return np.stack([memory[at + i] for i in range(4)], 1).copy().view(self.dtype)

    def _store(self, memory, byte, values):
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(128, -1)
        assert (byte[self.masks[-1]] % raw.shape[1] == 0).all()
        for i in range(raw.shape[1]):
            memory[byte[self.masks[-1]] + i] = raw[self.masks[-1], i]

    def store_pair(self, memory, byte, pair):
        self._store(memory, byte, pair)

    def store_rounded(self, memory, byte, values, through, scale):
        values = np.stack(values, 1).astype(through)
        if scale is not None:
            limit = ml_dtypes.finfo(self.dtype).max
            values = np.clip(values.astype(np.float32) / scale, -limit, limit)
        self._store(memory, byte, values.astype(self.dtype))

    def load_floats(self, memory, byte, count):
        at = np.where(self.masks[-1], byte, 0)
        assert (at % (4 * count) == 0).all()
        raw = np.stack([memory[at + i] for i in range(4 * count)], 1)
        return list(raw.copy().view(np.float32).T)

    def store_floats(self, memory, byte, values):
        self._store(memory, byte, np.stack(values, 1).astype(np.float32))

    def send_floats(self, memory, byte, values, block, barrier):
        values = np.stack(values, 1).astype(np.float32)
        for to in range(len(memory)):
            with self.when(block == to):
                assert np.isnan(memory[to].view(np.float32)[byte[self.masks[-1]] // 4]).all()
                self._store(memory[to], byte, values)
                barrier[to] += values.nbytes // 128 * self.masks[-1].sum()
        assert (block[self.masks[-1]] < len(memory)).all()

    def number(self, x):
        return np.full(128, x, np.float32)

    def repeat(self, count, body, carry):
        for i in range(count):
            carry = body(self.constant(i), carry)
        return carry

    def plus(self, x, y):
        return x + y

    def minus(self, x, y):
        return x - y

    def times(self, x, y):
        return x * y

    def larger(self, x, y):
        return np.maximum(x, y)

    def exp2(self, x):
        return np.exp2(x)

    def one_over(self, x):
        return np.where(x > 0, 1 / np.where(x > 0, x, 1), 0)

    def store_zeros(self, memory, byte):
        self._store(memory, byte, np.zeros((128, 16), np.uint8))

    def part(self, pair, i):
        return pair[:, i]

    def to_f16(self, pair):
        return pair.astype(np.float16)

    def ldmatrix(self, memory, byte, count, *, transposed):
        # By the manual: rows of 16 bytes, whose 8 pairs of bytes are dealt out to 4 lanes a row.
        words = []
        lane = np.arange(32)
        for matrix in range(count):
            of_warps = []
            for warp in range(4):
                rows = byte[32 * warp + 8 * matrix + np.arange(8)]
                assert (rows % 16 == 0).all()
                pairs = memory[rows[:, None] + np.arange(16)].reshape(8, 8, 2)
                if transposed:
                    pairs = pairs.swapaxes(0, 1)
                first, second = (pairs[lane // 4, 2 * (lane % 4) + i] for i in range(2))
                of_warps.append(np.concatenate([first, second], 1))
            words.append(np.concatenate(of_warps))
        return words

    def widen(self, word, dtype, *pairs):
        wide = word.copy().view(dtype).astype(np.float16)
        return [wide[:, list(pair)] for pair in pairs]


def in_shared_memory(x, swizzle):
    """The bytes of a matrix as TMA stores it: tiles of 8 rows by `swizzle` bytes, in which the
    16-byte chunk c of 128-byte line l lies at c ^ (l % (swizzle / 16))."""
    raw = np.ascontiguousarray(x).view(np.uint8)
    if swizzle is None:
        return raw.reshape(-1).copy()
    rows, width = raw.shape
    tiles = raw.reshape(rows // 8, 8, width // swizzle, swizzle).transpose(0, 2, 1, 3)
    lines = tiles.reshape(-1, 8 * swizzle // 128, 8, 16)
    out = np.empty_like(lines)
    for line, chunk in np.ndindex(lines.shape[1:3]):
        out[:, line, chunk ^ (line % (swizzle // 16))] = lines[:, line, chunk]
    return out.reshape(-1)


def from_registers(registers):
    """The left operand of wgmma: in each 64 rows warp w has 16, lane l rows l / 4 and l / 4 + 8 of
    them, and of each 8 columns 2 (l % 4) and the next."""
    blocks, eights, _ = registers.shape
    out = np.full((64 * blocks, 8 * eights), np.nan, np.float16)
    thread = np.arange(128)
    for block, eight, half in np.ndindex(registers.shape):
        rows = 64 * block + thread // 32 * 16 + 8 * half + thread % 32 // 4
        for i in range(2):
            out[rows, 8 * eight + 2 * (thread % 4) + i] = registers[block, eight, half][:, i]
    return out


def byte_matrix(tokens, head_dim, dtype):
    rng = np.random.default_rng(1)
    if dtype == np.int8:
        return rng.integers(-128, 128, (tokens, head_dim)).astype(np.int8)
    return rng.normal(size=(tokens, head_dim)).astype(dtype)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_threads_load_an_8_bit_cache(dtype, head_dim):
    tokens = 128 if head_dim == 128 else 64
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    operands = Operands(tokens, head_dim, 8, np.dtype(dtype), bfloat16)
    swizzle = operands.swizzle if operands.cache_transforms else None
    x = byte_matrix(tokens, head_dim, dtype)
    memory = in_shared_memory(x, swizzle)
    arguments = (Simulated(), memory, tokens, head_dim, np.dtype(dtype), swizzle)
    keys = from_registers(narrow.emit_keys(*arguments))
    assert (keys == np.asarray(narrow.keys(jnp.asarray(x)))).all()
    values = from_registers(narrow.emit_values(*arguments))
    place = np.asarray(narrow.rows(jnp.arange(values.shape[0])[:, None]))[0]  # of each feature
    assert (values[place][:head_dim] == x.astype(np.float16).T).all()
    assert (np.asarray(narrow.values(jnp.asarray(x)))[place][:head_dim] == x.T.astype(float)).all()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_threads_store_queries(cache, head_dim):
    operands = Operands(64, head_dim, 16, np.dtype(cache), np.dtype(np.float16))
    tile = operands.queries_buffer().transforms[0].tiling[1]
    x = np.random.default_rng(2).normal(size=(16, head_dim)).astype(np.float16)
    memory = np.zeros(x.nbytes, np.uint8)
    convert = narrow.emit_query_pair if operands.narrow else None
    raw = x.reshape(-1).view(np.uint8)
    places.emit_put_queries(Simulated(), raw, memory, x.shape, 2 * tile, convert)
    wanted = np.asarray(narrow.queries(jnp.asarray(x))) if operands.narrow else x
    assert (memory == in_shared_memory(wanted, 2 * tile)).all()


@pytest.mark.parametrize("bounds", [(0, 64), (-30, 17), (5, 200), (20, 21)])
@pytest.mark.parametrize(
    ("width", "swizzle"), [(128, 128), (64, 64), (256, 32), (512, 128), (80, None)]
)
def test_threads_clear_rows(bounds, width, swizzle):
    x = np.random.default_rng(3).integers(1, 255, (64, width)).astype(np.uint8)
    memory = in_shared_memory(x, swizzle)
    limits = tuple(np.full(128, bound) for bound in bounds)
    places.emit_clear_rows(Simulated(), memory, limits, x.shape, swizzle)
    row = np.arange(64)[:, None]
    kept = np.where((row >= bounds[0]) & (row < bounds[1]), x, 0)
    assert (memory == in_shared_memory(kept, swizzle)).all()


def in_registers(mixed):
    """Registers of an accumulator [features, columns]: see `from_registers`."""
    registers = np.empty((mixed.shape[0] // 64, mixed.shape[1] // 8, 2), object)
    thread = np.arange(128)
    for block, eight, half in np.ndindex(registers.shape):
        rows = 64 * block + thread // 32 * 16 + 8 * half + thread % 32 // 4
        at = 8 * eight + 2 * (thread % 4)
        registers[block, eight, half] = np.stack([mixed[rows, at], mixed[rows, at + 1]], 1)
    return registers


@pytest.mark.parametrize("neighbours", [1, 2])
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 128), (5, 80), (12, 64), (1, 256)])
def test_threads_store_rows(heads, head_dim, neighbours):
    columns, features = -(-heads // 8) * 8, -(-head_dim // 64) * 64
    mixed = np.random.default_rng(4).normal(size=(features, columns)).astype(np.float32)
    registers = in_registers(mixed)
    memory = np.zeros(2 * heads * head_dim, np.uint8)
    for block in range(features // 64):  # as the merge does it
        start = np.full(128, 64 * block)
        part = registers[block : block + 1]
        rows = places.Rows(memory, (heads, head_dim), 2, np.float16)
        places.emit_put_rows(Simulated(), part, rows, start, neighbours)
    wanted = np.asarray(narrow.rows(jnp.asarray(mixed))) if neighbours == 2 else mixed.T
    found = memory.view(np.float16).reshape(heads, head_dim)
    assert (found == wanted[:heads, :head_dim].astype(np.float16)).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "head_dim", "blocks", "warpgroups", "neighbours"),
    [
        (4, 128, 8, 1, 1),
        (4, 128, 8, 3, 2),
        (12, 80, 4, 2, 2),
        (8, 32, 8, 2, 1),
        (4, 128, 1, 2, 1),
        (16, 256, 1, 4, 2),
        (71, 64, 2, 1, 1),
        (3, 96, 2, 4, 2),
    ],
)
def test_threads_add_up_what_all_found(heads, head_dim, blocks, warpgroups, neighbours, dtype):
    columns, features = -(-heads // 8) * 8, -(-head_dim // 64) * 64
    x = strips.Deal(head_dim, columns, blocks, warpgroups, neighbours)
    rng = np.random.default_rng(5)
    tops = np.float32(5 * rng.normal(size=(x.members, columns)))
    totals = np.float32(rng.uniform(1, 9, size=tops.shape))
    mixed = np.float32(rng.normal(size=(x.members, features, columns)))
    # One that had nothing to do, and a head of which nobody has seen anything.
    tops[-1], totals[-1], mixed[-1] = strips.LOWEST, 0, 0
    tops[:, 1], totals[:, 1], mixed[:, :, 1] = strips.LOWEST, 0, 0
    mixed[:, head_dim:] = np.nan  # are not looked at
    pieces, weights = (
        [np.full(size, 255, np.uint8) for _ in range(blocks)]  # NaN
        for size in (x.each * x.members * 512, x.members * x.eights * 64)
    )
    came = np.zeros(blocks, int)
    for member in range(x.members):
        memory = (pieces, weights, came) if blocks > 1 else (pieces[0], weights[0])
        thread = np.arange(128)
        at = [8 * eight + 2 * (thread % 4) for eight in range(x.eights)]
        of_heads = [
            [np.stack([y[c], y[c + 1]], 1) for c in at] for y in (tops[member], totals[member])
        ]
        values = in_registers(mixed[member])
        strips.emit_send(Simulated(), x, memory, np.full(128, member), of_heads, values)
    found = np.zeros(heads * head_dim * np.dtype(dtype).itemsize, np.uint8)
    scale = np.float32(0.01) if np.dtype(dtype).itemsize == 1 else None
    rows = places.Rows(found, (heads, head_dim), np.dtype(dtype).itemsize, np.float16, scale)
    for block, warpgroup in np.ndindex(blocks, warpgroups):
        mine = min(max(x.all - block * x.each, 0), x.each)
        if blocks > 1:  # as `open` tells the barrier
            assert came[block] == mine * x.members * 512 + x.members * x.eights * 64
        place = (np.full(128, block), np.full(128, warpgroup))
        memory = pieces[block], weights[block]
        strips.emit_collect(
            Simulated(dtype), x, memory, *place, np.full(128, 1.5, np.float32), rows
        )
    share = np.exp2(tops - tops.max(0)).astype(np.float64)
    total = (share * totals).sum(0)
    terms = 1.5 * share[:, None] * mixed / np.where(total > 0, total, 1)
    y, size = terms.sum(0), np.abs(terms).sum(0)
    y, size = (
        (np.asarray(narrow.rows(jnp.asarray(z))) if neighbours == 2 else z.T)[:heads, :head_dim]
        for z in (y, size)
    )
    # Sums and 2 ** x are float32. What is rounded is float16, and e4m3 once more: half a unit, or
    # half of the smallest number.
    error = 2.0**-11 * np.abs(y) + 2.0**-25 + 2.0**-20 * size
    if scale is not None:
        y, error = np.clip(y / scale, -448, 448), error / scale
        error = error + 2.0**-4 * (np.abs(y) + error) + 2.0**-10
    off = np.abs(found.view(dtype).reshape(y.shape).astype(np.float64) - y)
    assert (off <= error).all()


SHAPES = [(1, 8, 4, 128, 64, 16), (64, 8, 8, 128, 64, 64), (16, 1, 71, 64, 64, 64)]
SHAPES += [(32, 8, 2, 256, 16, 999), (8, 32, 1, 80, 4096, 1), (256, 8, 4, 128, 128, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cache", CACHES)
def test_candidates_fit(shape, cache):
    found = candidates(*shape, np.dtype(cache), 132)
    assert 2 <= len(found) <= 6
    assert len(set(found)) == len(found)
    columns = -(-shape[2] // 8) * 8
    for config in found:
        assert config.fits(*shape[4:])
        shared = config.shared(shape[3], columns, np.dtype(cache)) + 1024
        assert shared * max(1, config.persistent) <= SHARED_MEMORY


def test_what_is_refused():
    def kernel(case, config=None):
        arrays = [None if x is None else jnp.asarray(x) for x in case.arrays]
        static = {"scale": 1.0, "window": None, "soft_cap": None, "config": config}
        mosaic.decode_attention(*arrays, interpret=True, **static)

    for case, config, reason in (
        (Case(query="float32"), None, "queries must be"),
        (Case(query="float16"), None, "a cache of bfloat16 with queries of float16"),
        (Case(head_dim=72), None, "head_dim"),
        (Case(heads=300, kv_heads=1), None, "300 query heads"),
        (Case(page_size=48), None, "pages of 48"),
        (Case(page_size=192, lengths=(300,)), Config(tokens=128), "steps of 128"),
        (Case(page_size=150, paged=False), None, "a multiple of 8"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            kernel(case, config)
    arrays = [None if x is None else jnp.asarray(x) for x in Case().arrays[:5]]
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        api.decode_attention(*arrays, implementation="mosaic")


def test_calls_that_do_not_fit_together():
    q, k, v, table, lengths = (jnp.asarray(x) for x in Case().arrays[:5])
    call = functools.partial(api.decode_attention, implementation="xla")
    for arguments, static, reason in (
        ((q[0], k, v, table, lengths), {}, "q is"),
        ((q, k, v[:, :1], table, lengths), {}, "must be alike"),
        ((q[:, :5], k, v, table, lengths), {}, "divides 5"),
        ((q, k, v, table[:1], lengths), {}, "block_table"),
        ((q, k, v, None, lengths), {}, "without a block table"),
        ((q, k, v, table, lengths.astype(jnp.float32)), {}, "lengths"),
        ((q, k, v, table, lengths), {"k_scale": jnp.ones(3)}, "k_scale"),
        ((q, k, v, table, lengths), {"alibi_slopes": jnp.ones(3)}, "alibi_slopes"),
        ((q, k, v, table, lengths), {"window": 0}, "window"),
        ((q, k, v, table, lengths), {"soft_cap": 0.0}, "soft_cap"),
        ((q, k, v, table, lengths), {"out_dtype": jnp.int8}, "needs an out_scale"),
        ((q, k, v, table, lengths), {"out_scale": jnp.float32(1)}, "out_dtype int8"),
        (
            (q, k, v, table, lengths),
            {"out_dtype": jnp.int8, "out_scale": jnp.ones(3)},
            "out_scale",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            call(*arguments, **static)


def test_the_default_runs_anywhere():
    case = Case(cache="int8", scales="one")

    def default(q, k, v, table, lengths, k_scale, v_scale, slopes, **static):
        scales = {"k_scale": k_scale, "v_scale": v_scale, "alibi_slopes": slopes}
        return jax.jit(functools.partial(api.decode_attention, **static))(
            q, k, v, table, lengths, **scales
        )

    case.check(default)


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
@pytest.mark.parametrize(("columns", "head_dim"), [(8, 64), (8, 112), (16, 80), (24, 256)])
def test_what_is_copied_begins_at_128_bytes(columns, head_dim, cache):
    """Elsewhere the copy engine raises an illegal instruction, which the interpreter does not."""
    operands = Operands(
        tokens=64, head_dim=head_dim, columns=columns,
        cache=np.dtype(cache), query=np.dtype("bfloat16"),
    )  # fmt: skip
    problem = Problem(
        operands=operands, batch=1, heads=columns, kv_heads=1, page_size=64, pages=1,
        scale=1.0, window=None, soft_cap=None, out=np.dtype("bfloat16"),
    )  # fmt: skip
    scratch = Buffers.scratch(problem, 2, 3, slopes=True)
    for name, outer in (("raw_queries", 1), ("slopes", 1), ("keys", 2), ("values", 2)):
        shared = scratch[name]
        assert np.prod(shared.shape[outer:]) * np.dtype(shared.dtype).itemsize % 128 == 0, name
