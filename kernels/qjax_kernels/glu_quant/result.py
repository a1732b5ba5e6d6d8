"""What the op returns."""

from typing import NamedTuple

import jax


class Glu(NamedTuple):
    """Rows after the gate.

    Attributes:
      values: [..., features].
      scale: float32 [..., 1], or the static one as given; None without quantization.
      group_sums: float32 [..., features / 128], sums of `values`; None if not asked.
    """

    values: jax.Array
    scale: jax.Array | None
    group_sums: jax.Array | None
