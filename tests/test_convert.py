"""qjax.nn.convert against the Flax layers themselves.

Kernels, biases and inputs are small integers wherever that is possible: products and sums are
then exact in float32 in whatever order they are added, so the copy must equal the original bit
for bit, and one misplaced axis shows.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import ConfigError, plan, preset, quantize
from qjax.nn import Embed, General, Linear, convert
from qjax.qarray import is_qarray
from qjax.quantize import dequantize_tree
from qjax.tree import named_leaves


def integers(key, shape, dtype=jnp.float32):
    """An initializer: integers of -3..3. Drawn by NumPy, because XLA compiles for each shape."""
    seed = np.asarray(jax.random.key_data(key))
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), dtype)


def inputs(*shape, dtype=jnp.float32):
    return integers(jax.random.key(1), shape, dtype)


INTEGERS = {"kernel_init": integers, "bias_init": integers}


def rngs():
    return nnx.Rngs(0)


def assert_same(expected, got):
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    # NumPy finds NaN equal to NaN in its own types only; float64 holds all of ours.
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(expected, np.float64))


def weights_of(model):
    """Names of the leaves with two or more axes."""
    return [name for name, leaf in named_leaves(nnx.state(model)) if len(leaf.shape) >= 2]


# ---------------------------------------------------------------- Linear


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0, 3)])
def test_linear(use_bias, lead):
    layer = nnx.Linear(6, 4, use_bias=use_bias, **INTEGERS, rngs=rngs())
    new = convert(layer)
    x = inputs(*lead, 6)
    assert_same(layer(x), new(x))
    assert isinstance(new, Linear)
    assert new.weight.shape == (4, 6)
    assert (new.bias is None) == (not use_bias)


DTYPES = (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("layer_type", ["Linear", "LinearGeneral", "Einsum"])
@pytest.mark.parametrize(
    ("param_dtype", "dtype", "x_dtype"),
    list(itertools.product(DTYPES, (None, jnp.float16, *DTYPES), (jnp.int32, *DTYPES))),
)
def test_dtypes(layer_type, param_dtype, dtype, x_dtype):
    """The result has Flax's dtype, and x is rounded where Flax rounds it: before the product."""
    settings = {"param_dtype": param_dtype, "dtype": dtype, "rngs": rngs(), **INTEGERS}
    layer = {
        "Linear": lambda: nnx.Linear(4, 3, **settings),
        "LinearGeneral": lambda: nnx.LinearGeneral(4, (3,), **settings),
        "Einsum": lambda: nnx.Einsum("...d,dh->...h", (4, 3), (3,), **settings),
    }[layer_type]()
    # 257 is no bfloat16: rounded to 256 first, 257 - 256 is 0 and not 1. Sums are exact in
    # float32, in which XLA adds products of 16-bit numbers, and are rounded once.
    x = jnp.asarray(np.random.default_rng(1).integers(256, 264, (16, 4)), x_dtype)
    with jax.numpy_dtype_promotion("standard"):
        assert_same(layer(x), convert(layer)(x))


def test_dtypes_that_strict_promotion_refuses():
    layer = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=rngs())
    for model in (layer, convert(layer)):
        with pytest.raises(jax.dtypes.TypePromotionError):
            model(inputs(2, 4))


def test_weakly_typed_and_numpy_inputs():
    layer = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, **INTEGERS, rngs=rngs())
    new = convert(layer)
    weak = jnp.full((2, 4), 0.5)
    assert weak.weak_type
    assert_same(layer(weak), new(weak))
    assert new(weak).dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):
        x = np.full((2, 4), 0.5, np.float32)
        assert_same(layer(x), new(x))


# ---------------------------------------------------------------- LinearGeneral


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("features", "out", "axis", "shape"),
    [
        (4, 5, -1, (2, 3, 4)),
        (4, (2, 3), -1, (2, 3, 4)),
        ((3, 4), 5, (-2, -1), (2, 3, 4)),
        ((3, 4), (5, 2), (-2, -1), (6, 2, 3, 4)),
        ((4, 4), 5, (-1, -2), (2, 4, 4)),  # Flax sorts the axes: this is (-2, -1)
        ((4, 4), (5, 2), (-1, 0), (4, 3, 4)),  # and this (0, -1)
        (3, 5, -2, (2, 3, 4)),
        (3, (5, 2), 1, (2, 3, 4)),
        ((2, 4), 5, (0, 2), (2, 3, 4)),
        ((2, 3, 4), (5, 2), (-3, -2, -1), (2, 3, 4)),
    ],
)
def test_linear_general(use_bias, features, out, axis, shape):
    layer = nnx.LinearGeneral(features, out, axis=axis, use_bias=use_bias, **INTEGERS, rngs=rngs())
    x = inputs(*shape)
    new = convert(layer)
    assert_same(layer(x), new(x))
    assert new.weight.shape == (np.prod(out), np.prod(features))


