"""qjax.calibrate against NumPy: every layer's input, computed by hand.

Weights and inputs are small integers, so that float32 sums are exact in any order and the
statistics must equal NumPy's bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import DataError, calibrate, preset, quantize
from qjax.nn import Embed, Linear, convert
from qjax.qarray import is_qarray
from qjax.tree import named_leaves


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


class MLP(nnx.Module):
    """4 -> 6 -> 6 -> 3; the middle layer runs twice, its own result 0 in feature 0."""

    def __init__(self, dtype=None):
        self.layers = nnx.List(
            [
                Linear(4, 6, use_bias=True, dtype=dtype, rngs=nnx.Rngs(0)),
                Linear(6, 6, dtype=dtype, rngs=nnx.Rngs(1)),
                Linear(6, 3, dtype=dtype, rngs=nnx.Rngs(2)),
            ]
        )
        for seed, layer in enumerate(self.layers):
            layer.weight.set_value(jnp.asarray(integers(seed, *layer.weight.shape)))
        self.layers[0].bias.set_value(jnp.asarray(integers(9, 6)))
        self.layers[1].weight.set_value(self.layers[1].weight.get_value().at[0].set(0))

    def __call__(self, x):
        first, twice, last = self.layers
        x = jnp.maximum(first(x), 0)
        return last(twice(twice(x)))


def mlp_inputs(model, x):
    """What reaches each layer, by NumPy: name -> list of [tokens, in], one a call."""
    w = [np.asarray(layer.weight.get_value()) for layer in model.layers]
    reached = {"layers.0.weight": [x]}
    x = np.maximum(x @ w[0].T + np.asarray(model.layers[0].bias.get_value()), 0)
    reached["layers.1.weight"] = [x, x @ w[1].T]
    reached["layers.2.weight"] = [x @ w[1].T @ w[1].T]
    return {name: [a.reshape(-1, a.shape[-1]) for a in calls] for name, calls in reached.items()}


def expected_stats(inputs_of, batches):
    every = [inputs_of(batch) for batch in batches]
    return {
        name: np.max(np.abs(np.concatenate([a for calls in every for a in calls[name]])), axis=0)
        for name in every[0]
    }


def assert_stats(stats, expected):
    assert sorted(stats) == sorted(expected)
    for name, amax in expected.items():
        assert set(stats[name]) == {"amax"}
        got = stats[name]["amax"]
        assert (got.dtype, got.shape) == (jnp.float32, amax.shape)
        np.testing.assert_array_equal(np.asarray(got), amax, err_msg=name)


# In batch i feature i is twice as large: no batch alone gives the statistics of all.
BATCHES = [integers(10 + i, 2, 5, 4) * (1 + np.eye(4, dtype=np.float32)[i]) for i in range(3)]


def test_the_largest_magnitude_of_each_feature_over_all_batches():
    model = MLP()
    expected = expected_stats(lambda x: mlp_inputs(model, x), BATCHES)
    assert_stats(calibrate(model, [jnp.asarray(b) for b in BATCHES]), expected)
    for batch in BATCHES:
        alone = expected_stats(lambda x: mlp_inputs(model, x), [batch])
        assert any((alone[name] != expected[name]).any() for name in expected)
    # The middle layer's first call alone would not do, nor its second.
    calls = [mlp_inputs(model, batch)["layers.1.weight"] for batch in BATCHES]
    for call in (0, 1):
        amax = np.max(np.abs(np.concatenate([c[call] for c in calls])), axis=0)
        assert (amax != expected["layers.1.weight"]).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: [jnp.asarray(b) for b in BATCHES],
        lambda: tuple(BATCHES),  # NumPy arrays
        lambda: iter(BATCHES),
        lambda: (b for b in BATCHES),
        lambda: [(b,) for b in BATCHES],  # tuples of arguments
        lambda: jnp.stack([jnp.asarray(b) for b in BATCHES]),  # an array is its rows
    ],
    ids=["list", "tuple", "iterator", "generator", "argument tuples", "array"],
)
def test_forms_of_batches(make):
    model = MLP()
    assert_stats(calibrate(model, make()), expected_stats(lambda x: mlp_inputs(model, x), BATCHES))


def test_batches_of_different_shapes():
    model = MLP()
    batches = [BATCHES[0], BATCHES[1][:1], BATCHES[2][0]]
    assert_stats(calibrate(model, batches), expected_stats(lambda x: mlp_inputs(model, x), batches))


def test_progress():
    seen = []
    calibrate(MLP(), BATCHES, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    calibrate(MLP(), iter(BATCHES), progress=lambda done, total: seen.append((done, total)))
    assert seen == []  # no total is known


def test_several_arguments():
    class TwoInputs(nnx.Module):
        def __init__(self):
            self.left = Linear(4, 3, rngs=nnx.Rngs(0))
            self.right = Linear(5, 3, rngs=nnx.Rngs(1))

        def __call__(self, x, y):
            return self.left(x) + self.right(y)

    batches = [(integers(1, 2, 4), integers(2, 2, 5)), (integers(3, 7, 4), integers(4, 7, 5))]
    expected = expected_stats(lambda xy: {"left.weight": [xy[0]], "right.weight": [xy[1]]}, batches)
    assert_stats(calibrate(TwoInputs(), batches), expected)


def test_features_of_a_converted_layer_run_as_its_columns_do():
    """Contracting axes (-2, -1) of x: statistic i belongs to column i of the weight."""
    model = convert(nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=nnx.Rngs(0)))
    x = integers(1, 6, 3, 4)
    assert_stats(calibrate(model, [x]), {"weight": np.abs(x).max(axis=0).reshape(12)})
    permuted = convert(nnx.Einsum("bnh,hnd->bd", (4, 3, 5), rngs=nnx.Rngs(0)))
    assert_stats(calibrate(permuted, [x]), {"weight": np.abs(x).max(axis=0).reshape(12)})


def test_a_layer_shared_by_two_places_has_one_entry():
    class Shared(nnx.Module):
        def __init__(self):
            self.first = Linear(4, 4, rngs=nnx.Rngs(0))
            self.second = self.first

        def __call__(self, x):
            return self.second(2 * self.first(x))

    model = Shared()
    w = integers(0, 4, 4)
    model.first.weight.set_value(jnp.asarray(w))
    x = integers(1, 5, 4)
    both = np.concatenate([x, 2 * x @ w.T])
    stats = calibrate(model, [x])
    assert_stats(stats, {"first.weight": np.abs(both).max(axis=0)})
    # It is the name that the state, and so `quantize`, has for it.
    assert [name for name, _ in named_leaves(nnx.state(model))] == list(stats)


def test_embeddings_and_layers_that_do_not_run_have_no_entry():
    class Partial(nnx.Module):
        def __init__(self):
            self.embed = Embed(7, 4, rngs=nnx.Rngs(0))
            self.used = Linear(4, 4, rngs=nnx.Rngs(0))
            self.unused = Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, ids):
            return self.used(self.embed(ids))

    model = Partial()
    table = np.asarray(model.embed.embedding.get_value())
    stats = calibrate(model, [np.array([[1, 2]]), np.array([[3, 1]])])
    assert_stats(stats, {"used.weight": np.abs(table[1:4]).max(axis=0)})
    with pytest.raises(DataError, match=r"unused\.weight"):
        quantize(nnx.state(model), preset("fp8"), stats)


def test_statistics_are_of_what_the_product_sees():
    """A layer that computes in bfloat16 sees 257 as 256; statistics are float32 all the same."""
    x = np.float32([[257, 1, -259, 0.5]])
    seen = np.float32([256, 1, 260, 0.5])  # 259 is between 258 and 260, ties to even
    stats = calibrate(MLP(dtype=jnp.bfloat16), [x])
    np.testing.assert_array_equal(np.asarray(stats["layers.0.weight"]["amax"]), seen)
    assert all(entry["amax"].dtype == jnp.float32 for entry in stats.values())


def test_the_model_is_not_changed():
    model = convert(nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))))
    graphdef, state = nnx.split(model)
    before = dict(named_leaves(state))
    calibrate(model, [BATCHES[0]])
    after_graphdef, after_state = nnx.split(model)
    assert after_graphdef == graphdef
    after = dict(named_leaves(after_state))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, Linear)]
    assert len(layers) == 2
    assert not any(layer.observe for layer in layers)
    assert jax.tree.leaves(nnx.state(model, nnx.Intermediate)) == []


def test_variables_that_the_model_writes_are_not_changed():
    class Counting(nnx.Module):
        def __init__(self):
            self.layer = Linear(4, 4, rngs=nnx.Rngs(0))
            self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls.set_value(self.calls.get_value() + 1)
            return self.layer(x)

    model = Counting()
    calibrate(model, BATCHES)
    assert int(model.calls.get_value()) == 0


def test_one_compilation_for_batches_of_one_shape():
    traces = []

    class Traced(nnx.Module):
        def __init__(self):
            self.layer = Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            traces.append(x.shape)
            return self.layer(x)

    calibrate(Traced(), BATCHES)
    assert traces == [(2, 5, 4)]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite(value):
    model = MLP()
    model.layers[1].weight.set_value(jnp.full((6, 6), value))
    bad = BATCHES[1]
    with pytest.raises(DataError, match=r"reach layers\.1\.weight are NaN or infinite"):
        # Its second call receives what its first made.
        calibrate(model, [BATCHES[0], bad])


def test_one_bad_batch_among_good_ones():
    bad = BATCHES[1].copy()
    bad[0, 0, 2] = np.nan
    with pytest.raises(DataError, match=r"reach layers\.0\.weight are NaN or infinite"):
        calibrate(MLP(), [BATCHES[0], bad, BATCHES[2]])


@pytest.mark.parametrize("batches", [[], (), iter([])])
def test_no_batches(batches):
    with pytest.raises(DataError, match="no batches"):
        calibrate(MLP(), batches)


def test_an_unconverted_model_is_told_to_convert():
    with pytest.raises(DataError, match=r"Linear has no qjax\.nn layers.*qjax\.nn\.convert"):
        calibrate(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), BATCHES)


def test_the_first_layer_in_model_order_is_named():
    class Deep(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(12)])

        def __call__(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x) * (jnp.inf if i == 2 else 1)
            return x

    with pytest.raises(DataError, match=r"reach layers\.3\.weight"):  # and not layers.10
        calibrate(Deep(), BATCHES)


def test_what_the_model_sows_itself_is_no_statistic():
    class Sowing(nnx.Module):
        def __init__(self):
            self.layer = Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.sow(nnx.Intermediate, "hidden", x / 0)
            return self.layer(x)

    assert list(calibrate(Sowing(), BATCHES)) == ["layer.weight"]


def test_a_layer_that_only_some_batches_reach():
    class Optional(nnx.Module):
        def __init__(self):
            self.always = Linear(4, 4, rngs=nnx.Rngs(0))
            self.sometimes = Linear(4, 4, rngs=nnx.Rngs(1))

        def __call__(self, x, y):
            return self.always(x) if y is None else self.always(x) + self.sometimes(y)

    x, y = integers(1, 2, 4), integers(2, 2, 4)
    expected = {"always.weight": np.abs(x).max(axis=0), "sometimes.weight": np.abs(y).max(axis=0)}
    assert_stats(calibrate(Optional(), [(x, None), (x, y)]), expected)
    assert_stats(calibrate(Optional(), [(x, y), (x, None)]), expected)


# ---------------------------------------------------------------- what the statistics are for


def test_a_static_fp8_scale_is_the_largest_magnitude_over_448():
    model = MLP()
    stats = calibrate(model, BATCHES)
    expected = expected_stats(lambda x: mlp_inputs(model, x), BATCHES)
    q = dict(named_leaves(quantize(nnx.state(model), preset("fp8"), stats)))
    assert {name for name, leaf in q.items() if is_qarray(leaf)} == set(expected)
    for name, amax in expected.items():
        spec = q[name].input
        assert (spec.format, spec.granularity) == ("fp8_e4m3", "per_tensor")
        assert (spec.scale.shape, spec.scale.dtype) == ((), jnp.float32)
        assert float(spec.scale) == np.float32(amax.max()) / np.float32(448)


def test_a_layer_that_no_batch_reached_is_refused():
    stats = calibrate(MLP(), [np.zeros((1, 4), np.float32)])
    with pytest.raises(DataError, match=r"no calibration batch reached layers\.0\.weight"):
        quantize(nnx.state(MLP()), preset("fp8"), stats)


def test_calibration_runs_in_evaluation_mode():
    class Dropping(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.layer = Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(self.dropout(x))

    model = Dropping()
    stats = calibrate(model, [np.ones((8, 4), np.float32)])
    # Dropout would have doubled what it keeps.
    np.testing.assert_array_equal(stats["layer.weight"]["amax"], np.ones(4))
    assert not model.dropout.deterministic
