"""Every configuration of the tuned tables compiles for an H200: no spills, memory that fits."""

import dataclasses

import h200
import numpy as np
import pytest
from qjax_kernels.decode_attention.choice import table_format
from qjax_kernels.scaled_gemm import choice as scaled
from qjax_kernels.tuned import lookup, schema
from qjax_kernels.tuning import measure
from qjax_kernels.tuning.jobs import Job
from qjax_kernels.tuning.problems import PROBLEMS, problem
from qjax_kernels.weight_only_gemm import choice as weight_only

pytestmark = pytest.mark.heavy

MOST = 150  # so that these tests take minutes
FITTED = {"prepared_gemm": weight_only.fitted, "w4a8_gemm": weight_only.fitted}
FITTED |= dict.fromkeys(("scaled_gemm", "plain_gemm", "gemm_swiglu"), scaled.fitted)
CACHES = ("bfloat16", "float8_e4m3fn", "int8")
ENTRIES = [
    entry
    for path in sorted(lookup.directory().glob("*.json"))
    for entry in schema.parse(path.read_text(), path.name).entries
]


def distinct(entries):
    """One entry for each configuration of an op and format, the smallest that uses it, and one for
    each that is left of a configuration when the fewest tokens cut it."""
    mosaic = [entry for entry in entries if entry.implementation == "mosaic"]
    mosaic.sort(key=lambda entry: entry.m * entry.n * entry.k)
    found = {}
    for entry in [*mosaic, *map(with_fewest_tokens, mosaic)]:
        found.setdefault((*entry.key, str(schema.config_of(entry))), entry)
    return list(found.values())


def with_fewest_tokens(entry):
    """An entry as it serves the fewest tokens that it is near to."""
    if entry.op not in FITTED:
        return entry
    m = next(m for m in range(1, entry.m + 1) if not lookup.far(entry, m))
    config = FITTED[entry.op](schema.config_of(entry), m)
    return dataclasses.replace(entry, m=m, config=dataclasses.asdict(config))


def problem_of(entry):
    """What the tuner measured."""
    m, sizes = entry.m, {"n": entry.n, "k": entry.k, "group_size": entry.group_size}
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


def test_there_are_few():
    assert len(distinct(ENTRIES)) < MOST


MADE_UP = schema.Entry(
    op="scaled_gemm", format="int8", m=16, n=512, k=1024, group_size=None,
    implementation="mosaic", us=1.0, bound_us=1.0, row_error=0.0,
    config={"columns": 16, "stages": 6},
)  # fmt: skip


def test_the_check_itself():
    """Of an entry made up here, since there may be no table."""
    compile_and_check(problem_of(MADE_UP), schema.config_of(MADE_UP))
    broken = schema.config_of(dataclasses.replace(MADE_UP, config={"columns": 256, "stages": 32}))
    with pytest.raises(AssertionError):
        compile_and_check(problem_of(MADE_UP), broken)


def test_what_is_distinct():
    wide = dataclasses.replace(MADE_UP, config={"columns": 64, "stages": 6})
    large = dataclasses.replace(MADE_UP, n=8192)
    xla = dataclasses.replace(MADE_UP, m=64, implementation="xla", config={})
    assert distinct([large, MADE_UP, xla]) == [MADE_UP]
    # 64 columns serve 9 tokens as 16.
    assert [entry.m for entry in distinct([wide])] == [16, 9]
    assert distinct([large, wide, MADE_UP]) == [wide, MADE_UP]
    sequences = {"op": "decode_attention", "format": "bfloat16x128", "config": {"stages": 5}}
    sequences = dataclasses.replace(MADE_UP, **sequences)
    assert distinct([sequences]) == [sequences]
