"""Block by block: the same result in memory, streamed and resumed; and what is refused."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import small_lm
from flax import nnx
from tiny import tiny_config, tiny_lm, token_batches

import qjax
from qjax.blockwise.blocks import specs
from qjax.blockwise.layer import Task, quantize_block
from qjax.blockwise.memory import MemorySink, MemorySource
from qjax.blockwise.pipeline import Job, run
from qjax.checkpoint.orbax import fill
from qjax.errors import CheckpointError, ConfigError, DataError
from qjax.evaluate.compare import trees_equal
from qjax.qarray import dequantize, is_qarray
from qjax.tree import leaves_by_name, named_leaves

GPTQ = qjax.preset("int4_gptq", group_size=64)
BATCHES = token_batches(6)


class Interrupted(Exception):
    """A run that was stopped."""


def stop_after(count):
    def progress(done, total):
        if done == count:
            raise Interrupted

    return progress


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(num_hidden_layers=3)


@pytest.fixture(scope="module")
def expected(lm):
    return qjax.quantize_model(lm, GPTQ, BATCHES)


@pytest.fixture(scope="module")
def directory(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "model"
    lm.save(path)
    return path


def same(a, b):
    return trees_equal(a.split()[1], b.split()[1])


# Ways to the same bits ---------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(lm, expected, tmp_path):
    work = tmp_path / "work"
    with pytest.raises(Interrupted):
        qjax.quantize_model(lm, GPTQ, BATCHES, work=work, progress=stop_after(2))
    assert {p.name for p in work.iterdir()} == {"run.json", "stem", "layers.0", "layers.1"}
    with pytest.raises(CheckpointError):  # nothing of it is a model
        qjax.load(work)
    with pytest.raises(CheckpointError, match="bare tree"):
        qjax.load(work / "layers.0")
    stamp = (work / "layers.1" / "qjax.json").stat().st_mtime_ns
    seen = []
    with pytest.raises(Interrupted):
        qjax.quantize_model(lm, GPTQ, BATCHES, work=work, progress=stop_after(3))
    assert (work / "layers.1" / "qjax.json").stat().st_mtime_ns == stamp
    resumed = qjax.quantize_model(
        lm, GPTQ, BATCHES, work=work, progress=lambda *at: seen.append(at)
    )
    assert seen == [(i, 4) for i in range(1, 5)]
    assert same(resumed, expected)
    assert not work.exists()
    report, first = resumed.quantization_report, expected.quantization_report
    assert report.weights == first.weights


def test_blocks_of_another_run_are_refused(lm, tmp_path):
    work = tmp_path / "work"
    with pytest.raises(Interrupted):
        qjax.quantize_model(lm, GPTQ, BATCHES, work=work, progress=stop_after(1))
    for how, what in (
        ((lm, qjax.preset("int4_gptq", group_size=32), BATCHES), "recipe"),
        ((lm, GPTQ, token_batches(6, seed=1)), "tokens"),
        ((tiny_lm(num_hidden_layers=2), GPTQ, BATCHES), "config"),
    ):
        with pytest.raises(CheckpointError, match=f"of another run: its {what} differ"):
            qjax.quantize_model(*how, work=work)
    with pytest.raises(CheckpointError, match="made from other weights"):
        qjax.quantize_model(tiny_lm(seed=1, num_hidden_layers=3), GPTQ, BATCHES, work=work)
    file = next(f for f in (work / "layers.0" / "arrays").rglob("*") if f.stat().st_size > 100)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        qjax.quantize_model(lm, GPTQ, BATCHES, work=work)
    with pytest.raises(CheckpointError, match="no work folder"):
        qjax.quantize_model(lm, GPTQ, BATCHES, work=work / "layers.0")


def test_streamed_from_our_checkpoint(directory, expected, tmp_path):
    out = tmp_path / "q"
    with pytest.raises(Interrupted):
        qjax.quantize_checkpoint(directory, out, GPTQ, BATCHES, progress=stop_after(2))
    assert not out.exists()
    report = qjax.quantize_checkpoint(directory, out, GPTQ, BATCHES)
    loaded = qjax.load(out)
    assert same(loaded, expected)
    assert loaded.quantization == GPTQ
    assert report.weights == expected.quantization_report.weights
    assert {p.name for p in tmp_path.iterdir()} == {"q"}
    assert {p.name for p in (out / "arrays").iterdir()} == {
        "stem", "layers.0", "layers.1", "layers.2", "head"
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="exists already"):
        qjax.quantize_checkpoint(directory, out, GPTQ, BATCHES)
    with pytest.raises(DataError, match="quantized already"):
        qjax.quantize_checkpoint(out, tmp_path / "again", GPTQ, BATCHES)
    name = sorted(f.name for f in (out / "arrays" / "layers.1").iterdir())[0]
    (out / "arrays" / "layers.1" / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        qjax.load(out)


def test_spilled_activations(lm, expected):
    assert same(qjax.quantize_model(lm, GPTQ, BATCHES, spill=True), expected)


@pytest.mark.heavy
@pytest.mark.parametrize("preset", ["int4_wo", "fp8"])
def test_streaming_plain_recipes(lm, directory, preset, tmp_path):
    """What needs no blocks has the bits of `quantize`."""
    qjax.quantize_checkpoint(directory, tmp_path / "q", preset, BATCHES)
    assert same(qjax.load(tmp_path / "q"), qjax.quantize_model(lm, preset, BATCHES))


@pytest.mark.heavy
def test_peak_memory_does_not_grow_with_layers(tmp_path):
    """Streamed, the device holds the same few blocks whatever the number of layers."""
    peaks = []
    for layers in (2, 6):
        lm = tiny_lm(num_hidden_layers=layers)
        lm.save(tmp_path / f"{layers}")
        block = sum(v.nbytes for n, v in leaves_by_name(lm.split()[1]).items() if ".0." in n)
        del lm
        gc.collect()
        before, seen = live_bytes(), []
        qjax.quantize_checkpoint(
            tmp_path / f"{layers}", tmp_path / f"q{layers}", GPTQ, BATCHES,
            progress=lambda done, total, seen=seen: seen.append(live_bytes()),
        )  # fmt: skip
        peaks.append(max(seen) - before)
    assert peaks[1] <= peaks[0] + block // 10


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays())


# What it does ------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_blocks_see_what_quantized_blocks_give(lm):
    """The second layer's scale is of activations behind a quantized first layer."""
    cfg = qjax.preset("int4_gptq", act="fp8_e4m3", act_granularity="per_tensor",
                      act_scale="static", group_size=64)  # fmt: skip
    leaves = dict(named_leaves(qjax.quantize_model(lm, cfg, BATCHES).split()[1]))
    _, state = lm.split()
    half = {
        name: leaves[name] if name.startswith("layers.0.") else leaf
        for name, leaf in named_leaves(state)
    }
    model = nnx.merge(lm.split()[0], fill(state, half, "half"))
    stats = qjax.calibrate(model, [lm.check_ids(b) for b in BATCHES])
    name = "layers.1.mlp.up_proj.weight"
    expected = np.float32(stats[name]["amax"].max()) / np.float32(448)
    np.testing.assert_allclose(leaves[name].input.scale, expected, rtol=1e-6)
    original = qjax.calibrate(lm.model, [lm.check_ids(b) for b in BATCHES])
    assert original[name]["amax"].max() != stats[name]["amax"].max()


