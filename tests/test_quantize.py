"""quantize, plan and dequantize_tree over dicts, dataclasses and NNX state."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.config import QuantConfig, Rule
from qjax.errors import ConfigError, DataError
from qjax.plan import plan
from qjax.presets import PRESETS, preset
from qjax.qarray import QArray, bits_of, dequantize, is_qarray, validate
from qjax.quantize import dequantize_tree, quantize
from qjax.tree import map_named, named_leaves

U = oracles.UNIT["float32"]


def array(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def params():
    """A decoder in miniature, with Hugging Face's names."""
    layers = [
        {
            "input_layernorm": {"weight": jnp.ones(32)},
            "mlp": {
                "up": {"weight": array(i, 64, 32), "bias": jnp.zeros(64)},
                "down": {"weight": array(10 + i, 32, 64, dtype=jnp.bfloat16)},
            },
        }
        for i in range(2)
    ]
    return {
        "embed": {"weight": array(20, 48, 32)},
        "layers": layers,
        "lm_head": {"weight": array(21, 48, 32)},
        "step": jnp.int32(7),
        "ids": jnp.zeros((4, 4), jnp.int32),
    }


MATRICES = [f"layers.{i}.mlp.{name}.weight" for i in range(2) for name in ("down", "up")]


def stats():
    """What calibration might give: [in] magnitudes for each matrix."""
    return {name: {"amax": jnp.ones(64 if "down" in name else 32)} for name in MATRICES}


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    weight: object
    bias: object
    name: str = "layer"


class Net(nnx.Module):
    """NNX, with a Flax kernel [in, out] beside a weight [out, in]."""

    def __init__(self):
        self.up = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
        self.weight = nnx.Param(array(1, 8, 32))
        self.calls = nnx.Variable(jnp.int32(0))


def quantized_names(tree):
    return [name for name, leaf in named_leaves(tree) if is_qarray(leaf)]


