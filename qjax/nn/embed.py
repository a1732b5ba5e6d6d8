"""Embedding tables."""

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import ops
from qjax.qarray import is_qarray


class Embed(nnx.Module):
    """Rows of a table [vocabulary, features], an array or a QArray.

    Attributes:
      embedding: Param [vocabulary, features]. A rule reaches it only by spelling 'embed'.
      dtype: of the rows; None: the table's own (logical) dtype.
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        param_dtype: jnp.dtype = jnp.float32,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        init = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (vocabulary, features), param_dtype))
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int [...] -> [..., features]."""
        rows = ops.embed(ids, self.embedding.get_value())
        return rows if self.dtype is None else rows.astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits against the table: x [..., features] -> [..., vocabulary]. Tied output heads."""
        table = self.embedding.get_value()
        if self.dtype is not None:
            return ops.linear(x.astype(self.dtype), table)
        own = jnp.dtype(table.dtype) if is_qarray(table) else table.dtype
        return ops.linear(x.astype(jnp.promote_types(x.dtype, own)), table)
