"""The linear layer every model is made of, and the one that mixtures of experts are made of."""

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import ops


class Linear(nnx.Module):
    """y = x @ weight.T + bias, with weight [out, in] an array or a QArray.

    Attributes:
      weight: Param, [out, in]; its name is what quantization rules find.
      bias: Param [out], or None.
      dtype: the type to compute in; None: the type of x.
      observe: static; while True, each call sows the largest magnitude of each input feature
        (float32 [in]) as an Intermediate named 'amax'. `qjax.calibrate` sets it.
      keep_input: static; while True, each call sows its input as an Intermediate named 'input'.
        Calibration block by block sets it.
    """

    keep_input = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        param_dtype: jnp.dtype = jnp.float32,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (out_features, in_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else nnx.data(None)
        self.dtype = dtype
        self.observe = False

    def __call__(self, x: jax.Array, *, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x [..., in] -> [..., out], in out_dtype, else the dtype computed in."""
        x = x if self.dtype is None else x.astype(self.dtype)
        self._observe(x)
        bias = None if self.bias is None else self.bias.get_value()
        return ops.linear(x, self.weight.get_value(), bias, out_dtype=out_dtype)

    def _observe(self, x: jax.Array) -> None:
        if self.keep_input:
            self.sow(nnx.Intermediate, "input", x)
        if not self.observe:
            return
        rows = jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
        # Said outright: a maximum need not pass NaN on.
        finite = jnp.isfinite(rows).all(axis=0)
        amax = jnp.where(finite, jnp.max(rows, axis=0, initial=0.0), jnp.nan)
        self.sow(nnx.Intermediate, "amax", amax)


class GroupedLinear(Linear):
    """y[m] = x[m] @ weight[expert of m].T, for rows sorted by expert.

    Attributes:
      weight: Param, [experts, out, in]; quantized, each expert has scales of its own. What is
        observed of the input is one number a feature, for all experts.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        init = jax.nn.initializers.normal(0.02)
        shape = (experts, out_features, in_features)
        self.weight = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.data(None)
        self.dtype = None
        self.observe = False

    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        group_sizes: jax.Array,
        *,
        row_ids: jax.Array | None = None,
        row_scale: jax.Array | None = None,
    ) -> jax.Array:
        """x [tokens, in] -> [rows, out]; arguments as those of `ops.grouped_linear`."""
        self._observe(x)
        if self.keep_input:
            self.sow(nnx.Intermediate, "group_sizes", group_sizes)
            if row_ids is not None:
                self.sow(nnx.Intermediate, "row_ids", row_ids)
        return ops.grouped_linear(
            x, self.weight.get_value(), group_sizes, row_ids=row_ids, row_scale=row_scale
        )
