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

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int4", "int8")
# What the activations of a weight may be.
ACTS = {"int4": "fp8_e4m3"} | {name: name for name in ("fp8_e4m3", "fp8_e5m2", "int8")}
PAIRS = [f"{weight} with {act}" for weight, act in ACTS.items()]


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
    granularity = draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    settings = {
        "path": draw(patterns),
        "weight": draw(st.sampled_from([None, *FORMATS])),
        "granularity": granularity,
        "group_size": draw(st.integers(1, 512)) if granularity == "per_group" else -1,
        "scale_dtype": draw(st.sampled_from([None, "float32", "bfloat16"])),
        "contract_axis": draw(st.sampled_from([None, -1, -2])),
    }
    if settings["weight"] in ("int4", "int8"):
        settings["symmetric"] = draw(st.booleans())
        if settings["symmetric"]:
            settings["scale_rule"] = draw(st.sampled_from(["absmax", "absmax_half"]))
    quantizable = settings["weight"] == "int4" or granularity != "per_group"
    quantizable = quantizable and settings["weight"] is not None and settings.get("symmetric", True)
    if quantizable and draw(st.booleans()):
        settings["act"] = ACTS[settings["weight"]]
        settings["act_granularity"] = draw(st.sampled_from(["per_token", "per_tensor"]))
        if settings["act_granularity"] == "per_tensor":
            settings["act_scale"] = draw(st.sampled_from(["dynamic", "static"]))
    return Rule(**settings)


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
    )
    default = Rule(path="c")
    for field in dataclasses.fields(Rule):
        if field.name != "method":  # there is one method
            values = {getattr(rule, field.name) for rule in (group, static, default)}
            assert len(values) > 1, field.name
    cfg = QuantConfig(rules=[group, static, default], ignore=["d"], name="mine")
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
        ("weight", "int3", FORMATS),
        ("weight", "INT8", FORMATS),
        ("weight", 8, FORMATS),
        ("granularity", "per_block", ("per_tensor", "per_channel", "per_group")),
        ("granularity", None, ("per_tensor", "per_channel", "per_group")),
        ("scale_rule", "mse", ("absmax", "absmax_half")),
        ("scale_dtype", "float16", ("float32", "bfloat16")),
        ("act", "fp16", FORMATS),
        ("act_granularity", "per_channel", ("per_token", "per_tensor")),
        ("act_scale", "running", ("dynamic", "static")),
        ("method", "magic", ("rtn",)),
        ("contract_axis", 0, ("-1", "-2", "None")),
        ("contract_axis", "in", ("-1", "-2", "None")),
        ("group_size", 0, ("positive integer", "-1")),
        ("group_size", -2, ("positive integer", "-1")),
        ("group_size", 64.0, ("positive integer", "-1")),
        ("group_size", "128", ("positive integer", "-1")),
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
    "int4_wo": ("int4", "per_group", 128, None, "per_token", "dynamic"),
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
    ],
)
def test_aliases(alias, name):
    assert preset(alias) == preset(name)


def test_unknown_presets_and_settings_list_the_known():
    with pytest.raises(ConfigError) as error:
        preset("int3")
    names_all(error, "'int3'", *PRESETS, *ALIASES)
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
    with pytest.raises(ConfigError, match="per_channel or per_tensor"):
        preset("int8", group_size=32)
    # The table itself is not changed by what was asked for before.
    assert preset("int4_wo").rules[0].group_size == 128


def test_preset_refuses_a_string_to_ignore():
    with pytest.raises(ConfigError, match="list of patterns"):
        preset("int8_wo", ignore="down_proj")


@pytest.mark.parametrize("field", ["samples", "seq_len", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None])
def test_calib_config_needs_positive_integers(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {re.escape(repr(value))}"):
        CalibConfig(**{field: value})
    assert CalibConfig(**{field: 3}) == dataclasses.replace(CalibConfig(), **{field: 3})
