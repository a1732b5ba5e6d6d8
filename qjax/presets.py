"""Named recipes, as data. The README's table of presets is checked against this one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qjax.config import QuantConfig, Rule
from qjax.errors import one_of

# Settings of the one rule of each preset: every weight matrix but the protected ones.
PRESETS: dict[str, dict[str, Any]] = {
    "fp8": {
        "weight": "fp8_e4m3",
        "granularity": "per_tensor",
        "act": "fp8_e4m3",
        "act_granularity": "per_tensor",
        "act_scale": "static",
    },
    "fp8_per_token": {"weight": "fp8_e4m3", "act": "fp8_e4m3"},
    "fp8_wo": {"weight": "fp8_e4m3"},
    "int8": {"weight": "int8", "act": "int8"},
    "int8_wo": {"weight": "int8"},
    "int4_wo": {"weight": "int4", "granularity": "per_group", "group_size": 128},
    "w4a8": {
        "weight": "int4",
        "granularity": "per_group",
        "group_size": 128,
        "act": "fp8_e4m3",
    },
    "w4a8_static": {
        "weight": "int4",
        "granularity": "per_group",
        "group_size": 128,
        "act": "fp8_e4m3",
        "act_granularity": "per_tensor",
        "act_scale": "static",
    },
}

# What TensorRT-LLM, ModelOpt and llm-compressor call the same thing.
ALIASES: dict[str, str] = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_per_token",
    "FP8_DYNAMIC": "fp8_per_token",
    "W8A8": "int8",
    "INT8": "int8",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": "int8",
    "W8A16": "int8_wo",
    "W4A16": "int4_wo",
    "W4AFP8": "w4a8",
    "W4A8": "w4a8",  # of TensorRT-LLM and ModelOpt; llm-compressor's has int8 activations
    "INT4_FP8": "w4a8",
}


def preset(name: str, *, ignore: Sequence[str] = (), **changes: Any) -> QuantConfig:
    """The recipe called `name`, a key of PRESETS or of ALIASES.

    Args:
      ignore: patterns of weights to leave as they are.
      changes: Rule settings to change, e.g. group_size=64, contract_axis=-2 for trees whose
        kernels are [in, out]. group_size=-1 on a group-wise preset makes it per-channel.

    Raises:
      ConfigError: no such preset or setting.

    >>> preset("W4A16").rules[0].group_size
    128
    """
    one_of("preset", name, [*PRESETS, *ALIASES])
    for key in changes:
        one_of("preset setting", key, [f.name for f in dataclasses.fields(Rule)])
    name = ALIASES.get(name, name)
    if "group_size" in changes and "granularity" not in changes:
        changes["granularity"] = "per_channel" if changes["group_size"] == -1 else "per_group"
    settings = {"path": ".*"} | PRESETS[name] | changes
    return QuantConfig(name=name, rules=(Rule(**settings),), ignore=ignore)
