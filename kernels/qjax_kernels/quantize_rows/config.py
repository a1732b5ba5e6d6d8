"""How rows are spread over blocks and warps."""

from qjax_kernels import row_config
from qjax_kernels.row_config import Config

MOST_FEATURES = 65536
MOST_VECTORS = 8  # about 8 registers each


def candidates(rows: int, features: int) -> list[Config]:
    """At most 6 for rows [rows, features], best guess first."""
    return row_config.candidates(rows, features, MOST_VECTORS)
