"""The tuner: what it plans, how it judges, what it writes, what it does about kernels that hang.

Nothing is timed here: a fake clock gives the times, and a fake worker hangs and dies.
"""

import dataclasses
import json
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from qjax_kernels import support, timing
from qjax_kernels.decode_attention import api as decode
from qjax_kernels.plain_gemm import api as plain
from qjax_kernels.scaled_gemm import api as scaled
from qjax_kernels.tuned import lookup, schema
from qjax_kernels.tuning import jobs, measure, record, run, worker
from qjax_kernels.tuning.jobs import Job
from qjax_kernels.tuning.pool import Pool
from qjax_kernels.tuning.problem import Problem
from qjax_kernels.tuning.problems import problem
from qjax_kernels.weight_only_gemm import api as weight_only

from benchmarks.kernels import regret, sweep
from qjax.cli import main

# Plans


def test_the_default_run_covers_the_models():
    found = run.default_jobs(jobs.DEFAULT_OPS, jobs.SHAPES, jobs.M, 128)
    linear = [job for job in found if job.op != "decode_attention"]
    sizes = {(job.op, job.n, job.k, m) for job in linear for m in job.ms}
    assert len(sizes) == sum(len(job.ms) for job in linear) == 5 * 9 * 6
    assert {job.group_size for job in linear if job.op in ("w4a16", "w4a8")} == {128}
    assert {job.group_size for job in linear if job.op in ("w8a16", "fp8", "int8")} == {None}
    attention = [job for job in found if job.op == "decode_attention"]
    assert {(job.n, job.group_size) for job in attention} == {(1024, 4), (256, 8)}
    assert max(job.ms[-1] for job in attention) <= jobs.MOST_SEQUENCES
    assert found == sorted(found, key=lambda job: job.op == "decode_attention")
    plan = run.plan(found)
    assert plan.refused == []
    assert sum(len(job.ms) for job in plan.jobs) < plan.combinations
    assert plan.combinations <= 6 * sum(len(job.ms) for job in found)


@pytest.mark.heavy
def test_every_candidate_may_be_in_a_table():
    for job in run.default_jobs(jobs.OPS, jobs.SHAPES, jobs.M, 128):
        for m in job.ms:
            one = problem(job, m, 132)
            for config in one.candidates():
                fields = dataclasses.asdict(config)
                entry = schema.Entry(
                    op=one.table_op, format=one.format, m=m, n=job.n, k=job.k,
                    group_size=job.group_size, implementation="mosaic", config=fields,
                    us=1.0, bound_us=one.work.us, row_error=0.0,
                )  # fmt: skip
                schema.check(entry, str(job))
                assert schema.config_of(entry) == config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["w2a2"], ["square"], [1], 128), "unknown op 'w2a2'; choose of: w4a16, w8a16"),
        ((["fp8"], ["round"], [1], 128), "unknown shapes 'round'; choose of: llama3-8b, .*OUTxIN"),
        ((["fp8"], ["0x64"], [1], 128), "unknown shapes '0x64'"),
        ((["fp8"], ["64x64"], [0], 128), "m is 0; it must be at least 1"),
        ((["w4a16"], ["64x320"], [1], 128), "group size 128 does not divide the 320 inputs"),
    ],
)
def test_names_that_are_not_known_are_errors(arguments, said):
    with pytest.raises(ValueError, match=said):
        run.default_jobs(*arguments)


def test_a_size_that_nothing_takes_is_left_out():
    plan = run.plan(run.default_jobs(["fp8"], ["64x33"], [1], 128))
    assert plan.jobs == []
    assert plan.refused == ["fp8 m=1 n=64 k=33: no tiles fit M = 1, N = 64, K = 33"]


# Operands and references


def sized(op, m, n=128, k=256):
    if op == "decode_attention":
        job = Job(op=op, ms=(m,), n=128, k=192, group_size=2, cache="bfloat16", head_dim=64)
    else:
        group_size = 128 if op in ("w4a16", "w4a8") else None
        job = Job(op=op, ms=(m,), n=n, k=k, group_size=group_size)
    return problem(job, m, 132)


