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
    "fp8_block": {
        "weight": "fp8_e4m3",
        "granularity": "per_block",
        "group_size": 128,
        "act": "fp8_e4m3",
        "act_granularity": "per_group",
        "act_group_size": 128,
    },
    "fp8_wo": {"weight": "fp8_e4m3"},
    "int8": {"weight": "int8", "act": "int8"},
    "int8_wo": {"weight": "int8"},
    "int4_wo": {"weight": "int4", "granularity": "per_group", "group_size": 128},
    "int4_wo_asym": {
        "weight": "int4",
        "granularity": "per_group",
        "group_size": 128,
        "symmetric": False,
    },
    "int3_wo": {
        "weight": "int3",
        "granularity": "per_group",
        "group_size": 128,
        "symmetric": False,
    },
    "int2_wo": {
        "weight": "int2",
        "granularity": "per_group",
        "group_size": 64,
        "symmetric": False,
    },
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
    "nvfp4": {
        "weight": "fp4_e2m1",
        "granularity": "per_group",
        "group_size": 16,
        "scale_dtype": "float8_e4m3fn",
        "act": "fp4_e2m1",
        "act_granularity": "per_group",
        "act_group_size": 16,
        "act_scale_dtype": "float8_e4m3fn",
    },
    "nvfp4_wo": {
        "weight": "fp4_e2m1",
        "granularity": "per_group",
        "group_size": 16,
        "scale_dtype": "float8_e4m3fn",
    },
    "mxfp4": {
        "weight": "fp4_e2m1",
        "granularity": "per_group",
        "group_size": 32,
        "scale_rule": "even",
        "scale_dtype": "float8_e8m0fnu",
        "act": "fp4_e2m1",
        "act_granularity": "per_group",
        "act_group_size": 32,
        "act_scale_dtype": "float8_e8m0fnu",
    },
    "mxfp4_wo": {
        "weight": "fp4_e2m1",
        "granularity": "per_group",
        "group_size": 32,
        "scale_rule": "even",
        "scale_dtype": "float8_e8m0fnu",
    },
    "mxfp8": {
        "weight": "fp8_e4m3",
        "granularity": "per_group",
        "group_size": 32,
        "scale_rule": "rceil",
        "scale_dtype": "float8_e8m0fnu",
        "act": "fp8_e4m3",
        "act_granularity": "per_group",
        "act_group_size": 32,
        "act_scale_dtype": "float8_e8m0fnu",
    },
}

_INT4 = PRESETS["int4_wo"]
_AWQ = {"scaling": "awq", "range_search": "clip"}
_SMOOTH = {"weight": "int8", "act": "int8", "scaling": "smoothquant"}
PRESETS |= {
    "int8_sq": _SMOOTH | {"act_granularity": "per_tensor", "act_scale": "static"},
    "int8_sq_per_token": _SMOOTH,
    "int4_awq": _INT4 | _AWQ,
    "int4_gptq": _INT4 | {"method": "gptq", "act_order": True},
    # Of the int4 recipes tried the one that loses least: inputs decide how far grids reach, and
    # GPTQ rounds on it.
    "int4_gptq_imatrix": _INT4 | {"method": "gptq", "act_order": True, "range_search": "imatrix"},
    "w4a8_awq": PRESETS["w4a8_static"] | _AWQ,
}

# What TensorRT-LLM, ModelOpt and llm-compressor call the same thing.
ALIASES: dict[str, str] = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_per_token",
    "FP8_DYNAMIC": "fp8_per_token",
    "FP8_BLOCK": "fp8_block",
    "FP8_BLOCK_SCALES": "fp8_block",
    "W8A8": "int8",
    "INT8": "int8",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": "int8_sq_per_token",
    "W8A16": "int8_wo",
    "W4A16": "int4_wo",
    "W4A16_ASYM": "int4_wo_asym",
    "W4AFP8": "w4a8",
    "W4A8": "w4a8",  # of TensorRT-LLM and ModelOpt; llm-compressor's has int8 activations
    "INT4_FP8": "w4a8",
    "W8A8_SQ_PER_CHANNEL": "int8_sq",
    "INT8_SQ": "int8_sq",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": "int8_sq",
    "W4A16_AWQ": "int4_awq",
    "INT4_AWQ": "int4_awq",
    "W4A16_GPTQ": "int4_gptq",
    "W4A8_AWQ": "w4a8_awq",
    "INT4_FP8_AWQ": "w4a8_awq",
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4_wo",
    "W4A16_NVFP4": "nvfp4_wo",
    "MXFP4": "mxfp4",
    "MXFP4A16": "mxfp4_wo",
    "W4A16_MXFP4": "mxfp4_wo",
    "MXFP8": "mxfp8",
}


# What `preset(kv=...)` and `--kv` take.
KV: dict[str, dict[str, str]] = {
    "fp8": {"kv": "fp8_e4m3"},
    "fp8_per_head": {"kv": "fp8_e4m3", "kv_granularity": "per_head"},
    "int8": {"kv": "int8"},
    "int8_per_head": {"kv": "int8", "kv_granularity": "per_head"},
}


def preset(
    name: str,
    *,
    ignore: Sequence[str] = (),
    kv: str | None = None,
    rotation: str | None = None,
    **changes: Any,
) -> QuantConfig:
    """The recipe called `name`, a key of PRESETS or of ALIASES.

    Args:
      ignore: patterns of weights to leave as they are.
      kv: what the cache of keys and values holds: 'fp8' or 'int8', with calibrated scales; see
        QuantConfig. 'fp8_per_head' and 'int8_per_head': with scales of each head.
      rotation: see QuantConfig.
      changes: Rule settings to change, e.g. group_size=64, contract_axis=-2 for trees whose
        kernels are [in, out]. group_size=-1 on a group-wise preset makes it per-channel.

    Raises:
      ConfigError: no such preset or setting.

    >>> preset("W4A16").rules[0].group_size
    128
    >>> preset("int4_wo", kv="fp8").name
    'int4_wo.kv_fp8'
    """
    one_of("preset", name, [*PRESETS, *ALIASES])
    for key in changes:
        one_of("preset setting", key, [f.name for f in dataclasses.fields(Rule)])
    name = ALIASES.get(name, name)
    if "group_size" in changes and "granularity" not in changes:
        squares = PRESETS[name].get("granularity") == "per_block"
        grouped = "per_block" if squares else "per_group"
        changes["granularity"] = "per_channel" if changes["group_size"] == -1 else grouped
    settings = {"path": ".*"} | PRESETS[name] | changes
    model: dict[str, Any] = {} if kv is None else KV[one_of("kv", kv, KV)]
    suffixes = ["" if kv is None else f".kv_{kv}", "" if rotation is None else f".{rotation}"]
    return QuantConfig(
        name=name + "".join(suffixes),
        rules=(Rule(**settings),),
        ignore=ignore,
        rotation=rotation,
        **model,
    )
