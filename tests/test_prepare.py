"""Prepared models: the same numbers and the same text, from weights laid out for kernels."""

import dataclasses
from functools import cache as remembered
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qjax_kernels.gemm_swiglu.layout import separate
from qjax_kernels.weight_only_gemm.api import unprepare
from test_reference import REFERENCE, SURE
from tiny import DISTINCT, PLAIN, some_heavy, tiny_config, tiny_lm, token_batches

import qjax
from qjax import cache as kv
from qjax import ops
from qjax.data import STDLIB, calibration_data
from qjax.lm import LanguageModel
from qjax.models.registry import abstract_model
from qjax.quantize import quantize
from qjax.runtime.weights import APART, INTERLEAVED, STACKED
from qjax.tree import map_named

FORMATS = [None, *sorted(PLAIN), "int8_sq"]
FEWER = [None, *DISTINCT, "fp8_wo", "w4a8_static", "nvfp4_wo", "int8_sq"]
PROMPTS = [[5, 9, 13, 4, 8], [7, 6], [200, 100, 50, 25, 12, 6, 3, 77]]
QUANTIZED_INPUT = ("fp8", "fp8_per_token", "int8", "int8_sq")
MIXED = ("w4a8", "w4a8_static")  # int4 weights, repacked, and fp8 activations
NOT_FUSED = {
    "fp8_block": "their scales are for blocks of several rows",
    "nvfp4": "their global scales differ",
    "nvfp4_wo": "their global scales differ",
}
BY_GROUPS = ("fp8_block", "nvfp4", "mxfp4", "mxfp8")  # activations with a scale for each group


@remembered
def original(dtype: str) -> LanguageModel:
    return qjax.load(REFERENCE, dtype=dtype)


@remembered
def reference(preset: str | None, dtype: str) -> LanguageModel:
    """The reference model, quantized."""
    lm = original(dtype)
    if preset is None:
        return lm
    batches = calibration_data(
        STDLIB, lm.tokenizer, qjax.CalibConfig(num_samples=4, max_seq_length=128)
    )
    return qjax.quantize_model(lm, preset, batches)


@remembered
def tiny(preset: str | None, **changes) -> LanguageModel:
    lm = tiny_lm(eos_token_id=(), **changes)
    return lm if preset is None else qjax.quantize_model(lm, preset, token_batches(1))


def logits_of(lm: LanguageModel) -> np.ndarray:
    ids = [lm.tokenizer(text)["input_ids"][:24] for text in SURE]
    assert {len(row) for row in ids} == {24}
    return np.asarray(lm(ids)).astype(np.float64)


def rms(x: np.ndarray) -> np.ndarray:
    """Of each row."""
    return np.sqrt(np.mean(np.square(x), axis=-1))


@pytest.mark.heavy
@pytest.mark.parametrize("preset", FORMATS)
def test_float32_logits(preset):
    """The products are the same, in another order of the sums.

    A sum of k products in float32 is off by at most k 2^-24 of their absolute sum, and some layers
    of it add up; but where activations are quantized, a difference in the last bit moves a few of
    them to the next number of the format. That is less than rounding all of them did, half a step
    each at most: the change is smaller than what quantization itself changed.
    """
    lm = reference(preset, "float32")
    expected, got = logits_of(lm), logits_of(qjax.prepare(lm))
    cfg = lm.config
    bound = cfg.num_hidden_layers * cfg.intermediate_size * 2**-24 * rms(expected)
    if preset in (*QUANTIZED_INPUT, *MIXED, *BY_GROUPS):
        bound = rms(expected - logits_of(original("float32")))
    difference = rms(got - expected)
    assert (difference <= bound).all(), (difference / bound).max()
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.98


@pytest.mark.heavy
@pytest.mark.parametrize("preset", FEWER)
def test_bfloat16_logits(preset):
    """Prepared layers round norms and gates once where canonical ones do twice.

    So they are no further from the model in float32 than canonical ones are; both errors are random
    sums of some hundred roundings, of which the mean over tokens varies by a tenth.
    """
    lm = reference(preset, "bfloat16")
    exact = logits_of(reference(preset, "float32"))
    # Weights that stay plain are bfloat16 in the checkpoint: casting to float32 changes none.
    canonical = rms(logits_of(lm) - exact)
    prepared = rms(logits_of(qjax.prepare(lm)) - exact)
    assert prepared.mean() <= 1.1 * canonical.mean()
    assert prepared.max() <= 1.5 * canonical.max()


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", FEWER)
def test_text_is_the_same(preset, dtype):
    """In float32 to the token, but for int4 weights with fp8 activations and activations rounded in
    groups, whose sums are in another order; those, and all in bfloat16, up to where the canonical
    model itself is not sure."""
    lm = reference(preset, dtype)
    expected = lm.generate(SURE, max_new_tokens=24)
    got = qjax.prepare(lm).generate(SURE, max_new_tokens=24)
    for text, row, other in zip(SURE, got.token_ids, expected.token_ids, strict=True):
        if not (row == other).all():
            assert dtype == "bfloat16" or preset in (*MIXED, *BY_GROUPS)
            assert unsure(preset, dtype, lm.tokenizer(text)["input_ids"], other, row)


