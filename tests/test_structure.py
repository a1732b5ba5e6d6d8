"""What reads what in a decoder layer: scales folded into it leave the function what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import config_of, small_lm
from flax import nnx

from qjax import structure
from qjax.bench.random_model import random_model
from qjax.blockwise.blocks import specs
from qjax.blockwise.fold import fold, power_of_two, shared
from qjax.checkpoint.orbax import fill
from qjax.nn.layer import ARRANGEMENTS, POST
from qjax.tree import leaves_by_name

# One family for each arrangement and each thing that a fold meets: biases, gains of 1 + x,
# grouped queries, experts, ungated units.
FAMILIES = ("llama", "falcon", "gptj", "gemma2", "opt", "mpt", "mixtral", "phi3", "gpt2", "qwen2")


def models():
    for family in FAMILIES:
        marks = () if family in ("llama", "gemma2", "mixtral") else pytest.mark.heavy
        yield pytest.param(lambda f=family: small_lm(f, layers=2), id=family, marks=marks)
    post = config_of("opt", do_layer_norm_before=False, num_hidden_layers=2)
    yield pytest.param(lambda: random_model(post, None, dtype=jnp.float32), id="opt, post")


def test_every_arrangement_is_there():
    kinds = {spec.layer.arrangement for f in FAMILIES for _, spec in specs(decoder(f))[:-1]}
    assert kinds | {POST} == set(ARRANGEMENTS)


def decoder(family):
    return config_of(family).decoder()


@pytest.mark.parametrize("make", list(models()))
def test_folds_leave_the_function_as_it_is(make):
    """Random scales, of up to 8 and down to 1/8, on every input that something can divide."""
    lm = make()
    graphdef, state = lm.split()
    # Biases and gains that are not 0 and 1.
    rng = np.random.default_rng(0)
    leaves = {
        name: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)
        if leaf.ndim == 1
        else leaf
        for name, leaf in leaves_by_name(state).items()
    }
    ids = jnp.asarray(rng.integers(0, 64, (2, 12)), jnp.int32)
    model = nnx.merge(graphdef, fill(state, leaves, "the model"))
    before = np.asarray(jax.jit(lambda m: m(ids))(model))
    changed = dict(leaves)
    for prefix, spec in specs(lm.model.decoder_config):
        for group in spec.groups:
            own = {n.removeprefix(prefix): v for n, v in changed.items() if n.startswith(prefix)}
            if group.fold is not None and f"{group.readers[0]}.weight" in own:
                scale = random_scale(rng, own, group)
                new, applied = fold(own, group, scale, own.keys(), spec.plus_one)
                np.testing.assert_allclose(applied, scale, rtol=1e-4)
                assert any(bool((new[n] != own[n]).any()) for n in own)
                changed |= {f"{prefix}{n}": leaf for n, leaf in new.items()}
    assert sum(bool((changed[n] != leaves[n]).any()) for n in leaves) > len(leaves) // 3
    model = nnx.merge(graphdef, fill(state, changed, "the model"))
    after = np.asarray(jax.jit(lambda m: m(ids))(model))
    # Each weight is rounded once more, and products of a scale and its inverse: some 2^-23 of each
    # number. Two layers of sums of 128 such terms, and logits that cancel: 1e-4 of the largest.
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


def random_scale(rng, leaves, group):
    weight = leaves[f"{group.readers[0]}.weight"]
    shape = (len(weight), weight.shape[-1]) if group.own_scale else (weight.shape[-1],)
    scale = jnp.exp2(jnp.asarray(rng.uniform(-3, 3, shape), jnp.float32))
    # A router must send every token where it went: no rounding.
    exact = power_of_two(scale) if any("router" in r for r in group.readers) else scale
    return shared(exact, group.fold)


def test_heads_that_share_their_values_share_their_scale():
    layer = decoder("llama").layers[0]
    group = next(g for g in structure.groups(layer) if g.name == "attention_output")
    assert (group.fold.module, group.fold.repeats, group.fold.width) == ("self_attn.v_proj", 2, 32)
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, 128), jnp.float32)
    one = np.asarray(shared(scale, group.fold)).reshape(2, 2, 32)
    np.testing.assert_array_equal(one[:, 0], one[:, 1])
    parts = np.asarray(scale, np.float64).reshape(2, 2, 32)
    np.testing.assert_allclose(one[:, 0], np.sqrt(parts[:, 0] * parts[:, 1]), rtol=1e-6)


def folds(layer):
    return {g.name: g.fold and g.fold.module for g in structure.groups(layer)}


def test_nothing_is_folded_where_the_function_would_change():
    llama = decoder("llama").layers[0]
    assert folds(llama) == {
        "attention_input": "input_layernorm",
        "attention_output": "self_attn.v_proj",
        "mlp_input": "post_attention_layernorm",
        "mlp_output": "mlp.up_proj",
    }
    # The residual stream is read as it is.
    post = folds(dataclasses.replace(llama, arrangement=POST))
    assert post["attention_input"] is None
    assert post["mlp_input"] is None
    # Values that are clipped; a unit that is not linear in what it reads; a norm without a gain.
    clipped = dataclasses.replace(llama.attention, clip_qkv=3.0)
    assert folds(dataclasses.replace(llama, attention=clipped))["attention_output"] is None
    gelu = decoder("gpt2").layers[0]
    assert folds(gelu)["mlp_output"] is None
    relu = dataclasses.replace(gelu, mlp=dataclasses.replace(gelu.mlp, activation="relu"))
    assert folds(relu)["mlp_output"] == "mlp.up_proj"
    bare = dataclasses.replace(gelu, norm=dataclasses.replace(gelu.norm, scale=False))
    assert folds(bare)["attention_input"] is None


def test_one_norm_in_front_of_both_is_one_group():
    groups = structure.groups(decoder("gptj").layers[0])
    assert [g.name for g in groups] == ["attention_input", "attention_output", "mlp_output"]
    assert groups[0].readers == (*(f"self_attn.{p}_proj" for p in "qkv"), "mlp.up_proj")


def test_the_readers_of_experts_have_their_router_with_them():
    groups = {g.name: g for g in structure.groups(decoder("mixtral").layers[0])}
    assert groups["mlp_input"].readers[-1] == "mlp.router"
    assert groups["mlp_input"].experts
    assert groups["mlp_output"].own_scale


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("plus_one", [False, True])
def test_a_stored_gain_is_what_the_weights_answer_to(dtype, plus_one):
    """gain' = gain / s is rounded to 16 bits; the weights get gain / gain', not s."""
    rng = np.random.default_rng(0)
    gain = jnp.asarray(rng.uniform(0.01, 3, 64), dtype) - jnp.asarray(plus_one, dtype)
    leaves = {"n.scale": gain, "r.weight": jnp.ones((2, 64), dtype)}
    group = structure.Group(name="x", readers=("r",), fold=structure.Fold(kind="norm", module="n"))
    scale = jnp.asarray(2.0 ** rng.uniform(-6, 6, 64), jnp.float32)
    new, applied = fold(leaves, group, scale, {"r.weight"}, plus_one)
    assert new["n.scale"].dtype == gain.dtype
    one = float(plus_one)
    product = (np.asarray(new["n.scale"], np.float64) + one) * np.asarray(new["r.weight"][0])
    # One division and one product in float32, where 1 + x is exact.
    np.testing.assert_allclose(product, np.asarray(gain, np.float64) + one, rtol=2**-22)
    np.testing.assert_array_equal(new["r.weight"][0], applied)