def assert_same_leaves(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(oracles.decode(x), oracles.decode(y))


# The tree ----------------------------------------------------------------------------------------


def test_a_catch_all_reaches_the_weights_and_nothing_else():
    before = params()
    after = quantize(before, preset("int8_wo"))
    assert quantized_names(after) == MATRICES
    for (name, old), (_, new) in zip(named_leaves(before), named_leaves(after), strict=True):
        if name not in MATRICES:
            assert new is old, name


def test_the_input_is_not_changed():
    tree = params()
    leaves = jax.tree.leaves(tree)
    copies = [np.array(leaf) for leaf in leaves]
    structure = jax.tree.structure(tree)
    quantize(tree, preset("int8_wo"))
    assert jax.tree.structure(tree) == structure
    for old, leaf, copy in zip(leaves, jax.tree.leaves(tree), copies, strict=True):
        assert leaf is old
        np.testing.assert_array_equal(leaf, copy)


PLAIN = [name for name in PRESETS if not preset(name).needs_blocks]


@pytest.mark.parametrize("name", PLAIN)
def test_the_numbers_are_those_of_the_oracle(name):
    small = {key: 16 for key in ("group_size", "act_group_size") if key in PRESETS[name]}
    cfg = preset(name, **small)
    rule = cfg.rules[0]
    tree = params()
    leaves = dict(named_leaves(quantize(tree, cfg, stats())))
    block = {
        "per_tensor": (-1, -1),
        "per_channel": (1, -1),
        "per_group": (1, 16),
        "per_block": (16, 16),
    }[rule.granularity]
    default = "bfloat16" if rule.granularity == "per_group" else "float32"
    for path in MATRICES:
        weight = oracles.decode(dict(named_leaves(tree))[path])
        q = leaves[path]
        validate(q, path)
        assert (q.format, q.block, q.axis) == (rule.weight, block, -1)
        assert q.dtype == ("bfloat16" if "down" in path else "float32")
        assert q.scale.dtype == (rule.scale_dtype or default)
        scale = oracles.decode(q.scale)
        if q.global_scale is not None:
            scale = oracles.narrow(scale * oracles.decode(q.global_scale), "float32")
        exact = oracles.scales(weight, rule.weight, block, symmetric=rule.symmetric)
        if rule.scale_dtype == "float8_e8m0fnu":
            amax = exact * oracles.grid(rule.weight)[0][-1]
            exact = oracles.power_of_two(amax, rule.weight, rule.scale_rule)
        # Two roundings to float32 (of asymmetric ranges three, of both levels four), and one to the
        # type of the scale.
        roundings = 2 if rule.symmetric and q.global_scale is None else 4
        narrow = {"bfloat16": oracles.UNIT["bfloat16"], "float8_e4m3fn": 2.0**-4}
        narrow = narrow.get(q.scale.dtype.name, 0)
        assert np.abs(scale / exact - 1).max() <= (narrow + roundings * U) * (1 + narrow)
        # A tie may go either way where x / s is compiled as x * (1 / s).
        values = oracles.decode(q.values)
        how = {"symmetric": rule.symmetric}
        divided, _ = oracles.quantize(weight, rule.weight, block, scale, **how)
        multiplied, _ = oracles.quantize(weight, rule.weight, block, scale, reciprocal=True, **how)
        np.testing.assert_array_equal(values, np.where(values == divided, divided, multiplied))
        if rule.act is None:
            assert q.input is None
        else:
            assert (q.input.format, q.input.granularity) == (rule.act, rule.act_granularity)
            assert (q.input.scale_dtype, q.input.scale_rule) == (
                rule.act_scale_dtype,
                rule.scale_rule if rule.act_scale_dtype == "float8_e8m0fnu" else "absmax",
            )
            assert q.input.group_size == rule.act_group_size
            assert (q.input.scale is None) == (rule.act_scale == "dynamic")


def test_dataclasses_keep_their_type_and_static_fields():
    layer = Layer(weight=array(0, 8, 16), bias=jnp.zeros(8), name="first")
    out = quantize({"a": layer}, preset("int8_wo"))["a"]
    assert isinstance(out, Layer)
    assert out.name == "first"
    assert is_qarray(out.weight)
    assert out.bias is layer.bias
    assert not is_qarray(layer.weight)


def test_nnx_state_and_its_pure_dict():
    graphdef, state = nnx.split(Net())
    cfg = QuantConfig(
        rules=[
            Rule(path="kernel", weight="int8", contract_axis=-2),
            Rule(path="^weight$", weight="int4"),
        ]
    )
    out = quantize(state, cfg)
    assert isinstance(out, nnx.State)
    assert quantized_names(out) == ["up.kernel", "weight"]
    model = nnx.merge(graphdef, out)
    kernel = model.up.kernel.get_value()
    assert (kernel.axis, kernel.block, kernel.scale.shape) == (-2, (-1, 1), (1, 32))
    assert model.weight.get_value().format == "int4"
    assert model.up.bias.get_value().dtype == jnp.float32
    pure = nnx.to_pure_dict(state)
    as_dict = quantize(pure, cfg)
    assert quantized_names(as_dict) == ["up.kernel", "weight"]
    assert_same_leaves(as_dict, nnx.to_pure_dict(out))


def test_numpy_leaves():
    weight = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    q = quantize({"weight": weight}, preset("int8_wo"))["weight"]
    expected = quantize({"weight": jnp.asarray(weight)}, preset("int8_wo"))["weight"]
    assert_same_leaves(q, expected)


def test_none_leaves_stay():
    out = quantize({"weight": array(0, 8, 16), "bias": None}, preset("int8_wo"))
    assert out["bias"] is None


def test_python_numbers_stay():
    assert quantize({"weight": array(0, 8, 16), "eps": 1e-6}, preset("int8_wo"))["eps"] == 1e-6


def test_stacked_experts():
    weight = array(0, 3, 16, 32)
    q = quantize({"experts": {"weight": weight}}, preset("int4_wo", group_size=8))
    q = q["experts"]["weight"]
    assert (q.shape, q.scale.shape) == ((3, 16, 32), (3, 16, 4))


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")])
def test_sharding_is_kept(spec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, spec)
    weight = array(0, 16, 64)
    cfg = preset("int4_wo", group_size=16)
    q = quantize({"weight": jax.device_put(weight, sharding)}, cfg)["weight"]
    assert q.values.sharding.is_equivalent_to(sharding, 2)
    assert q.scale.sharding.is_equivalent_to(sharding, 2)
    assert_same_leaves(q, quantize({"weight": weight}, cfg)["weight"])


# jit and eval_shape ------------------------------------------------------------------------------

CONFIGS = {
    "asymmetric": preset("int4_wo", group_size=8, symmetric=False),
    "fp8_per_token": preset("fp8_per_token"),
    "mixed": QuantConfig(
        rules=[Rule(path="up", weight="fp8_e5m2"), Rule(path="embed|mlp", weight="int4")],
        ignore=[r"layers\.1\..*up"],
    ),
}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_jit_gives_the_same(cfg):
    tree = params()
    assert_same_leaves(jax.jit(lambda p: quantize(p, cfg))(tree), quantize(tree, cfg))


@every_config
def test_eval_shape_gives_the_same_tree(cfg):
    tree = params()
    concrete = quantize(tree, cfg)
    # Both from arrays and from a tree that is abstract already.
    for start in (tree, jax.eval_shape(lambda: tree)):
        abstract = jax.eval_shape(lambda p: quantize(p, cfg), start)
        assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
        for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_eval_shape_of_nnx_state():
    cfg = preset("int8_wo", contract_axis=-2)
    abstract = nnx.split(nnx.eval_shape(Net))[1]
    shapes = jax.eval_shape(lambda p: quantize(p, cfg), abstract)
    concrete = quantize(nnx.split(Net())[1], cfg)
    assert jax.tree.structure(shapes) == jax.tree.structure(concrete)


# Which rule --------------------------------------------------------------------------------------


def test_the_first_match_decides():
    cfg = QuantConfig(
        rules=[
            Rule(path=r"layers\.0", weight="int4"),
            Rule(path="up", weight=None),
            Rule(path=".*", weight="int8"),
        ]
    )
    leaves = dict(named_leaves(quantize(params(), cfg)))
    assert leaves["layers.0.mlp.up.weight"].format == "int4"
    assert leaves["layers.0.mlp.down.weight"].format == "int4"
    assert not is_qarray(leaves["layers.1.mlp.up.weight"])
    assert leaves["layers.1.mlp.down.weight"].format == "int8"


def test_ignore_comes_before_every_rule():
    cfg = QuantConfig(rules=[Rule(path="up", weight="int4")], ignore=[r"layers\.1\."])
    assert quantized_names(quantize(params(), cfg)) == ["layers.0.mlp.up.weight"]


@pytest.mark.parametrize("pattern", ["embed", "lm_head"])
def test_protected_weights_can_be_asked_for(pattern):
    tree = quantize(params(), QuantConfig(rules=[Rule(path=pattern, weight="int8")]))
    assert quantized_names(tree) == [f"{pattern}.weight"]


def test_a_stacked_norm_is_protected():
    tree = {"norm": {"weight": jnp.ones((3, 16))}, "up": {"weight": array(0, 3, 8, 16)}}
    assert quantized_names(quantize(tree, preset("int8_wo"))) == ["up.weight"]


@pytest.mark.parametrize(
    "cfg",
    [
        QuantConfig(rules=[Rule(path="mlp", weight="int8"), Rule(path="attn", weight="int8")]),
        preset("int8_wo", ignore=["attn"]),
        # Found, but vectors or integers are no weights, and protected words are not spelled.
        QuantConfig(rules=[Rule(path="bias", weight="int8"), Rule(path="attn", weight="int8")]),
    ],
)
def test_a_rule_that_matches_nothing_is_named(cfg):
    with pytest.raises(ConfigError, match=r"no weight matches .*'attn'") as error:
        quantize(params(), cfg)
    assert "'mlp'" not in str(error.value)
    assert "layers.0.mlp.down.weight" in str(error.value)


@pytest.mark.parametrize("path", ["bias", "ids", "step", "^lm_h", "layernorm"])
def test_what_is_no_candidate_is_not_found(path):
    with pytest.raises(ConfigError, match=f"no weight matches '{re.escape(path)}'"):
        quantize(params(), QuantConfig(rules=[Rule(path=path, weight="int8")]))


def test_kernels_need_their_contracting_axis():
    tree = {"up": {"kernel": array(0, 32, 64)}}
    with pytest.raises(ConfigError, match=r"up.kernel \(32, 64\).*contract_axis=-2"):
        quantize(tree, preset("int8_wo"))
    flax = quantize(tree, preset("int8_wo", contract_axis=-2))["up"]["kernel"]
    assert (flax.axis, flax.scale.shape) == (-2, (1, 64))
    plain = quantize(tree, preset("int8_wo", contract_axis=-1))["up"]["kernel"]
    assert (plain.axis, plain.scale.shape) == (-1, (32, 1))
    grouped = quantize(tree, preset("int4_wo", group_size=8, contract_axis=-2))["up"]["kernel"]
    assert (grouped.block, grouped.scale.shape) == ((8, 1), (4, 64))


def test_kernels_of_more_than_two_axes_are_not_guessed():
    # As of Flax's LinearGeneral, [in, heads, head_dim]: no stack of matrices.
    tree = {"query": {"kernel": array(0, 16, 4, 8), "bias": array(1, 4, 8)}}
    with pytest.raises(ConfigError, match=r"query\.kernel \(16, 4, 8\).*qjax\.nn\.convert"):
        quantize(tree, preset("int8_wo", contract_axis=-2))


def test_biases_with_two_axes_are_no_weights():
    tree = {"weight": array(0, 3, 8, 16), "bias": array(1, 3, 8)}
    assert quantized_names(quantize(tree, preset("int8_wo"))) == ["weight"]


def test_stacked_weights_have_no_static_activation_scale():
    tree = {"experts": {"weight": array(0, 3, 8, 16)}}
    with pytest.raises(ConfigError, match=r"experts\.weight \(3, 8, 16\).*act_scale='dynamic'"):
        quantize(tree, preset("fp8"), {"experts.weight": {"amax": jnp.ones(16)}})


def test_a_module_is_refused_for_its_state():
    with pytest.raises(ConfigError, match=r"nnx\.split"):
        quantize(Net(), preset("int8_wo", contract_axis=-2))


def test_contract_axis_of_a_rule_overrides_the_name():
    tree = {"weight": array(0, 32, 64)}
    q = quantize(tree, preset("int8_wo", contract_axis=-2))["weight"]
    assert (q.axis, q.scale.shape) == (-2, (1, 64))


def test_a_group_that_does_not_divide_names_the_weight():
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down\.weight: group size 48 .* 64"):
        quantize(params(), preset("int4_wo", group_size=48))


def test_quantized_weights_are_refused_or_ignored():
    cfg = QuantConfig(rules=[Rule(path="up", weight="int8")])
    once = quantize(params(), cfg)
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.up\.weight is already quantized to int8"
    ):
        quantize(once, preset("int8_wo"))
    twice = quantize(once, preset("int4_wo", group_size=8, ignore=["up"]))
    leaves = dict(named_leaves(twice))
    assert leaves["layers.0.mlp.down.weight"].format == "int4"
    up = leaves["layers.0.mlp.up.weight"]
    assert up is once["layers"][0]["mlp"]["up"]["weight"]


