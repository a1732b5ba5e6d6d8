"""Products of rows sorted by expert against float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from qjax_kernels.grouped_gemm import triton, xla
from qjax_kernels.grouped_gemm.api import grouped_gemm, prepare, prepared_grouped_gemm, unprepare
from qjax_kernels.grouped_gemm.config import Config, Problem, candidates, row_tiles

SIXTEEN = ("bfloat16", "float16")
# The largest relative error of one rounding.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
RANGES = {"int4": (-8, 8), "int8": (-128, 128)}


@dataclasses.dataclass
class Case:
    """Arguments of one call, and what float64 makes of them."""

    x: Any
    values: Any
    sizes: Any
    scale: Any = None
    zero_point: Any = None
    x_scale: Any = None
    row_ids: Any = None
    row_scale: Any = None

    def exact(self):
        """(y, the sum of the magnitudes that add up to it), float64 [rows, out]."""
        x, w = oracles.decode(np.asarray(self.x)), oracles.decode(np.asarray(self.values))
        if self.scale is not None:
            group = w.shape[2] // self.scale.shape[2]
            if self.zero_point is not None:
                w = w - np.repeat(np.asarray(self.zero_point, np.float64), group, axis=2)
            w = w * np.repeat(np.asarray(self.scale, np.float64), group, axis=2)
        if self.x_scale is not None:
            x = x * np.asarray(self.x_scale, np.float64)
        ids = np.arange(len(x)) if self.row_ids is None else np.asarray(self.row_ids)
        y, size = np.zeros((2, len(ids), w.shape[1]))
        row = 0
        for expert, count in enumerate(np.asarray(self.sizes)):
            for _ in range(count):
                factor = 1.0 if self.row_scale is None else float(self.row_scale[row])
                y[row] = w[expert] @ x[ids[row]] * factor
                size[row] = np.abs(w[expert]) @ np.abs(x[ids[row]]) * abs(factor)
                row += 1
        return y, size


def make(seed, fmt, *, sizes=(5, 0, 11, 3), rows=23, out=72, features=160, group=None, zero=False,
         ids=False, weighted=False, tokens=None):  # fmt: skip
    """fmt: 'x' or 'x.w', types of activations and weights. Outliers, rows of different sizes."""
    rng = np.random.default_rng(seed)
    x_type, _, w_type = fmt.partition(".")
    w_type = w_type or x_type
    experts = len(sizes)
    tokens = tokens or (9 if ids else rows)
    if x_type == "int8":
        x = rng.integers(-127, 128, (tokens, features))
    else:
        x = rng.normal(size=(tokens, features)) * 4.0 ** rng.uniform(-2, 2, (tokens, 1))
        x[:, rng.integers(features)] *= 10
    shape = (experts, out, features)
    w = rng.integers(*RANGES[w_type], shape) if w_type in RANGES else rng.normal(size=shape)
    scale = zero_point = None
    if w_type not in (*SIXTEEN, "float32"):
        groups = features // (group or features)
        scale = jnp.asarray(2.0 ** rng.uniform(-9, -5, (experts, out, groups)), jnp.bfloat16)
        if w_type == "int4" and zero:
            zero_point = jnp.asarray(rng.integers(-8, 8, scale.shape), jnp.int4)
        elif zero:
            zero_point = jnp.asarray(rng.integers(-20, 20, scale.shape), jnp.int8)
    eight = x_type not in (*SIXTEEN, "float32")
    return Case(
        x=jnp.asarray(x, x_type),
        values=jnp.asarray(w, w_type),
        sizes=jnp.asarray(sizes, jnp.int32),
        scale=scale.astype(jnp.float32) if eight else scale,
        zero_point=zero_point,
        x_scale=jnp.asarray(2.0 ** rng.uniform(-9, -5, (tokens, 1)), jnp.float32)
        if eight
        else None,
        row_ids=jnp.asarray(rng.integers(0, tokens, rows), jnp.int32) if ids else None,
        row_scale=jnp.asarray(rng.uniform(-2, 2, rows), jnp.float32) if weighted else None,
    )


def interpreted(function):
    """The Triton kernel under Triton's interpreter."""

    def run(*args, **kwargs):
        pytest.importorskip("triton")
        import triton_interpreter  # noqa: F401

        return function(*args, **kwargs, interpret=True)

    return run


