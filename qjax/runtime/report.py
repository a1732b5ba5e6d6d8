"""What `prepare` did with a model."""

import dataclasses
import re

from qjax import ops
from qjax.nn.layer import LayerConfig
from qjax.nn.moe import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `prepare` did with each product of a model.

    Attributes:
      fused: products that took the place of several, 'layers.0.self_attn.qkv_proj'.
      apart: those that could have been fused, and why they were not.
      canonical: weights that no kernel takes repacked, and why; XLA dequantizes them at each
        product.
      between: what XLA does between the kernels of a layer, and why.
    """

    fused: tuple[str, ...]
    apart: dict[str, str]
    canonical: dict[str, str]
    between: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """One line for all layers that fared alike."""
        rows = [("fused", name, "") for name in self.fused]
        rows += [("not fused", name, reason) for name, reason in self.apart.items()]
        rows += [("left to XLA", name, reason) for name, reason in self.canonical.items()]
        rows += [("by XLA", name, reason) for name, reason in self.between.items()]
        counts: dict[tuple[str, str, str], int] = {}
        for what, name, reason in rows:
            key = what, re.sub(r"^layers\.\d+\.", "layers.*.", name), reason
            counts[key] = counts.get(key, 0) + 1
        lines = []
        for (what, name, reason), count in counts.items():
            times = f" ({count} layers)" if name.startswith("layers.") else ""
            lines.append(f"{what}: {name}{times}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)


def between_kernels(cfg: LayerConfig) -> dict[str, str]:
    """Part of a layer -> why XLA does it, of what is left between the kernels."""
    found = {}
    attention, mlp = cfg.attention, cfg.mlp
    if attention.clip_qkv is not None:
        found["self_attn.clip_qkv"] = "no kernel bounds queries, keys and values"
    if isinstance(mlp, MoEConfig):
        found["mlp.router"] = "no kernel chooses experts and sorts tokens by them"
    if (isinstance(mlp, MoEConfig) or mlp.gated) and mlp.activation not in ops.GATES:
        names = ", ".join(ops.GATES)
        found["mlp.activation"] = f"a gate with {mlp.activation}; kernels have {names}"
    return found
