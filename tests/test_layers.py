"""The parts of decoder layers against float64: attention's forms, norms, rotation, experts."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from tiny import PLAIN

import qjax
from qjax import attention, ops
from qjax.nn.moe import MoE, MoEConfig

U = 2.0**-24


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Attention ---------------------------------------------------------------------------------------

FORMS = {
    "window": {"window": 5},
    "window of one": {"window": 1},
    "long window": {"window": 70},
    "soft cap": {"soft_cap": 2.0},
    "scale": {"scale": 0.7},
    "alibi": {"alibi_slopes": np.array([0.5, 0.1, 0.02, 0.9], np.float32)},
    "all": {
        "window": 20,
        "soft_cap": 3.0,
        "scale": 0.4,
        "alibi_slopes": np.array([0.5, 0.1, 0.02, 0.9], np.float32),
    },
}


def attention_oracle(q, k, v, positions, *, window=None, soft_cap=None, scale=None,
                     alibi_slopes=None):  # fmt: skip
    """Query by query, in float64; and the largest score."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out, largest = np.zeros(q.shape), 0.0
    for b, i, h in np.ndindex(q.shape[:3]):
        group, p = h * k.shape[1] // q.shape[2], positions[b, i]
        seen = np.arange(0 if window is None else max(p - window + 1, 0), p + 1)
        scores = k[b, group, seen] @ q[b, i, h] * (q.shape[-1] ** -0.5 if scale is None else scale)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[h] * (seen - p)
        largest = max(largest, np.abs(scores).max())
        out[b, i, h] = oracles.softmax(scores) @ v[b, group, seen]
    return out, largest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_forms(form, kv_heads):
    batch, tokens, length, dim = 2, 18, 150, 8
    q = random((batch, tokens, 4, dim))
    k, v = (random((batch, kv_heads, length, dim), seed) for seed in (1, 2))
    positions = (np.array([0, 131])[:, None] + np.arange(tokens)).astype(np.int32)
    expected, largest = attention_oracle(q, k, v, positions, **FORMS[form])
    # A score is a sum of 8 products and some functions of it, each rounded: 20 roundings of the
    # largest. A softmax weight is off by as much, relatively, up and down by its sum of 150.
    bound = (2.2 * 20 * max(largest, 1) + 300) * U * np.abs(v).max()
    for implementation in (ops.attention, at_once):
        y = implementation(*map(jnp.asarray, (q, k, v, positions)), **as_arrays(FORMS[form]))
        assert np.abs(y - expected).max() <= bound


def at_once(*args, alibi_slopes=None, window=None, soft_cap=None, scale=None):
    """What runs on GPUs."""
    divisor = 8**0.5 if scale is None else 1 / scale
    form = attention.Form(divisor=divisor, window=window, soft_cap=soft_cap)
    return attention.at_once(*args, alibi_slopes, form=form)


def as_arrays(form):
    return {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in form.items()}


def test_a_window_does_not_see_what_is_before_it():
    q, (k, v) = random((1, 1, 2, 8)), (random((1, 2, 100, 8), seed) for seed in (1, 2))
    positions = jnp.array([[90]], jnp.int32)
    y = ops.attention(q, k, v, positions, window=10)
    for x in (k, v):
        x[:, :, :81] = 3e38
        x[:, :, 91:] = 3e38
    np.testing.assert_array_equal(ops.attention(q, k, v, positions, window=10), y)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_attention_does_not_depend_on_the_rows_beside_it(form):
    q = random((1, 20, 4, 8))
    k, v = (random((1, 2, 80, 8), seed) for seed in (1, 2))
    positions = jnp.arange(40, 60, dtype=jnp.int32)[None]
    options = as_arrays(FORMS[form])
    together = ops.attention(q, k, v, positions, **options)
    for at in (0, 19):
        one = slice(at, at + 1)
        alone = ops.attention(q[:, one], k, v, positions[:, one], **options)
        np.testing.assert_array_equal(alone, together[:, one])


