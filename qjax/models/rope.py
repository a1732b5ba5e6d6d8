"""Rotary position embeddings: the frequencies, and how long-context models rescale them."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import CheckpointError, one_of

ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Hugging Face's rope_parameters.

    Attributes:
      theta: base of the geometric series of wavelengths.
      type: 'default'; 'linear' (positions divided by factor); 'llama3' (long wavelengths only,
        with a smooth transition).
      dtype: what the frequencies are rounded to. float32 is what transformers computes with; a
        torch model that was cast to bfloat16 as a whole has bfloat16 ones, which
        hf_overrides={"rope_dtype": "bfloat16"} reproduces.
      factor, low_freq_factor, high_freq_factor, original_max_position: of the rescaled types.
    """

    theta: float = 10000.0
    type: str = "default"
    dtype: str = "float32"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        one_of("rope_type", self.type, ROPE_TYPES, CheckpointError)
        one_of("rope_dtype", self.dtype, ("float32", "bfloat16"), CheckpointError)
        for field in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise CheckpointError(f"rope {field} is {value!r}; it must be a positive number")
        if type(self.original_max_position) is not int or self.original_max_position < 1:
            raise CheckpointError(
                f"rope original_max_position is {self.original_max_position!r}; it must be a "
                "positive integer"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """From a config.json: `rope_parameters` (transformers 5) or `rope_theta` and
        `rope_scaling` (before)."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = one_of(
            "rope_type",
            rope.get("rope_type", rope.get("type", "default")),
            ROPE_TYPES,
            CheckpointError,
        )
        needed = {
            "linear": ("factor",),
            "llama3": (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
        }
        missing = [key for key in needed.get(kind, ()) if key not in rope]
        if missing:
            raise CheckpointError(f"rope_type {kind!r} needs {', '.join(missing)} in config.json")
        return cls(
            theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            type=kind,
            dtype=one_of(
                "rope_dtype",
                config.get("rope_dtype", "float32"),
                ("float32", "bfloat16"),
                CheckpointError,
            ),
            factor=float(rope.get("factor", 1.0)),
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            original_max_position=int(rope.get("original_max_position_embeddings", 8192)),
        )


def inverse_frequencies(cfg: RopeConfig, head_dim: int) -> np.ndarray:
    """float32 [head_dim/2]: radians a position, theta^(-2i/head_dim), rescaled by cfg.type."""
    base = 1.0 / cfg.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if cfg.type == "linear":
        base = base / cfg.factor
    elif cfg.type == "llama3":
        # Wavelengths under original/high keep their frequency, those over original/low are
        # divided by factor, and those between are interpolated.
        turns = cfg.original_max_position * base / (2 * np.pi)
        smooth = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        base = (1 - smooth) * base / cfg.factor + smooth * base
    return base.astype(jnp.dtype(cfg.dtype)).astype(np.float32)


def rope_table(cfg: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [batch, tokens, head_dim/2], for int32 positions [batch, tokens]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(cfg, head_dim)
    return jnp.cos(angles), jnp.sin(angles)
