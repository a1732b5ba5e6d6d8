"""Random weights in the shapes of a model, made when they are asked for: no disk, no whole model.

For `quantize_checkpoint`: how long calibration and quantization take depends on shapes alone.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.bench.random_model import random_leaf
from qjax.models.registry import abstract_model
from qjax.tree import leaves_by_name


class SyntheticSource:
    """The leaves of a model of random weights, each the same whenever it is read.

    Attributes:
      model_type, config: of the model.
      dtype: of its weights.
    """

    def __init__(self, config: Any, dtype: Any = jnp.bfloat16) -> None:
        self.model_type = config.model_type
        self.config = config
        self.dtype = jnp.dtype(dtype)
        _, state = abstract_model(self.model_type, config, self.dtype)
        self._leaves = leaves_by_name(state)
        self._order = {name: index for index, name in enumerate(self._leaves)}

    def abstract(self) -> dict[str, Any]:
        """Name -> ShapeDtypeStruct."""
        return {n: jax.ShapeDtypeStruct(x.shape, self.dtype) for n, x in self._leaves.items()}

    def read(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Name -> array on the device."""
        shapes = {name: self._leaves[name].shape for name in names}
        return {n: random_leaf(n, shape, self.dtype, self._order[n]) for n, shape in shapes.items()}
