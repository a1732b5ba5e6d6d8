"""An op at one size, as the tuner sees it: candidates, operands, the call, a reference."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax_kernels import bound
from qjax_kernels.tuning.jobs import Job

ROWS = 512  # of the result that are checked, at most


@dataclasses.dataclass(frozen=True)
class Problem(ABC):
    """One size of an op. What takes arrays can be traced; `seed` is uint32 [], and the same one
    makes the same numbers.

    Attributes:
      job: the op and its shape.
      m: tokens or sequences.
      cores: multiprocessors.
    """

    job: Job
    m: int
    cores: int

    table_op: ClassVar[str]
    limit: ClassVar[float]  # of a row's error: above it a result is wrong

    @property
    @abstractmethod
    def format(self) -> str:
        """As a table's entry has it."""

    @property
    @abstractmethod
    def work(self) -> bound.Work:
        """Of one call."""

    @property
    @abstractmethod
    def rotated_bytes(self) -> float:
        """Of what `prepare` returns."""

    @abstractmethod
    def candidates(self) -> list[Any]:
        """Configurations to time, at most 6."""

    @abstractmethod
    def chosen(self) -> Any:
        """The configuration that a call without one gets here and now."""

    @abstractmethod
    def shared(self, seed: jax.Array) -> Any:
        """Operands that all calls share: activations."""

    @abstractmethod
    def rotated(self, seed: jax.Array) -> Any:
        """Operands that each call has others of, as models have them: weights, or a cache."""

    def prepare(self, rotated: Any) -> Any:
        """As the kernels want them."""
        return rotated

    @abstractmethod
    def call(self, config: Any) -> Callable[[Any, Any], jax.Array]:
        """(shared, prepared) -> [m, features]. Config None: XLA's implementation."""

    @abstractmethod
    def reference(self, shared: Any, rotated: Any) -> jax.Array:
        """float32 [rows, features]: those of `rows`."""

    @property
    def by_xla(self) -> bool:
        """Whether XLA's implementation can be taken instead."""
        return False

    @property
    def copies(self) -> int:
        """Calls of one timed program: so many that operands are not in the cache twice. Many
        tokens are bound by products, wherever the weights are."""
        return 2 if self.m >= 1024 else min(8, bound.copies(self.rotated_bytes))

    @property
    def rows(self) -> np.ndarray:
        """Rows of the result that are checked: the first, the last, and evenly between."""
        return np.unique(np.linspace(0, self.m - 1, min(self.m, ROWS)).astype(np.int32))

    def error(self, y: jax.Array, reference: jax.Array) -> jax.Array:
        """The largest relative error of the checked rows; NaN if one is not finite."""
        off = y.reshape(self.m, -1)[self.rows].astype(jnp.float32) - reference
        size = jnp.linalg.norm(reference, axis=-1)
        off = jnp.linalg.norm(off, axis=-1) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
        return jnp.where(jnp.isfinite(y).all(), jnp.max(off), jnp.nan)
