"""Choosing the implementation of an op."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

_MOST = 64  # reasons that are kept of an op: a report, not a log
_references_only = False
_skipped: dict[str, dict[str, None]] = {}  # op -> reasons, in the order they came


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., jax.Array]],
    implementation: str | None,
    *args: Any,
    passed_over: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> jax.Array:
    """Run `op` by the named implementation, or by the first that accepts the call.

    An implementation refuses a call by raising NotImplementedError with the reason. Where
    another one runs instead, `skipped` tells the reason afterwards; results do not depend on that.

    Args:
      op: name of the op, for messages.
      implementations: name -> function, best first; the last one accepts every valid call.
      implementation: a name, which runs or raises; None tries them in order.
      passed_over: name -> reason, of those that are not to be tried unless they are named.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named one refuses the call, or all do; every reason is given.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"{op} has no implementation {implementation!r}; choose one of: "
            f"{', '.join(implementations)}, or None"
        )
    if implementation is None and _references_only:
        implementation = list(implementations)[-1]
    names = implementations if implementation is None else (implementation,)
    refused = dict(passed_over or {}) if implementation is None else {}
    reasons = []
    for name in names:
        try:
            if name in refused:
                raise NotImplementedError(refused[name])
            result = implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
            continue
        _remember(op, reasons)
        return result
    raise NotImplementedError(f"{op} cannot take this call. " + "; ".join(reasons))


@contextmanager
def references() -> Iterator[None]:
    """Inside, calls that name no implementation run the op's reference, the last one.

    What jax traced outside is forgotten, and what it traces inside afterwards: a trace keeps the
    implementation that it began with.
    """
    global _references_only
    before, _references_only = _references_only, True
    jax.clear_caches()
    try:
        yield
    finally:
        _references_only = before
        jax.clear_caches()


def skipped() -> dict[str, list[str]]:
    """Op -> 'implementation: reason' of those that were skipped for another in this process."""
    return {op: list(reasons) for op, reasons in _skipped.items()}


def forget() -> None:
    """Empty what `skipped` returns."""
    _skipped.clear()


def _remember(op: str, reasons: list[str]) -> None:
    if reasons:
        known = _skipped.setdefault(op, {})
        known |= dict.fromkeys(reasons[: _MOST - len(known)])
