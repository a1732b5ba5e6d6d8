"""The settings of rules and recipes that choose an algorithm."""

import dataclasses

import pytest

from qjax.config import CalibConfig, QuantConfig, Rule
from qjax.errors import ConfigError
from qjax.methods import makes_up, needs_gram
from qjax.presets import KV, preset

INT4 = {"path": "a", "weight": "int4"}
INT8 = {"path": "a", "weight": "int8", "act": "int8"}


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "0.5", True, float("nan")])
def test_alpha_is_between_0_and_1(alpha):
    with pytest.raises(ConfigError, match=r"alpha is .* from 0 to 1, or None"):
        Rule(**INT8, scaling="smoothquant", alpha=alpha)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_its_ends_are_taken(alpha):
    assert Rule(**INT4, scaling="awq", alpha=alpha).alpha == alpha


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (INT4 | {"alpha": 0.5}, "without scaling"),
        (INT4 | {"act_order": True}, "act_order is for method 'gptq'"),
        (INT4 | {"act_order": 1, "method": "gptq"}, "choose true or false"),
        (INT4 | {"damping": 0}, "between 0 and 1"),
        (INT4 | {"damping": 1.0}, "between 0 and 1"),
        (INT4 | {"scaling": "smoothquant"}, "name their format as act"),
        (INT8 | {"observer": "mse"}, "set act_scale='static'"),
        (INT4 | {"method": "gptq", "contract_axis": -2}, r"take \[out, in\] weights"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**settings)


def test_what_methods_need():
    """(block by block, second moments, quantized blocks in front)."""
    static = {"act_granularity": "per_tensor", "act_scale": "static"}
    cases = [
        (INT8, (False, False, False)),
        (INT8 | static, (False, False, False)),
        (INT8 | static | {"observer": "entropy"}, (True, False, False)),
        (INT8 | {"scaling": "smoothquant", "alpha": 0.5}, (True, False, False)),
        (INT8 | {"scaling": "smoothquant"}, (True, True, False)),
        (INT4 | {"range_search": "mse"}, (True, False, False)),
        (INT4 | {"range_search": "imatrix"}, (True, True, False)),
        (INT4 | {"range_search": "clip"}, (True, True, True)),
        (INT4 | {"scaling": "awq"}, (True, True, True)),
        (INT4 | {"method": "gptq"}, (True, True, True)),
    ]
    for settings, expected in cases:
        rule = Rule(**settings)
        assert (rule.needs_blocks, needs_gram(rule), makes_up(rule)) == expected, settings
        assert rule.needs_stats == (expected[0] or rule.act_scale == "static")
        assert QuantConfig(rules=[rule]).needs_blocks == expected[0]


def test_a_rule_that_quantizes_nothing_needs_nothing():
    assert not Rule(path="a", method="gptq").needs_blocks


@pytest.mark.parametrize("kv", KV)
def test_caches(kv):
    cfg = preset("int4_wo", kv=kv, rotation="hadamard")
    assert cfg.name == f"int4_wo.kv_{kv}.hadamard"
    assert cfg.kv in ("fp8_e4m3", "int8")
    assert (cfg.kv_granularity == "per_head") == kv.endswith("per_head")
    assert cfg.needs_stats
    assert cfg.needs_blocks
    assert QuantConfig.from_json(cfg.to_json()) == cfg


@pytest.mark.parametrize(
    ("field", "value"), [("kv", "fp8"), ("kv_granularity", "per_token"), ("rotation", "random")]
)
def test_unknown_settings_of_a_recipe(field, value):
    with pytest.raises(ConfigError, match=f"unknown {field} '{value}'; choose one of"):
        QuantConfig(rules=[Rule(path="a", weight="int8")], **{field: value})
    with pytest.raises(ConfigError, match="unknown kv 'fp4'"):
        preset("int8", kv="fp4")


def test_recipes_of_before_are_read():
    """Checkpoints that were written before a field was there have its default."""
    old = preset("int8").to_dict()
    for key in ("kv", "kv_granularity", "rotation"):
        del old[key]
    for key in ("observer", "scaling", "alpha", "range_search", "act_order", "damping"):
        del old["rules"][0][key]
    assert QuantConfig.from_dict(old) == preset("int8")


@pytest.mark.parametrize(("field", "value"), [("seed", -1), ("seed", 0.5), ("dataset", ""),
                                              ("dataset", None)])  # fmt: skip
def test_calibration(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        CalibConfig(**{field: value})


def test_the_defaults_of_calibration_are_the_toolkits():
    assert dataclasses.asdict(CalibConfig()) == {
        "num_samples": 512,
        "batch_size": 8,
        "max_seq_length": 512,
        "seed": 0,
        "dataset": "cnn_dailymail",
    }
