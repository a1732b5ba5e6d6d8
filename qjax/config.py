"""Recipes as data: which weights become what. Frozen, JSON both ways, unknown keys raise."""

import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, Self

from qjax import numerics
from qjax.errors import ConfigError, one_of
from qjax.qarray import ACT_GRANULARITIES

WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
ACT_SCALES = ("dynamic", "static")
METHODS = ("rtn",)

# A rule reaches these only by spelling the word: quantizing an embedding, a norm or the output
# head costs quality out of proportion, so a catch-all such as '.*' must not do it by accident.
PROTECTED = ("embed", "norm", "lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the weights whose name `path` finds (re.search on the dotted name).

    Attributes:
      path: regular expression, e.g. r'layers\\.0\\..*mlp', 'q_proj|k_proj', '.*'.
      weight: format of the weight, a name of numerics.FORMATS; None leaves the weight alone.
      granularity: 'per_tensor', 'per_channel' (one scale an output) or 'per_group'.
      group_size: weights along the contracting axis that share a scale; for per_group only.
      symmetric: False adds a zero point (integer formats).
      scale_rule: 'absmax' or 'absmax_half', see numerics.scale_from_amax.
      scale_dtype: 'float32', 'bfloat16'; None: bfloat16 for groups, else float32.
      act: format of the activations in products with the weight, see numerics.PRODUCTS; None:
        weight-only.
      act_granularity: 'per_token' or 'per_tensor'. A dynamic per_tensor scale is taken over all
        that is computed at once, other sequences and padding included.
      act_scale: 'dynamic' (from the activations, as they come) or 'static' (per_tensor, from
        calibration).
      method: the algorithm that chooses the numbers: 'rtn' (round to nearest).
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
    act_scale: str = "dynamic"
    method: str = "rtn"
    contract_axis: int | None = None

    def __post_init__(self) -> None:
        compile_pattern(self.path)
        if self.weight is not None:
            numerics.get_format(self.weight)
        one_of("granularity", self.granularity, WEIGHT_GRANULARITIES)
        one_of("scale rule", self.scale_rule, ("absmax", "absmax_half"))
        one_of("act_granularity", self.act_granularity, ACT_GRANULARITIES)
        one_of("act_scale", self.act_scale, ACT_SCALES)
        one_of("method", self.method, METHODS)
        if self.scale_dtype is not None:
            one_of("scale_dtype", self.scale_dtype, ("float32", "bfloat16"))
        if self.contract_axis is not None and not _is_one_of(self.contract_axis, (-1, -2)):
            raise ConfigError(f"contract_axis is {self.contract_axis!r}; choose -1, -2 or None")
        if not _is_integer(self.group_size) or self.group_size == 0 or self.group_size < -1:
            raise ConfigError(f"group_size is {self.group_size!r}; choose a positive integer or -1")
        if (self.granularity == "per_group") != (self.group_size > 0):
            raise ConfigError(
                f"granularity {self.granularity!r} with group_size {self.group_size}: 'per_group' "
                "needs a positive group_size, the others need -1"
            )
        self._check_zero_point()
        self._check_activation()

    def _check_zero_point(self) -> None:
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"symmetric is {self.symmetric!r}; choose true or false")
        is_float = self.weight is not None and not numerics.get_format(self.weight).is_integer
        if is_float and not self.symmetric:
            raise ConfigError(f"weight {self.weight!r} has no zero point; set symmetric=True")
        if self.scale_rule == "absmax_half" and (is_float or not self.symmetric):
            raise ConfigError(
                f"scale_rule 'absmax_half' is for symmetric integer formats, not {self.weight!r} "
                f"with symmetric={self.symmetric}; use 'absmax'"
            )

    def _check_activation(self) -> None:
        if self.act is None:
            if self.act_scale == "static":
                raise ConfigError("act_scale 'static' without act: name the format of activations")
            return
        numerics.get_format(self.act)
        groups = numerics.PRODUCTS.get((str(self.weight), self.act))
        if groups is None:
            raise ConfigError(
                f"act {self.act!r} with weight {self.weight!r}: no product takes these formats; "
                f"choose one of: {numerics.known_products()}, or act=None for weight-only"
            )
        if not self.symmetric or (self.granularity == "per_group" and not groups):
            raise ConfigError(
                f"act {self.act!r} with weight {self.weight!r} needs a symmetric weight"
                f"{'' if groups else ', per_channel or per_tensor'}; this rule says "
                f"granularity={self.granularity!r}, symmetric={self.symmetric}"
            )
        if self.act_scale == "static" and self.act_granularity != "per_tensor":
            raise ConfigError(
                "act_scale 'static' has one scale for all tokens; set act_granularity='per_tensor'"
            )

    @property
    def needs_stats(self) -> bool:
        """Whether quantizing by this rule needs the statistics of `qjax.calibrate`."""
        return self.act is not None and self.act_scale == "static"

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
      name: what tables and checkpoints call the recipe; presets fill it in.

    >>> cfg = QuantConfig(rules=[Rule(path="mlp", weight="int8")], ignore=["down_proj"])
    >>> QuantConfig.from_json(cfg.to_json()) == cfg
    True
    """

    rules: Sequence[Rule]
    ignore: Sequence[str] = ()
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

    @property
    def needs_stats(self) -> bool:
        return any(rule.needs_stats for rule in self.rules)

    def to_dict(self) -> dict[str, Any]:
        rules = [rule.to_dict() for rule in self.rules]
        return {"name": self.name, "rules": rules, "ignore": list(self.ignore)}

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
    """How much text calibration runs over.

    Attributes:
      samples: number of sequences.
      seq_len: tokens in each.
      batch_size: sequences in one forward pass.
    """

    samples: int = 32
    seq_len: int = 512
    batch_size: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_integer(value) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; it must be a positive integer")


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


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_one_of(value: object, allowed: tuple[int, ...]) -> bool:
    return _is_integer(value) and value in allowed


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
