"""Saving and restoring: bit for bit, in 4 bits, atomic, and never from damaged files."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import PLAIN, tiny_lm, token_batches

import qjax
from qjax.checkpoint import orbax
from qjax.checkpoint.format import FILE
from qjax.evaluate.compare import trees_equal
from qjax.tree import named_leaves


def quantized(preset: str, **changes):
    lm = tiny_lm()
    return qjax.quantize_model(lm, qjax.preset(preset, **changes), token_batches(1))


def bits(tree) -> dict[str, bytes]:
    """Name and dtype of each array -> its raw bytes, by NumPy alone."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        f"{jax.tree_util.keystr(path)}:{leaf.dtype}{leaf.shape}": np.asarray(leaf).tobytes()
        for path, leaf in leaves
    }


@pytest.mark.parametrize("preset", PLAIN)
def test_restored_equals_saved_bit_for_bit(tmp_path, preset):
    lm = quantized(preset)
    lm.save(tmp_path / "q")
    restored = qjax.load(tmp_path / "q")
    saved_state, restored_state = lm.split()[1], restored.split()[1]
    assert jax.tree.structure(saved_state) == jax.tree.structure(restored_state)
    assert bits(saved_state) == bits(restored_state)
    assert trees_equal(saved_state, restored_state)
    assert restored.quantization == lm.quantization
    assert restored.config == lm.config


@pytest.mark.parametrize(
    "changes", [{"symmetric": False}, {"group_size": -1}, {"scale_dtype": "float32"}]
)
def test_variants_of_int4_round_trip(tmp_path, changes):
    lm = quantized("int4_wo", **changes)
    lm.save(tmp_path / "q")
    assert bits(qjax.load(tmp_path / "q").split()[1]) == bits(lm.split()[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 8))
def test_numbers_take_their_bits_on_disk(tmp_path, bits, symmetric):
    """Not more; 13 columns fill no whole byte."""
    rng = np.random.default_rng(bits)
    rule = qjax.Rule(
        path=".*", weight=f"int{bits}", granularity="per_group", group_size=128, symmetric=symmetric
    )
    odd = qjax.Rule(path="odd", weight=f"int{bits}", symmetric=symmetric)
    tree = {
        "weight": jnp.asarray(rng.uniform(-1, 1, (512, 1024)), jnp.float32),
        "odd": {"weight": jnp.asarray(rng.uniform(-1, 1, (7, 13)), jnp.float32)},
    }
    tree = qjax.quantize(tree, qjax.QuantConfig(rules=[odd, rule]))
    qjax.save(tmp_path / "q", tree)
    assert trees_equal(qjax.restore(tmp_path / "q", tree), tree)
    record = json.loads((tmp_path / "q" / FILE).read_text())["leaves"]["weight"]["parts"]["values"]
    assert record.get("bits") == (bits if bits not in (2, 4) else None)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "q" / orbax.ARRAYS).rglob("*"))
    # A scale of 16 bits, and a zero point, every 128 weights. The rest is Orbax's, which no byte a
    # number would fit into: 64 KiB for each bit.
    exact = bits + (16 if symmetric else 16 + bits) / 128
    assert on_disk <= exact * 512 * 1024 / 8 + 24 * 1024


def test_checkpoints_written_before_activations_had_groups(tmp_path):
    """Their records say format and granularity alone."""
    leaf = qjax.quantize({"weight": jnp.eye(4, 8)}, qjax.preset("int8"))["weight"]
    qjax.save(tmp_path / "q", {"weight": leaf})

    def older(data):
        fields = data["leaves"]["weight"]["input"]
        for name in ("group_size", "scale_dtype", "scale_rule"):
            fields.pop(name)

    edit(tmp_path / "q", older)
    assert trees_equal(qjax.restore(tmp_path / "q")["weight"], leaf)


def test_all_parts_of_a_leaf_round_trip(tmp_path):
    spec = qjax.InputSpec(
        scale=jnp.float32(0.5),
        pre_scale=jnp.arange(8, dtype=jnp.float32),
        perm=jnp.arange(8)[::-1].astype(jnp.int32),
        format="int8",
        granularity="per_tensor",
    )
    leaf = qjax.quantize_array(jnp.eye(4, 8), "int8", input=spec)
    qjax.save(tmp_path / "q", {"a": {"weight": leaf}, "b": jnp.ones(3, jnp.bfloat16)})
    restored = qjax.restore(tmp_path / "q")
    assert set(restored) == {"a.weight", "b"}
    assert trees_equal(restored["a.weight"], leaf)
    assert bits(restored["b"]) == bits(jnp.ones(3, jnp.bfloat16))


