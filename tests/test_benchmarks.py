"""benchmarks/kernels: what it says of a kernel is right, and nothing is left out unsaid.

Times are a GPU's; here a fake clock gives them.
"""

import copy
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from jax.experimental.mosaic.gpu import profiler

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import bound, other_rows, peers, results, rows, sweep, timing

N, K, GROUP = 48, 256, 128
TINY = {"tiny": [(N, K)]}
# bfloat16 keeps 8 bits: rounding is off by at most 2^-9 of a number, and so of a row of them. In
# w4a16 the XLA implementation rounds each weight too, which is off by as much.
ROUNDING = 2.0**-9
PYTHON = sys.executable  # which some tests replace
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*/kernels*.json"))


def fake_clock(microseconds=12.5):
    def clock(function, argument_sets, iterations):
        return [function(*arguments) for arguments in argument_sets], microseconds

    return clock


def tiny(ops):
    return sweep.Ops({name: sweep.Op(op.build, TINY, op.grouped) for name, op in ops.items()})


def row(**changes):
    plain = {"op": "w4a16", "m": 16, "n": 8192, "k": 8192, "group_size": 128}
    plain |= {"implementation": "qjax/mosaic", "us": 12.0, "bound_us": 8.5, "row_error": 0.002}
    return plain | changes


def document(*found, **changes):
    head = {"device": "NVIDIA H200", "versions": {"jax": "0.11.2"}, "commit": "0123456789ab"}
    return head | {"date": "2026-11-21", "rows": list(found)} | changes


# Bounds


def test_bound_of_a_read_is_its_bytes_over_the_bandwidth():
    weights, scales, x, y = 8192 * 8192 // 2, 2 * 8192 * 64, 2 * 8192, 2 * 8192
    work = bound.LINEAR["w4a16"].work(1, 8192, 8192, 128)
    assert work.bytes == weights + scales + x + y
    assert work.us == pytest.approx(1e6 * work.bytes / 4.1e12) == pytest.approx(8.448, abs=1e-3)


@pytest.mark.parametrize(("op", "peak"), [("bf16", 989e12), ("fp8", 1979e12), ("int8", 1979e12)])
def test_bound_of_a_large_product_is_its_operations_over_the_peak(op, peak):
    assert bound.LINEAR[op].work(8192, 8192, 8192, None).us == pytest.approx(
        1e6 * 2 * 8192**3 / peak
    )


def test_bound_counts_scales_where_the_op_has_them():
    bytes_of = {op: linear.work(4, N, K, GROUP).bytes for op, linear in bound.LINEAR.items()}
    assert bytes_of["fp8"] - bytes_of["fp8_tensor"] == 4 * 4 + 4 * N
    assert bytes_of["w8a16"] == 2 * 4 * K + N * K + 4 * N + 2 * 4 * N
    assert bytes_of["w4a8"] == 4 * K + 4 * 4 + N * K / 2 + 2 * N * (K / GROUP) + 2 * 4 * N


def test_copies_exceed_the_cache_twice():
    for bytes_each in (8e6, 34.6e6, 67e6):
        assert bound.copies(bytes_each) * bytes_each >= 2 * bound.L2
        assert (bound.copies(bytes_each) - 1) * bytes_each < 2 * bound.L2
    assert bound.copies(1e9) == 2
    assert bound.copies(1e3) == 16


# Cases of qjax and XLA


@pytest.mark.parametrize("op", other_rows.OPS)
def test_every_op_has_a_case_that_the_reference_agrees_with(op):
    measure = partial(rows.measure, iterations=1, clock=fake_clock())
    found = list(sweep.sweep(tiny({op: rows.OPS[op]}), TINY, [1, 3], GROUP, _xla, measure))
    assert not [r for r in found if isinstance(r, str)]
    assert [r["m"] for r in found] == [1, 3]
    for r in found:
        assert 0 <= r["row_error"] < 2 * ROUNDING
        assert (r["us"], r["implementation"]) == (12.5, "xla")
        assert r["group_size"] == (GROUP if op.startswith("w4") else None)
    results.check(document(*found))


def _xla(implementation):
    return implementation == "xla"


def test_weights_rotate():
    seen = []

    def clock(function, argument_sets, iterations):
        seen.extend(argument_sets)
        return fake_clock()(function, argument_sets, iterations)

    case = rows.OPS["w4a16"].build(N, K, GROUP)(2)
    rows.measure(case, "xla", clock=clock)
    assert len(seen) == bound.copies(bound.LINEAR["w4a16"].weight_bytes(N, K, GROUP))
    assert len({a[1].unsafe_buffer_pointer() for a in seen}) == len(seen)
    assert not jnp.array_equal(seen[0][1].astype(jnp.int8), seen[1][1].astype(jnp.int8))
    assert {a[0].unsafe_buffer_pointer() for a in seen} == {seen[0][0].unsafe_buffer_pointer()}


