"""Weights on their way from a checkpoint to a device: placed, cast and quantized one by one.

So a model that is quantized as it is loaded never has all its original weights on the device.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.assign import Assignment, assign
from qjax.config import QuantConfig
from qjax.qarray import is_qarray
from qjax.quantize import Stats, check_finite, quantize_leaf, require_plain, require_stats
from qjax.tree import leaves_by_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arriving:
    """What becomes of each weight.

    Attributes:
      device: where it goes; None: where JAX puts arrays.
      dtype: of floating-point weights, and that QArrays stand for; None: as it was.
      assigned: leaf name -> how it is quantized.
      shapes: leaf name -> its shape in the model; weights of another are left as they are.
      stats: what `calibrate` returned, if recipes need it.
    """

    device: jax.Device | None = None
    dtype: jnp.dtype | None = None
    assigned: Mapping[str, Assignment] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    stats: Stats | None = None

    @property
    def on(self) -> jax.Device:
        return jax.devices()[0] if self.device is None else self.device

    def quantizing(self, state: Any, cfg: QuantConfig, stats: Stats | None) -> "Arriving":
        """The same with a recipe, for a model of the abstract `state`.

        Raises:
          ConfigError: the recipe does not fit the model.
          DataError: statistics are missing.
        """
        require_plain(cfg)
        assigned = assign(state, cfg)
        leaves = leaves_by_name(state)
        shapes = {name: leaves[name].shape for name in assigned}
        features = {name: shapes[name][how.axis] for name, how in assigned.items()}
        require_stats(assigned, features, stats)
        return dataclasses.replace(self, assigned=assigned, shapes=shapes, stats=stats)

    def leaf(self, name: str, leaf: Any) -> Any:
        """An array of the host or of a device, or a QArray -> the leaf as the model has it.

        Raises:
          DataError: a weight to be quantized holds NaN or infinity.
        """
        leaf = jax.tree.map(self._placed, leaf)
        if is_qarray(leaf):
            return leaf if self.dtype is None else dataclasses.replace(leaf, dtype=self.dtype.name)
        if self.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(self.dtype)
        if name not in self.assigned or leaf.shape != self.shapes[name]:
            return leaf
        check_finite({name: leaf})
        amax = None if self.stats is None else self.stats.get(name, {}).get("amax")
        # Finished before the next one comes: the host reads faster than a device quantizes.
        return jax.block_until_ready(quantize_leaf(leaf, self.assigned[name], amax))

    def _placed(self, x: Any) -> jax.Array:
        if self.device is None:
            return jnp.asarray(x)
        if isinstance(x, jax.Array) and x.devices() == {self.device}:
            return x
        return jax.device_put(x, self.device)