# Bad numbers and statistics ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "convert"),
    [(np.nan, jnp.asarray), (np.inf, jnp.asarray), (-np.inf, jnp.asarray), (np.nan, np.asarray)],
)
def test_weights_that_are_not_finite_are_named(bad, convert):
    tree = params()
    weight = np.array(tree["layers"][1]["mlp"]["up"]["weight"])
    weight[3, 5] = bad
    tree["layers"][1]["mlp"]["up"]["weight"] = convert(weight)
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up\.weight \(64, 32\).*NaN or infinity"):
        quantize(tree, preset("int8_wo"))
    # What is not quantized is not looked at; under jit there are no numbers to look at.
    quantize(tree, preset("int8_wo", ignore=["up"]))
    jax.jit(lambda p: quantize(p, preset("int8_wo")))(tree)


def test_missing_statistics_name_the_call():
    tree = params()
    with pytest.raises(DataError, match=r"qjax\.calibrate\(") as error:
        quantize(tree, preset("fp8"))
    assert "layers.0.mlp.down.weight" in str(error.value)
    assert "none were given" in str(error.value)
    some = {name: stats()[name] for name in MATRICES[:-1]}
    with pytest.raises(DataError, match=re.escape(MATRICES[-1])):
        quantize(tree, preset("fp8"), some)
    with pytest.raises(DataError, match=re.escape(MATRICES[-1])):
        jax.jit(lambda p: quantize(p, preset("fp8"), some))(tree)