def test_a_mixed_axis_follows_the_rank_of_its_input():
    """axis=(1, -2) contracts axes (1, 2) of rank 4, and (1, 3) of rank 5."""
    layer = nnx.LinearGeneral((4, 4), 3, axis=(1, -2), **INTEGERS, rngs=rngs())
    new = convert(layer)
    for x in (inputs(2, 4, 4, 5), inputs(2, 4, 5, 4, 6)):
        assert_same(layer(x), new(x))


def test_an_axis_out_of_range_raises():
    new = convert(nnx.LinearGeneral(4, 3, axis=2, rngs=rngs()))
    with pytest.raises(IndexError):
        new(inputs(4, 4))


# ---------------------------------------------------------------- Einsum

# (equation, kernel shape, bias shape, shape of x)
EQUATIONS = [
    ("...d,dh->...h", (4, 5), (5,), (2, 3, 4)),
    ("...d,dh->...h", (4, 5), (5,), (4,)),
    ("...d,dhk->...hk", (4, 2, 3), (2, 3), (2, 3, 4)),
    ("btd,ndh->btnh", (3, 4, 5), (3, 5), (2, 6, 4)),
    ("btd,ndh->btnh", (3, 4, 5), (3, 1, 5), (2, 6, 4)),
    ("btd,ndh->bthn", (3, 4, 5), (5, 3), (2, 6, 4)),
    ("btd,ndh->nbth", (3, 4, 5), (3, 1, 1, 5), (2, 6, 4)),
    ("btnh,nhd->btd", (3, 4, 5), (5,), (2, 6, 3, 4)),
    ("btnh,hnd->btd", (4, 3, 5), (5,), (2, 6, 3, 4)),
    ("btnh,dnh->btd", (5, 3, 4), (5,), (2, 6, 3, 4)),
    ("bsd,cdh->csbh", (3, 4, 5), (3, 1, 1, 5), (2, 6, 4)),
    ("bsd,dh->hsb", (4, 5), (5, 1, 1), (2, 6, 4)),
    ("BTD,NDH->BTNH", (3, 4, 5), (3, 5), (2, 6, 4)),
    ("dbt,dh->bth", (4, 5), (5,), (4, 2, 6)),
    ("bdt,dh->bth", (4, 5), (5,), (2, 4, 6)),
    ("abc,cah->bh", (4, 3, 5), (5,), (3, 2, 4)),
    # the ellipsis anywhere; equal sizes, so that shapes alone could not tell
    ("d...,dh->h...", (4, 4), None, (4, 4, 4)),
    ("d...,dh->...h", (4, 4), (4,), (4, 4, 4)),
    ("b...d,dh->b...h", (4, 4), (4,), (4, 4, 4, 4)),
    ("b...d,dh->...bh", (4, 4), (4,), (4, 4, 4, 4)),
    ("...bd,dh->b...h", (4, 4), (4,), (4, 4, 4, 4)),
    ("d...e,edh->...h", (4, 4, 4), (4,), (4, 4, 4)),
    # nothing stays, nothing contracts, no outputs
    ("bd,bdh->h", (2, 4, 5), (5,), (2, 4)),
    ("bd,dbh->h", (4, 2, 5), (5,), (2, 4)),
    ("bd,h->bdh", (5,), (5,), (2, 4)),
    ("bd,d->b", (4,), None, (2, 4)),
    ("bd,bd->", (2, 4), None, (2, 4)),
]


@pytest.mark.parametrize(("equation", "kernel", "bias", "shape"), EQUATIONS)
def test_einsum(equation, kernel, bias, shape):
    layer = nnx.Einsum(equation, kernel, bias, **INTEGERS, rngs=rngs())
    new = convert(layer)
    x = inputs(*shape)
    assert_same(layer(x), new(x))
    assert new.weight.ndim == 2
    assert new.weight.size == np.prod(kernel)


