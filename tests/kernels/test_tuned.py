"""Tuned tables: what may be in one, which entry serves a call, and what is done where none can."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from qjax_kernels import dispatch
from qjax_kernels.decode_attention import choice as decode
from qjax_kernels.decode_attention.config import Config as DecodeConfig
from qjax_kernels.scaled_gemm import api as scaled_api
from qjax_kernels.scaled_gemm import choice as scaled
from qjax_kernels.scaled_gemm import mosaic as scaled_mosaic
from qjax_kernels.scaled_gemm import plan
from qjax_kernels.scaled_gemm.config import Config as ScaledConfig
from qjax_kernels.target import Target
from qjax_kernels.tuned import lookup, schema
from qjax_kernels.weight_only_gemm import api as weight_api
from qjax_kernels.weight_only_gemm import choice as weight_only
from qjax_kernels.weight_only_gemm import config as weight_config

H200, H100 = Target("gpu", "NVIDIA H200", 132), Target("gpu", "NVIDIA H100 80GB HBM3", 132)
E4M3 = "float8_e4m3fn"
SCALED = {"swap": True, "warpgroups": 1, "columns": 64, "stages": 4}
STREAM = {"kernel": "stream", "tokens": 16, "warpgroups": 2, "tiles": 4, "stages": 2}


def entry(**changes):
    plain = {"op": "scaled_gemm", "format": E4M3, "m": 16, "n": 4096, "k": 4096}
    plain |= {"group_size": None, "implementation": "mosaic", "config": SCALED}
    return plain | {"us": 9.5, "bound_us": 4.1, "row_error": 0.003} | changes


def document(*entries, **changes):
    head = {"device": "NVIDIA H200", "versions": {"jax": "0.11.2"}, "commit": "0123456789ab"}
    return head | {"date": "2026-11-21", "entries": list(entries)} | changes


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Puts tables where the kernels look: tables(document, name of the file)."""
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path))

    def put(found, name="nvidia-h200.json"):
        (tmp_path / name).write_text(json.dumps(found))
        return tmp_path / name

    return put


def on(kind="NVIDIA H200"):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


# The file


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (document(entry(speed=1)), "entry 0: unknown field 'speed'; allowed: op, format, m,"),
        (document(entry(), entry(m=1, op="matmul")), r"entry 1 \(matmul .* allowed: scaled_gemm,"),
        (document(entry(config=SCALED | {"tile": 3})), "unknown field of config 'tile'; allowed"),
        (document(entry(config=SCALED | {"columns": 12})), "columns is 12; allowed: 8, 16 ... 256"),
        (document(entry(config=SCALED | {"swap": 1})), "swap is 1; allowed: False, True"),
        (document(entry(config=SCALED | {"snake": -1})), "snake is -1; allowed: integers from 0"),
        (document(entry(config=SCALED | {"snake": 2.0})), r"snake is 2.0; allowed: integers"),
        (document(entry(implementation="cuda")), "'cuda'; allowed: mosaic, xla"),
        (document(entry(implementation="xla")), "allowed for 'xla': {}"),
        (document(entry(m="16")), "entry 0: m is '16'; allowed: int"),
        (document(entry(m=0)), "m is 0; allowed: above 0"),
        (document(entry(us=float("nan"))), "us is nan; allowed: float"),
        (document(entry(group_size=True)), "group_size is True; allowed: int or NoneType"),
        (document(entry(), entry(us=3.0)), "two entries are of the same op"),
        (document(rows=[]), "unknown field 'rows'; allowed: device, versions, commit"),
        ({"device": "x"}, "lacks versions, commit, date, entries; it must have device,"),
        (document(versions={"jax": 11}), "versions: jax is 11; allowed: a string"),
        ([], "is list; allowed: an object"),
        (
            document(entry(op="prepared_gemm", config=STREAM | {"kernel": "fast"})),
            "kernel is 'fast'; allowed: stream, tiled",
        ),
        (
            document(entry(op="prepared_gemm", config={"kernel": "tiled"})),
            "config lacks a field; allowed: kernel, tokens",
        ),
    ],
)
def test_what_is_not_known_is_an_error_that_names_it(tables, found, said):
    path = tables(found)
    with pytest.raises(schema.TableError, match=said) as error:
        lookup.lookup("scaled_gemm", E4M3, None, 1, 64, 64, H200)
    assert str(error.value).startswith(str(path))