def unsure(
    preset: str | None, dtype: str, ids: list[int], tokens: np.ndarray, others: np.ndarray
) -> bool:
    """Whether the first token that differs was chosen by less than rounding does to two logits:
    that to bfloat16, or that of the activations."""
    models = [reference(preset, d) for d in ("bfloat16", "float32")]
    if dtype == "float32":
        models = [reference(preset, dtype), original(dtype)]
    rough, exact = (
        np.asarray(lm([ids + tokens.tolist()]), np.float64)[0, len(ids) - 1 :] for lm in models
    )
    at = int(np.flatnonzero(tokens != others)[0])
    gap = rough[at, tokens[at]] - rough[at, others[at]]
    return gap <= 2 * np.abs(rough[at] - exact[at]).max()


@pytest.mark.parametrize(
    "preset", some_heavy([None, "fp8", "int8", "int4_wo", "int3_wo", *MIXED, *BY_GROUPS])
)
def test_generation(preset):
    lm = tiny(preset)
    prepared = qjax.prepare(lm)
    expected = lm.generate(PROMPTS, max_new_tokens=12).token_ids
    np.testing.assert_array_equal(prepared.generate(PROMPTS, max_new_tokens=12).token_ids, expected)


def test_speculation():
    """Verifies several tokens at a time, at positions of each row's own, over the pages."""
    lm = tiny(None)
    prompts = [[5, 9, 13, 5, 9, 13, 5, 9], [7, 6]]
    expected = lm.generate(prompts, max_new_tokens=12).token_ids
    guesses = qjax.PromptLookup(tokens=3)
    got = qjax.prepare(lm).generate(prompts, max_new_tokens=12, speculate=guesses)
    np.testing.assert_array_equal(got.token_ids, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": "fp8_e5m2", "act": "fp8_e5m2"},
        {"weight": "fp8_e4m3", "act": "fp8_e4m3", "act_granularity": "per_tensor"},
        {"weight": "int4", "granularity": "per_group", "group_size": 32, "symmetric": False},
        {"weight": "int4", "act": "fp8_e4m3", "act_granularity": "per_tensor"},
        # No kernel takes groups of 32 with fp8 activations.
        {"weight": "int4", "act": "fp8_e4m3", "granularity": "per_group", "group_size": 32},
    ],
)
def test_what_row_kernels_do_not_write(settings):
    """Formats without one, a scale of all tokens, zero points."""
    lm = qjax.quantize_model(tiny_lm(), qjax.QuantConfig(rules=(qjax.Rule(path=".*", **settings),)))
    prepared = qjax.prepare(lm)
    assert len(prepared.report.fused) == 4
    ids = token_batches(1)[0]
    expected, got = (np.asarray(m(ids), np.float64) for m in (lm, prepared))
    if "act" not in settings:
        assert_same_logits(lm, prepared)
    # See `test_float32_logits`.
    error = rms(expected - np.asarray(tiny_lm()(ids)))
    assert (rms(got - expected) <= error).all()


@pytest.mark.parametrize("preset", NOT_FUSED)
def test_formats_that_are_not_fused(preset):
    prepared = qjax.prepare(tiny(preset))
    assert prepared.report.fused == ()
    assert list(prepared.report.apart.values()) == [NOT_FUSED[preset]] * 4
    assert prepared.report.canonical == {}


@pytest.mark.parametrize("preset", some_heavy(name for name in FORMATS if name not in NOT_FUSED))
def test_all_is_fused(preset):
    """And how gate and up lie: a scale for each token is known only after all of its row."""
    prepared = qjax.prepare(tiny(preset))
    names = [f"layers.{i}.{n}" for i in range(2) for n in ("self_attn.qkv", "mlp.gate_up")]
    assert sorted(prepared.report.fused) == sorted(f"{name}_proj" for name in names)
    assert prepared.report.apart == prepared.report.canonical == {}
    for layer in prepared.model.layers:
        weights = layer.get_value()
        stacked = preset in ("int8", "fp8_per_token")
        assert weights.gated == (STACKED if stacked else INTERLEAVED)
        kind = {None: jax.Array}.get(preset, ops.Prepared)
        if preset in QUANTIZED_INPUT:
            kind = qjax.QArray
        for part in (*weights.qkv, weights.o, *weights.gate_up, weights.down):
            assert isinstance(part.weight, kind)
        assert weights.qkv[0].weight.shape == ((4 + 2 + 2) * 32, 128)
        assert weights.gate_up[0].weight.shape == (512, 128)
    assert "fused: layers.*.self_attn.qkv_proj (2 layers)" in repr(prepared)