def test_gptq_errs_less_in_outputs_and_more_in_weights(lm, expected):
    plain = qjax.quantize_model(lm, qjax.preset("int4_wo", group_size=64))
    original, rounded, solved = (
        {n: leaf for n, leaf in named_leaves(m.split()[1]) if n.endswith("down_proj.weight")}
        for m in (lm, plain, expected)
    )
    for name, weight in original.items():
        errors = [float(jnp.linalg.norm(weight - dequantize(q[name]))) for q in (rounded, solved)]
        assert errors[0] < errors[1]
    ids = token_batches(1)[0]
    distance = [float(jnp.linalg.norm(m(ids) - lm(ids))) for m in (plain, expected)]
    assert distance[1] < distance[0]


@pytest.mark.heavy
def test_readers_of_one_input_share_its_scale(lm):
    q = qjax.quantize_model(lm, "int8_sq", BATCHES)
    leaves = dict(named_leaves(q.split()[1]))
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                  ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
        scales = {float(leaves[f"layers.1.{part}.weight"].input.scale) for part in parts}
        assert len(scales) == 1
    prepared = qjax.prepare(q)
    assert "layers.1.self_attn.qkv_proj" in prepared.report.fused


@pytest.mark.heavy
def test_a_scale_that_nothing_can_take_stays_with_the_product(lm):
    """GPT-J's unit is no product with a gate: down_proj multiplies its input itself."""
    lm = small_lm("gptj", layers=1)
    ids = [np.random.default_rng(i).integers(0, 64, (4, 32)).astype(np.int32) for i in range(2)]
    q = qjax.quantize_model(lm, qjax.preset("int4_awq", group_size=32, alpha=0.5), ids)
    leaf = dict(named_leaves(q.split()[1]))["layers.0.mlp.down_proj.weight"]
    assert leaf.input.pre_scale.shape == (128,)
    assert leaf.input.format is None
    row = {r.name: r for r in q.quantization_report.weights}["layers.0.mlp.down_proj.weight"]
    assert (row.scaled_by, row.alpha) == ("pre_scale", 0.5)