def test_prng_keys_and_other_types_round_trip(tmp_path):
    tree = {
        "dropout": {"key": jax.random.key(3), "count": jnp.uint32(7)},
        "mask": jnp.array([True]),
    }
    qjax.save(tmp_path / "t", tree)
    restored = qjax.restore(tmp_path / "t", tree)
    assert jax.random.bits(restored["dropout"]["key"]) == jax.random.bits(jax.random.key(3))
    assert restored["dropout"]["count"] == 7
    assert restored["mask"].dtype == bool
    with pytest.raises(qjax.CheckpointError, match=r"leaf eps is 1e-06 \(float\)"):
        qjax.save(tmp_path / "u", {"eps": 1e-6})


def test_a_checkpoint_does_not_say_where_it_was_made(tmp_path):
    qjax.save(tmp_path / "q", {"weight": jnp.ones((2, 2))})
    for file in (tmp_path / "q").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file


def test_int4_takes_4_bits_in_the_tree_and_on_disk(tmp_path):
    # Random nibbles do not compress, so the file size is that of the packed data.
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.uniform(-1, 1, (1024, 1024)), jnp.float32)
    leaf = qjax.quantize({"weight": weight}, qjax.preset("int4_wo"))["weight"]
    assert leaf.values.dtype == jnp.int4
    assert qjax.plan({"weight": weight}, qjax.preset("int4_wo")).bytes_after * 8 / 2**20 <= 4.25
    qjax.save(tmp_path / "q", {"weight": leaf})
    on_disk = sum(f.stat().st_size for f in (tmp_path / "q" / orbax.ARRAYS).rglob("*"))
    # 4 bits and a 16-bit scale every 128 weights are 4.125; directories and indices are the rest.
    assert 4.0 < on_disk * 8 / weight.size <= 4.25


def test_restore_goes_straight_to_shardings(tmp_path):
    lm = quantized("int4_wo")
    lm.save(tmp_path / "q")
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def sharding(name, spec):
        along_in = name.endswith(("down_proj.weight.values", "down_proj.weight.scale"))
        return NamedSharding(mesh, P(None, "tp") if along_in else P())

    state = qjax.restore(tmp_path / "q", lm.split()[1], sharding=sharding)
    leaf = dict(named_leaves(state))["layers.0.mlp.down_proj.weight"]
    assert leaf.values.sharding.spec == P(None, "tp")
    assert leaf.values.addressable_shards[0].data.shape == (128, 128)
    assert leaf.scale.addressable_shards[0].data.shape == (128, 1)
    assert bits(state) == bits(lm.split()[1])


