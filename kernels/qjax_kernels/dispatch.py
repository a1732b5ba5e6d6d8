"""Choosing the implementation of an op."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., jax.Array]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> jax.Array:
    """Run `op` by the named implementation, or by the first that accepts the call.

    An implementation refuses a call by raising NotImplementedError with the reason.

    Args:
      op: name of the op, for messages.
      implementations: name -> function, best first; the last one accepts every valid call.
      implementation: a name, which runs or raises; None tries them in order.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named one refuses the call, or all do; every reason is given.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"{op} has no implementation {implementation!r}; choose one of: "
            f"{', '.join(implementations)}, or None"
        )
    names = implementations if implementation is None else (implementation,)
    reasons = []
    for name in names:
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op} cannot take this call. " + "; ".join(reasons))