@pytest.mark.parametrize("preset", [None, "fp8", "fp8_wo", "int8", "int4_wo", "w4a8"])
def test_no_number_changes(preset):
    """What a fused weight holds are the parts' numbers, and each output's own scale."""
    lm = tiny(preset)
    layer, weights = lm.model.layers[1], qjax.prepare(lm).model.layers[1].get_value()

    def numbers(weight):
        """Values [out, in] and scales [out, groups]."""
        if isinstance(weight, ops.Prepared):
            return unprepare(weight)[:2]
        if isinstance(weight, qjax.QArray):
            repeats = weight.shape[0] // weight.scale.shape[0]
            return weight.values, jnp.repeat(weight.scale, repeats, axis=0)
        return weight, jnp.ones((weight.shape[0], 1))

    def check(got, parts):
        expected = [numbers(part.weight.get_value()) for part in parts]
        for index, array in enumerate(got):
            wide = np.concatenate([np.asarray(e[index], np.float32) for e in expected])
            np.testing.assert_array_equal(np.asarray(array, np.float32), wide)

    attention, mlp = layer.self_attn, layer.mlp
    check(numbers(weights.qkv[0].weight), (attention.q_proj, attention.k_proj, attention.v_proj))
    both = numbers(weights.gate_up[0].weight)
    if weights.gated == INTERLEAVED:
        both = tuple(jnp.concatenate(separate(x.astype(jnp.float32))) for x in both)
    check(both, (mlp.gate_proj, mlp.up_proj))
    check(numbers(weights.down.weight), (mlp.down_proj,))


def changed(lm: LanguageModel, name: str, change) -> LanguageModel:
    """A copy whose weight `name` is changed."""
    state = map_named(lambda n, leaf: change(leaf) if n == name else leaf, lm.split()[1])
    return lm.with_state(state, lm.quantization)


def assert_same_logits(lm: LanguageModel, prepared: LanguageModel) -> None:
    """As in `test_float32_logits`, for the tiny model."""
    ids = token_batches(1)[0]
    expected, got = (np.asarray(m(ids), np.float64) for m in (lm, prepared))
    assert (rms(got - expected) <= 2 * 256 * 2**-24 * rms(expected)).all()


def test_other_input_scales_are_not_fused():
    def change(q):
        return dataclasses.replace(q, input=dataclasses.replace(q.input, scale=q.input.scale * 2))

    lm = changed(tiny("fp8"), "layers.0.self_attn.k_proj.weight", change)
    lm = changed(lm, "layers.1.mlp.up_proj.weight", change)
    prepared = qjax.prepare(lm)
    apart = prepared.report.apart
    assert list(apart) == ["layers.0.self_attn.qkv_proj", "layers.1.mlp.gate_up_proj"]
    assert all("their static input scales differ: 0." in reason for reason in apart.values())
    assert prepared.model.layers[1].get_value().gated == APART
    assert "not fused: layers.*.mlp.gate_up_proj (1 layers): their static" in repr(prepared)
    assert_same_logits(lm, prepared)


def test_mixed_formats_are_not_fused():
    rules = (
        qjax.Rule(path=r".*v_proj.*", weight="int8"),
        qjax.Rule(path=".*[qk]_proj.*", weight="int4", granularity="per_group", group_size=32),
        qjax.Rule(path=r".*gate_proj.*", weight="int8"),
        qjax.Rule(path=r".*down_proj.*", weight="int8", act="int8"),
    )
    lm = qjax.quantize_model(tiny_lm(), qjax.QuantConfig(rules=rules))
    prepared = qjax.prepare(lm)
    assert prepared.report.apart["layers.0.self_attn.qkv_proj"] == "their formats differ"
    assert prepared.report.apart["layers.0.mlp.gate_up_proj"] == "only some are quantized"
    kinds = [type(part.weight) for part in prepared.model.layers[0].get_value().qkv]
    assert kinds == [ops.Prepared] * 3
    ids = token_batches(1)[0]
    np.testing.assert_array_equal(lm(ids).argmax(-1), prepared(ids).argmax(-1))