def test_restore_into_another_container(tmp_path):
    tree = {"layers": [{"weight": jnp.ones((2, 4))}, {"weight": jnp.zeros((2, 4))}]}
    qjax.save(tmp_path / "t", tree)
    restored = qjax.restore(tmp_path / "t", jax.eval_shape(lambda: tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    with pytest.raises(qjax.CheckpointError, match=r"lacks other.*has layers\.0\.weight"):
        qjax.restore(tmp_path / "t", {"other": jnp.ones(1)})
    with pytest.raises(qjax.CheckpointError, match=r"of shape \(2, 4\), the model \(2, 5\)"):
        qjax.restore(tmp_path / "t", {"layers": [{"weight": jnp.ones((2, 5))}] * 2})


def test_an_interrupted_save_leaves_nothing(tmp_path):
    def fail(directory: Path) -> None:
        assert (directory / orbax.ARRAYS).is_dir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qjax.save(tmp_path / "q", {"weight": jnp.ones((2, 2))}, extra=fail)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old(tmp_path):
    qjax.save(tmp_path / "q", {"weight": jnp.ones((2, 2))})

    def fail(directory: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        qjax.save(tmp_path / "q", {"weight": jnp.zeros((2, 2))}, overwrite=True, extra=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    assert float(qjax.restore(tmp_path / "q")["weight"].sum()) == 4


def test_an_overwrite_that_fails_at_the_last_step_keeps_the_old(tmp_path, monkeypatch):
    qjax.save(tmp_path / "q", {"weight": jnp.ones((2, 2))})
    rename = Path.rename

    def fail_to_finish(self, target):
        if "unfinished" in self.name:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_to_finish)
    with pytest.raises(OSError, match="disk full"):
        qjax.save(tmp_path / "q", {"weight": jnp.zeros((2, 2))}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    assert float(qjax.restore(tmp_path / "q")["weight"].sum()) == 4


def test_a_sharding_that_does_not_divide_is_named(tmp_path):
    q = qjax.quantize_array(jnp.ones((4, 12)), "int4")
    qjax.save(tmp_path / "q", {"weight": q})
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))

    def sharding(name, spec):
        return NamedSharding(mesh, P(None, "tp") if name == "weight.values" else P())

    with pytest.raises(qjax.CheckpointError, match=r"weight\.values, uint8\(4, 6\) on disk"):
        qjax.restore(tmp_path / "q", sharding=sharding)


def test_a_killed_save_does_not_load(tmp_path):
    """What a kill leaves behind: the hidden directory, with arrays but without qjax.json."""
    seen = tmp_path / "seen"
    qjax.save(
        tmp_path / "q",
        {"weight": jnp.ones((2, 2))},
        extra=lambda directory: shutil.copytree(directory, seen) and None,
    )
    with pytest.raises(qjax.CheckpointError, match=FILE):
        qjax.restore(seen)


def test_links_are_followed(tmp_path):
    qjax.save(tmp_path / "real", {"weight": jnp.ones((2, 2))})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    qjax.save(tmp_path / "link", {"weight": jnp.zeros((2, 2))}, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert float(qjax.restore(tmp_path / "real")["weight"].sum()) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_overwrite_is_asked_for_and_spares_foreign_directories(tmp_path):
    tree = {"weight": jnp.ones((2, 2))}
    qjax.save(tmp_path / "q", tree)
    with pytest.raises(qjax.CheckpointError, match="exists already; pass overwrite=True"):
        qjax.save(tmp_path / "q", tree)
    qjax.save(tmp_path / "q", {"weight": jnp.zeros((2, 2))}, overwrite=True)
    assert float(qjax.restore(tmp_path / "q")["weight"].sum()) == 0
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(qjax.CheckpointError, match="choose another path"):
        qjax.save(tmp_path / "home", tree, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.fixture
def saved(tmp_path) -> Path:
    quantized("int4_wo").save(tmp_path / "q")
    return tmp_path / "q"


def edit(path: Path, change) -> None:
    data = json.loads((path / FILE).read_text())
    change(data)
    (path / FILE).write_text(json.dumps(data))


LEAF = "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version 2.*upgrade qjax"),
        (lambda d: d.update(format="gguf"), "was not written by qjax"),
        (lambda d: d.pop("leaves"), "lacks leaves"),
        (lambda d: d.update(files=[]), "lacks files"),
        (lambda d: d["files"].update({"../evil": "x"}), "which is not under arrays"),
        (lambda d: d["files"].update({"arrays/evil": "x"}), "evil is missing"),
        (lambda d: d.update(files={}), "files that are not in qjax.json"),
        (lambda d: d["leaves"].pop(LEAF), "not in qjax.json"),
        (lambda d: d["leaves"][LEAF].update(block=[1, 64]), f"{LEAF}.*scale has shape"),
        (lambda d: d["leaves"][LEAF].update(format="int8"), f"{LEAF}.*needs int8"),
        (lambda d: d["leaves"][LEAF].update(format="nf4"), "unknown format 'nf4'"),
        (lambda d: d["leaves"][LEAF]["parts"]["values"].update(dtype="int8"), "does not hold"),
        (lambda d: d["leaves"][LEAF]["parts"]["values"].update(bits=3), "int4 is not packed in 3"),
        (lambda d: d["leaves"][LEAF]["parts"]["scale"].update(shape=[256, 2]), "does not hold"),
        (lambda d: d["leaves"][LEAF]["parts"]["scale"].update(dtype="no"), "damaged at array"),
        (lambda d: d["leaves"][LEAF].pop("block"), "damaged"),
        (lambda d: d["model"].update(model_type="mamba"), "unknown model_type 'mamba'.*llama"),
        (lambda d: d["model"]["config"].pop("rope"), "damaged"),
        (lambda d: d["model"]["config"].update(vocab_size=None), "vocab_size is None"),
        (lambda d: d["model"]["config"]["rope"].update(theta=-1), "rope theta is -1"),
        (lambda d: d["model"]["config"].update(eos_token_id="x"), "eos_token_id is"),
        (lambda d: d["leaves"][LEAF].update(kind="x"), "kind 'x'"),
        (lambda d: d["leaves"][LEAF].update(dtype="int8"), "not floating point"),
        (lambda d: d["leaves"][LEAF].update(layout="mine"), "layout 'mine'"),
        (lambda d: d["leaves"][LEAF].update(block=[]), "not two integers"),
        (
            lambda d: d["leaves"][LEAF].update(input={"format": "int4", "granularity": "x"}),
            "no product takes these",
        ),
        (lambda d: d["leaves"][LEAF]["parts"]["values"].update(shape=["256", 128]), "damaged"),
        (lambda d: d.update(format_version=0), "format_version 0"),
        (lambda d: d.update(format_version=True), "format_version True"),
        (lambda d: d.update(model=None), "qjax.restore"),
    ],
)
def test_a_wrong_manifest_is_refused(saved, change, message):
    edit(saved, change)
    with pytest.raises(qjax.QJaxError, match=message):
        qjax.load(saved)


def test_damaged_directories_are_refused(saved, tmp_path):
    with pytest.raises(qjax.CheckpointError, match="no checkpoint directory"):
        qjax.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(qjax.CheckpointError, match=r"neither qjax\.json"):
        qjax.load(tmp_path / "empty")
    (saved / FILE).write_text("{")
    with pytest.raises(qjax.CheckpointError, match="not JSON"):
        qjax.load(saved)


def test_missing_arrays_are_refused(saved):
    shutil.rmtree(saved / orbax.ARRAYS)
    with pytest.raises(qjax.CheckpointError, match="truncated"):
        qjax.load(saved)


def data_files(path: Path) -> list[Path]:
    """The files that hold arrays, largest first."""
    files = [f for f in (path / orbax.ARRAYS).rglob("*") if f.is_file() and f.parent.name == "d"]
    return sorted(files, key=lambda f: -f.stat().st_size)


def test_a_missing_or_truncated_shard_fails_the_load(saved):
    for shard in data_files(saved):
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2])
        with pytest.raises(qjax.CheckpointError, match=f"{shard.name} is truncated"):
            qjax.load(saved)
        shard.unlink()
        with pytest.raises(qjax.CheckpointError, match=f"truncated: .*{shard.name} is missing"):
            qjax.load(saved)
        shard.write_bytes(content)
    qjax.load(saved)


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_flipped_byte_in_a_shard_fails_the_load(saved, where):
    for shard in data_files(saved):
        original = shard.read_bytes()
        content = bytearray(original)
        content[int(len(content) * where)] ^= 0x10
        shard.write_bytes(content)
        with pytest.raises(qjax.CheckpointError, match=f"{shard.name} is damaged.*SHA-256"):
            qjax.load(saved)
        shard.write_bytes(original)
    qjax.load(saved)