def by_xla(one: Problem, shared, prepared):
    """The op's own reference on the same operands."""
    out = {"out_dtype": jnp.bfloat16, "implementation": "xla"}
    if one.table_op == "prepared_gemm":
        return weight_only.prepared_gemm(*shared, prepared, **out)
    if one.table_op == "w4a8_gemm":
        return weight_only.w4a8_gemm(*shared, prepared, **out)
    if one.table_op == "scaled_gemm":
        return scaled.scaled_gemm(*shared, *prepared, **out)
    if one.table_op == "plain_gemm":
        return plain.plain_gemm(*shared, *prepared, **out)
    (q, lengths), (keys, values, table, *_) = shared, prepared
    return decode.decode_attention(q, keys, values, table, lengths, implementation="xla")


@pytest.mark.parametrize("op", jobs.OPS)
@pytest.mark.parametrize("m", [3, 700])
def test_references_agree_with_the_ops(op, m):
    if op == "decode_attention":
        m = min(m, 5)
    one = sized(op, m)
    shared, rotated = one.shared(np.uint32(0)), one.rotated(np.uint32(1))
    expected = one.reference(shared, rotated)
    prepared = one.prepare(rotated)
    y = by_xla(one, shared, prepared)
    assert expected.shape == (len(one.rows), y.reshape(m, -1).shape[1])
    assert (one.rows[0], one.rows[-1], len(one.rows)) == (0, m - 1, min(m, 512))
    # bfloat16 keeps 8 bits: the result and, in w4a16, the weights are off by up to 2^-9.
    assert float(one.error(y, expected)) < 2**-8
    assert one.limit > 2**-8
    wrong = y.at[m - 1].multiply(1 + 2 * one.limit)
    assert float(one.error(wrong, expected)) > one.limit
    assert np.isnan(float(one.error(y.at[0].set(jnp.nan), expected)))
    # Other seeds, other weights; the bytes are those of the weights.
    other = one.prepare(one.rotated(np.uint32(2)))
    assert not np.array_equal(*(np.asarray(jax.tree.leaves(x)[0]) for x in (prepared, other)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(prepared))
    assert one.rotated_bytes == pytest.approx(size, rel=0.02)


def test_copies_exceed_the_cache_unless_products_are_the_bound():
    assert sized("fp8", 16, 4096, 4096).copies == 8
    assert sized("fp8", 16, 8192, 8192).copies == 2
    assert sized("fp8", 2048, 4096, 4096).copies == 2


# Judging


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    name: str
    factor: float


@dataclasses.dataclass(frozen=True)
class Fake(Problem):
    """y = 2 x w, by configurations that are right, wrong or refuse."""

    table_op = "fake"
    limit = 0.01
    format = "float32"
    work = dataclasses.replace(sized("fp8", 1).work)
    rotated_bytes = 1e9
    configs = (
        FakeConfig("good", 2.0),
        FakeConfig("better", 2.0),
        FakeConfig("wrong", 2.1),
        FakeConfig("nan", float("nan")),
        FakeConfig("refuses", 0.0),
    )

    def candidates(self):
        return list(self.configs)

    def chosen(self):
        return FakeConfig("chosen", 2.0)

    def shared(self, seed):
        return (jnp.full((self.m, 8), 1.0 + seed.astype(jnp.float32)),)

    def rotated(self, seed):
        return jnp.arange(1.0, 9.0) + seed.astype(jnp.float32)

    def prepare(self, rotated):
        return rotated + 1

    def call(self, config):
        def run(shared, w):
            if config.name == "refuses":
                raise NotImplementedError("it takes no such thing\nand more")
            return (shared[0] * (w - 1) * config.factor).astype(jnp.bfloat16)

        return run

    def reference(self, shared, rotated):
        return (2 * shared[0] * rotated)[self.rows]


JOB = Job(op="w4a16", ms=(4,), n=8, k=8, group_size=None)


@pytest.fixture
def measured(monkeypatch):
    """measured(**options): the messages of the fake problem."""
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(timing, "OPTIONS", {})
    times = iter([20.0, 10.0, 15.0])
    held = []

    @contextmanager
    def gpu():
        held.append(True)
        yield
        held.pop()

    def clock(program, arguments, calls, iterations):
        assert held
        assert len(program(*arguments)) == calls == 2
        return next(times)

    def run_it(skip=None, **options):
        options = measure.Options(gpu=gpu, clock=clock, **options)
        found = list(measure.measure(Fake(JOB, 4, 132), options, skip or {}, {}))
        assert not held
        return found

    return run_it


def candidates_of(messages):
    return {one["config"]["name"]: one for one in messages[-1]["result"]["candidates"]}


def test_wrong_results_are_dropped_and_the_rest_is_timed(measured):
    messages = measured()
    found = candidates_of(messages)
    assert {name: one["us"] for name, one in found.items() if one["us"]} == {
        "good": 20.0, "better": 10.0,
    }  # fmt: skip
    assert found["wrong"]["dropped"].startswith("wrong: row error 4.9e-02 > ")
    assert found["nan"]["dropped"] == "wrong: not finite"
    refusal = "does not compile: NotImplementedError: it takes no such thing"
    assert found["refuses"]["dropped"] == refusal
    assert 0 <= found["good"]["row_error"] < 2**-8
    json.dumps(messages)
    stages = [message.get("stage") for message in messages]
    assert stages[:5] == ["compile"] * 5
    assert stages[5:7] == ["wait", "operands"]
    assert stages[7:-1] == ["run"] * 4 + ["warm up", "time", "time"]


def test_what_broke_a_process_is_not_run_again(measured):
    label = "mosaic name=better,factor=2.0"
    assert label in [message.get("label") for message in measured()]
    messages = measured(skip={label: "run: nothing came for 60 s"})
    assert candidates_of(messages)["better"]["dropped"] == "run: nothing came for 60 s"
    assert label not in [m["label"] for m in messages if m.get("stage") in ("run", "time")]


def test_the_chosen_configuration_is_measured_too(measured):
    found = candidates_of(measured(chosen=True))
    assert [name for name, one in found.items() if one["chosen"]] == ["chosen"]
    assert found["chosen"]["us"] == 15.0


def result(**times):
    candidates = [
        {
            "implementation": "mosaic", "config": {"columns": columns}, "us": us, "dropped": None,
            "row_error": 0.002, "registers": 100, "spills": 0, "shared": 1024, "chosen": False,
        }
        for columns, us in zip((8, 16, 32), times["us"], strict=True)
    ]  # fmt: skip
    plain = {"tuned": "fp8", "op": "scaled_gemm", "format": "float8_e4m3fn", "m": 1, "n": 64}
    plain |= {"k": 128, "group_size": None, "bound_us": 1.5, "candidates": candidates}
    return plain | times.get("fields", {})


def test_the_fastest_is_recorded_and_the_file_is_written_each_time(tmp_path):
    path = tmp_path / "nvidia-h200.json"
    kept = record.Record.at(path, "abc")
    kept.of_device("NVIDIA H200", {"jax": "0.11.2"})
    assert kept.add(result(us=[3.0, 2.0, None])).config == {"columns": 16}
    assert len(schema.parse(path.read_text(), "it").entries) == 1
    assert kept.add(result(us=[None, None, None], fields={"m": 2})) is None
    dropped = result(us=[1.0, 5.0, 9.0], fields={"m": 4})
    dropped["candidates"][0]["dropped"] = "wrong: row error 0.5"
    assert kept.add(dropped).us == 5.0
    # Within 2 %, what is used already is used again.
    assert kept.add(result(us=[2.0, 2.03, 9.0], fields={"m": 8})).config == {"columns": 16}
    assert kept.add(result(us=[2.0, 2.1, 9.0], fields={"m": 16})).config == {"columns": 8}
    assert len(kept.distinct()) == 2
    # A second run goes on from the file, and replaces what it measures again.
    again = record.Record.at(path, "def")
    job = Job(op="fp8", ms=(1, 2), n=64, k=128)
    has = [again.has(job, m, "scaled_gemm", "float8_e4m3fn") for m in (1, 2, 4)]
    assert has == [True, False, True]
    assert not again.has(job, 1, "scaled_gemm", "int8")
    again.of_device("NVIDIA H200", {"jax": "0.12"})
    again.add(result(us=[1.75, 2.0, None]))
    table = schema.parse(path.read_text(), "it")
    assert (table.commit, table.versions) == ("def", {"jax": "0.12"})
    assert [(e.m, e.us) for e in table.entries] == [(1, 1.75), (4, 5.0), (8, 2.03), (16, 2.0)]
    with pytest.raises(schema.TableError, match=r"is of NVIDIA H200; this device is NVIDIA H100"):
        again.of_device("NVIDIA H100", {})


def test_a_plan_that_is_resumed_leaves_out_what_is_there(tmp_path):
    kept = record.Record.at(tmp_path / "nvidia-h200.json", "abc")
    kept.of_device("NVIDIA H200", {})
    kept.add(result(us=[3.0, 2.0, None]))
    found = run.default_jobs(["fp8"], ["64x128", "128x128"], [1, 16], 128)
    sizes = [(job.n, job.ms) for job in run.plan(found, kept).jobs]
    assert sizes == [(64, (16,)), (128, (1, 16))]


# Workers

WORKER = """
import json, sys, time
def tell(**m): print("@@ " + json.dumps(m), flush=True)
print("noise")
tell(hello={"device": "NVIDIA H200", "cores": 132, "versions": {}})
for line in sys.stdin:
    task = json.loads(line)
    for m in task["ms"]:
        for name in ("a", "b"):
            if name in task["skip"].get(str(m), {}):
                continue
            tell(stage="run", label=name)
            if (m, name) == (2, "a"):
                time.sleep(60)
            if (m, name) == (2, "b"):
                raise SystemExit("CUDA_ERROR_ILLEGAL_ADDRESS")
        if m == 3:
            tell(stage="operands")
            raise SystemExit("no memory")
        tell(result={"m": m, "skipped": task["skip"].get(str(m), {}), "cores": task["cores"]})
    tell(done=True)
"""


@pytest.fixture
def fake_worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return [sys.executable, str(path)]


def test_a_worker_that_hangs_or_dies_is_replaced(fake_worker):
    found = [dataclasses.replace(JOB, ms=(1, 2, 3, 4)), dataclasses.replace(JOB, ms=(5,))]
    limits = {"run": 3.0}
    messages = list(Pool(found, 2, {}, limits=limits, command=fake_worker).messages())
    results = {m["result"]["m"]: m["result"] for m in messages if "result" in m}
    assert sorted(results) == [1, 2, 4, 5]
    why = {"a": "run: nothing came for 3 s", "b": "run: exit status 1: CUDA_ERROR_ILLEGAL_ADDRESS"}
    assert results[2] == {"m": 2, "skipped": why, "cores": 132}
    failed = [message["failed"] for message in messages if "failed" in message]
    assert failed == ["w4a16 m=3 n=8 k=8: operands: exit status 1: no memory"]
    assert threading.active_count() < 20


def test_the_time_ends_a_run(fake_worker):
    found = [dataclasses.replace(JOB, ms=(1,)), dataclasses.replace(JOB, ms=(2,))]
    messages = list(Pool(found, 1, {}, seconds=5.0, command=fake_worker).messages())
    assert [m["result"]["m"] for m in messages if "result" in m] == [1]
    assert messages[-1] == {"failed": "the time is up; what was measured is kept"}


def test_without_a_gpu_workers_say_why():
    messages = list(Pool([JOB], 1, {"compile_only": False}).messages())
    assert messages == [
        {"failed": "a worker did not start: it needs an NVIDIA GPU of compute capability 9.0, "
                   "not cpu"},
        {"failed": "1 sizes were not measured: no worker could go on"},
    ]  # fmt: skip


def test_one_process_at_a_time_holds_the_gpu(tmp_path):
    hold, order = worker.locked(str(tmp_path / "gpu")), []

    def other():
        with hold():
            order.append("other")

    with hold():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("this")
    thread.join(5)
    assert order == ["this", "other"]


def test_results_are_kept_and_passed_on(tmp_path):
    path = tmp_path / "nvidia-h200.json"
    messages = [
        {"hello": {"device": "NVIDIA H200", "cores": 132, "versions": {"jax": "1"}}},
        {"failed": "something"},
        {"result": result(us=[3.0, 2.0, None])},
    ]
    kept = list(run.keep(iter(messages), lambda device: record.Record.at(path, "abc")))
    assert kept[:2] == messages[:2]
    assert kept[2]["entry"]["us"] == 2.0
    assert schema.parse(path.read_text(), "it").device == "NVIDIA H200"


def test_where_a_table_goes(tmp_path, monkeypatch):
    assert run.path_of(tmp_path / "mine.json", "NVIDIA H200") == tmp_path / "mine.json"
    assert run.path_of(tmp_path, "NVIDIA H200") == tmp_path / "nvidia-h200.json"
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path / "new"))
    assert run.path_of(None, "NVIDIA H200") == tmp_path / "new" / "nvidia-h200.json"
    monkeypatch.delenv(lookup.VARIABLE)
    assert run.path_of(None, "NVIDIA H200").parent.name == "tuned"