# Norms and rotation ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(dtype, affine):
    x = jnp.asarray(random((5, 96)) * 3 + 7, dtype)
    scale, bias = (random(96, seed) if affine else None for seed in (1, 2))
    y = ops.layer_norm(x, *(None if a is None else jnp.asarray(a) for a in (scale, bias)), 1e-5)
    assert y.dtype == dtype
    x = np.asarray(x, np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = expected * scale + bias if affine else expected
    # The mean of 96 numbers near 7, and rounding to dtype at the end.
    bound = 96 * 7 * U * 4 + oracles.UNIT[dtype] * np.abs(expected).max()
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= bound
    alone = ops.layer_norm(jnp.asarray(x[2:3], dtype), *(None if a is None else jnp.asarray(a)
                           for a in (scale, bias)), 1e-5)  # fmt: skip
    np.testing.assert_array_equal(alone, y[2:3])


def test_gemmas_norm_adds_one_before_it_rounds():
    from qjax.nn import RMSNorm

    norm = RMSNorm(64, plus_one=True, param_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(norm.scale.get_value(), np.zeros(64))
    scale = jnp.asarray(random(64) * 0.01, jnp.bfloat16)
    norm.scale.set_value(scale)
    x = jnp.asarray(random((3, 64), 1), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    rms = np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    expected = wide / rms * (1 + np.asarray(scale, np.float64))
    # One rounding to bfloat16; 1 + scale in bfloat16 would be a second one.
    error = np.abs(np.asarray(norm(x), np.float64) - expected)
    assert (error <= np.abs(expected) * 2.0**-8 * 1.01).all()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotated", [4, 12])
def test_rotation(interleaved, rotated):
    x, angles = random((2, 3, 4, 12)), random((2, 3, rotated // 2), 1) * 3
    y = ops.apply_rope(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles), interleaved=interleaved)
    half = rotated // 2
    first = np.arange(0, rotated, 2) if interleaved else np.arange(half)
    second = first + (1 if interleaved else half)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles[:, :, None])
    np.testing.assert_allclose(y[..., first], turned.real, atol=1e-5)
    np.testing.assert_allclose(y[..., second], turned.imag, atol=1e-5)
    np.testing.assert_array_equal(y[..., rotated:], x[..., rotated:])


# Experts -----------------------------------------------------------------------------------------


def quantized(weight, preset):
    """Of one name that `quantize` takes for a stack of experts, with a static scale if need be."""
    cfg = qjax.preset(preset)
    tree = {"mlp": {"experts": {"up": {"weight": weight}}}}
    stats = {"mlp.experts.up.weight": {"amax": jnp.full(weight.shape[-1], 4.0)}}
    return qjax.quantize(tree, cfg, stats)["mlp"]["experts"]["up"]["weight"]


@pytest.mark.parametrize("preset", [None, *PLAIN])
def test_grouped_products_are_those_of_each_expert(preset):
    """Row by row `ops.linear` with the expert's own weight; an expert has no rows."""
    experts, rows = 4, 40
    weight = jnp.asarray(random((experts, 24, 128)) * np.array([1, 4, 0.2, 1])[:, None, None],
                         jnp.float32)  # fmt: skip
    weight = weight if preset is None else quantized(weight, preset)
    x = jnp.asarray(random((16, 128), 1))
    sizes = jnp.array([25, 0, 1, 14], jnp.int32)
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 16, rows), jnp.int32)
    factors = jnp.asarray(np.random.default_rng(3).uniform(size=rows), jnp.float32)
    y = ops.grouped_linear(x, weight, sizes, row_ids=ids, row_scale=factors)
    assert y.shape == (rows, 24)
    start = 0
    for expert, size in enumerate(np.asarray(sizes)):
        own = jax.tree.map(lambda leaf, e=expert: leaf[e] if leaf.ndim else leaf, weight)
        part = slice(start, start + int(size))
        if size:
            expected = ops.linear(x, own)[ids[part]] * factors[part, None]
            np.testing.assert_allclose(y[part], expected, rtol=1e-5, atol=1e-5)
        start += int(size)


@pytest.mark.parametrize("block", [(1, 64), (-1, -1), (1, -1)])
def test_weights_that_no_grouped_product_takes_are_dequantized(block):
    from qjax.qarray import InputSpec, quantize_array

    x, sizes = jnp.asarray(random((6, 128), 1)), jnp.array([2, 4], jnp.int32)
    spec = InputSpec(pre_scale=jnp.full(128, 2.0), perm=jnp.arange(128)[::-1])
    q = quantize_array(jnp.asarray(random((2, 16, 128))), "fp8_e5m2", block=block, input=spec)
    y = ops.grouped_linear(x, q, sizes)
    dense = np.asarray(qjax.dequantize(q), np.float64)
    rows = np.asarray(x)[:, ::-1] * 2.0
    expected = np.concatenate([rows[:2] @ dense[0].T, rows[2:] @ dense[1].T])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_mixture_is_the_sum_of_its_experts(normalize):
    cfg = MoEConfig(experts=5, experts_per_token=2, features=24, normalize=normalize)
    moe = MoE(16, cfg, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    moe = jax.tree.map(lambda leaf: leaf * 20, moe)
    x = random((2, 7, 16))
    y = np.asarray(jax.jit(lambda x: moe(x))(x))
    router, *parts = (
        np.asarray(linear.weight.get_value(), np.float64)
        for linear in (moe.router, moe.experts.gate_proj, moe.experts.up_proj,
                       moe.experts.down_proj)
    )  # fmt: skip
    for at in np.ndindex(x.shape[:2]):
        token = x[at].astype(np.float64)
        likes = oracles.softmax(router @ token)
        best = np.argsort(-likes)[:2]
        expected = 0
        for expert in best:
            gate, up, down = (part[expert] for part in parts)
            inner = gate @ token
            part = down @ (inner / (1 + np.exp(-inner)) * (up @ token))
            share = likes[expert] / (likes[best].sum() if normalize else 1)
            expected = expected + share * part
        np.testing.assert_allclose(y[at], expected, rtol=1e-4, atol=1e-5)
