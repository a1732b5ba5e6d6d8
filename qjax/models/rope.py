"""Rotary position embeddings: the frequencies, and how long-context models rescale them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import CheckpointError, one_of

# What each type needs in a config.json, besides what has a default.
NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
ROPE_TYPES = tuple(NEEDS)
_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Hugging Face's rope_parameters.

    Attributes:
      theta: base of the geometric series of wavelengths.
      type: 'default'; 'linear' (positions divided by factor); 'dynamic' (stretched only past the
        context the model was trained for, which is where this model ends: the default);
        'llama3' (long wavelengths only, with a smooth transition); 'yarn' (arXiv:2309.00071);
        'longrope' (a factor for each wavelength, others for long sequences; arXiv:2402.13753).
      dtype: what the frequencies are rounded to. float32 is what transformers computes with; a
        torch model that was cast to bfloat16 as a whole has bfloat16 ones, which
        hf_overrides={"rope_dtype": "bfloat16"} reproduces.
      table_dtype: what cos and sin are rounded to, likewise, in models that store those.
      factor, low_freq_factor, high_freq_factor, original_max_position: of the rescaled types.
      beta_fast, beta_slow, truncate: of 'yarn', the wavelengths between which it changes over.
      attention_factor: of 'yarn' and 'longrope', what cos and sin are multiplied by.
      short_factor, long_factor: of 'longrope', [rotated dims / 2]; the second for sequences that
        are, or may become, longer than original_max_position.
    """

    theta: float = 10000.0
    type: str = "default"
    dtype: str = "float32"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    table_dtype: str = "float32"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        one_of("rope_type", self.type, ROPE_TYPES, CheckpointError)
        one_of("rope_dtype", self.dtype, ("float32", "bfloat16"), CheckpointError)
        one_of("rope_dtype", self.table_dtype, ("float32", "bfloat16"), CheckpointError)
        numbers = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.type is float
        ]
        for name in ("short_factor", "long_factor"):
            # A list where JSON made one of a tuple.
            object.__setattr__(self, name, tuple(getattr(self, name)))
            numbers += [(name, value) for value in getattr(self, name)]
        for name, value in numbers:
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if not plain or not 0 < value < float("inf"):
                raise CheckpointError(f"rope {name} is {value!r}; it must be a positive number")
        if type(self.original_max_position) is not int or self.original_max_position < 1:
            raise CheckpointError(
                f"rope original_max_position is {self.original_max_position!r}; it must be a "
                "positive integer"
            )
        if type(self.truncate) is not bool:
            raise CheckpointError(f"rope truncate is {self.truncate!r}; it must be true or false")

    @classmethod
    def from_hf(
        cls,
        config: dict[str, Any],
        *,
        parameters: dict[str, Any] | None = None,
        theta: float = 10000.0,
    ) -> Self:
        """From a config.json: `rope_parameters` (transformers 5) or `rope_theta` and
        `rope_scaling` (before).

        Args:
          config: the contents of config.json.
          parameters: in the place of its rope_parameters or rope_scaling; None: those.
          theta: where the config has none.

        Raises:
          CheckpointError: an unknown type or key, or a value that is missing or wrong.
        """
        rope = _parameters(config) if parameters is None else parameters
        kind = rope_type(rope)
        unknown = sorted(rope.keys() - _KEYS)
        if unknown:
            raise CheckpointError(
                f"rope_type {kind!r} has {', '.join(unknown)} in config.json, which qjax does not "
                f"know; it knows {', '.join(sorted(_KEYS))}"
            )
        limit = config.get("max_position_embeddings")
        # Phi-3 and its kin have it beside rope_parameters, not in them.
        original = config.get(
            "original_max_position_embeddings", rope.get("original_max_position_embeddings")
        )
        missing = [key for key in NEEDS[kind] if rope.get(key) is None]
        if original is not None:
            missing = [key for key in missing if key != "original_max_position_embeddings"]
        if missing:
            raise CheckpointError(f"rope_type {kind!r} needs {', '.join(missing)} in config.json")
        if original is None:
            original = limit if kind in ("yarn", "longrope") and limit is not None else 8192
        factor = rope.get("factor")
        if factor is None:
            factor = limit / original if kind == "longrope" and limit is not None else 1.0
        rope_dtype = one_of(
            "rope_dtype",
            config.get("rope_dtype", "float32"),
            ("float32", "bfloat16"),
            CheckpointError,
        )
        return cls(
            theta=float(_first(rope.get("rope_theta"), config.get("rope_theta"), theta)),
            type=kind,
            dtype=rope_dtype,
            factor=float(factor),
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            original_max_position=int(original),
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            truncate=rope.get("truncate", True),
            attention_factor=_attention_factor(kind, rope, float(factor), int(original)),
            short_factor=tuple(rope.get("short_factor") or ()) if kind == "longrope" else (),
            long_factor=tuple(rope.get("long_factor") or ()) if kind == "longrope" else (),
        )


