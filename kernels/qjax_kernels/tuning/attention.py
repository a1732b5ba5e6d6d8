"""Decode attention over a paged cache, to be tuned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.random import fold_in, normal

from qjax_kernels import bound
from qjax_kernels.decode_attention import choice, mosaic, xla
from qjax_kernels.decode_attention.config import candidates
from qjax_kernels.tuning.jobs import PAGE
from qjax_kernels.tuning.problem import Problem


class Attention(Problem):
    """One new token of each sequence, all sequences as long as they may be."""

    table_op = "decode_attention"
    limit = 0.02

    @property
    def format(self) -> str:
        return choice.table_format(self.dtype, self.job.head_dim)

    @property
    def dtype(self) -> np.dtype:
        """Of the cache."""
        return jnp.dtype(self.job.cache)

    @property
    def kv_heads(self) -> int:
        return self.job.n // self.job.head_dim

    @property
    def work(self) -> bound.Work:
        rows = 2 * 2 * self.m * self.job.n * (self.job.group_size or 1)
        return bound.Work(self.rotated_bytes + rows, 0.0)

    @property
    def rotated_bytes(self) -> float:
        return 2.0 * self.m * self.job.k * self.job.n * self.dtype.itemsize

    @property
    def copies(self) -> int:
        return min(8, bound.copies(self.rotated_bytes))

    def _shape(self) -> tuple:
        job = self.job
        group = job.group_size or 1
        pages = -(-job.k // PAGE)
        return self.m, self.kv_heads, group, job.head_dim, PAGE, pages, self.dtype, self.cores

    def candidates(self) -> list[Any]:
        return candidates(*self._shape())

    def chosen(self) -> Any:
        return choice.choose(*self._shape())

    def shared(self, seed: jax.Array) -> Any:
        """q, lengths: all sequences are as long as they may be."""
        heads = self.kv_heads * (self.job.group_size or 1)
        key = fold_in(jax.random.key(0), seed)
        q = normal(key, (self.m, heads, self.job.head_dim), jnp.float32).astype(jnp.bfloat16)
        return q, jnp.full((self.m,), self.job.k, jnp.int32)

    def rotated(self, seed: jax.Array) -> Any:
        """k_pages, v_pages, block_table, k_scale, v_scale: pages in random order."""
        batch, kv_heads, _, head_dim, page, pages, dtype, _ = self._shape()
        keys = jax.random.split(fold_in(jax.random.key(1), seed), 3)
        shape = (batch * pages, kv_heads, page, head_dim)
        caches = [normal(key, shape, jnp.bfloat16).astype(dtype) for key in keys[:2]]
        table = jax.random.permutation(keys[2], batch * pages).astype(jnp.int32)
        narrow = dtype.itemsize == 1
        scale = jnp.ones((kv_heads,), jnp.float32) if narrow else None
        return *caches, table.reshape(batch, pages), scale, scale

    def call(self, config: Any) -> Callable[[Any, Any], jax.Array]:
        run = partial(mosaic.decode_attention, config=config)
        return lambda shared, cache: self._attend(run, shared, cache)

    def reference(self, shared: Any, rotated: Any) -> jax.Array:
        y = self._attend(xla.decode_attention, shared, rotated)
        return y.reshape(self.m, -1)[self.rows].astype(jnp.float32)

    def _attend(self, run: Callable[..., jax.Array], shared: Any, cache: Any) -> jax.Array:
        (q, lengths), (keys, values, table, k_scale, v_scale) = shared, cache
        static = {"scale": self.job.head_dim**-0.5, "window": None, "soft_cap": None}
        return run(q, keys, values, table, lengths, k_scale, v_scale, None, **static)