def run(case, name, out="float32", config=None):
    """The result of an implementation; int4 is packed for Triton."""
    dtype = jnp.dtype(out)
    extra = {} if config is None else {"config": config}
    if name == "triton" and case.values.dtype == jnp.int4:
        weight = prepare(case.values, case.scale, case.zero_point)
        function = interpreted(triton.prepared_grouped_gemm)
        arguments = (case.x, weight, case.sizes, case.row_ids, case.row_scale)
    else:
        function = xla.grouped_gemm if name == "xla" else interpreted(triton.grouped_gemm)
        arguments = tuple(getattr(case, f.name) for f in dataclasses.fields(case))
    return np.asarray(function(*arguments, out_dtype=dtype, **extra)).astype(np.float64)


def check(case, y, out="float32"):
    """Float32 sums of `features` terms, the weights perhaps rounded to the type of x after scaling
    (as dequantized weights are), and one rounding of the result.

    int8 sums are exact; every error here is relative to the sum of magnitudes of an element.
    """
    exact, size = case.exact()
    features = case.x.shape[1]
    relative = (features + 8) * 2.0**-24
    rounded = case.scale is not None and (
        case.scale.shape[2] > 1 or case.zero_point is not None or case.values.dtype == jnp.int4
    )
    if rounded:
        relative += UNIT[case.x.dtype.name]
    bound = relative * size + 1.01 * UNIT[out] * np.abs(exact)
    assert y.shape == exact.shape
    wrong = ~(np.abs(y - exact) <= bound)  # NaN is wrong
    worst = wrong.sum(axis=-1)
    assert not worst.any(), f"row {worst.argmax()}: {worst.max()} of {exact.shape[1]} are wrong"
    assert not y[int(np.asarray(case.sizes).sum()) :].any()


implementations = pytest.mark.parametrize("name", ["xla", "triton"])
FORMATS = [
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "int8",
    "bfloat16.int8",
    "float16.int8",
    "bfloat16.float8_e4m3fn",
    "bfloat16.float8_e5m2",
    "bfloat16.int4",
    "float16.int4",
]


@pytest.mark.parametrize("fmt", FORMATS)
@implementations
def test_formats(name, fmt):
    case = make(1, fmt, ids=True, weighted=True)
    check(case, run(case, name))


@pytest.mark.parametrize("fmt", ["bfloat16", "float8_e4m3fn", "bfloat16.int4"])
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ((0, 0, 0), 5),  # nobody
        ((0, 40, 0), 40),  # one has everything
        ((0, 0, 1), 1),
        ((16, 16, 0), 32),  # tiles are full
        ((1, 1, 1, 1, 1, 1, 1), 7),
        ((17, 0, 0, 15, 1), 49),
        ((3,), 20),
    ],
)
@implementations
def test_group_sizes(name, sizes, rows, fmt):
    case = make(2, fmt, sizes=sizes, rows=rows, out=40, features=128, ids=rows % 2 == 0)
    check(case, run(case, name))


@pytest.mark.parametrize("fmt", ["bfloat16", "int8", "bfloat16.int4"])
@implementations
def test_many_experts(name, fmt):
    rng = np.random.default_rng(3)
    sizes = rng.multinomial(60, rng.dirichlet(np.full(40, 0.3)))
    case = make(3, fmt, sizes=tuple(sizes), rows=63, out=24, features=64, ids=True)
    check(case, run(case, name))


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("scale_sums", [True, False])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_int4_groups(group, zero, scale_sums, rows):
    features = 384 if group == 128 else 192
    case = make(4, "bfloat16.int4", group=group, zero=zero, features=features, rows=21)
    # Steps of 128 columns, and of 256 in parts that have one scale.
    config = Config(rows=rows, columns=64, k_bytes=64 if rows == 16 else 128, scale_sums=scale_sums)
    check(case, run(case, "triton", config=config))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [32, 48, None])
@pytest.mark.parametrize("w_type", ["int4", "int8"])
def test_groups_of_the_reference(w_type, group, zero):
    case = make(5, f"bfloat16.{w_type}", group=group, zero=zero, features=192)
    check(case, run(case, "xla"))