def rope_type(parameters: dict[str, Any]) -> str:
    """The type that rope_parameters name; CheckpointError if there is none of that name."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return one_of("rope_type", kind, ROPE_TYPES, CheckpointError)


def rotary_dim(config: dict[str, Any], head_dim: int) -> int:
    """How many dims of a head are rotated: `partial_rotary_factor` of them, all by default."""
    factor = _first(
        _parameters(config).get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0
    )
    dims = int(head_dim * float(factor))
    if not 0 < dims <= head_dim or dims % 2:
        raise CheckpointError(
            f"partial_rotary_factor {factor!r} rotates {dims} of {head_dim} dims; it must be an "
            "even number of them, more than none"
        )
    return dims


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return parameters


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _attention_factor(kind: str, rope: dict[str, Any], factor: float, original: int) -> float:
    if kind not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        one, all_dim = (0.1 * float(rope[k]) * math.log(factor) + 1 for k in _MSCALES)
        return one / all_dim
    return 0.1 * math.log(factor) + 1.0


_MSCALES = ("mscale", "mscale_all_dim")


def inverse_frequencies(cfg: RopeConfig, dim: int, length: int | None = None) -> np.ndarray:
    """float32 [dim/2]: radians a position, theta^(-2i/dim), rescaled by cfg.type.

    Args:
      dim: rotated dims of a head.
      length: of the longest that a sequence may become; 'longrope' needs it.
    """
    base = 1.0 / cfg.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    base = _RESCALED.get(cfg.type, lambda base, cfg, length: base)(base, cfg, length)
    return base.astype(jnp.dtype(cfg.dtype)).astype(np.float32)


def _linear(base: np.ndarray, cfg: RopeConfig, length: int | None) -> np.ndarray:
    return base / cfg.factor


def _llama3(base: np.ndarray, cfg: RopeConfig, length: int | None) -> np.ndarray:
    # Wavelengths under original/high keep their frequency, those over original/low are
    # divided by factor, and those between are interpolated.
    turns = cfg.original_max_position * base / (2 * np.pi)
    smooth = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * base / cfg.factor + smooth * base


def _yarn(base: np.ndarray, cfg: RopeConfig, length: int | None) -> np.ndarray:
    # As llama3, but the transition is linear in the index of a frequency, not in its turns.
    dim = 2 * len(base)

    def index(turns: float) -> float:
        """Of the frequency that makes so many turns in the original context."""
        wavelength = cfg.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(cfg.theta))

    low, high = index(cfg.beta_fast), index(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    interpolated = np.clip((np.arange(len(base)) - low) / (high - low), 0, 1)
    return base / cfg.factor * interpolated + base * (1 - interpolated)


def _longrope(base: np.ndarray, cfg: RopeConfig, length: int | None) -> np.ndarray:
    if length is None:
        raise ValueError("rope_type 'longrope' needs the length that a sequence may have")
    long = length > cfg.original_max_position
    factors = np.asarray(cfg.long_factor if long else cfg.short_factor, np.float64)
    if factors.shape != base.shape:
        name = "long_factor" if long else "short_factor"
        raise CheckpointError(
            f"rope {name} has {len(factors)} numbers; {2 * len(base)} dims are rotated, which "
            f"need {len(base)}"
        )
    return base / factors


_RESCALED: dict[str, Callable[[np.ndarray, RopeConfig, int | None], np.ndarray]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rope_table(
    cfg: RopeConfig, dim: int, positions: jax.Array, length: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [batch, tokens, dim/2], for int32 positions [batch, tokens].

    Args:
      dim: rotated dims of a head.
      length: see `inverse_frequencies`.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(cfg, dim, length)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if cfg.attention_factor != 1.0:
        cos, sin = cos * cfg.attention_factor, sin * cfg.attention_factor
    if cfg.table_dtype != "float32":
        cos, sin = (x.astype(cfg.table_dtype).astype(jnp.float32) for x in (cos, sin))
    return cos, sin
