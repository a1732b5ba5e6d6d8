"""What the op returns."""

from typing import NamedTuple

import jax


class RopeCache(NamedTuple):
    """Rotated queries and the cache.

    Attributes:
      q: [tokens, heads, head_dim], rotated.
      k_pages, v_pages: [pages, kv_heads, page_size, head_dim], with the new tokens in them.
      k, v: [tokens, kv_heads, head_dim], the rotated keys and the values, not quantized; None if
        not asked.
    """

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    k: jax.Array | None
    v: jax.Array | None