# The command


@pytest.mark.heavy
def test_compile_only_needs_no_gpu(capsys):
    argv = ["tune", "--compile-only", "--ops", "fp8,w4a16", "--shapes", "256x512", "--m", "1"]
    assert main([*argv, "--workers", "1", "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert (data["file"], data["failed"], data["dropped"]) == (None, [], [])
    assert [size["tuned"] for size in data["sizes"]] == ["fp8", "w4a16"]
    for size in data["sizes"]:
        assert size["candidates"]
        for one in size["candidates"]:
            assert one["spills"] == 0
            assert 16 <= one["registers"] <= 255
            assert 0 < one["shared"] <= 232448
            assert one["us"] is None
    assert "2 sizes, " in captured.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "nothing can be timed here: it needs an NVIDIA GPU of compute capability 9.0, not"),
        (["--ops", "w2a2"], "unknown op 'w2a2'; choose of: w4a16"),
        (["--shapes", "gpt"], "unknown shapes 'gpt'; choose of: llama3-8b"),
        (["--m", "1,two"], "--m is '1,two'; it takes positive numbers"),
        (["--minutes", "0"], "--minutes is 0.0; it must be above 0"),
        (["--workers", "-1", "--compile-only"], "--workers is -1; it must be above 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(capsys, argv, said):
    assert main(["tune", *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_run_on_a_gpu_writes_the_table(tmp_path, monkeypatch, capsys):
    from qjax.cli import tune

    def measure_all(plan, workers, **options):
        assert (workers, options["iterations"], options["seconds"]) == (3, 5, 90.0)
        yield {"hello": {"device": "NVIDIA H200", "cores": 132, "versions": {"jax": "0.11.2"}}}
        one = result(us=[3.0, 2.0, None])
        one["candidates"][2]["dropped"] = "spills 8 bytes"
        yield {"result": one}
        yield {"failed": "w4a16 m=1: no memory"}

    monkeypatch.setattr(tune, "_device", lambda: "NVIDIA H200")
    monkeypatch.setattr(run, "measure_all", measure_all)
    argv = ["tune", "--ops", "fp8", "--shapes", "64x128", "--m", "1", "--commit", "abc"]
    argv += ["--output", str(tmp_path), "--workers", "3", "--minutes", "1.5"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "1 sizes, " in out
    assert "[1/1] fp8 float8_e4m3fn 1x64x128: 2.00 us, 1.33x the bound: columns 16" in out
    assert "dropped {'columns': 32}: spills 8 bytes" in out
    assert "not measured: w4a16 m=1: no memory" in out
    assert "1 candidates dropped, 1 sizes not measured" in out
    path = tmp_path / "nvidia-h200.json"
    assert schema.parse(path.read_text(), "it").commit == "abc"
    (tmp_path / "nvidia-h200.json").write_text("{")
    assert main(argv) == 2
    assert "nvidia-h200.json is not JSON" in capsys.readouterr().err
    argv[argv.index("--output") + 1] = "/dev/null/tables"
    assert main(argv) == 2
    assert "check the path and its permissions" in capsys.readouterr().err


def test_a_resumed_run_that_is_complete_measures_nothing(tmp_path, monkeypatch, capsys):
    from qjax.cli import tune

    kept = record.Record.at(tmp_path / "nvidia-h200.json", "abc")
    kept.of_device("NVIDIA H200", {})
    kept.add(result(us=[3.0, 2.0, None]))
    monkeypatch.setattr(tune, "_device", lambda: "NVIDIA H200")
    argv = ["tune", "--ops", "fp8", "--shapes", "64x128", "--m", "1", "--resume", "--json"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["sizes"] == []
    assert "0 sizes, 0 combinations" in captured.err


# Support


def on(kind):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def test_info_says_which_table_is_in_use(tmp_path, monkeypatch):
    from qjax.cli import info
    from qjax.errors import ConfigError

    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path))
    kept = record.Record.at(tmp_path / "nvidia-h200.json", "abc")
    kept.of_device("NVIDIA H200", {"jax": "0.11.2"})
    kept.add(result(us=[3.0, 2.0, None]))
    assert info._tuned() is None
    with on("NVIDIA H200"):
        found = info._tuned()
    assert (found["device"], found["commit"], found["entries"]) == ("NVIDIA H200", "abc", 1)
    assert (found["stands_in"], found["versions"]) == (False, {"jax": "0.11.2"})
    with on("NVIDIA H100 80GB HBM3"):
        assert info._tuned()["stands_in"]
    kept.path.write_text("{}")
    with on("NVIDIA H200"), pytest.raises(ConfigError, match=r"lacks device, .* delete the file"):
        info._tuned()


def test_info_prints_each_reason_once(capsys):
    from qjax.cli import info

    kernels = {
        "a": {"runs": ["xla"], "notes": {"mosaic": "no", "xla": ""}, "skipped": ["mosaic: no"]},
        "b": {"runs": ["xla"], "notes": {"mosaic": "no", "xla": ""}, "skipped": ["mosaic: no"]},
        "c": {
            "runs": ["mosaic", "xla"],
            "notes": {"mosaic": "", "xla": ""},
            "skipped": ["mosaic: XLA is faster"],
        },
    }
    table = {"device": "NVIDIA H200", "stands_in": True, "date": "2026-11-21", "commit": "abc"}
    info._print_kernels({"kernels": kernels, "tuned": table | {"entries": 3, "file": "x.json"}})
    out = capsys.readouterr().out
    assert "mosaic: no (a, b)\nmosaic: skipped: XLA is faster (c)\n" in out
    assert "tuned table: NVIDIA H200, which stands in for this device's, 2026-11-21" in out


def test_support_says_what_runs_and_why_not():
    here = {found.op: found for found in support.support()}
    assert all(found.runs[-1] == "xla" for found in here.values())
    reason = "it needs an NVIDIA GPU of compute capability 9.0, not cpu"
    assert here["scaled_gemm"].notes["mosaic"] == reason
    assert f"mosaic: {reason}" in here["scaled_gemm"].skipped
    with on("NVIDIA H200"):
        hopper = {found.op: found for found in support.support()}
    assert hopper["scaled_gemm"].runs[0] == "mosaic"
    assert hopper["scaled_gemm"].notes["mosaic"] == ""
    with on("NVIDIA A100-SXM4-80GB"):
        ampere = {found.op: found for found in support.support()}
    assert "mosaic" not in ampere["scaled_gemm"].runs
    folders = Path(support.__file__).parent.glob("*/api.py")
    probed = {found.op for found in here.values()} | {"sampling"}
    assert {path.parent.name for path in folders} <= probed, "give these a probe"
    triton = ampere["norm_quant"].notes["triton"]
    assert triton in (support.NOT_TIMED, "it needs the packages jax-triton and triton")
    assert hopper["norm_quant"].notes["triton"] in ("", triton)


# Regret


def test_regret_samples_are_of_many_models_and_the_same_each_time():
    found = regret.samples(20)
    assert found == regret.samples(20)
    assert len(set(found)) == 20
    assert {model for model, _ in found} == set(regret.MODELS)
    assert {job.op for _, job in found} == set(jobs.LINEAR_OPS)
    tuned = {shape for one in jobs.SHAPES.values() for shape in one.linear}
    assert sum((job.n, job.k) not in tuned or job.ms[0] not in jobs.M for _, job in found) >= 15


def test_regret_is_of_the_chosen_over_the_best():
    one = result(us=[2.0, 2.5, None])
    assert regret.regret(one) is None
    one["candidates"][1]["chosen"] = True
    row = regret.regret(one)
    assert (row["us"], row["best_us"], row["regret"]) == (2.5, 2.0, 0.25)
    assert (row["config"], row["best"]) == ({"columns": 16}, {"columns": 8})


def test_both_clocks_warm_up_alike():
    assert timing.WARM_UP_SECONDS == sweep.WARM_UP_SECONDS