def test_inputs_that_are_rescaled_stay_as_they_are():
    """AWQ and SmoothQuant divide weights by what they multiply inputs with."""
    factor = jnp.linspace(0.5, 2.0, 128)

    def change(q):
        return dataclasses.replace(q, input=qjax.InputSpec(pre_scale=factor))

    lm = changed(tiny("int4_wo"), "layers.0.self_attn.q_proj.weight", change)
    prepared = qjax.prepare(lm)
    assert prepared.report.apart == {
        "layers.0.self_attn.qkv_proj": "their inputs are rescaled or permuted"
    }
    assert prepared.report.canonical == {
        "layers.0.self_attn.q_proj": "its input is rescaled or permuted"
    }
    assert_same_logits(lm, prepared)


def test_groups_that_no_kernel_takes_are_left_to_xla():
    recipe = qjax.preset("int4_wo", group_size=8)
    lm = qjax.quantize_model(tiny_lm(), recipe)
    prepared = qjax.prepare(lm)
    assert len(prepared.report.canonical) == 2 * 4
    assert "groups of 8" in prepared.report.canonical["layers.0.self_attn.qkv_proj"]
    assert "left to XLA: layers.*.mlp.down_proj (2 layers): groups of 8" in repr(prepared)
    assert_same_logits(lm, prepared)


@pytest.mark.parametrize("preset", [None, "int8", "fp8", "int8_wo"])
def test_biases_and_tied_embeddings(preset):
    lm = tiny_lm(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)

    def noise(name, leaf):
        key = jax.random.key(len(name))
        return jax.random.normal(key, leaf.shape) if name.endswith("bias") else leaf

    lm = lm.with_state(map_named(noise, lm.split()[1]), None)
    if preset is not None:
        lm = qjax.quantize_model(lm, preset, token_batches(1))
    prepared = qjax.prepare(lm)
    assert prepared.report.apart == {}
    if preset in ("int8", "fp8"):
        ids = token_batches(1)[0]
        np.testing.assert_array_equal(lm(ids).argmax(-1), prepared(ids).argmax(-1))
    else:
        assert_same_logits(lm, prepared)


def test_the_head_is_prepared_too():
    rules = (qjax.Rule(path=".*lm_head.*", weight="fp8_e4m3"),)
    lm = qjax.quantize_model(tiny_lm(), qjax.QuantConfig(rules=rules))
    prepared = qjax.prepare(lm)
    assert isinstance(prepared.model.head.get_value().weight, ops.Prepared)
    assert_same_logits(lm, prepared)


# ---------------------------------------------------------------- the cache


@partial(jax.jit, static_argnames=("graphdef", "fresh"))
def hidden(graphdef, state, ids, positions, cache=None, *, fresh=False):
    """(hidden states, cache) of a prepared model, as `split`."""
    return nnx.merge(graphdef, state).hidden(ids, positions, cache, fresh=fresh)


def test_chunks_and_steps_read_what_is_cached():
    """A prompt in two chunks and a step, against one pass; rows at positions of their own."""
    prepared = qjax.prepare(tiny(None))
    ids = jnp.asarray(token_batches(1, batch=2, seq=80)[0])
    positions = jnp.broadcast_to(jnp.arange(80), ids.shape)
    run = partial(hidden, *prepared.split())
    whole, _ = run(ids, positions)
    cache = prepared.model.init_cache(2, 80)
    assert cache.block_table.tolist() == [[0, 1], [2, 3]]
    at = 0
    for size, fresh in ((70, True), (9, False), (1, False)):
        here = slice(at, at + size)
        part, cache = run(ids[:, here], positions[:, here], cache, fresh=fresh)
        np.testing.assert_allclose(part, whole[:, here], rtol=0, atol=1e-4)  # rows have rms 1
        at += size


def test_places_behind_the_pages_are_not_written():
    cache = kv.init_pages(1, 2, 1, 100, 4, jnp.dtype(jnp.float32))
    assert cache.block_table.tolist() == [[0, 1], [2, 3]]
    page, slot = kv.places(cache, jnp.asarray([[63, 64], [127, 128]]))
    assert page.tolist() == [0, 1, 3, -1]
    assert slot.tolist()[:3] == [63, 0, 63]


