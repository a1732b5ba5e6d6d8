"""Recipes: what a Rule accepts, JSON both ways, which names match, presets."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.config import CalibConfig, QuantConfig, Rule
from qjax.errors import ConfigError
from qjax.presets import ALIASES, PRESETS, preset

INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
FORMATS = ("fp4_e2m1", "fp8_e4m3", "fp8_e5m2", *INTEGERS)
# What the activations of a weight may be.
ACTS = {"int4": "fp8_e4m3"} | {name: name for name in ("fp8_e4m3", "fp8_e5m2", "int8", "fp4_e2m1")}
PAIRS = [f"{weight} with {act}" for weight, act in [*ACTS.items(), ("fp4_e2m1", "fp8_e4m3")]]
SCALE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu")
DECODED = ("int4", "fp4_e2m1")  # whose groups need no groups of activations


def names_all(error, *words):
    message = str(error.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


# JSON --------------------------------------------------------------------------------------------

patterns = st.one_of(
    st.sampled_from([r".*", r"layers\.\d+\..*mlp", "q_proj|k_proj", "^lm_head$", "norm"]),
    st.text(min_size=1, max_size=12).map(re.escape),
)


@st.composite
def rules(draw):
    """Any rule that is valid."""
    granularity = draw(st.sampled_from(["per_tensor", "per_channel", "per_group", "per_block"]))
    grouped = granularity in ("per_group", "per_block")
    settings = {
        "path": draw(patterns),
        "weight": draw(st.sampled_from([None, *FORMATS])),
        "granularity": granularity,
        "group_size": draw(st.integers(1, 512)) if grouped else -1,
        "scale_dtype": draw(st.sampled_from([None, "float32", "bfloat16"])),
        "contract_axis": draw(st.sampled_from([None, -1, -2])),
    }
    if settings["weight"] in INTEGERS:
        settings["symmetric"] = draw(st.booleans())
        if settings["symmetric"]:
            settings["scale_rule"] = draw(st.sampled_from(["absmax", "absmax_half"]))
    elif settings["weight"] is not None and draw(st.booleans()):
        settings["scale_dtype"] = draw(st.sampled_from(["float8_e4m3fn", "float8_e8m0fnu"]))
        if settings["scale_dtype"] == "float8_e8m0fnu":
            settings["scale_rule"] = draw(st.sampled_from(["floor", "rceil", "even"]))
    if settings["weight"] in ACTS and settings.get("symmetric", True) and draw(st.booleans()):
        settings |= draw(activations(settings))
    return Rule(**settings)


@st.composite
def activations(draw, settings):
    """Settings of activations that a weight with `settings` may meet."""
    size, weight = settings["group_size"], settings["weight"]
    granularities = ["per_token", "per_tensor"] if size == -1 or weight in DECODED else []
    granularity = draw(st.sampled_from([*granularities, *(["per_group"] if size != -1 else [])]))
    chosen = {"act": ACTS[weight], "act_granularity": granularity}
    if granularity == "per_group":
        chosen["act_group_size"] = size
    floats = ["float8_e4m3fn"] if weight not in INTEGERS else []
    if settings.get("scale_rule") in ("floor", "rceil", "even"):
        floats.append("float8_e8m0fnu")
    chosen["act_scale_dtype"] = draw(st.sampled_from(["float32", "bfloat16", *floats]))
    if granularity == "per_tensor" or chosen["act_scale_dtype"] == "float8_e4m3fn":
        chosen["act_scale"] = draw(st.sampled_from(["dynamic", "static"]))
    return chosen


configs = st.builds(
    QuantConfig,
    rules=st.lists(rules(), min_size=1, max_size=4),
    ignore=st.lists(patterns, max_size=3),
    name=st.from_regex(r"\w[\w.-]{0,9}", fullmatch=True),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(cfg=configs)
def test_json_round_trip(cfg):
    text = cfg.to_json()
    back = QuantConfig.from_json(text)
    assert back == cfg
    assert hash(back) == hash(cfg)
    assert back.to_json() == text
    assert QuantConfig.from_dict(cfg.to_dict()) == cfg
    for rule in cfg.rules:
        assert Rule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_every_field_survives_json():
    # A value different from the default for each field: one that is dropped is noticed.
    group = Rule(
        path="a",
        weight="int4",
        granularity="per_group",
        group_size=64,
        symmetric=False,
        scale_dtype="float32",
        contract_axis=-2,
    )
    static = Rule(
        path="b",
        weight="int8",
        granularity="per_tensor",
        scale_rule="absmax_half",
        act="int8",
        act_granularity="per_tensor",
        act_scale="static",
        observer="mse",
    )
    small = Rule(
        path="d",
        weight="fp4_e2m1",
        granularity="per_group",
        group_size=16,
        act="fp4_e2m1",
        act_granularity="per_group",
        act_group_size=16,
        act_scale_dtype="float8_e4m3fn",
    )
    method = Rule(
        path="e",
        weight="int4",
        method="gptq",
        scaling="awq",
        alpha=0.25,
        range_search="clip",
        act_order=True,
        damping=0.5,
    )
    default = Rule(path="c")
    rules = [group, static, small, method, default]
    for field in dataclasses.fields(Rule):
        assert len({getattr(rule, field.name) for rule in rules}) > 1, field.name
    cfg = QuantConfig(rules=rules, ignore=["d"], name="mine")
    assert QuantConfig.from_json(cfg.to_json()) == cfg
    assert json.loads(cfg.to_json())["ignore"] == ["d"]


def test_defaults_may_be_left_out():
    cfg = QuantConfig.from_json('{"rules": [{"path": "mlp", "weight": "int8"}]}')
    assert cfg == QuantConfig(rules=[Rule(path="mlp", weight="int8")])
    assert (cfg.ignore, cfg.name) == ((), "custom")


@pytest.mark.parametrize("text", ["", "{", "not json", "{'rules': []}"])
def test_text_that_is_not_json(text):
    with pytest.raises(ConfigError, match="not a JSON recipe"):
        QuantConfig.from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"fp8"'])
def test_json_that_is_no_object(text):
    with pytest.raises(ConfigError, match="must be a JSON object"):
        QuantConfig.from_json(text)


def test_unknown_keys_are_named_with_the_known():
    with pytest.raises(ConfigError) as error:
        Rule.from_dict({"path": ".*", "wieght": "int8"})
    names_all(error, "'wieght'", *(field.name for field in dataclasses.fields(Rule)))
    with pytest.raises(ConfigError) as error:
        QuantConfig.from_dict({"rules": [{"path": ".*"}], "rule": []})
    names_all(error, "'rule'", "rules", "ignore", "name")
    with pytest.raises(ConfigError, match="'bits'"):
        QuantConfig.from_dict({"rules": [{"path": ".*", "bits": 4}]})


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="a Rule needs the key 'path'"):
        Rule.from_dict({"weight": "int8"})
    with pytest.raises(ConfigError, match="a QuantConfig needs the key 'rules'"):
        QuantConfig.from_dict({})


@pytest.mark.parametrize(
    "data",
    [
        {"rules": []},
        {"rules": "mlp"},
        {"rules": ["mlp"]},
        {"rules": {"path": "mlp"}},
        {"rules": [None]},
        {"rules": [{"path": "mlp"}], "ignore": "mlp"},
        {"rules": [{"path": "mlp"}], "ignore": [3]},
        {"rules": [{"path": "mlp"}], "ignore": ["("]},
    ],
)
def test_malformed_recipes(data):
    with pytest.raises(ConfigError):
        QuantConfig.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        {"rules": 3},
        {"rules": None},
        {"rules": [{"path": "mlp"}], "ignore": None},
        {"rules": [{"path": "mlp"}], "ignore": 3},
    ],
)
def test_recipes_with_scalars_for_lists(data):
    with pytest.raises(ConfigError):
        QuantConfig.from_dict(data)


# Rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("weight", "int9", FORMATS),
        ("weight", "INT8", FORMATS),
        ("weight", 8, FORMATS),
        ("granularity", "per_row", ("per_tensor", "per_channel", "per_group", "per_block")),
        ("granularity", None, ("per_tensor", "per_channel", "per_group", "per_block")),
        ("scale_rule", "mse", ("absmax", "absmax_half", "floor", "rceil", "even")),
        ("scale_dtype", "float16", SCALE_DTYPES),
        ("act_scale_dtype", "float16", SCALE_DTYPES),
        ("act_scale_dtype", None, SCALE_DTYPES),
        ("act", "fp16", FORMATS),
        ("act_granularity", "per_channel", ("per_token", "per_tensor", "per_group")),
        ("act_scale", "running", ("dynamic", "static")),
        ("method", "magic", ("rtn", "gptq")),
        ("scaling", "magic", ("awq", "smoothquant")),
        ("range_search", "magic", ("clip", "imatrix", "mse")),
        ("observer", "max", ("amax", "entropy", "mse", "percentile")),
        ("contract_axis", 0, ("-1", "-2", "None")),
        ("contract_axis", "in", ("-1", "-2", "None")),
        ("group_size", 0, ("positive integer", "-1")),
        ("group_size", -2, ("positive integer", "-1")),
        ("group_size", 64.0, ("positive integer", "-1")),
        ("group_size", "128", ("positive integer", "-1")),
        ("act_group_size", 0, ("positive integer", "-1")),
        ("act_group_size", True, ("positive integer", "-1")),
    ],
)
def test_unknown_values_are_named_with_the_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as error:
        Rule(**({"path": ".*", "weight": "int8"} | {field: value}))
    names_all(error, repr(value), *allowed)


@pytest.mark.parametrize("path", ["(", "[a", "*", "a(?P<b", "", None, 3])
def test_bad_regex(path):
    with pytest.raises(ConfigError, match="regular expression") as error:
        Rule(path=path)
    names_all(error, repr(path))
    with pytest.raises(ConfigError, match="regular expression"):
        QuantConfig(rules=[Rule(path="a")], ignore=[path])


def test_regex_with_too_many_repetitions():
    with pytest.raises(ConfigError):
        Rule(path="a{99999999999999999999}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"granularity": "per_group"}, ["'per_group'", "positive group_size"]),
        ({"group_size": 128}, ["'per_channel'", "128", "-1"]),
        ({"granularity": "per_tensor", "group_size": 64}, ["'per_tensor'", "64"]),
        ({"weight": None, "act": "int8"}, ["'int8'", "None", *PAIRS]),
        ({"weight": "fp8_e4m3", "act": "int8"}, ["'int8'", "'fp8_e4m3'", *PAIRS]),
        ({"weight": "fp8_e4m3", "act": "fp8_e5m2"}, ["'fp8_e5m2'", "'fp8_e4m3'", *PAIRS]),
        ({"weight": "int4", "act": "int8"}, ["'int8'", "'int4'", *PAIRS]),
        ({"weight": "int4", "act": "int4"}, ["'int4'", *PAIRS]),
        ({"act": "int8", "symmetric": False}, ["'int8'", "symmetric=False"]),
        (
            {"weight": "int4", "act": "fp8_e4m3", "symmetric": False},
            ["'fp8_e4m3'", "'int4'", "symmetric=False"],
        ),
        (
            {"act": "int8", "granularity": "per_group", "group_size": 8},
            ["'int8'", "'per_group'", "per_channel or per_tensor"],
        ),
        ({"act": "int8", "act_scale": "static"}, ["'static'", "act_granularity='per_tensor'"]),
        ({"granularity": "per_block"}, ["'per_block'", "positive group_size"]),
        ({"act": "int8", "act_group_size": 8}, ["'per_token'", "act_group_size 8"]),
        ({"act": "int8", "act_granularity": "per_group"}, ["'per_group'", "act_group_size"]),
        (
            {"act": "int8", "act_granularity": "per_group", "act_group_size": 8},
            ["'int8'", "'per_group'", "with group_size 8", "group_size=-1"],
        ),
        ({"scale_dtype": "float8_e4m3fn"}, ["'float8_e4m3fn'", "float formats", "'int8'"]),
        ({"scale_rule": "rceil"}, ["'rceil'", "float formats", "'int8'"]),
        ({"weight": "fp4_e2m1", "scale_rule": "rceil"}, ["'rceil'", "float8_e8m0fnu", "'float32'"]),
        (
            {"weight": "fp4_e2m1", "scale_dtype": "float8_e8m0fnu"},
            ["'absmax'", "'float8_e8m0fnu'", "floor, rceil, even"],
        ),
        (
            {"weight": "fp4_e2m1", "act": "fp4_e2m1", "act_scale_dtype": "float8_e8m0fnu"},
            ["'absmax'", "'float8_e8m0fnu'", "floor, rceil, even"],
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ConfigError) as error:
        Rule(**({"path": ".*", "weight": "int8"} | settings))
    names_all(error, *words)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": "fp8_e4m3", "symmetric": False},
        {"weight": "fp8_e4m3", "scale_rule": "absmax_half"},
        {"weight": "int8", "symmetric": False, "scale_rule": "absmax_half"},
        {"weight": "int8", "act_scale": "static"},
        {"weight": "int8", "symmetric": "false"},
    ],
    ids=str,
)
def test_settings_without_meaning(settings):
    with pytest.raises(ConfigError):
        Rule(path=".*", **settings)


def test_rules_and_configs_are_frozen_and_keyword_only():
    rule = Rule(path="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.path = "b"
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig(rules=[rule]).name = "b"
    with pytest.raises(TypeError):
        Rule("a")
    with pytest.raises(TypeError):
        QuantConfig([rule])


def test_lists_become_tuples():
    cfg = QuantConfig(rules=[Rule(path="a")], ignore=["b"])
    assert (cfg.rules, cfg.ignore) == ((Rule(path="a"),), ("b",))
    assert hash(cfg) == hash(QuantConfig(rules=(Rule(path="a"),), ignore=("b",)))


def test_needs_stats_is_about_static_activation_scales():
    dynamic = Rule(path="a", weight="int8", act="int8")
    static = Rule(
        path="a", weight="int8", act="int8", act_granularity="per_tensor", act_scale="static"
    )
    assert not dynamic.needs_stats
    assert static.needs_stats
    assert not QuantConfig(rules=[dynamic]).needs_stats
    assert QuantConfig(rules=[dynamic, static]).needs_stats


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        (".*", "layers.0.mlp.up_proj.weight", True),
        ("mlp", "layers.0.mlp.up_proj.weight", True),
        ("^mlp", "layers.0.mlp.up_proj.weight", False),
        (r"layers\.1\.", "layers.1.mlp.weight", True),
        (r"layers\.1\.", "layers.11.mlp.weight", False),
        ("q_proj|k_proj", "layers.0.attn.k_proj.weight", True),
        ("q_proj|k_proj", "layers.0.attn.v_proj.weight", False),
        ("weight$", "layers.0.attn.weight_scale", False),
    ],
)
def test_a_rule_searches_the_name(path, name, expected):
    assert Rule(path=path).matches(name) is expected


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("embed", "embed_tokens.embedding"),
        ("norm", "layers.0.input_layernorm.weight"),
        ("lm_head", "lm_head.weight"),
    ],
)
def test_protected_words_must_be_spelled(word, name):
    for path in (".*", "weight|table", name[:1], r"\w+"):
        assert not Rule(path=path).matches(name)
    for path in (word, name, f"mlp|{word}"):
        assert Rule(path=path).matches(name)
    assert not Rule(path=word).matches("layers.0.mlp.weight")


def test_a_name_with_two_protected_words_needs_both():
    assert not Rule(path="embed").matches("embed_norm.weight")
    assert Rule(path="embed_norm").matches("embed_norm.weight")


# Presets -----------------------------------------------------------------------------------------

EXPECTED = {
    "fp8": ("fp8_e4m3", "per_tensor", -1, "fp8_e4m3", "per_tensor", "static"),
    "fp8_per_token": ("fp8_e4m3", "per_channel", -1, "fp8_e4m3", "per_token", "dynamic"),
    "fp8_wo": ("fp8_e4m3", "per_channel", -1, None, "per_token", "dynamic"),
    "int8": ("int8", "per_channel", -1, "int8", "per_token", "dynamic"),
    "int8_wo": ("int8", "per_channel", -1, None, "per_token", "dynamic"),
    "fp8_block": ("fp8_e4m3", "per_block", 128, "fp8_e4m3", "per_group", "dynamic"),
    "int4_wo": ("int4", "per_group", 128, None, "per_token", "dynamic"),
    "nvfp4": ("fp4_e2m1", "per_group", 16, "fp4_e2m1", "per_group", "dynamic"),
    "nvfp4_wo": ("fp4_e2m1", "per_group", 16, None, "per_token", "dynamic"),
    "mxfp4": ("fp4_e2m1", "per_group", 32, "fp4_e2m1", "per_group", "dynamic"),
    "mxfp4_wo": ("fp4_e2m1", "per_group", 32, None, "per_token", "dynamic"),
    "mxfp8": ("fp8_e4m3", "per_group", 32, "fp8_e4m3", "per_group", "dynamic"),
    "w4a8": ("int4", "per_group", 128, "fp8_e4m3", "per_token", "dynamic"),
    "w4a8_static": ("int4", "per_group", 128, "fp8_e4m3", "per_tensor", "static"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_presets_are_what_their_names_say(name):
    cfg = preset(name)
    (rule,) = cfg.rules
    settings = (rule.weight, rule.granularity, rule.group_size)
    settings += (rule.act, rule.act_granularity, rule.act_scale)
    assert settings == EXPECTED[name]
    assert (rule.path, rule.symmetric, rule.method, cfg.ignore) == (".*", True, "rtn", ())
    assert cfg.name == name
    assert cfg.needs_stats == (name in ("fp8", "w4a8_static"))


@pytest.mark.parametrize(
    ("name", "format", "group_size"),
    [("int4_wo_asym", "int4", 128), ("int3_wo", "int3", 128), ("int2_wo", "int2", 64)],
)
def test_presets_with_zero_points(name, format, group_size):
    (rule,) = preset(name).rules
    assert (rule.weight, rule.group_size, rule.symmetric) == (format, group_size, False)
    assert (rule.granularity, rule.act) == ("per_group", None)


@pytest.mark.parametrize(("name", "size"), [("nvfp4", 16), ("mxfp4", 32), ("mxfp8", 32)])
def test_small_formats_have_small_scales_on_both_sides(name, size):
    (rule,) = preset(name).rules
    dtype = "float8_e4m3fn" if name == "nvfp4" else "float8_e8m0fnu"
    assert (rule.scale_dtype, rule.act_scale_dtype) == (dtype, dtype)
    assert (rule.group_size, rule.act_group_size) == (size, size)
    assert (rule.scale_rule in ("floor", "rceil", "even")) == (name != "nvfp4")


@pytest.mark.parametrize("name", [*PRESETS, *ALIASES])
def test_every_preset_builds_and_survives_json(name):
    cfg = preset(name)
    assert cfg.name in PRESETS
    assert QuantConfig.from_json(cfg.to_json()) == cfg


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("FP8", "fp8"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_per_token"),
        ("W8A8", "int8"),
        ("W8A16", "int8_wo"),
        ("W4A16", "int4_wo"),
        ("W4AFP8", "w4a8"),
        ("W4A8", "w4a8"),
        ("INT4_FP8", "w4a8"),
        ("W4A16_ASYM", "int4_wo_asym"),
        ("FP8_BLOCK", "fp8_block"),
        ("NVFP4", "nvfp4"),
        ("NVFP4A16", "nvfp4_wo"),
        ("MXFP4", "mxfp4"),
        ("MXFP4A16", "mxfp4_wo"),
        ("MXFP8", "mxfp8"),
    ],
)
def test_aliases(alias, name):
    assert preset(alias) == preset(name)


def test_unknown_presets_and_settings_list_the_known():
    with pytest.raises(ConfigError) as error:
        preset("int9")
    names_all(error, "'int9'", *PRESETS, *ALIASES)
    with pytest.raises(ConfigError) as error:
        preset("int4_wo", groupsize=64)
    names_all(error, "'groupsize'", "group_size")


def test_presets_take_changes():
    rule = preset("int4_wo", group_size=64, contract_axis=-2).rules[0]
    assert (rule.granularity, rule.group_size, rule.contract_axis) == ("per_group", 64, -2)
    rule = preset("int4_wo", group_size=-1).rules[0]
    assert (rule.granularity, rule.group_size) == ("per_channel", -1)
    rule = preset("int8_wo", group_size=32).rules[0]
    assert (rule.granularity, rule.group_size) == ("per_group", 32)
    assert preset("int8_wo", ignore=["down_proj"]).ignore == ("down_proj",)
    rule = preset("fp8_block", group_size=64, act_group_size=64).rules[0]
    assert (rule.granularity, rule.group_size, rule.act_group_size) == ("per_block", 64, 64)
    with pytest.raises(ConfigError, match="per_channel or per_tensor"):
        preset("int8", group_size=32)
    # The table itself is not changed by what was asked for before.
    assert preset("int4_wo").rules[0].group_size == 128


def test_preset_refuses_a_string_to_ignore():
    with pytest.raises(ConfigError, match="list of patterns"):
        preset("int8_wo", ignore="down_proj")


@pytest.mark.parametrize("field", ["num_samples", "max_seq_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None])
def test_calib_config_needs_positive_integers(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {re.escape(repr(value))}"):
        CalibConfig(**{field: value})
    assert CalibConfig(**{field: 3}) == dataclasses.replace(CalibConfig(), **{field: 3})