def test_spaces_in_an_equation():
    layer = nnx.Einsum(" ...d, d h -> ...h ", (4, 5), (5,), **INTEGERS, rngs=rngs())
    assert_same(layer(inputs(2, 4)), convert(layer)(inputs(2, 4)))


# ---------------------------------------------------------------- Embed


@pytest.mark.parametrize(("param_dtype", "dtype"), list(itertools.product(DTYPES, (None, *DTYPES))))
def test_embed(param_dtype, dtype):
    layer = nnx.Embed(
        7, 4, param_dtype=param_dtype, dtype=dtype, embedding_init=integers, rngs=rngs()
    )
    new = convert(layer)
    assert isinstance(new, Embed)
    ids = jnp.array([[0, 6, 3], [-1, 7, 2]])  # -1 is the last row, 7 is out of range: NaN
    assert_same(layer(ids), new(ids))
    assert np.isnan(np.asarray(new(ids), np.float32)[1, 1]).all()
    for x_dtype in DTYPES:
        x = inputs(2, 3, 4, dtype=x_dtype)
        assert_same(layer.attend(x), new.attend(x))


def test_a_variable_used_beside_its_layer_stays_tied():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(7, 4, embedding_init=integers, rngs=rngs())
            self.table = self.embed.embedding

        def __call__(self, ids):
            return self.embed(ids) @ self.table[...].T

    model, new = Tied(), convert(Tied())
    assert new.table is new.embed.embedding
    assert_same(model(jnp.arange(3)), new(jnp.arange(3)))


# ---------------------------------------------------------------- whole models


class MLP(nnx.Module):
    def __init__(self):
        self.layers = nnx.List(
            [nnx.Linear(a, b, **INTEGERS, rngs=rngs()) for a, b in ((4, 8), (8, 8), (8, 3))]
        )

    def __call__(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            # Integers stay integers, and small: |x| <= 3, sums of at most 8 products.
            x = jnp.clip(nnx.relu(layer(x)), 0, 3)
        return last(x)


class Nested(nnx.Module):
    """Layers in lists in lists, in a dict, and in a Sequential."""

    def __init__(self):
        def layer():
            return nnx.Linear(4, 4, **INTEGERS, rngs=rngs())

        self.grid = nnx.List([nnx.List([layer(), layer()]), nnx.List([layer()])])
        self.named = nnx.Dict(first=layer(), inner=nnx.Dict(second=layer()))
        self.chain = nnx.Sequential(layer(), lambda x: jnp.clip(x, -3, 3), layer())

    def __call__(self, x):
        flat = [*self.grid[0], *self.grid[1], self.named["first"], self.named["inner"]["second"]]
        for layer in flat:
            x = jnp.clip(layer(x), -3, 3)
        return self.chain(x)


class Block(nnx.Module):
    def __init__(self, features, r):
        self.norm1 = nnx.LayerNorm(features, rngs=r)
        self.attention = nnx.MultiHeadAttention(4, features, num_kv_heads=2, decode=False, rngs=r)
        self.norm2 = nnx.LayerNorm(features, rngs=r)
        self.up = nnx.LinearGeneral(features, (2, 2 * features), use_bias=False, rngs=r)
        self.down = nnx.Einsum("btf,fd->btd", (2 * features, features), rngs=r)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), is_causal=True)
        gate, up = jnp.moveaxis(self.up(self.norm2(x)), -2, 0)
        return x + self.down(jax.nn.silu(gate) * up)


class Transformer(nnx.Module):
    def __init__(self, vocabulary=11, features=16, depth=2):
        r = rngs()
        self.embed = nnx.Embed(vocabulary, features, rngs=r)
        self.blocks = nnx.List([Block(features, r) for _ in range(depth)])
        self.norm = nnx.LayerNorm(features, rngs=r)
        self.head = nnx.Linear(features, vocabulary, use_bias=False, rngs=r)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize(("model", "count"), [(MLP, 3), (Nested, 7)])
def test_models_of_linears(model, count):
    old, new = model(), convert(model())
    assert_same(old(inputs(5, 4)), new(inputs(5, 4)))
    names = weights_of(new)
    assert len(names) == count
    assert all(name.endswith(".weight") for name in names)