def test_the_scales_of_int4_are_not_rounded():
    case = make(6, "float16.int4", group=128, features=256)
    case.scale = case.scale.astype(jnp.float32) * np.float32(1.0001)
    exact, size = case.exact()
    y = run(case, "triton", config=Config(rows=16, columns=64))
    assert (np.abs(y - exact) <= 264 * 2.0**-24 * size).all()


@pytest.mark.parametrize(
    "fmt", ["bfloat16", "float8_e4m3fn", "int8", "float16.int8", "bfloat16.int4"]
)
@pytest.mark.parametrize(
    "config",
    [
        Config(rows=16, columns=16, k_bytes=256, swap=False, band=2),
        Config(rows=64, columns=32, k_bytes=64, swap=False, band=1),
        Config(rows=8, columns=64, k_bytes=128, band=3),
        Config(rows=32, columns=128, k_bytes=512),
    ],
)
def test_every_tile(config, fmt):
    case = make(7, fmt, sizes=(9, 34, 0, 2), rows=46, out=136, features=320, weighted=True)
    check(case, run(case, "triton", config=config))


@pytest.mark.parametrize("features", [1, 16, 33, 100])
@pytest.mark.parametrize("fmt", ["bfloat16", "int8", "bfloat16.int4"])
@implementations
def test_lengths_that_fill_no_tile(name, fmt, features):
    case = make(8, fmt, features=features, out=1)
    check(case, run(case, name))


@pytest.mark.parametrize("out", ["bfloat16", "float16"])
@implementations
def test_results_are_rounded_once(name, out):
    case = make(9, "bfloat16", weighted=True)
    check(case, run(case, name, out), out)


@pytest.mark.parametrize("fmt", ["bfloat16", "float8_e4m3fn", "int8", "bfloat16.int4"])
@implementations
def test_what_belongs_to_no_row_is_not_read(name, fmt):
    case = make(10, fmt, sizes=(4, 0, 3), rows=10, ids=True, weighted=True, tokens=9)
    case.row_ids = jnp.asarray([0, 1, 2, 3, 0, 1, 2, 8, 8, 8], jnp.int32)
    clean = run(case, name)
    check(case, clean)

    def spoil(array, index):
        if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        return array.at[index].set(jnp.nan)

    for field in ("x", "x_scale"):
        setattr(case, field, spoil(getattr(case, field), slice(4, None)))
    for field in ("values", "scale"):
        setattr(case, field, spoil(getattr(case, field), 1))
    case.row_scale = spoil(case.row_scale, slice(7, None))
    assert (run(case, name) == clean).all()


@pytest.mark.parametrize("fmt", ["bfloat16", "bfloat16.int4", "int8"])
def test_a_row_does_not_depend_on_the_others(fmt):
    case = make(11, fmt, sizes=(30, 20), rows=50)
    whole = run(case, "xla")
    rows = np.r_[3:7, 40:41]
    few = dataclasses.replace(
        case,
        x=case.x[rows],
        x_scale=None if case.x_scale is None else case.x_scale[rows],
        sizes=jnp.asarray([4, 1], jnp.int32),
    )
    assert (run(few, "xla") == whole[rows]).all()


def test_int8_sums_are_exact():
    case = make(12, "int8", features=4096, out=8, sizes=(2, 1), rows=3)
    case.x_scale = jnp.ones_like(case.x_scale)
    case.scale = jnp.ones_like(case.scale)
    case.x = jnp.full_like(case.x, 127)
    case.values = jnp.full_like(case.values, 127).at[..., 0].set(1)
    for name in ("xla", "triton"):
        assert (run(case, name) == np.float32(4095 * 127 * 127 + 127)).all()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("features", [64, 128, 200, 384])
