"""`python -m benchmarks.kernels.rope_cache`: every candidate, checked and timed.

The timed calls may not donate their pages, so XLA copies those first; that is no kernel and not in
the times.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels.rope_cache import triton, xla
from qjax_kernels.rope_cache.config import candidates

from benchmarks.kernels import row_bench

PAGE_SIZE = 64
MODELS = {"llama8b": (32, 8, 128), "llama2-7b": (32, 32, 128), "gptj": (16, 16, 256)}


def exact(arguments: tuple, heads: int, kv_heads: int, interleaved: bool) -> list[np.ndarray]:
    """float64 q, k, v of some tokens."""
    qkv, cos, sin = (row_bench.some(a).astype(np.float64) for a in arguments[:3])
    x = qkv.reshape(len(qkv), heads + 2 * kv_heads, -1)
    half = cos.shape[-1]
    pairs = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    first, second = pairs if interleaved else (slice(half), slice(half, 2 * half))
    y = x.copy()
    turned = x[:, : heads + kv_heads]
    a, b, cos, sin = turned[..., first], turned[..., second], cos[:, None], sin[:, None]
    y[:, : heads + kv_heads, first] = a * cos - b * sin
    y[:, : heads + kv_heads, second] = b * cos + a * sin
    return np.split(y, [heads, heads + kv_heads], axis=1)


def check(result: Any, arguments: tuple, heads: int, kv_heads: int, interleaved: bool) -> str:
    """What `row_bench.against` says of q and of the pages' new keys and values."""
    page, slot = (row_bench.some(a) for a in arguments[5:7])
    q, k, v = exact(arguments, heads, kv_heads, interleaved)
    said = ["q " + row_bench.against(row_bench.some(result.q), None, q)]
    for name, pages, scale, new in (
        ("k", result.k_pages, arguments[7], k),
        ("v", result.v_pages, arguments[8], v),
    ):
        got = np.asarray(pages[page, :, slot])
        step = None if scale is None else np.asarray(scale, np.float64)
        said.append(f"{name} " + row_bench.against(got, step, new))
    untouched = np.asarray(result.k_pages[-1], np.float32)
    said.append("rest ok" if (untouched == 0).all() else "rest WRONG")
    return "; ".join(said)


def case(tokens: int, model: str, kv: Any, asked: Any, *, interleaved: bool = False,
         half: int | None = None) -> None:  # fmt: skip
    """One table."""
    heads, kv_heads, head_dim = MODELS[model]
    half = head_dim // 2 if half is None else half
    kv = jnp.dtype(kv)
    pages = -(-tokens // PAGE_SIZE) + 1  # the last stays empty

    def arguments(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 3)
        angles = jax.random.uniform(keys[0], (tokens, half), maxval=100.0)
        shape = (pages, kv_heads, PAGE_SIZE, head_dim)
        place = jax.random.permutation(keys[1], (pages - 1) * PAGE_SIZE)[:tokens].astype(jnp.int32)
        scale = jnp.float32(0.05) if kv.itemsize == 1 else None
        return (
            jax.random.normal(keys[2], (tokens, (heads + 2 * kv_heads) * head_dim), jnp.bfloat16),
            jnp.cos(angles),
            jnp.sin(angles),
            jnp.zeros(shape, kv),
            jnp.zeros(shape, kv),
            place // PAGE_SIZE,
            place % PAGE_SIZE,
            scale,
            scale,
        )

    moved = tokens * head_dim * (heads * 4 + 2 * kv_heads * (2 + kv.itemsize))
    moved += tokens * (8 * half + 8)
    same = dict(heads=heads, interleaved=interleaved, with_kv=False)
    calls = [
        (
            f"triton warps {c.warps} heads {c.heads} tokens {c.tokens}",
            partial(triton.rope_cache, **same, config=c),
        )
        for c in candidates(tokens, heads, kv_heads, head_dim)
    ]
    calls.append(("xla", partial(xla.rope_cache, **same)))
    title = f"rope_cache {model} {tokens} tokens {kv.name}{' interleaved' * interleaved}"
    checked = partial(check, heads=heads, kv_heads=kv_heads, interleaved=interleaved)
    row_bench.table(title, calls, row_bench.sets(arguments, moved), moved, checked, asked)


def main() -> None:
    """All cases, the ones that bars are set for first."""
    asked = row_bench.options(__doc__)
    for kv in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8):
        for tokens in (8192, 1) if asked.quick else (8192, 1, 16, 64, 512):
            case(tokens, "llama8b", kv, asked)
    if asked.quick:
        return
    for tokens in (1, 8192):
        case(tokens, "llama2-7b", jnp.float8_e4m3fn, asked)
        case(tokens, "gptj", jnp.bfloat16, asked, interleaved=True, half=32)


if __name__ == "__main__":
    main()