def test_what_is_no_json_is_an_error(tables):
    path = tables(document())
    path.write_text('{"device": "NVIDIA H')
    with pytest.raises(schema.TableError, match=r"nvidia-h200\.json is not JSON"):
        lookup.table_of(H200)


def parsed(found):
    return schema.parse(json.dumps(found), "here")


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "nvidia-h200.json"
    schema.write(path, parsed(document(entry(), entry(m=1))))
    before = path.read_text()
    assert [line.startswith('  {"op"') for line in before.splitlines()].count(True) == 2
    assert schema.parse(before, "it") == parsed(document(entry(), entry(m=1)))

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        schema.write(path, parsed(document(entry())))
    monkeypatch.undo()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_text() == before
    broken = dataclasses.replace(
        parsed(document()), entries=(schema.Entry(**entry(config={"x": 1})),)
    )
    with pytest.raises(schema.TableError):
        schema.write(path, broken)
    assert path.read_text() == before


def test_a_part_of_a_file_is_no_table(tables):
    tables(document(entry()), ".nvidia-h200-abc.part")
    assert lookup.table_of(H200) is None


@pytest.mark.parametrize("op", schema.OPS)
def test_fields_of_every_op_are_known(op):
    fields = schema.config_fields(op)
    assert set(schema.OPS[op].values) <= set(fields)
    assert all(allowed is int or len(list(allowed)) > 1 for allowed in fields.values())


# The device


def test_each_device_has_a_file_of_its_own(tables):
    assert lookup.table_of(H200) is None
    assert lookup.nearest("scaled_gemm", E4M3, None, 1, 64, 64, H200) == []
    path = tables(document(entry()))
    found = lookup.table_of(H200)
    assert (found.path, found.stands_in, len(found.table.entries)) == (path, False, 1)
    stand_in = lookup.table_of(H100)
    assert (stand_in.path, stand_in.stands_in) == (path, True)
    own = tables(document(entry(m=1), entry(m=2)), "nvidia-h100-80gb-hbm3.json")
    assert (lookup.table_of(H100).path, lookup.table_of(H100).stands_in) == (own, False)
    assert lookup.table_of(Target("gpu", "NVIDIA A100-SXM4-80GB", 108)) is None
    assert lookup.table_of(Target("cpu", "cpu", 1)) is None


def test_a_table_that_changed_is_read_again(tables):
    tables(document(entry()))
    assert lookup.lookup("scaled_gemm", E4M3, None, 16, 4096, 4096, H200).us == 9.5
    tables(document(entry(us=8.25), entry(m=1)))
    assert lookup.lookup("scaled_gemm", E4M3, None, 16, 4096, 4096, H200).us == 8.25


def test_another_directory_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(schema.TableError, match=r"QJAX_TUNED is .*nowhere', which is no directory"):
        lookup.table_of(H200)


def test_tables_of_the_package_are_good():
    for path in lookup.directory().glob("*.json"):
        table = schema.parse(path.read_text(), path.name)
        assert lookup.file_name(table.device) == path.name
        assert all(e.us > 0.9 * e.bound_us for e in table.entries), "faster than the chip"
        assert all(e.row_error < 0.03 for e in table.entries)


# The nearest entry


def sizes_of(m, n, k, entries, op="scaled_gemm", format=E4M3, group_size=None):
    return [found.size for found in lookup.nearest(op, format, group_size, m, n, k, H200)]


@pytest.mark.parametrize(
    ("m", "expected"),
    [
        (1, 1), (5, 1), (8, 1), (9, 16), (16, 16), (17, None), (32, None), (33, 64), (64, 64),
        (65, None), (128, None), (129, 150), (160, 150), (161, None), (224, None), (225, 256),
        (256, 256), (300, 256), (700, 2048), (2049, 2048), (4096, 8192), (20000, 8192),
    ],
)  # fmt: skip
def test_tokens_count_by_the_tiles_that_they_need(tables, m, expected):
    tables(document(*(entry(m=size) for size in (1, 16, 64, 150, 256, 2048, 8192))))
    found = lookup.lookup("scaled_gemm", E4M3, None, m, 4096, 4096, H200)
    assert (None if found is None else found.m) == expected


