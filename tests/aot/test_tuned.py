"""Every configuration of the tuned tables compiles for an H200: no spills, memory that fits."""

import dataclasses

import h200
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import timing
from qjax_kernels.decode_attention.choice import table_format
from qjax_kernels.tuned import schema
from qjax_kernels.tuning.jobs import Job
from qjax_kernels.tuning.problems import PROBLEMS, problem
from tuned_tables import ENTRIES, distinct

pytestmark = pytest.mark.heavy

MOST = 150  # so that these tests take minutes
CACHES = ("bfloat16", "float8_e4m3fn", "int8")


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
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    rotated = jax.eval_shape(one.rotated, seed)
    operands = jax.eval_shape(one.shared, seed), jax.eval_shape(one.prepare, rotated)
    operands = jax.tree.map(lambda x: h200.shape(x.shape, x.dtype), operands)
    compiled = h200.compile_for_h200(timing.chain(one.call(config)), operands)
    kernel, *merge = compiled.kernels
    assert len(merge) == bool(getattr(config, "persistent", 0))
    assert [kernel.spills for kernel in compiled.kernels] == [0] * len(compiled.kernels)
    assert 0 < kernel.shared <= h200.SHARED_MEMORY
    assert "wgmma.mma_async" in kernel.ptx
    assert ".local" not in kernel.ptx


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
    with pytest.raises(NotImplementedError, match="shared memory"):
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