@pytest.mark.parametrize("part", ["values", "scale"])
def test_one_changed_nibble_or_scale_is_seen(saved, tmp_path, part):
    """The smallest damage there is, written as a well-formed checkpoint: equality must fail."""
    lm = qjax.load(saved)

    def damage(name, leaf):
        if name != LEAF:
            return leaf
        if part == "scale":
            return dataclasses.replace(leaf, scale=leaf.scale.at[3, 0].multiply(jnp.bfloat16(1.01)))
        nibble = leaf.values[5, 7].astype(jnp.int8) ^ 1
        return dataclasses.replace(leaf, values=leaf.values.at[5, 7].set(nibble.astype(jnp.int4)))

    damaged = qjax.tree.map_named(damage, lm.split()[1])
    lm.with_state(damaged, lm.quantization).save(tmp_path / "damaged")
    restored = qjax.load(tmp_path / "damaged")
    assert not trees_equal(restored.split()[1], lm.split()[1])
    assert bits(restored.split()[1]) != bits(lm.split()[1])
    ids = token_batches(1)[0]
    assert (np.asarray(restored(ids)) != np.asarray(lm(ids))).any()


def test_load_casts_plain_weights_only(saved):
    lm = qjax.load(saved, dtype="bfloat16")
    leaves = dict(named_leaves(lm.split()[1]))
    assert leaves["embed_tokens.embedding"].dtype == jnp.bfloat16
    assert leaves[LEAF].dtype == "bfloat16"
    assert leaves[LEAF].scale.dtype == jnp.bfloat16  # as stored
    assert lm(token_batches(1)[0]).dtype == jnp.float32
    with pytest.raises(qjax.DataError, match="int8"):
        qjax.load(saved, dtype="int8")
    with pytest.raises(qjax.CheckpointError, match="hf_overrides"):
        qjax.load(saved, hf_overrides={"rope_dtype": "bfloat16"})