def test_attention_layer():
    layer = nnx.MultiHeadAttention(
        4, 16, num_kv_heads=2, in_kv_features=8, normalize_qk=True, decode=False, rngs=rngs()
    )
    new = convert(layer)
    assert {type(getattr(new, name)) for name in ("query", "key", "value", "out")} == {General}
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    memory = jax.random.normal(jax.random.key(1), (2, 6, 8))
    run = nnx.jit(lambda model, *args: model(*args))
    _assert_close(run(layer, x, memory), run(new, x, memory), terms=16, products=2)
    # Decoding goes through the cache of the copy.
    decode = nnx.jit(lambda model, *args: model(*args, decode=True))
    for model in (layer, new):
        model.init_cache((2, 5, 16))
    for at in range(2):
        args = (x[:, at : at + 1], memory[:, at : at + 1])
        _assert_close(decode(layer, *args), decode(new, *args), terms=16, products=2)
    assert int(new.cache_index[...]) == int(layer.cache_index[...]) == 2


def test_transformer():
    model = Transformer()
    new = convert(model)
    ids = jnp.arange(24).reshape(2, 12) % 11
    # Through one block: value, out, up, down, each on normalized inputs; 2 blocks and the head.
    _assert_close(nnx.jit(model)(ids), nnx.jit(new)(ids), terms=32, products=9)


def _assert_close(expected, got, *, terms, products):
    """Two float32 evaluations that differ in the order of sums of at most `terms` products.

    Each sum is off by gamma = terms * 2^-24 of the sum of magnitudes of its products, in either
    evaluation; for random signs the magnitudes add up to less than sqrt(terms) times the typical
    result. Norms and softmax pass relative errors on, so `products` layers one after another add
    them up. A wrong axis is off by the whole result.
    """
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    bound = products * 2 * terms * 2.0**-24 * terms**0.5
    assert bound < 1e-3
    error = np.abs(np.asarray(got) - np.asarray(expected)).max()
    assert error <= bound * np.abs(np.asarray(expected)).max()


def test_the_plan_finds_every_weight_of_a_transformer():
    model = Transformer()
    state = nnx.state(convert(model))
    rows = {row.path: row for row in plan(state, preset("int8_wo")).rows}
    block = ["attention.query", "attention.key", "attention.value", "attention.out", "up", "down"]
    expected = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in block} | {"head.weight"}
    assert {path for path, row in rows.items() if row.after == "int8"} == expected
    assert {p for p, row in rows.items() if len(row.shape) > 1} == expected | {"embed.embedding"}
    # No number was lost or added.
    sizes = [sum(x.size for _, x in named_leaves(tree)) for tree in (state, nnx.state(model))]
    assert sizes[0] == sizes[1]


def test_the_original_is_not_changed():
    model = Transformer()
    graphdef, state = nnx.split(model)
    before = dict(named_leaves(state))
    new = convert(model)
    new.embed.embedding.set_value(jnp.zeros((11, 16)))
    new.norm.scale.set_value(jnp.zeros(16))
    after_graphdef, after_state = nnx.split(model)
    assert after_graphdef == graphdef
    after = dict(named_leaves(after_state))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_a_shared_layer_stays_shared():
    class Shared(nnx.Module):
        def __init__(self):
            layer = nnx.Linear(4, 4, **INTEGERS, rngs=rngs())
            self.first = layer
            self.rest = nnx.List([layer, nnx.Linear(4, 4, **INTEGERS, rngs=rngs())])

        def __call__(self, x):
            return self.rest[1](jnp.clip(self.rest[0](jnp.clip(self.first(x), -3, 3)), -3, 3))

    model, new = Shared(), convert(Shared())
    assert new.first is new.rest[0]
    assert weights_of(new) == ["first.weight", "rest.1.weight"]
    assert_same(model(inputs(5, 4)), new(inputs(5, 4)))