@pytest.mark.heavy
def test_rules_differ_by_weight(lm):
    cfg = qjax.QuantConfig(rules=[
        qjax.Rule(path="lm_head", weight="int8", method="gptq"),
        qjax.Rule(path=r"layers\.0\.", weight="int8"),
        dataclasses.replace(GPTQ.rules[0], path="self_attn", act_order=False),
        qjax.Rule(path="embed", weight="int8"),
    ])  # fmt: skip
    q = qjax.quantize_model(lm, cfg, BATCHES)
    methods = {row.name: row.method for row in q.quantization_report.weights}
    assert methods["lm_head.weight"] == methods["layers.2.self_attn.o_proj.weight"] == "gptq"
    assert methods["layers.0.mlp.up_proj.weight"] == methods["embed_tokens.embedding"] == "rtn"
    leaves = dict(named_leaves(q.split()[1]))
    assert {n for n, leaf in leaves.items() if is_qarray(leaf)} == set(methods)
    plain = qjax.quantize(lm.split()[1], dataclasses.replace(cfg, rules=(cfg.rules[1],)))
    name = "layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(leaves[name].values, dict(named_leaves(plain))[name].values)


# Experts -----------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_experts_that_no_token_reaches_are_rounded_to_nearest():
    """The router sends everything to experts 0 and 1."""
    lm = small_lm("mixtral", layers=1)
    _, state = lm.split()
    leaves = leaves_by_name(state)
    router = "layers.0.mlp.router.weight"
    leaves[router] = jnp.zeros_like(leaves[router])
    lm = lm.with_state(fill(state, leaves, "x"), None)
    ids = [np.random.default_rng(i).integers(0, 64, (4, 32)).astype(np.int32) for i in range(2)]
    # Equal scores: top_k takes the first two experts.
    q = qjax.quantize_model(lm, qjax.preset("int4_gptq", group_size=32), ids)
    rows = {row.name: row for row in q.quantization_report.weights}
    row = rows["layers.0.mlp.experts.down_proj.weight"]
    assert row.tokens == 0
    assert "experts [2, 3] saw no token" in row.note
    assert "experts [2, 3]" in str(q.quantization_report)
    found = dict(named_leaves(q.split()[1]))
    plain = dict(named_leaves(qjax.quantize_model(lm, qjax.preset("int4_wo", group_size=32))
                              .split()[1]))  # fmt: skip
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"layers.0.mlp.experts.{part}.weight"
        a, b = found[name], plain[name]
        np.testing.assert_array_equal(a.values[2:], b.values[2:])
        assert (a.values[:2] != b.values[:2]).any()


def test_statistics_of_experts_are_of_their_own_rows():
    from qjax.blockwise.collect import TILE, Want, _update_experts

    rng = np.random.default_rng(0)
    sizes = np.array([TILE + 3, 0, 5, 2 * TILE])
    rows = rng.integers(-3, 4, (sizes.sum(), 8)).astype(np.float32)
    want = Want(group="x", reader="y", features=8, experts=4, gram=True)
    update = jax.jit(_update_experts)
    stats = want.start()
    for _ in range(2):
        stats = update(stats, jnp.asarray(rows), jnp.asarray(sizes, jnp.int32))
    ends = np.cumsum(sizes)
    for expert, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = rows[end - size : end]
        # Small integers: exact in bfloat16, and their sums in float32.
        np.testing.assert_array_equal(stats.gram[expert], 2 * own.T @ own)
        np.testing.assert_array_equal(stats.total_abs[expert], 2 * np.abs(own).sum(axis=0))
        assert float(stats.tokens[expert]) == 2 * int(size)


# Bad input ---------------------------------------------------------------------------------------


