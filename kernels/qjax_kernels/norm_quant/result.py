"""What the op returns."""

from typing import NamedTuple

import jax


class Norm(NamedTuple):
    """Rows after the norm.

    Attributes:
      values: [..., features].
      scale: float32 [..., 1], or the static one as given; None without quantization.
      residual: [..., features], x + the residual that was given; None without one.
      group_sums: float32 [..., features / 128], sums of `values`; None if not asked.
    """

    values: jax.Array
    scale: jax.Array | None
    residual: jax.Array | None
    group_sums: jax.Array | None