def test_static_scales_come_from_the_statistics():
    tree = params()
    rng = np.random.default_rng(0)
    amax = {name: rng.uniform(0.1, 9, 64 if "down" in name else 32) for name in MATRICES}
    given = {name: {"amax": jnp.asarray(a, jnp.float32)} for name, a in amax.items()}
    given["lm_head.weight"] = {"amax": jnp.ones(32)}  # of a layer that stays: not used
    result = quantize(tree, preset("fp8"), given)
    leaves = dict(named_leaves(result))
    for name in MATRICES:
        spec = leaves[name].input
        assert (spec.scale.shape, spec.scale.dtype) == ((), jnp.float32)
        expected = float(np.float32(amax[name]).max()) / 448
        # A division by a constant may be a product with its rounded reciprocal.
        assert abs(float(spec.scale) / expected - 1) <= 2 * U
    # Statistics may be arguments of a jitted function too.
    assert_same_leaves(jax.jit(lambda p, s: quantize(p, preset("fp8"), s))(tree, given), result)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_that_are_not_finite_name_the_layer(bad):
    given = stats()
    given[MATRICES[1]]["amax"] = given[MATRICES[1]]["amax"].at[3].set(bad)
    with pytest.raises(DataError, match=re.escape(MATRICES[1])):
        quantize(params(), preset("fp8"), given)


