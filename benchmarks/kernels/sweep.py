"""Ops times shapes times rows of activations times implementations: the order of a run."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from benchmarks.kernels.bound import Work

# (n, k) of the products of a model: fused qkv, attention's output, fused gate and up, down, and of
# the 8B model the logits. A GPU of four holds a quarter of the 70B model's.
LINEAR_SHAPES = {
    "square": [(8192, 8192)],
    "llama8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "llama70b_tp4": [(2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)],
}


# Of work before the clock starts, as in `qjax_kernels.timing`, which says why (and needs JAX).
WARM_UP_SECONDS = 0.05


class Case(Protocol):
    """An op at one size: implementations by name, and the work of one call."""

    @property
    def calls(self) -> Mapping[str, Any]: ...

    @property
    def work(self) -> Work: ...


@dataclasses.dataclass(frozen=True)
class Op:
    """Something to measure.

    Attributes:
      build: (n, k, group_size) -> m -> Case; operands that do not depend on m are made only once.
      shapes: [(n, k)] by name of the set.
      grouped: whether group_size means something.
    """

    build: Callable[[int, int, int], Callable[[int], Any]]
    shapes: Mapping[str, list[tuple[int, int]]]
    grouped: bool


class Ops(dict[str, Op]):
    """Ops by name."""

    def register(
        self,
        name: str,
        shapes: Mapping[str, list[tuple[int, int]]] = LINEAR_SHAPES,
        grouped: bool = False,
    ) -> Callable[[Callable], Callable]:
        """Decorate the function that builds an op's cases."""

        def add(build: Callable) -> Callable:
            self[name] = Op(build, shapes, grouped)
            return build

        return add

    def select(self, names: Iterable[str]) -> "Ops":
        """Those of `names` that are here, in the order of `names`."""
        return Ops({name: self[name] for name in names if name in self})


def sweep(
    ops: Mapping[str, Op],
    shapes: Iterable[str],
    ms: Sequence[int],
    group_size: int,
    wanted: Callable[[str], bool],
    measure: Callable[[Any, str], tuple[float, float | None]],
) -> Iterator[dict[str, Any] | str]:
    """Measure ops at sizes. Yields a row of results, or a sentence on what could not be measured.

    Args:
      ops: what to measure.
      shapes: names of sets of shapes.
      ms: rows of activations (sequences, for attention).
      group_size: of group-wise weights.
      wanted: by name of an implementation.
      measure: (case, name of an implementation) -> (microseconds, maximum row error).
    """
    sets = list(shapes)
    for name, op in ops.items():
        for n, k in [shape for key in sets for shape in op.shapes.get(key, [])]:
            size = {"n": n, "k": k, "group_size": group_size if op.grouped else None}
            build, failure = attempt(op.build, n, k, group_size)
            if failure:
                yield f"{name} {n}x{k}: {failure}"
                continue
            for m in ms:
                case, failure = attempt(build, m)
                if failure:
                    yield f"{name} {m}x{n}x{k}: {failure}"
                    continue
                chosen = list(filter(wanted, case.calls))
                if not chosen:
                    yield f"{name} {m}x{n}x{k}: it has only {', '.join(case.calls)}"
                for implementation in chosen:
                    measured, failure = attempt(measure, case, implementation)
                    if failure:
                        yield f"{name} {m}x{n}x{k} {implementation}: {failure}"
                        continue
                    key = {"op": name, "m": m} | size | {"implementation": implementation}
                    us, error = measured
                    yield key | {"us": us, "bound_us": case.work.us, "row_error": error}


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What the function returns and None, or None and its exception in a line.

    One kernel that fails must not end a run that took minutes of a GPU to get there.
    """
    try:
        return function(*arguments), None
    except Exception as reason:
        return None, f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:300]}"
