"""Every configuration of the tuned tables compiles for an H200: no spills, memory that fits."""

import dataclasses

import h200
import numpy as np
import pytest
from qjax_kernels.decode_attention.choice import table_format
from qjax_kernels.tuned import lookup, schema
from qjax_kernels.tuning import measure
from qjax_kernels.tuning.jobs import Job
from qjax_kernels.tuning.problems import PROBLEMS, problem
from qjax_kernels.weight_only_gemm.choice import fitted

pytestmark = pytest.mark.heavy

MOST = 150  # so that these tests take minutes
CACHES = ("bfloat16", "float8_e4m3fn", "int8")
ENTRIES = [
    entry
    for path in sorted(lookup.directory().glob("*.json"))
    for entry in schema.parse(path.read_text(), path.name).entries
]


def distinct(entries):
    """One entry for each configuration of an op and format, the smallest that uses it."""
    found = {}
    for entry in sorted(entries, key=lambda entry: entry.m * entry.n * entry.k):
        if entry.implementation == "mosaic":
            found.setdefault((*entry.key, str(schema.config_of(entry))), entry)
    return list(found.values())


def problem_of(entry, m=None):
    """What the tuner measured."""
    sizes = {"n": entry.n, "k": entry.k, "group_size": entry.group_size}
    m = entry.m if m is None else m
    if entry.op == "decode_attention":
        for cache in CACHES:
            head_dim = entry.format.rpartition("x")[2]
            if table_format(np.dtype(cache), int(head_dim)) == entry.format:
                more = {"cache": cache, "head_dim": int(head_dim)}
                return problem(Job(op=entry.op, ms=(m,), **sizes, **more), m, 132)
    for op, kind in PROBLEMS.items():
        one = problem(Job(op=op, ms=(m,), **sizes), m, 132)
        if op != "decode_attention" and (kind.table_op, one.format) == (entry.op, entry.format):
            return one
    raise AssertionError(f"the tuner has no {entry.op} of {entry.format}")


def compile_and_check(one, config):
    candidate = measure.Candidate("mosaic", dataclasses.asdict(config))
    measure.compile_candidate(one, candidate, measure.Options(compile_only=True))
    assert candidate.dropped is None
    assert candidate.spills == 0
    assert 0 < candidate.shared <= h200.SHARED_MEMORY


def label(entry):
    return f"{entry.op}-{entry.format}-{entry.m}x{entry.n}x{entry.k}"


@pytest.mark.parametrize("entry", distinct(ENTRIES), ids=label)
def test_tuned_configurations(entry):
    compile_and_check(problem_of(entry), schema.config_of(entry))


@pytest.mark.parametrize("entry", distinct(e for e in ENTRIES if e.m == 64)[:12], ids=label)
def test_those_that_fewer_tokens_cut(entry):
    if entry.op not in ("prepared_gemm", "w4a8_gemm"):
        pytest.skip("other ops are not cut so")
    config = fitted(schema.config_of(entry), 24)
    compile_and_check(problem_of(entry, 24), config)


def test_there_are_few():
    assert len(distinct(ENTRIES)) < MOST


def test_the_check_itself():
    """Of an entry made up here, since there may be no table."""
    entry = schema.Entry(
        op="scaled_gemm", format="int8", m=16, n=512, k=1024, group_size=None,
        implementation="mosaic", us=1.0, bound_us=1.0, row_error=0.0,
        config={"columns": 16, "stages": 6},
    )  # fmt: skip
    compile_and_check(problem_of(entry), schema.config_of(entry))
    broken = schema.config_of(dataclasses.replace(entry, config={"columns": 256, "stages": 32}))
    with pytest.raises(AssertionError):
        compile_and_check(problem_of(entry), broken)