def test_statistics_of_another_model_are_refused():
    other = {name: {"amax": jnp.ones(5)} for name in MATRICES}
    with pytest.raises(DataError, match=re.escape(MATRICES[0])):
        quantize(params(), preset("fp8"), other)


def test_progress_counts_the_weights():
    calls = []
    quantize(params(), preset("int8_wo"), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


# The plan ----------------------------------------------------------------------------------------


@every_config
def test_the_plan_is_what_quantize_does(cfg):
    tree = params()
    result = dict(named_leaves(quantize(tree, cfg)))
    dry_run = plan(tree, cfg)
    assert [row.path for row in dry_run.rows] == [name for name, _ in named_leaves(tree)]
    for row, (name, leaf) in zip(dry_run.rows, named_leaves(tree), strict=True):
        after = result[name]
        assert row.shape == leaf.shape
        assert row.before == leaf.dtype.name
        assert row.after == (after.format if is_qarray(after) else leaf.dtype.name)
        assert row.bytes_before == leaf.nbytes
        assert row.bytes_after * 8 == bits_of(after)
    assert dry_run.bytes_before * 8 == bits_of(tree)
    assert dry_run.bytes_after * 8 == bits_of(result)
    assert plan(jax.eval_shape(lambda: tree), cfg) == dry_run


def test_the_plan_counts_static_scales_without_statistics():
    result = quantize(params(), preset("fp8"), stats())
    assert plan(params(), preset("fp8")).bytes_after * 8 == bits_of(result)


def test_the_plan_by_hand():
    tree = {"up": {"weight": jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)}}
    (row,) = plan(tree, preset("int4_wo")).rows
    assert (row.path, row.shape, row.before, row.after) == (
        "up.weight",
        (256, 512),
        "bfloat16",
        "int4",
    )
    # 4 bits a weight, and 16 for each 128 of them.
    assert (row.bytes_before, row.bytes_after) == (262144, 65536 + 2048)


def test_the_plan_of_what_is_quantized_already():
    once = quantize(params(), preset("int8_wo"))
    dry_run = plan(once, QuantConfig(rules=[Rule(path="lm_head", weight="int4")]))
    rows = {row.path: row for row in dry_run.rows}
    assert (rows[MATRICES[0]].before, rows[MATRICES[0]].after) == ("int8", "int8")
    assert rows["lm_head.weight"].after == "int4"
    assert dry_run.bytes_before * 8 == bits_of(once)


def test_the_plan_prints_each_row_and_the_total():
    dry_run = plan(params(), preset("int8_wo"))
    lines = str(dry_run).splitlines()
    assert len(lines) == len(dry_run.rows) + 1
    assert "int8" in next(line for line in lines if line.startswith(MATRICES[0]))
    assert f"{dry_run.bytes_after:,} B" in lines[-1]
    as_dict = dry_run.to_dict()
    assert as_dict["bytes_after"] == dry_run.bytes_after
    assert as_dict["rows"][0]["path"] == dry_run.rows[0].path


