"""Recipes as data: which weights become what. Frozen, JSON both ways, unknown keys raise."""

import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, Self

from qjax.errors import ConfigError, one_of
from qjax.formats import check_formats, is_integer
from qjax.methods import check_method, needs_blocks

KV_FORMATS = ("fp8_e4m3", "int8")
KV_GRANULARITIES = ("per_tensor", "per_head")
ROTATIONS = ("hadamard",)

# A rule reaches these only by spelling the word: quantizing an embedding, a norm or the output
# head costs quality out of proportion, so a catch-all such as '.*' must not do it by accident.
PROTECTED = ("embed", "norm", "lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the weights whose name `path` finds (re.search on the dotted name).

    Attributes:
      path: regular expression, e.g. r'layers\\.0\\..*mlp', 'q_proj|k_proj', '.*'.
      weight: format of the weight, a name of numerics.FORMATS; None leaves the weight alone.
      granularity: 'per_tensor', 'per_channel' (one scale an output), 'per_group' (one for
        `group_size` weights along the contracting axis) or 'per_block' (for a square of
        group_size by group_size, cut at the edges).
      group_size: see granularity; else -1.
      symmetric: False adds a zero point (integer formats).
      scale_rule: 'absmax' or 'absmax_half', or for powers of 2 'floor', 'rceil' or 'even'; see
        numerics.scale_from_amax.
      scale_dtype: 'float32', 'bfloat16', 'float8_e4m3fn' (beside a global scale: nvfp4) or
        'float8_e8m0fnu' (powers of 2: mxfp4, mxfp8); None: bfloat16 for groups, else float32.
      act: format of the activations in products with the weight, see numerics.PRODUCTS; None:
        weight-only.
      act_granularity: 'per_token', 'per_tensor' or 'per_group' (one scale for `act_group_size`
        features of a token). A dynamic per_tensor scale is taken over all that is computed at once,
        other sequences and padding included.
      act_group_size: see act_granularity; else -1.
      act_scale_dtype: as scale_dtype; powers of 2 are chosen by scale_rule.
      act_scale: 'dynamic' (from the activations, as they come) or 'static' (per_tensor, from
        calibration; beside scales in float8_e4m3fn the global one, which else each token has of
        its own).
      observer: what a static activation scale covers: 'amax' (all there was), 'percentile' (99.99 %
        of it), 'mse' or 'entropy' (the range that loses least by either measure).
      method: the algorithm that rounds: 'rtn' (to nearest) or 'gptq' (arXiv:2210.17323).
      scaling: what is moved between weights and activations first: 'smoothquant'
        (arXiv:2211.10438), 'awq' (arXiv:2306.00978) or None.
      alpha: the exponent of `scaling`, 0..1; None: searched for each layer.
      range_search: how far the grid of each block reaches: None (to its largest weight), 'clip'
        (the least error of the layer's output), 'mse' (of the weights), 'imatrix' (of the weights,
        each weighted by the mean square of its input).
      act_order: gptq rounds the columns with the largest inputs first; groups stay where they are.
      damping: gptq adds this part of the Hessian's mean diagonal to it.
      contract_axis: which axis of the weight contracts, -1 ([out, in]) or -2 ([in, out]). None
        is right for leaves called 'weight', which are [out, in] as in qjax and Hugging Face; for
        any other leaf it must be said.

    Raises:
      ConfigError: an unknown name, or settings that do not go together.
    """

    path: str
    weight: str | None = None
    granularity: str = "per_channel"
    group_size: int = -1
    symmetric: bool = True
    scale_rule: str = "absmax"
    scale_dtype: str | None = None
    act: str | None = None
    act_granularity: str = "per_token"
    act_group_size: int = -1
    act_scale_dtype: str = "float32"
    act_scale: str = "dynamic"
    observer: str = "amax"
    method: str = "rtn"
    scaling: str | None = None
    alpha: float | None = None
    range_search: str | None = None
    act_order: bool = False
    damping: float = 0.01
    contract_axis: int | None = None

    def __post_init__(self) -> None:
        compile_pattern(self.path)
        check_formats(self)
        if self.contract_axis is not None and not _is_one_of(self.contract_axis, (-1, -2)):
            raise ConfigError(f"contract_axis is {self.contract_axis!r}; choose -1, -2 or None")
        check_method(self)

    @property
    def needs_stats(self) -> bool:
        """Whether quantizing by this rule needs the statistics of `qjax.calibrate`."""
        return (self.act is not None and self.act_scale == "static") or self.needs_blocks

    @property
    def needs_blocks(self) -> bool:
        """Whether its method runs block by block, in `qjax.quantize_model`."""
        return self.weight is not None and needs_blocks(self)

    def matches(self, name: str) -> bool:
        """Whether this rule is about the leaf called `name`. Protected leaves must be spelled."""
        if compile_pattern(self.path).search(name) is None:
            return False
        path, name = self.path.lower(), name.lower()
        return all(word in path for word in PROTECTED if word in name)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return _strict(cls, data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Ordered rules; the first that matches a leaf decides.

    Attributes:
      rules: tried in order. A rule that matches no leaf at all is an error when applied.
      ignore: shorthand for rules with weight=None put first: patterns of leaves to leave alone.
      kv: format of keys and values in the cache, 'fp8_e4m3' or 'int8', with calibrated scales;
        None: the type of the activations.
      kv_granularity: 'per_tensor' or 'per_head'; keys and values have scales of their own.
      rotation: 'hadamard' turns the basis of the hidden features, and that of each head's values,
        before anything is quantized (arXiv:2404.00456); None: it stays.
      name: what tables and checkpoints call the recipe; presets fill it in.

    >>> cfg = QuantConfig(rules=[Rule(path="mlp", weight="int8")], ignore=["down_proj"])
    >>> QuantConfig.from_json(cfg.to_json()) == cfg
    True
    """

    rules: Sequence[Rule]
    ignore: Sequence[str] = ()
    kv: str | None = None
    kv_granularity: str = "per_tensor"
    rotation: str | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        for field in ("rules", "ignore"):
            value = getattr(self, field)
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{field} must be a list of patterns or rules, not {value!r}")
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ConfigError(
                f"name is {self.name!r}; it names directories: use letters, digits, '_', '-', '.'"
            )
        if not self.rules:
            raise ConfigError("a QuantConfig needs at least one rule")
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ConfigError(f"rules must be qjax.Rule objects, not {type(rule).__name__}")
        for pattern in self.ignore:
            compile_pattern(pattern)
        if self.kv is not None:
            one_of("kv", self.kv, KV_FORMATS)
        one_of("kv_granularity", self.kv_granularity, KV_GRANULARITIES)
        if self.rotation is not None:
            one_of("rotation", self.rotation, ROTATIONS)

    @property
    def needs_stats(self) -> bool:
        """Whether it takes calibration data to quantize by this recipe."""
        return self.kv is not None or any(rule.needs_stats for rule in self.rules)

    @property
    def needs_blocks(self) -> bool:
        """Whether the recipe runs block by block, in `qjax.quantize_model`."""
        model = self.kv is not None or self.rotation is not None
        return model or any(rule.needs_blocks for rule in self.rules)

    def to_dict(self) -> dict[str, Any]:
        rules = [rule.to_dict() for rule in self.rules]
        return dataclasses.asdict(self) | {"rules": rules, "ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        if isinstance(data, dict) and isinstance(data.get("rules"), list):
            data = data | {"rules": [Rule.from_dict(rule) for rule in data["rules"]]}
        return _strict(cls, data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not a JSON recipe: {error}") from error
        return cls.from_dict(data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibConfig:
    """Which text calibration runs over, and how much of it.

    Attributes:
      num_samples: number of sequences.
      batch_size: sequences in one forward pass.
      max_seq_length: tokens in each; no more than the model's context.
      seed: of the choice of sequences.
      dataset: 'stdlib' (the source of this machine's Python), a name that `qjax.data` knows, or the
        path of a text file or of a data set.
    """

    num_samples: int = 512
    batch_size: int = 8
    max_seq_length: int = 512
    seed: int = 0
    dataset: str = "cnn_dailymail"

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "max_seq_length"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a positive integer")
        if not is_integer(self.seed) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}; it must be an integer, 0 or more")
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ConfigError(f"dataset is {self.dataset!r}; give a name or a path")


def compile_pattern(pattern: object) -> re.Pattern[str]:
    """A compiled path pattern, or ConfigError saying what is wrong with it."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"a path must be a non-empty regular expression, not {pattern!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # '[[a' means something else in some later Python
            return re.compile(pattern)
    except (re.error, OverflowError, Warning) as error:
        raise ConfigError(f"path {pattern!r} is not a regular expression: {error}") from error


def _is_one_of(value: object, allowed: tuple[int, ...]) -> bool:
    return is_integer(value) and value in allowed


def _strict(cls: Any, data: object) -> Any:
    """cls(**data), refusing what is not a dict and keys that are not fields."""
    if not isinstance(data, dict):
        raise ConfigError(f"a {cls.__name__} must be a JSON object, not {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        one_of(f"{cls.__name__} key", key, fields)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in data:
            raise ConfigError(f"a {cls.__name__} needs the key {name!r}")
    return cls(**data)
