"""Ops that are no products, measured as `rows` measures those."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.random import fold_in

from benchmarks.kernels import bound
from benchmarks.kernels.rows import OPS, Case, calls_of, scales, values


@OPS.register("norm_quant", {"square": [(8192, 0)], "llama8b": [(4096, 0)]})
def _norm_quant(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """Residual sum, RMSNorm and e4m3 with a scale for each row, of m rows of n; k means nothing."""
    from qjax_kernels.norm_quant import api

    weight = scales(jax.random.key(3), (n,), jnp.bfloat16)
    out_dtype = jnp.float8_e4m3fn

    def call(x: jax.Array, residual: jax.Array, implementation: str) -> Any:
        return api.norm_quant(
            x,
            weight,
            residual=residual,
            eps=1e-5,
            out_dtype=out_dtype,
            implementation=implementation,
        )

    def reference(x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(jnp.bfloat16)
        y = h.astype(jnp.float32)
        y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
        y = y * weight.astype(jnp.float32)
        scale = jnp.max(jnp.abs(y), axis=-1, keepdims=True) / 448.0
        return (y / scale).astype(out_dtype).astype(jnp.float32) * scale, h

    def case(m: int) -> Case:
        work = bound.Work(m * (3 * 2 * n + n + 4) + 2 * n, 0.0)
        sets = [
            tuple(values(fold_in(jax.random.key(i), j), (m, n), jnp.bfloat16) for j in range(2))
            for i in range(bound.copies(work.bytes))
        ]
        calls = calls_of(call, api.IMPLEMENTATIONS)
        return Case(
            sets,
            calls,
            work,
            reference,
            lambda y: (y.values.astype(jnp.float32) * y.scale, y.residual),
        )

    return case


@OPS.register("decode_attention", {"attention": [(4096, 1024)]})
def _decode_attention(n: int, k: int, group_size: int) -> Callable[[int], Case]:
    """m sequences of n tokens each, k numbers of keys a token: KV heads of 128, 8 queries each."""
    from qjax_kernels.decode_attention import api

    page_size, head_dim, group = 64, 128, 8
    kv_heads, pages = k // head_dim, -(-n // page_size)

    def reference(q: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array) -> jax.Array:
        def rows_of(pages: jax.Array) -> jax.Array:  # [sequence, KV head, token, head_dim]
            rows = pages[table].astype(jnp.float32).swapaxes(1, 2)
            return rows.reshape(*rows.shape[:2], -1, head_dim)[:, :, :n]

        def of_sequence(one: tuple) -> jax.Array:
            q, keys, values = one
            q = q.astype(jnp.float32).reshape(kv_heads, group, head_dim)
            scores = jnp.einsum("hgd,htd->hgt", q, keys, precision="highest") * head_dim**-0.5
            y = jnp.einsum("hgt,htd->hgd", jax.nn.softmax(scores), values, precision="highest")
            return y.reshape(kv_heads * group, head_dim)

        return jax.lax.map(of_sequence, (q, rows_of(keys), rows_of(values)))

    def call(q, keys, values, table, implementation: str) -> jax.Array:  # type: ignore[no-untyped-def]
        lengths = jnp.full(q.shape[:1], n, jnp.int32)
        return api.decode_attention(q, keys, values, table, lengths, implementation=implementation)

    def case(m: int) -> Case:
        work = bound.Work(2 * 2 * m * n * k + 2 * 2 * m * k * group, 0.0)
        shape = (m * pages, kv_heads, page_size, head_dim)
        table = jax.random.permutation(jax.random.key(3), m * pages).astype(jnp.int32)
        sets = [
            (
                values(
                    fold_in(jax.random.key(0), i), (m, kv_heads * group, head_dim), jnp.bfloat16
                ),
                *(values(fold_in(jax.random.key(j), i), shape, jnp.bfloat16) for j in (1, 2)),
                table.reshape(m, pages),
            )
            for i in range(bound.copies(work.bytes))
        ]
        return Case(
            sets,
            calls_of(jax.jit(call, static_argnames="implementation"), api.IMPLEMENTATIONS),
            work,
            reference,
        )

    return case