@pytest.mark.parametrize("kv_cache", ["fp8_e4m3", "int8", "bfloat16"])
def test_narrow_caches(kv_cache):
    """The cache's rounding is all that differs: half a step of each number."""
    lm = tiny(None)
    scales = None
    if kv_cache == "int8":
        scales = [(jnp.full((2,), 0.1), jnp.full((), 0.05))] * 2
    prepared = qjax.prepare(lm, kv_cache=kv_cache, kv_scales=scales)
    ids = jnp.asarray(token_batches(1, batch=1, seq=40)[0])
    positions = jnp.arange(40)[None]
    cache = prepared.model.init_cache(1, 40)
    assert cache.k_pages[0].dtype == {"fp8_e4m3": jnp.float8_e4m3fn}.get(kv_cache, kv_cache)
    run = partial(hidden, *prepared.split())
    _, cache = run(ids[:, :39], positions[:, :39], cache, fresh=True)
    last, _ = run(ids[:, 39:], positions[:, 39:], cache)
    whole, _ = hidden(*qjax.prepare(lm).split(), ids, positions)
    error = float(rms(np.asarray(last[:, 0] - whole[:, 39]))[0])
    assert 0 < error < {"bfloat16": 2**-8, "fp8_e4m3": 2**-3, "int8": 2**-3}[kv_cache]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_cache": "int4"}, "kv_cache"),
        ({"kv_cache": "int8"}, "needs kv_scales"),
        ({"kv_scales": [(1.0, 1.0)] * 2}, "cache in 8 bits"),
        ({"kv_cache": "int8", "kv_scales": [(1.0, 1.0)]}, "has 1 entries"),
        ({"kv_cache": "int8", "kv_scales": [(np.ones(3), 1.0)] * 2}, r"\(3,\)"),
    ],
)
def test_wrong_caches(arguments, message):
    with pytest.raises(qjax.ConfigError, match=message):
        qjax.prepare(tiny(None), **arguments)


# ---------------------------------------------------------------- memory, placement, misuse


@pytest.mark.parametrize("preset", [None, "int8", "int4_wo"])
def test_donated_weights_are_freed(preset):
    lm = tiny_lm(eos_token_id=())
    if preset is not None:
        lm = qjax.quantize_model(lm, preset)
    expected = lm.generate(PROMPTS, max_new_tokens=4).token_ids
    layer = lm.model.layers[1]
    fused = jax.tree.leaves(layer.self_attn.q_proj.weight.get_value())
    down = jax.tree.leaves(layer.mlp.down_proj.weight.get_value())
    prepared = qjax.prepare(lm, donate=True)
    assert all(x.is_deleted() for x in fused)
    # What is used as it is stays.
    assert all(x.is_deleted() == (preset == "int4_wo") for x in down)
    np.testing.assert_array_equal(prepared.generate(PROMPTS, max_new_tokens=4).token_ids, expected)


def test_weights_go_to_the_device():
    device = jax.devices()[1]
    lm = tiny_lm()
    prepared = qjax.prepare(lm, device)
    leaves = jax.tree.leaves(prepared.split()[1])
    assert all(x.devices() == {device} for x in leaves)
    assert not any(x.is_deleted() for x in jax.tree.leaves(lm.split()[1]))


# Global scales that differ keep weights apart, and abstract ones are taken to agree; SmoothQuant
# takes a model.
@pytest.mark.parametrize(
    "preset", [name for name in FORMATS if name not in ("nvfp4", "nvfp4_wo", "int8_sq")]
)
def test_abstract_models(preset):
    """Shapes without arrays: what a real model becomes, without its memory."""
    cfg = tiny_config()
    graphdef, state = abstract_model("llama", cfg, jnp.dtype(jnp.float32))
    recipe = None if preset is None else qjax.preset(preset)
    real = tiny_lm()
    if recipe is not None:
        real = qjax.quantize_model(real, recipe, token_batches(1))
        stats = qjax.calibrate(tiny_lm().model, token_batches(1)) if recipe.needs_stats else None
        state = jax.eval_shape(lambda s: quantize(s, recipe, stats), state)
    abstract = LanguageModel(nnx.merge(graphdef, state), cfg, model_type="llama")
    shapes, arrays = (qjax.prepare(lm).split() for lm in (abstract, real))
    assert shapes[0] == arrays[0]
    (found, structure), (expected, same) = (jax.tree.flatten(x[1]) for x in (shapes, arrays))
    assert structure == same
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


def test_prepared_models_are_final(tmp_path):
    prepared = qjax.prepare(tiny(None))
    with pytest.raises(qjax.DataError, match="prepared already"):
        qjax.prepare(prepared)
    with pytest.raises(qjax.DataError, match="not saved"):
        prepared.save(tmp_path / "model")
    with pytest.raises(qjax.DataError, match="quantize the one it came from"):
        qjax.quantize_model(prepared, "int8_wo")
    with pytest.raises(qjax.DataError, match="prepared model"):
        prepared.with_state(prepared.split()[1], None)