def case_of(function, **call):
    sets = [(jnp.full((2, 3), float(i + 1)),) for i in range(2)]
    calls = {"qjax/mosaic": rows.Call(function, **call)}
    return rows.Case(sets, calls, bound.Work(1e6, 1e6), lambda x: 2 * x)


def error_of(function, **call):
    return rows.measure(case_of(function, **call), "qjax/mosaic", clock=fake_clock())[1]


def test_row_error_is_of_the_worst_row_of_the_first_and_the_last_call():
    assert error_of(lambda x: 2 * x) == 0
    assert error_of(lambda x: 2 * x * jnp.array([[1.0], [1.1]])) == pytest.approx(0.1, rel=1e-5)
    last = jnp.full((2, 3), 2.0)
    assert error_of(lambda x: jnp.where(x == last, 3 * x, 2 * x)) == pytest.approx(0.5)
    assert error_of(lambda x: jnp.full_like(x, jnp.nan)) is None
    with pytest.raises(ValueError, match=r"the result is \(2, 2\), the reference \(2, 3\)"):
        error_of(lambda x: x[:, :2])


def test_an_implementation_prepares_its_operands_before_the_clock_starts():
    assert error_of(lambda x: x, prepare=lambda x: (2 * x,)) == 0


def test_a_failure_is_said_and_the_rest_is_measured():
    def build(n, k, group_size):
        def case(m):
            if m == 2:
                raise MemoryError("no room")
            good, bad = case_of(lambda x: 2 * x), case_of(_refuse)
            calls = {"qjax/mosaic": bad.calls["qjax/mosaic"], "xla": good.calls["qjax/mosaic"]}
            return rows.Case(good.sets, calls, good.work, good.reference)

        return case

    def broken(n, k, group_size):
        raise ValueError("no such size")

    ops = sweep.Ops()
    ops.register("broken", TINY)(broken)
    ops.register("half", TINY)(build)
    measure = partial(rows.measure, clock=fake_clock())
    found = list(sweep.sweep(ops, TINY, [1, 2], GROUP, lambda name: True, measure))
    assert found[0] == f"broken {N}x{K}: ValueError: no such size"
    assert found[1] == f"half 1x{N}x{K} qjax/mosaic: NotImplementedError: K of 7"
    assert (found[2]["implementation"], found[2]["row_error"]) == ("xla", 0)
    assert found[3] == f"half 2x{N}x{K}: MemoryError: no room"
    assert len(found) == 4
    none = list(sweep.sweep(ops.select(["half"]), TINY, [1], GROUP, lambda name: False, measure))
    assert none == [f"half 1x{N}x{K}: it has only qjax/mosaic, xla"]


def _refuse(x):
    raise NotImplementedError("K of 7\nand more")


# Clocks


def test_chain_runs_every_call_and_none_merges():
    x, ws = jnp.ones((8, 16)), [jnp.full((16, 32), float(i)) for i in range(3)]
    sets = [(x, w) for w in ws]
    lowered = jax.jit(timing.chain(jnp.dot)).lower(*sets)
    assert lowered.as_text().count("call @dot") == 3
    assert lowered.as_text().count("optimization_barrier") == 2
    found = lowered.compile()(*sets)
    for (a, w), y in zip(sets, found, strict=True):
        assert jnp.array_equal(y, a @ w)


@pytest.mark.parametrize("iterations", [1, 3])
def test_time_is_of_all_kernels_of_a_call_and_the_median_of_iterations(monkeypatch, iterations):
    milliseconds = [
        [("gemm", 0.010), ("reduce", 0.002), ("gemm", 0.012), ("reduce", 0.002)],
        [("gemm", 0.900), ("reduce", 0.002), ("gemm", 0.012), ("reduce", 0.002)],
        [("gemm", 0.010), ("reduce", 0.002), ("gemm", 0.016), ("reduce", 0.002)],
    ][:iterations]

    def measure(function, *, aggregate, iterations):
        assert not aggregate
        times = milliseconds[0] if iterations == 1 else milliseconds
        return lambda *arguments: (function(*arguments), times)

    monkeypatch.setattr(profiler, "measure", measure)
    sets = [(jnp.ones(2),), (jnp.zeros(2),)]
    us = timing.time_kernels(lambda x: x + 1.0, sets, iterations)
    assert us == pytest.approx(13.0 if iterations == 1 else 15.0)
    found, same = timing.run_and_time(lambda x: x + 1.0, sets, iterations)
    assert same == us
    assert [float(y[0]) for y in found] == [2, 1]