def test_stacked_layers_stay_stacked():
    """nnx.vmap makes [layers, in, out] kernels, nnx.scan runs them one after another."""

    def whole(key, shape, dtype):  # `integers` cannot run under vmap
        return jax.random.randint(key, shape, -3, 4).astype(dtype)

    init = {"kernel_init": whole, "bias_init": whole}

    class Stacked(nnx.Module):
        def __init__(self):
            r = nnx.Rngs(0).split(5)
            self.linear = nnx.vmap(lambda r: nnx.Linear(4, 6, **init, rngs=r))(r)
            self.einsum = nnx.vmap(lambda r: nnx.Einsum("bf,df->bd", (4, 6), (4,), **init, rngs=r))(
                r
            )

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
            def run(x, linear, einsum):
                return jnp.clip(einsum(jnp.clip(linear(x), -3, 3)), -3, 3)

            return run(x, self.linear, self.einsum)

    model, new = Stacked(), convert(Stacked())
    assert new.linear.weight.shape == (5, 6, 4)
    assert new.einsum.weight.shape == (5, 4, 6)
    assert_same(model(inputs(3, 4)), new(inputs(3, 4)))
    # Quantized, each layer of the stack has scales of its own; scan slices those too.
    graphdef, state = nnx.split(new)
    q = quantize(state, preset("int8_wo"))
    assert q["linear"]["weight"].get_value().scale.shape == (5, 6, 1)
    got = nnx.merge(graphdef, q)(inputs(3, 4))
    want = nnx.merge(graphdef, dequantize_tree(q))(inputs(3, 4))
    _assert_close(want, got, terms=6, products=10)


def test_an_abstract_model_converts():
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: convert(Transformer())))
    _, state = nnx.split(convert(Transformer()))
    assert [(n, x.shape, x.dtype) for n, x in named_leaves(abstract)] == [
        (n, x.shape, x.dtype) for n, x in named_leaves(state)
    ]
    ids = jnp.arange(8)[None]
    assert_same(convert(Transformer())(ids), nnx.merge(graphdef, state)(ids))


def test_a_quantized_copy_computes_with_its_dequantized_weights():
    graphdef, state = nnx.split(convert(MLP()))
    q = quantize(state, preset("int8_wo"))
    assert all(is_qarray(x) for name, x in named_leaves(q) if name.endswith("weight"))
    got, want = (nnx.merge(graphdef, s)(inputs(5, 4)) for s in (q, dequantize_tree(q)))
    _assert_close(want, got, terms=8, products=3)


# ---------------------------------------------------------------- skip, and what is refused


class Holder(nnx.Module):
    """One layer at the path 'blocks.1.layer', beside a plain one."""

    def __init__(self, layer):
        plain = nnx.Linear(4, 4, **INTEGERS, rngs=rngs())
        self.blocks = nnx.List([nnx.Dict(layer=plain), nnx.Dict(layer=layer)])