def test_the_plan_raises_what_quantize_raises():
    for cfg in (preset("int8_wo", ignore=["attn"]), preset("int4_wo", group_size=48)):
        with pytest.raises(ConfigError) as planned:
            plan(params(), cfg)
        with pytest.raises(ConfigError) as quantized:
            quantize(params(), cfg)
        assert str(planned.value) == str(quantized.value)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: jnp.ones((4, 4), bool), id="mask"),
        pytest.param(
            lambda: jax.random.key(0),
            id="key",
        ),
    ],
)
def test_the_plan_of_trees_with_other_leaves(make):
    tree = {"weight": array(0, 8, 16), "other": make()}
    assert quantize(tree, preset("int8_wo"))["other"] is tree["other"]
    rows = plan(tree, preset("int8_wo")).rows
    assert rows[0].before == rows[0].after == str(tree["other"].dtype)


# Back again --------------------------------------------------------------------------------------


def test_dequantize_tree():
    tree = params()
    back = dequantize_tree(quantize(tree, preset("int8_wo")))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for (name, old), (_, new) in zip(named_leaves(tree), named_leaves(back), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        if name not in MATRICES:
            assert new is old
            continue
        old, narrow = oracles.decode(old), 0 if "up" in name else oracles.UNIT["bfloat16"]
        largest = np.abs(old).max(axis=1, keepdims=True)
        # Half a step of amax / 127, 6 roundings to float32, and one to the dtype of the weight.
        bound = largest * (0.5 / 127 + 6 * U) * (1 + narrow) + narrow * np.abs(old)
        assert (np.abs(oracles.decode(new) - old) <= bound).all()


def test_dequantize_tree_without_qarrays_changes_nothing():
    tree = params()
    back = dequantize_tree(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))


# Names -------------------------------------------------------------------------------------------


def test_names_of_dicts_lists_dataclasses_and_qarrays():
    tree = {"a": [array(0, 2, 2), Layer(weight=array(1, 2, 2), bias=None)], "b": {"c": 1}}
    assert [name for name, _ in named_leaves(tree)] == ["a.0", "a.1.weight", "b.c"]
    quantized = quantize({"a": {"weight": array(0, 4, 4)}}, preset("int8_wo"))
    ((name, leaf),) = named_leaves(quantized)
    assert name == "a.weight"
    assert isinstance(leaf, QArray)
    assert map_named(lambda name, leaf: name, quantized) == {"a": {"weight": "a.weight"}}
    np.testing.assert_array_equal(
        dequantize(leaf), map_named(lambda _, leaf: dequantize(leaf), quantized)["a"]["weight"]
    )


def test_names_of_a_module_its_state_and_its_pure_dict_agree():
    model = Net()
    _, state = nnx.split(model)
    names = {name for name, _ in named_leaves(state)}
    assert names == {"up.kernel", "up.bias", "weight", "calls"}
    assert {name for name, _ in named_leaves(nnx.to_pure_dict(state))} == names
    assert {name for name, _ in named_leaves(model)} == names


@pytest.mark.parametrize("wrap", [lambda leaf: leaf, lambda leaf: {"value": leaf}])
def test_leaves_of_one_name_are_refused(wrap):
    leaf = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    nested = {"weight": wrap(leaf)}
    with pytest.raises(ConfigError, match=r"a\.weight"):
        plan({"a.weight": leaf, "a": nested}, preset("int8_wo"))


def test_modules_and_kernels_of_unknown_axes_are_refused():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"nnx\.split\(model\)"):
        quantize(model, preset("int8_wo"))
    kernel = {"query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}}
    with pytest.raises(ConfigError, match=r"query\.kernel \(8, 2, 4\) has more than two axes"):
        quantize(kernel, preset("int8_wo", contract_axis=-2))


def test_static_scales_are_refused_where_nothing_is_calibrated():
    stats = {"experts.weight": {"amax": jnp.ones(8)}, "embedding": {"amax": jnp.ones(8)}}
    with pytest.raises(ConfigError, match="stacked weights"):
        quantize({"experts": {"weight": jnp.ones((2, 4, 8))}}, preset("fp8"), stats)
    with pytest.raises(ConfigError, match="embedding"):
        quantize({"embedding": jnp.ones((4, 8))}, preset("fp8", path="embedding"), stats)


@pytest.mark.parametrize("name", ["LayerNorm_0.weight", "Embed_0.weight", "LM_HEAD.weight"])
def test_protected_words_in_any_case(name):
    tree = {name: jnp.ones((4, 8)), "weight": jnp.ones((4, 8))}
    assert not isinstance(quantize(tree, preset("int8_wo"))[name], qjax.QArray)