def test_no_kernel_is_an_error(monkeypatch):
    none = partial(lambda f, **_: lambda *a: (f(*a), None))
    monkeypatch.setattr(profiler, "measure", none)
    with pytest.raises(RuntimeError, match="no GPU kernel ran"):
        timing.time_kernels(lambda x: x, [(jnp.ones(2),)])


def kernel(start, duration, name="gemm", cat="kernel"):
    return {"cat": cat, "name": name, "ts": start, "dur": duration, "ph": "X"}


def test_peers_time_counts_overlap_once_and_only_kernels():
    trace = {
        "traceEvents": [
            kernel(0, 10),
            kernel(8, 10),  # started early, waits for the first
            kernel(50, 500, "Memset", cat="gpu_memset"),
            kernel(130, 12),
            kernel(120, 10),  # not in order
            {"ph": "M", "name": "process_name"},
        ]
    }
    # 18 in the first iteration and 22 in the second, of two calls each.
    assert peers.per_call(trace, 2, 2) == pytest.approx((18 + 22) / 2 / 2)
    assert peers.busy([(0, 10), (1, 2), (9, 11), (20, 21)]) == 12
    with pytest.raises(RuntimeError, match="4 GPU kernels in 3 iterations"):
        peers.per_call(trace, 2, 3)
    trace["traceEvents"][0]["name"] = "other"
    with pytest.raises(RuntimeError, match="different kernels"):
        peers.per_call(trace, 2, 2)
    with pytest.raises(RuntimeError, match="0 GPU kernels"):
        peers.per_call({"traceEvents": []}, 2, 2)


# Results


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_results_are_what_they_should_be(path):
    found = json.loads(path.read_text())
    results.check(found)
    assert all(r["us"] > 0.9 * r["bound_us"] for r in found["rows"]), "faster than the chip"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"us": 0.0}, "times must be positive"),
        ({"us": float("nan")}, "us is nan"),
        ({"us": "12"}, "us is '12'"),
        ({"m": 16.0}, "m is 16.0"),
        ({"group_size": True}, "group_size is True"),
        ({"row_error": float("inf")}, "row_error is inf"),
        ({"implementation": "qjax"}, "no implementation is called 'qjax'"),
        ({"tflops": 3.0}, r"unknown fields \['tflops'\]"),
    ],
)
def test_check_names_what_is_wrong(changes, complaint):
    with pytest.raises(ValueError, match=f"row 1: .*{complaint}"):
        results.check(document(row(), row(m=1) | changes))


def test_check_of_the_document():
    results.check(document(row(), row(m=1, row_error=None), row(m=2, group_size=None)))
    with pytest.raises(ValueError, match="two rows are of the same"):
        results.check(document(row(), row(us=13.0)))
    with pytest.raises(ValueError, match=r"absent \['device'\]"):
        results.check({name: v for name, v in document().items() if name != "device"})
    fields = row()
    del fields["row_error"]
    with pytest.raises(ValueError, match=r"row 0: .*absent \['row_error'\]"):
        results.check(document(fields))


def test_merge_replaces_rows_of_the_same_key_and_says_what_it_merged(tmp_path):
    old = document(row(), row(implementation="torch", us=20.0), versions={"torch": "2"})
    new = document(row(us=11.0), row(m=1), commit="ffffffffffff", date="2026-11-22")
    before = copy.deepcopy((old, new))
    both = results.merge(old, new)
    assert (old, new) == before
    assert {(r["m"], r["implementation"], r["us"]) for r in both["rows"]} == {
        (1, "qjax/mosaic", 12.0),
        (16, "qjax/mosaic", 11.0),
        (16, "torch", 20.0),
    }
    assert both["commit"] == "ffffffffffff"
    assert both["merged"] == [{"date": "2026-11-21", "commit": "0123456789ab"}]
    assert both["versions"] == {"torch": "2", "jax": "0.11.2"}
    results.write(tmp_path / "new" / "kernels.json", both)
    text = (tmp_path / "new" / "kernels.json").read_text()
    assert json.loads(text) == both
    assert [line.startswith('  {"op"') for line in text.splitlines()].count(True) == 3
    with pytest.raises(ValueError, match="the file is of NVIDIA H200, this run of NVIDIA H100"):
        results.merge(old, document(device="NVIDIA H100"))