def _dot(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def _promote(args, *, dtype=None, inexact=True):
    return nnx.nn.dtypes.promote_dtype(args, dtype=dtype, inexact=inexact)


def _late_equation():
    layer = nnx.Einsum("bd,dh->bh", (4, 4), **INTEGERS, rngs=rngs())
    layer.einsum_str = None
    return layer


def _edited():
    layer = nnx.Linear(4, 4, **INTEGERS, rngs=rngs())
    layer.kernel = nnx.Param(jnp.zeros((4, 5)))
    return layer


REFUSED = {
    "linear dot_general": (
        lambda: nnx.Linear(4, 4, dot_general=_dot, **INTEGERS, rngs=rngs()),
        "product",
    ),
    "linear precision": (
        lambda: nnx.Linear(4, 4, precision="highest", **INTEGERS, rngs=rngs()),
        "precision",
    ),
    "linear promote_dtype": (
        lambda: nnx.Linear(4, 4, promote_dtype=_promote, **INTEGERS, rngs=rngs()),
        "promotion",
    ),
    "linear preferred_element_type": (
        lambda: nnx.Linear(4, 4, preferred_element_type=jnp.float32, **INTEGERS, rngs=rngs()),
        "preferred_element_type",
    ),
    "linear with another kernel": (_edited, r"\(4, 5\)"),
    "general batch_axis": (
        lambda: nnx.LinearGeneral(4, 4, batch_axis={0: 2}, **INTEGERS, rngs=rngs()),
        "batch_axis",
    ),
    "general dot_general": (
        lambda: nnx.LinearGeneral(4, 4, dot_general=_dot, **INTEGERS, rngs=rngs()),
        "prod",
    ),
    "general dot_general_cls": (
        lambda: nnx.LinearGeneral(4, 4, dot_general_cls=lambda: _dot, **INTEGERS, rngs=rngs()),
        "product",
    ),
    "einsum einsum_op": (
        lambda: nnx.Einsum(
            "bd,dh->bh", (4, 4), einsum_op=lambda *a, **k: 0, **INTEGERS, rngs=rngs()
        ),
        "product",
    ),
    "einsum precision": (
        lambda: nnx.Einsum("bd,dh->bh", (4, 4), precision="highest", **INTEGERS, rngs=rngs()),
        "precision",
    ),
    "einsum at call time": (_late_equation, "only when it is called"),
    "embed promote_dtype": (
        lambda: nnx.Embed(4, 4, promote_dtype=_promote, rngs=rngs()),
        "promotion",
    ),
    "embed of one row": (lambda: nnx.Embed(1, 4, rngs=rngs()), "only row"),
} | {
    f"einsum {equation}": (
        lambda equation=equation, kernel=kernel: nnx.Einsum(
            equation, kernel, **INTEGERS, rngs=rngs()
        ),
        "not one matrix product",
    )
    for equation, kernel in (
        ("bsd,bdh->bsh", (2, 4, 4)),  # a batch axis
        ("...d,...dh->...h", (4, 4)),  # an ellipsis in the kernel
        ("bd,...h->bd...h", (4, 4)),
        ("...d,dh->h", (4, 4)),  # a sum over an axis of x alone
        ("bsd,dh->bh", (4, 4)),
        ("bd,dhk->bh", (4, 4, 4)),  # and of the kernel alone
        ("bd,dd->b", (4, 4)),  # a diagonal
        ("bdd,dh->bh", (4, 4)),
        ("bb,h->bh", (4,)),
    )
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, why = REFUSED[case]
    model = Holder(make())
    with pytest.raises(NotImplementedError, match=rf"^blocks\.1\.layer .*{why}") as info:
        convert(model)
    # The message names the pattern that leaves the layer alone.
    assert "skip=['blocks.1.layer']" in str(info.value)
    new = convert(model, skip=["blocks.1.layer"])
    assert type(new.blocks[1]["layer"]) is type(model.blocks[1]["layer"])
    assert isinstance(new.blocks[0]["layer"], General)


def test_a_refused_root_has_no_path_to_skip():
    with pytest.raises(NotImplementedError, match=r"^the model \(Linear\)") as info:
        convert(nnx.Linear(4, 4, precision="highest", **INTEGERS, rngs=rngs()))
    assert "skip" not in str(info.value)


def test_skip():
    model = Transformer()
    new = convert(model, skip=[r"blocks\.0\.attention\.(query|key)$", "head"])
    attention = new.blocks[0].attention
    assert type(attention.query) is type(attention.key) is nnx.LinearGeneral
    assert type(attention.value) is type(new.blocks[1].attention.query) is General
    assert type(new.head) is nnx.Linear
    ids = jnp.arange(8)[None]
    _assert_close(model(ids), new(ids), terms=32, products=9)
    # Skipped layers are copies too.
    new.head.kernel.set_value(jnp.zeros((16, 11)))
    assert np.asarray(model.head.kernel[...]).any()


def test_skip_patterns_that_match_nothing_raise():
    with pytest.raises(ConfigError, match=r"'layer' matches no layer.*embed.*head"):
        convert(Transformer(), skip=["head", "layer"])
    with pytest.raises(ConfigError, match="not the string 'head'"):
        convert(Transformer(), skip="head")


def test_subclasses_and_other_layers_are_left_alone():
    class Scaled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = Holder(Scaled(4, 4, **INTEGERS, rngs=rngs()))
    new = convert(model)
    assert type(new.blocks[1]["layer"]) is Scaled
    # Its weight is no candidate by accident: the recipe has to say which axis contracts.
    with pytest.raises(ConfigError, match=r"blocks\.1\.layer\.kernel"):
        plan(nnx.state(new), preset("int8_wo"))
    rows = plan(nnx.state(new), preset("int8_wo", ignore=[r"layer\.kernel"])).rows
    assert [row.path for row in rows if row.after == "int8"] == ["blocks.0.layer.weight"]


def test_out_sharding_is_refused_by_the_copy():
    new = convert(nnx.Linear(4, 4, **INTEGERS, rngs=rngs()))
    with pytest.raises(NotImplementedError, match="with_sharding_constraint"):
        new(inputs(2, 4), jax.sharding.PartitionSpec("data"))


def test_converting_twice_changes_nothing():
    once = convert(MLP())
    twice = convert(once)
    assert nnx.split(twice)[0] == nnx.split(once)[0]
    assert_same(once(inputs(5, 4)), twice(inputs(5, 4)))