@pytest.mark.parametrize(
    ("m", "expected"), [(16, 16), (17, None), (48, None), (49, 64), (129, 256), (200, 256)]
)
def test_tiles_of_weight_only_products(tables, m, expected):
    """48 tokens leave room for more warpgroups than 64: entries for 64 do not serve them."""
    stream = {"op": "prepared_gemm", "format": "int4", "config": STREAM, "group_size": 128}
    tables(document(*(entry(m=size, **stream) for size in (16, 64, 256))))
    found = lookup.lookup("prepared_gemm", "int4", 128, m, 4096, 4096, H200)
    assert (None if found is None else found.m) == expected


def test_the_nearest_is_of_the_same_op_format_and_group_size(tables):
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    entries = [entry(m=16, n=n, k=k) for n, k in shapes]
    stream = {"op": "prepared_gemm", "format": "int4", "config": STREAM, "k": 11008}
    others = [entry(format="int8", n=4096, k=11008), entry(**stream, group_size=128)]
    tables(document(*entries, *others))
    assert sizes_of(16, 4096, 14336, entries)[0] == (16, 4096, 14336)
    assert sizes_of(16, 4096, 11008, entries)[0] == (16, 4096, 14336)
    assert sizes_of(16, 22016, 4096, entries)[0] == (16, 28672, 4096)
    assert sorted(sizes_of(16, 8, 8, entries)) == sorted((16, n, k) for n, k in shapes)
    assert lookup.lookup("prepared_gemm", "int4", None, 16, 4096, 11008, H200) is None
    assert lookup.lookup("prepared_gemm", "int8", 128, 16, 4096, 11008, H200) is None
    assert lookup.lookup("w4a8_gemm", "int4", 128, 16, 4096, 11008, H200) is None
    assert lookup.lookup("prepared_gemm", "int4", 128, 16, 64, 64, H200).k == 11008


@pytest.mark.parametrize(
    ("m", "expected"),
    [(1, []), (32, []), (33, [64]), (64, [64]), (65, []), (100, []), (224, []), (256, [256]),
     (2048, [256]), (8192, [256])],
)  # fmt: skip
def test_an_entry_for_other_numbers_of_tokens_is_not_near(tables, m, expected):
    """Tiles of 64 tokens took twice the time of the first guess for 100, tiles of a prompt four
    times that of a decode step."""
    tables(document(entry(m=64), entry(m=256, k=8192)))
    found = lookup.nearest("scaled_gemm", E4M3, None, m, 4096, 4096, H200)
    assert [one.m for one in found] == expected


def test_sequences_have_no_tiles(tables):
    """An op whose tiles have no tokens takes entries of up to four times as many, or as few."""
    common = {"op": "decode_attention", "format": "bfloat16x128", "group_size": 4, "n": 1024}
    tables(document(entry(**common, m=16, config={})))
    found = [
        lookup.lookup("decode_attention", "bfloat16x128", 4, m, 1024, 4096, H200) is not None
        for m in (3, 4, 17, 64, 65)
    ]
    assert found == [False, True, True, True, False]


def test_tokens_count_before_the_shape(tables):
    tables(document(entry(m=16, n=8192, k=8192), entry(m=256, n=4096, k=4096)))
    assert lookup.lookup("scaled_gemm", E4M3, None, 16, 4096, 4096, H200).m == 16
    tables(document(entry(m=2048, n=8192, k=8192), entry(m=512, n=4096, k=4096)))
    found = lookup.nearest("scaled_gemm", E4M3, None, 2048, 4096, 4096, H200)
    assert [one.m for one in found] == [2048, 512]


# What the kernels take


def choose_scaled(m=16, n=4096, k=4096, **options):
    with on():
        return scaled.choose(m, n, k, dtype=E4M3, out_dtype=jnp.bfloat16, **options)


def test_without_a_table_the_cost_model_decides(tables):
    assert choose_scaled() == plan.candidates(16, 4096, 4096)[0]
    tables(document(entry(format="int8")))
    assert choose_scaled() == plan.candidates(16, 4096, 4096)[0]


@pytest.mark.parametrize("m", [8, 17, 64])
def test_for_other_numbers_of_tokens_the_cost_model_decides(tables, m):
    tables(document(entry(config=SCALED | {"columns": 16, "stages": 7})))
    assert choose_scaled(m=16).stages == 7
    assert choose_scaled(m=m) == plan.candidates(m, 4096, 4096)[0]
    common = {"op": "prepared_gemm", "format": "int4", "group_size": 128}
    tables(document(entry(**common, config=STREAM | {"stages": 3})))
    weight = prepared(4096, 4096)
    with on():
        assert weight_only.choose(16, weight, cores=132).stages == 3
        expected = weight_config.candidates(m, weight)[0]
        assert weight_only.choose(m, weight, cores=132) == expected