def test_table_says_bound_ratio_and_which_rows_do_not_count():
    lines = results.table(
        [
            row(implementation="torch", us=24.0),
            row(implementation="humming", us=1.0, row_error=None),
            row(implementation="xla", us=17.0, row_error=0.7),
            row(),
        ]
    ).splitlines()
    assert lines[0].split()[-5:] == ["us", "bound", "ratio", "row_error", "vs_peer"]
    assert lines[1].split()[5:] == ["qjax/mosaic", "12.0", "8.5", "1.41", "2.0e-03", "0.50"]
    assert lines[2].split()[5:] == ["xla", "17.0", "8.5", "2.00", "WRONG", "7.0e-01", "0.71"]
    assert lines[3].startswith("w4a16")
    assert "none: does not count" in lines[3]
    assert lines[4].split()[-1] == "1.00"


# The command


def test_ops_that_are_not_there_are_an_error_that_says_what_is(capsys):
    for arguments, complaint in [
        (["--ops", "w2a2"], "there is no 'w2a2' to measure by these implementations; jax: bf16"),
        (["--ops", "bf16", "--implementations", "humming"], "humming: w4a16, w8a16"),
        (["--shapes", "round"], "no shapes are called 'round'; there are: attention, llama70b_tp4"),
        (["--implementations", "cutlass"], "no implementation is called 'cutlass'"),
        (["--m", "16,x"], "--m takes positive numbers, not 16,x"),
    ]:
        with pytest.raises(SystemExit):
            command.parse(arguments)
        assert complaint in capsys.readouterr().err


def test_a_peers_process_has_no_jax():
    code = "import sys, benchmarks.kernels.__main__; raise SystemExit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_which_implementations_were_asked_for():
    options = command.parse(["--implementations", "qjax,torch"])
    assert [command.wanted(options, n) for n in ("qjax/mosaic", "xla", "torch")] == [1, 0, 1]
    assert [command.asked(options, worker) for worker in command.WORKERS] == [1, 1, 0, 0]
    options = command.parse(["--implementations", "qjax/triton"])
    assert [command.wanted(options, n) for n in ("qjax/mosaic", "qjax/triton")] == [0, 1]
    assert command.asked(options, "jax")
    assert all(command.asked(command.parse([]), worker) for worker in command.WORKERS)
    assert command.parse([]).ms == [1, 16, 64, 256, 8192]
    assert command.parse(["--quick"]).ms == [16, 256]
    assert command.parse(["--quick", "--m", "8"]).ms == [8]


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Replaces the workers by a program that prints lines and exits."""

    def replace(*lines, status=0):
        path = tmp_path / "worker"
        text = "\n".join(lines)
        path.write_text(f"#!{PYTHON}\nprint({text!r})\nraise SystemExit({status})\n")
        path.chmod(0o755)
        monkeypatch.setattr(command.sys, "executable", str(path))
        return tmp_path / "kernels.json"

    return replace


def told(**message):
    return command.MARK + json.dumps(message)


def test_a_run_writes_its_rows_and_prints_them(worker, capsys):
    head = told(device="NVIDIA H200", versions={"jax": "0.11.2"})
    out = worker(head, "not measured: w4a16 1x2x3 qjax/mosaic: no", told(row=row()))
    arguments = ["--out", str(out), "--implementations", "qjax", "--ops", "w4a16"]
    assert command.main(arguments) == 0
    found = json.loads(out.read_text())
    results.check(found)
    assert found["rows"] == [row()]
    assert found["device"] == "NVIDIA H200"
    printed = capsys.readouterr().out
    assert "not measured: w4a16 1x2x3 qjax/mosaic: no" in printed
    assert "1 rows in" in printed
    worker(head, told(row=row(us=11.0, m=1)))
    assert command.main([*arguments, "--merge", "--commit", "abc"]) == 0
    found = json.loads(out.read_text())
    assert [r["m"] for r in found["rows"]] == [1, 16]
    assert (found["commit"], len(found["merged"])) == ("abc", 1)


def test_a_worker_that_dies_leaves_its_rows_and_fails_the_run(worker, capsys):
    head = told(device="NVIDIA H200", versions={})
    out = worker(head, told(row=row()), status=3)
    assert command.main(["--out", str(out), "--implementations", "qjax"]) == 1
    assert json.loads(out.read_text())["rows"] == [row()]
    assert "failed or not measured: jax" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert command.main(["--worker", "jax"]) == 1
    expected = "jax: not measured: it needs an NVIDIA GPU, and JAX has a cpu"
    assert expected in capsys.readouterr().out
    assert "cannot be imported (ModuleNotFoundError" in peers.missing("no_such_peer")
