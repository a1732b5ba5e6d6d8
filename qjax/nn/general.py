"""A linear layer over several axes: what Flax's LinearGeneral and Einsum become."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.nn.linear import Linear, result_dtype


class General(Linear):
    """Contract some axes of x with a matrix, and unflatten the result.

    y = transpose(reshape(flatten(x over `contract`) @ weight.T + bias, free + out_shape), order)

    Attributes:
      weight: Param [prod(out_shape), prod of the contracted axes], in the order of `contract`.
      bias: Param [prod(out_shape)], or None.
      contract: axes of x, negative, in the order in which weight's columns run over them.
      out_shape: what the outputs unflatten to, behind the axes of x that stay.
      order: the permutation of the trailing axes (by negative index) of the result; None: none.
    """

    def __init__(
        self,
        weight: jax.Array,
        bias: jax.Array | None,
        *,
        contract: tuple[int, ...] = (-1,),
        out_shape: tuple[int, ...],
        order: tuple[int, ...] | None = None,
        dtype: jnp.dtype | None = None,
    ) -> None:
        self.weight = nnx.Param(weight)
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.contract = contract
        self.out_shape = out_shape
        self.order = order
        self.dtype = dtype
        self.observe = False

    def __call__(  # type: ignore[override]
        self, x: jax.Array, out_sharding: None = None
    ) -> jax.Array:
        """x -> free axes of x, then out_shape, permuted by `order`.

        Raises:
          NotImplementedError: if out_sharding is given; constrain the result instead.
        """
        if out_sharding is not None:
            raise NotImplementedError(
                f"out_sharding={out_sharding} is not taken by qjax.nn layers; apply "
                "jax.lax.with_sharding_constraint to the result"
            )
        x = x.astype(result_dtype(self.dtype, x, self.weight.get_value()))
        x = jnp.moveaxis(x, self.contract, range(-len(self.contract), 0))
        free = x.shape[: x.ndim - len(self.contract)]
        features = math.prod(x.shape[x.ndim - len(self.contract) :])
        y = super().__call__(x.reshape(*free, features)).reshape(*free, *self.out_shape)
        return y if self.order is None else _permute_trailing(y, self.order)


def _permute_trailing(y: jax.Array, order: tuple[int, ...]) -> jax.Array:
    lead = range(y.ndim - len(order))
    return y.transpose(*lead, *(y.ndim + axis for axis in order))
