"""A linear layer over several axes: what Flax's Linear, LinearGeneral and Einsum become."""

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.linear import Linear


class General(Linear):
    """Contract some axes of x with a matrix, and unflatten the result.

    y = permute(unflatten(flatten(x over `contract`) @ weight.T + bias))

    Attributes:
      weight: Param [prod(out_shape), prod of the contracted axes]. Its columns run over the
        contracted axes in the order in which x has them.
      bias: Param [prod(out_shape)], or None.
      contract: axes of x, counted from either end.
      out_shape: what the outputs unflatten to, behind the axes of x that stay.
      permute: the permutation of the result, as a one-operand einsum: '...ij->...ji'; None: none.
      dtype: the type to compute in; None: what x, weight and bias promote to, as in Flax.
    """

    def __init__(
        self,
        weight: jax.Array,
        bias: jax.Array | None,
        *,
        contract: tuple[int, ...] = (-1,),
        out_shape: tuple[int, ...],
        permute: str | None = None,
        dtype: jnp.dtype | None = None,
    ) -> None:
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.contract = contract
        self.out_shape = out_shape
        self.permute = permute
        self.dtype = dtype
        self.observe = False

    def __call__(  # type: ignore[override]
        self, x: jax.Array, out_sharding: None = None
    ) -> jax.Array:
        """x -> the axes of x that stay, then out_shape; permuted by `permute`.

        Raises:
          NotImplementedError: if out_sharding is given; constrain the result instead.
        """
        if out_sharding is not None:
            raise NotImplementedError(
                f"out_sharding={out_sharding} is not taken by qjax.nn layers; apply "
                "jax.lax.with_sharding_constraint to the result"
            )
        params = [p.get_value() for p in (self.weight, self.bias) if p is not None]
        dtype = self.dtype
        if dtype is None:
            dtype = jnp.result_type(x, *(jnp.dtype(p.dtype) for p in params))
        contract = sorted(range(x.ndim)[axis] for axis in self.contract)
        x = jnp.moveaxis(jnp.asarray(x, dtype), contract, range(-len(contract), 0))
        free = x.shape[: x.ndim - len(contract)]
        y = super().__call__(x.reshape(*free, params[0].shape[-1]))
        y = y.reshape(*free, *self.out_shape)
        return y if self.permute is None else jnp.einsum(self.permute, y)
