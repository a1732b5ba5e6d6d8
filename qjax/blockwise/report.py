"""What quantization did to each weight, and what did not go as asked."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightReport:
    """One weight.

    Attributes:
      name: dotted.
      method: 'rtn', 'gptq', ...: what chose the numbers in the end.
      tokens: of calibration that reached it; 0 if none were needed. Of a stack of experts, the
        fewest of any.
      error: squared error of its outputs over that of zero weights, tr(dW H dW^T) / tr(W H W^T);
        None where second moments were not collected.
      alpha: the exponent of its scaling; None: none.
      scaled_by: what divides its input: the name of a norm or a linear, 'pre_scale'; None: nothing.
      damping: what GPTQ added to the Hessian, as a part of its mean diagonal; None: no GPTQ.
      note: what did not go as asked; '' if all did.
    """

    name: str
    method: str
    tokens: int = 0
    error: float | None = None
    alpha: float | None = None
    scaled_by: str | None = None
    damping: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantReport:
    """All weights of a model, in the order in which they were quantized.

    Attributes:
      weights: one WeightReport each.
      skipped: weight -> why it was left as it is.
      tokens: of calibration, altogether.
      seconds: all of it took.
    """

    weights: tuple[WeightReport, ...]
    skipped: dict[str, str]
    tokens: int
    seconds: float

    @property
    def notes(self) -> dict[str, str]:
        """Weight -> what did not go as asked."""
        return self.skipped | {row.name: row.note for row in self.weights if row.note}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A line of totals, then one for each thing that did not go as asked."""
        methods: dict[str, int] = {}
        for row in self.weights:
            methods[row.method] = methods.get(row.method, 0) + 1
        counts = ", ".join(f"{count} by {method}" for method, count in methods.items())
        head = f"{len(self.weights)} weights quantized ({counts}), {self.tokens} tokens"
        return "\n".join([head, *(f"{name}: {note}" for name, note in self.notes.items())])
