"""What the op returns."""

from typing import NamedTuple

import jax


class Quantized(NamedTuple):
    """Rows in 8 bits.

    Attributes:
      values: [..., features].
      scale: float32 [..., 1], or the static one as given.
    """

    values: jax.Array
    scale: jax.Array