def test_scaled_gemm_takes_the_nearest_entry_that_is_valid(tables):
    near = SCALED | {"columns": 16, "stages": 7}
    # 32 stages of 64 x 512 do not fit any shape; 4 splits of 128 need a K of 512.
    big = SCALED | {"stages": 32, "k_tile": 512}
    split = SCALED | {"splits": 4, "columns": 32}
    tables(
        document(
            entry(n=4096, config=big),
            entry(n=8192, config=near),
            entry(n=64, k=384, config=split),
        )
    )
    assert choose_scaled() == ScaledConfig(**near)
    assert choose_scaled(n=64, k=384) == ScaledConfig(**near)
    tables(document(entry(config=big)))
    assert choose_scaled() == plan.candidates(16, 4096, 4096)[0]


def test_clusters_that_share_k_are_taken_only_for_one_tile_each(tables):
    tables(document(entry(m=64, config=SCALED | {"splits": 2})))
    assert choose_scaled(m=64).splits == 2
    assert choose_scaled(m=64, n=64 * 4096) == plan.candidates(64, 64 * 4096, 4096)[0]


def test_room_for_tokens_that_are_not_there_is_cut(tables):
    tables(document(*(entry(m=m, config=SCALED) for m in (8, 16, 32, 64))))
    for m, columns in ((5, 8), (9, 16), (17, 32), (33, 64), (64, 64)):
        assert choose_scaled(m=m) == ScaledConfig(**SCALED | {"columns": columns})
    assert choose_scaled(m=65) == plan.candidates(65, 4096, 4096)[0]
    assert scaled.fitted(ScaledConfig(columns=64, multicast=2), 5).columns == 16
    assert scaled.fitted(ScaledConfig(columns=160), 130).columns == 160
    assert scaled.fitted(ScaledConfig(swap=False, columns=128), 9).columns == 128
    stream = weight_config.Config(**STREAM)
    assert [weight_only.fitted(stream, m).tokens for m in (1, 9, 16, 40)] == [8, 16, 16, 16]
    stream = dataclasses.replace(stream, tokens=64)
    assert [weight_only.fitted(stream, m).tokens for m in (17, 40, 57)] == [24, 40, 64]


def test_the_kernel_runs_what_was_chosen(tables, monkeypatch):
    tables(document(entry(config=SCALED | {"stages": 7, "columns": 16})))
    seen = []

    def run(x, x_scale, values, scale, bias, residual, *, tiling):
        seen.append(tiling.config)
        return jnp.zeros((16, 4096), jnp.bfloat16)

    monkeypatch.setattr(scaled_mosaic, "run", run)
    with on():
        jax.eval_shape(
            lambda *arrays: scaled_mosaic.scaled_gemm(*arrays, jnp.bfloat16), *operands()
        )
    assert seen == [ScaledConfig(**SCALED | {"stages": 7, "columns": 16})]


def operands(m=16, n=4096, k=4096):
    shape = jax.ShapeDtypeStruct
    scales = shape((m, 1), jnp.float32), shape((n, 1), jnp.float32)
    return shape((m, k), E4M3), scales[0], shape((n, k), E4M3), scales[1]


def prepared(out, features, group_size=128, operand="float16", format="int4"):
    groups = features // group_size if group_size else 1
    return jax.eval_shape(
        lambda values, scale: weight_api.prepare(values, scale, operand=operand),
        jax.ShapeDtypeStruct((out, features), format),
        jax.ShapeDtypeStruct((out, groups), jnp.bfloat16),
    )


def test_weight_only_gemm_takes_the_nearest_entry_that_is_valid(tables):
    wide = STREAM | {"warpgroups": 4, "cluster": 8}  # needs 4 * 4 * 8 tiles of 64 columns
    common = {"op": "prepared_gemm", "format": "int4", "group_size": 128}
    tables(
        document(
            entry(**common, config=wide),
            entry(**common, n=64, k=64 * 1024, config=STREAM),
        )
    )
    with on():
        large, small = prepared(4096, 8192), prepared(4096, 2048)
        assert weight_only.choose(16, large, cores=132) == weight_config.Config(**wide)
        assert weight_only.choose(16, small, cores=132) == weight_config.Config(**STREAM)
        other = prepared(4096, 2048, group_size=64)
        assert weight_only.choose(16, other, cores=132) == weight_config.candidates(16, other)[0]


