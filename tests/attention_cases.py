"""Calls of attention of prompts, chunks and decode steps, with an oracle in float64."""

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  the names of its types for NumPy
import numpy as np

# The largest relative error of a rounding.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, with all that must not be used filled with NaN or nonsense.

    Attributes:
      context: tokens of each sequence before the chunk.
      lengths: tokens of each chunk.
      tokens: queries there is room for.
      layout: of keys and values: 'pages', 'cache' (not paged) or 'prompt' (of a prompt).
      factor: of the queries: large ones make softmax choose.
    """

    cache: str = "bfloat16"
    query: str = "bfloat16"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 32
    context: tuple[int, ...] = (37, 0, 64)
    lengths: tuple[int, ...] = (9, 0, 5)
    tokens: int = 9
    layout: str = "pages"
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    scale: float | None = None
    scales: str | None = "heads"
    factor: float = 1.0

    @functools.cached_property
    def arrays(self):
        """q, keys, values, table, k_scale, v_scale, slopes in NumPy."""
        rng = np.random.default_rng(0)
        batch, size = len(self.lengths), self.page_size
        ends = np.array(self.context) + self.lengths
        most = max(1, -(-max(ends) // size)) if self.layout == "pages" else 1
        pages = batch * most + 3 if self.layout == "pages" else batch
        table = np.arange(batch)[:, None]
        if self.layout == "pages":
            table = rng.permutation(pages)[: batch * most].reshape(batch, most)
        else:
            size = self.tokens if self.layout == "prompt" else size
        table = table.astype(np.int32)
        shape = (pages, self.kv_heads, size, self.head_dim)
        used = np.zeros((pages, size), bool)
        needed = set()
        for b, t in self.used():
            used[table[b, t // size], t % size] = True
            needed.add((b, t // size))
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
        for b, i in np.ndindex(*table.shape):
            if (b, i) not in needed and self.layout == "pages":
                table[b, i] = rng.choice([-1, 2**31 - 1])
        q = self.factor * rng.normal(size=(batch, self.tokens, self.heads, self.head_dim))
        for b, n in enumerate(self.lengths):
            q[b, n:] = np.nan
        scales = [None, None]
        if np.dtype(self.cache).itemsize == 1 and self.scales:
            count = self.kv_heads if self.scales == "heads" else ()
            scales = [np.float32(rng.uniform(0.5, 2, count)) for _ in range(2)]
            scales[0] = scales[0] / np.float32(64 if self.cache == "int8" else 1)
        slopes = np.float32(rng.uniform(0.01, 0.5, self.heads)) if self.alibi else None
        # What kernels round queries to, they are already.
        q = q.astype(np.float32).astype(self.multiplied if self.query == "float32" else self.query)
        return q.astype(self.query), *caches, table, *scales, slopes

    def sees(self, b: int, i: int) -> range:
        """The positions that query i of sequence b sees."""
        p = self.context[b] + i
        return range(0 if self.window is None else max(0, p + 1 - self.window), p + 1)

    def used(self) -> Iterator[tuple[int, int]]:
        """(sequence, position) of the keys that are seen."""
        for b, n in enumerate(self.lengths):
            if n:
                for t in range(self.sees(b, 0).start, self.sees(b, n - 1).stop):
                    yield b, t

    def expected(self):
        """In float64: (the result, the sum of the weights times |values|)."""
        q, keys, values, table, k_scale, v_scale, slopes = self.arrays
        y, size = np.zeros(q.shape), np.zeros(q.shape)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        for b, i, h in np.ndindex(*q.shape[:3]):
            if i >= self.lengths[b]:
                continue
            t, g = np.array(self.sees(b, i)), h // (self.heads // self.kv_heads)
            page, row = table[b, t // keys.shape[2]], t % keys.shape[2]
            k, v = (x[page, g, row].astype(np.float64) for x in (keys, values))
            k = k * (1.0 if k_scale is None else np.broadcast_to(k_scale, self.kv_heads)[g])
            v = v * (1.0 if v_scale is None else np.broadcast_to(v_scale, self.kv_heads)[g])
            s = scale * (k @ q[b, i, h].astype(np.float64))
            if self.soft_cap is not None:
                s = self.soft_cap * np.tanh(s / self.soft_cap)
            if slopes is not None:
                s = s + slopes[h] * (t - (self.context[b] + i))
            weights = np.exp(s - s.max())
            weights /= weights.sum()
            y[b, i, h], size[b, i, h] = weights @ v, weights @ np.abs(v)
        return y, size

    @property
    def static(self):
        """What is known when a call is compiled."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return {"window": self.window, "soft_cap": self.soft_cap, "scale": scale}

    def prompts(self, function):
        """The result of function(q, k, v, lengths, slopes, **static)."""
        q, keys, values, _, _, _, slopes = map(_array, self.arrays)
        lengths = jnp.asarray(self.lengths, jnp.int32)
        k, v = (x.swapaxes(1, 2) for x in (keys, values))
        return function(q, k, v, lengths, slopes, **self.static)

    def chunks(self, function):
        """That of function(q, k, v, table, context, lengths, k_scale, v_scale, slopes, ...)."""
        q, keys, values, table, *rest = map(_array, self.arrays)
        table = table if self.layout == "pages" else None
        sizes = (jnp.asarray(x, jnp.int32) for x in (self.context, self.lengths))
        return function(q, keys, values, table, *sizes, *map(_one, rest), **self.static)

    def steps(self, function):
        """That of function(q, k, v, table, lengths, k_scale, v_scale, slopes, **static)."""
        assert self.tokens == 1
        q, keys, values, table, *rest = map(_array, self.arrays)
        table = table if self.layout == "pages" else None
        ends = np.array(self.context) + self.lengths
        y = function(
            q[:, 0], keys, values, table, jnp.asarray(ends, jnp.int32), *map(_one, rest),
            **self.static,
        )  # fmt: skip
        return y[:, None]

    def check(self, y, rounded_weights=None):
        """Compare a result.

        Weights are rounded once to the type that is multiplied, results once to that of q. Sums
        are float32 and a GPU's 2 ** x has 22 bits: scores below 100 are off by less than 2^-14,
        which is then the relative error of a weight. float16 weights below 2^-14 lose bits: 2^-25
        of the largest weight each, less than 2^-14 of their sum for 2000 tokens.
        """
        y = np.asarray(y).astype(np.float64)
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

    @property
    def multiplied(self) -> str:
        """The type that kernels multiply."""
        return "float16" if np.dtype(self.cache).itemsize == 1 else self.cache


def _array(x):
    return None if x is None else jnp.asarray(x)


def _one(x):
    """Scales as implementations take them: [1] or one for each head."""
    return x if x is None or x.ndim else x.reshape(1)