def test_prepared_weights_come_back(features, zero):
    case = make(13, "bfloat16.int4", features=features, zero=zero, group=features // 1)
    weight = prepare(case.values, case.scale, case.zero_point)
    assert weight.shape == case.values.shape
    assert weight.group_size == features
    values, scale, zero_point = unprepare(weight)
    assert (values == case.values).all()
    assert (scale == case.scale.astype(jnp.float32)).all()
    assert (zero_point is None) == (not zero)
    if zero:
        assert (zero_point == case.zero_point).all()


def test_the_reference_takes_prepared_weights():
    case = make(14, "bfloat16.int4", group=32, zero=True, ids=True, weighted=True)
    weight = prepare(case.values, case.scale, case.zero_point)
    y = prepared_grouped_gemm(
        case.x, weight, case.sizes, row_ids=case.row_ids, row_scale=case.row_scale,
        out_dtype=jnp.float32,
    )  # fmt: skip
    assert (np.asarray(y) == run(case, "xla")).all()


def test_group_sizes_may_be_traced_and_there_may_be_no_rows():
    case = make(15, "bfloat16")
    product = jax.jit(lambda sizes: grouped_gemm(case.x, case.values, sizes, out_dtype=jnp.float32))
    check(case, np.asarray(product(case.sizes), np.float64))
    case.sizes = case.sizes[::-1]
    check(case, np.asarray(product(case.sizes), np.float64))
    none = grouped_gemm(case.x[:0], case.values, jnp.zeros_like(case.sizes), out_dtype=jnp.bfloat16)
    assert none.shape == (0, 72)


def test_there_is_a_tile_for_every_row():
    rng = np.random.default_rng(16)
    for _ in range(200):
        experts, tile = rng.integers(1, 12), 2 ** rng.integers(0, 6)
        sizes = rng.integers(0, 70, experts) * rng.integers(0, 2, experts)
        rows = max(sizes.sum() + rng.integers(0, 40), 1)
        needed = (-(-sizes // tile)).sum() + -(-(rows - sizes.sum()) // tile)
        assert needed <= row_tiles(int(rows), int(experts), int(tile))


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (16, 8), (16, 4)])
@pytest.mark.parametrize("rows", [1, 16, 256, 4096])
def test_candidates(rows, bits, capability):
    problem = Problem(
        rows=rows, experts=8, out=4096, features=14336, x_bits=bits[0], bits=bits[1], group=128,
        capability=capability,
    )  # fmt: skip
    found = candidates(problem)
    assert 1 <= len(found) <= 6
    assert len(set(found)) == len(found)


def test_what_does_not_fit_together_is_refused():
    case = make(17, "bfloat16.int8", group=80)
    good = {"scale": case.scale, "out_dtype": jnp.bfloat16}
    eight = make(18, "int8")
    floats = make(19, "bfloat16")
    for message, x, values, kwargs in (
        ("tokens, in", case.x[:, :-1], case.values, good),
        ("one type", case.x.astype(jnp.float16), floats.values, {"out_dtype": jnp.bfloat16}),
        ("one type", eight.x, case.values.astype(jnp.int4), good),
        ("x_scale", eight.x, eight.values, good),
        ("must have one", case.x, case.values, {"out_dtype": jnp.bfloat16}),
        ("must have one", floats.x, floats.values, good),
        ("dividing", case.x, case.values, good | {"scale": case.scale[:, 1:]}),
        ("zero_point is", case.x, case.values, good | {"zero_point": jnp.zeros(3, jnp.int8)}),
        ("more than one group", case.x, case.values.astype(jnp.float8_e4m3fn), good),
        ("row_ids", case.x, case.values, good | {"row_ids": jnp.zeros(3)}),
        ("row_scale", case.x, case.values, good | {"row_scale": jnp.zeros(3)}),
        ("no implementation", case.x, case.values, good | {"implementation": "cuda"}),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_gemm(x, values, case.sizes, **kwargs)
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_gemm(case.x, case.values, case.sizes[1:], **good)
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        grouped_gemm(
            floats.x, floats.values, floats.sizes, out_dtype=jnp.bfloat16, implementation="triton"
        )
    with pytest.raises(NotImplementedError, match="groups"):
        grouped_gemm(case.x, case.values, case.sizes, **good, implementation="triton")
    with pytest.raises(NotImplementedError, match="prepare"):
        grouped_gemm(case.x, case.values.astype(jnp.int4), case.sizes, **good,
                     implementation="triton")  # fmt: skip
    with pytest.raises(NotImplementedError, match="only int4"):
        prepare(case.values, case.scale)
    with pytest.raises(NotImplementedError, match="groups of 80"):
        prepare(case.values.astype(jnp.int4), case.scale)
    weight = prepare(case.values.astype(jnp.int4), case.scale[..., :1])
    with pytest.raises(ValueError, match="floating point"):
        prepared_grouped_gemm(eight.x, weight, case.sizes, out_dtype=jnp.bfloat16)