def test_w4a8_has_entries_of_its_own(tables):
    odd = STREAM | {"tiles": 1}  # fp8 takes pairs of tiles
    common = {"op": "w4a8_gemm", "format": "int4", "group_size": 128}
    four = entry(**common, config=STREAM | {"tiles": 4, "stages": 3})
    tables(document(entry(**common, n=2048, config=odd), four))
    weight = prepared(2048, 4096, operand=E4M3)
    with on():
        assert weight_only.choose(16, weight, cores=132) == weight_config.Config(**four["config"])
        plain = prepared(2048, 4096)
        assert weight_only.choose(16, plain, cores=132) == weight_config.candidates(16, plain)[0]


def test_decode_attention_takes_the_nearest_entry_that_is_valid(tables):
    common = {"op": "decode_attention", "format": "bfloat16x128", "group_size": 4, "n": 1024}
    long = entry(**common, m=64, k=8192, config={"tokens": 128, "stages": 2, "persistent": 1})
    short = entry(**common, m=16, k=1024, config={"stages": 5, "cluster": 4})
    tables(document(long, short))
    cache = np.dtype(jnp.bfloat16)
    with on():
        rest = (4, 128, 64, 128, cache, 132)
        assert decode.choose(64, 8, *rest) == DecodeConfig(**long["config"])
        assert decode.choose(8, 8, 4, 128, 64, 16, cache, 132) == DecodeConfig(**short["config"])
        # Pages of 192 tokens are no whole number of 128; another head_dim and group have no entry.
        page = decode.choose(64, 8, 4, 128, 192, 43, cache, 132)
        assert page == DecodeConfig(**short["config"])
        found = decode.choose(64, 8, 8, 128, 64, 128, cache, 132)
        assert found == decode.candidates(64, 8, 8, 128, 64, 128, cache, 132)[0]


# XLA where it is faster


def test_xla_is_taken_where_the_table_has_it_faster(tables):
    tables(document(entry(implementation="xla", config={}), entry(m=12, n=8192, k=8192)))
    dispatch.forget()

    def call(*arrays, implementation=None):
        return scaled_api.scaled_gemm(
            *arrays, out_dtype=jnp.bfloat16, implementation=implementation
        )

    with on():
        assert "smem" not in str(jax.make_jaxpr(call)(*operands()))
        others = [name for name in scaled_api.IMPLEMENTATIONS if name != "xla"]
        expected = [f"{name}: the tuned table has XLA faster here" for name in others]
        assert dispatch.skipped() == {"scaled_gemm": expected}
        dispatch.forget()
        named = jax.make_jaxpr(lambda *arrays: call(*arrays, implementation="mosaic"))
        # Named, it runs; with the nearest entry that has tiles.
        assert "smem" in str(named(*operands()))
        assert choose_scaled() == ScaledConfig(**SCALED | {"columns": 16})
        assert "smem" in str(jax.make_jaxpr(call)(*operands(8192, 8192, 8192)))
        assert dispatch.skipped() == {}


def test_dispatch_remembers_what_it_skipped():
    def refuse(x):
        raise NotImplementedError("not today")

    names = {"a": refuse, "b": lambda x: x + 1, "c": refuse}
    dispatch.forget()
    assert dispatch.dispatch("op", names, "b", 1, passed_over={"b": "slow"}) == 2
    assert dispatch.skipped() == {}
    assert dispatch.dispatch("op", names, None, 1) == 2
    assert dispatch.dispatch("op", names, None, 1) == 2
    assert dispatch.skipped() == {"op": ["a: not today"]}
    with pytest.raises(NotImplementedError, match="a: not today; b: slow; c: not today"):
        dispatch.dispatch("op", names, None, 1, passed_over={"b": "slow"})
    assert dispatch.skipped() == {"op": ["a: not today"]}
    dispatch.forget()
    for i in range(1000):
        dispatch.dispatch("op", names, None, i, passed_over={"a": f"number {i}"})
    assert len(dispatch.skipped()["op"]) == 64
    dispatch.forget()