def test_no_data(lm):
    for cfg in (GPTQ, "int8_sq", qjax.preset("int8_wo", kv="fp8")):
        with pytest.raises(DataError, match="needs calibration data, and there is none"):
            qjax.quantize_model(lm, cfg)
    with pytest.raises(ConfigError, match=r"block by block.*call qjax\.quantize_model"):
        qjax.quantize(lm.split()[1], GPTQ)
    with pytest.raises(ConfigError, match="takes no work folder"):
        qjax.quantize_model(lm, "int8_wo", work="nowhere")


def test_too_few_tokens(lm):
    message = r"needs 128 calibration tokens or more.*layers\.0\.self_attn\.q_proj.*there were 64"
    with pytest.raises(DataError, match=message):
        qjax.quantize_model(lm, GPTQ, token_batches(1))


def test_activations_that_are_not_finite(lm):
    _, state = lm.split()
    leaves = leaves_by_name(state)
    name = "layers.1.input_layernorm.scale"
    leaves[name] = jnp.full_like(leaves[name], 1e38)
    broken = lm.with_state(fill(state, leaves, "x"), None)
    message = r"the input of layers\.1\.self_attn\.\w+ is NaN or infinite"
    with pytest.raises(DataError, match=message):
        qjax.quantize_model(broken, GPTQ, BATCHES)
    leaves[name] = leaves[name].at[0].set(jnp.nan)
    with pytest.raises(DataError, match=r"layers\.1\.input_layernorm\.scale.*holds NaN"):
        qjax.quantize_model(lm.with_state(fill(state, leaves, "x"), None), GPTQ, BATCHES)


@pytest.mark.heavy
def test_shapes_that_a_format_cannot_take():
    lm = tiny_lm(intermediate_size=192)
    cfg = qjax.preset("int4_gptq")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj\.weight: group size 128"):
        qjax.quantize_model(lm, cfg, BATCHES)
    q = qjax.quantize_model(lm, cfg, BATCHES, strict=False)
    skipped = q.quantization_report.skipped
    assert set(skipped) == {f"layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert "does not divide an axis of 192" in skipped["layers.0.mlp.down_proj.weight"]
    leaves = dict(named_leaves(q.split()[1]))
    assert not is_qarray(leaves["layers.0.mlp.down_proj.weight"])
    assert is_qarray(leaves["layers.0.mlp.up_proj.weight"])
    assert "down_proj" in str(q.quantization_report)


def test_readers_that_ask_for_different_scalings(lm):
    rule = qjax.preset("int4_awq", group_size=64).rules[0]
    cfg = qjax.QuantConfig(rules=[
        dataclasses.replace(rule, path="q_proj", alpha=0.5),
        dataclasses.replace(rule, path="k_proj|v_proj"),
    ])  # fmt: skip
    with pytest.raises(ConfigError, match=r"q_proj.*attention_input.*different scalings"):
        qjax.quantize_model(lm, cfg, BATCHES)


def test_a_model_of_no_decoder():
    source = MemorySource({})
    job = Job(config=tiny_lm().model.decoder_config, recipe=GPTQ, batches=BATCHES)
    with pytest.raises(ConfigError, match="no weight matches"):
        run(job, source, MemorySink())
    spec = specs(job.config)[0][1]
    task = Task(name="x", spec=spec, leaves={}, rules={}, kv=None, through_quantized=True)
    with pytest.raises(CheckpointError, match="lacks"):
        quantize_block(task, [jnp.zeros((1, 2, 128))])


def test_weights_from_nowhere(tmp_path):
    """A synthetic source: random weights, the same whenever they are read."""
    from qjax.bench.synthetic import SyntheticSource

    source = SyntheticSource(tiny_config(num_hidden_layers=1), jnp.float32)
    names = list(source.abstract())
    again = source.read(names[::-1])
    for name, leaf in source.read(names).items():
        assert (leaf.shape, leaf.dtype) == (source.abstract()[name].shape, jnp.float32)
        np.testing.assert_array_equal(leaf, again[name])
    report = qjax.quantize_checkpoint(source, tmp_path / "q", GPTQ, BATCHES)
    assert len(report.weights) == 7
    loaded = qjax.load(tmp_path / "q", "float32")
    assert loaded(BATCHES[0]).shape == (2, 32, 256)
    with pytest.raises(DataError, match="needs a tokenizer"):
        qjax.quantize_checkpoint(source, tmp_path / "r", GPTQ, ["text"])
