"""The Triton products in Triton's interpreter against float64, and the packed order of weights."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from qjax_kernels.scaled_gemm import triton as scaled
from qjax_kernels.scaled_gemm import triton_config as scaled_config
from qjax_kernels.scaled_gemm import xla as scaled_xla
from qjax_kernels.scaled_gemm.api import scaled_gemm
from qjax_kernels.triton_gpus import GPUS, gpu
from qjax_kernels.weight_only_gemm import portable, triton
from qjax_kernels.weight_only_gemm import triton_config as config
from qjax_kernels.weight_only_gemm.triton_config import Config

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
LIMITS = {"int4": (-8, 8), "int8": (-128, 128)}
CORES = {80: 108, 86: 80, 89: 58, 90: 132, 100: 148}


def interpreted(function, *args, **kwargs):
    pytest.importorskip("triton")
    import triton_interpreter  # noqa: F401

    return function(*args, **kwargs, interpret=True)


def weight(out, features, format, group_size=0, zeros=False, scale_dtype="bfloat16"):
    """Canonical arrays, with scales that differ by a factor of 20."""
    rng = np.random.default_rng(out + features)
    if format in LIMITS:
        values = rng.integers(*LIMITS[format], (out, features))
    else:
        values = rng.normal(size=(out, features)) * 20
    values = jnp.asarray(values.astype(np.float32)).astype(format)
    groups = features // group_size if group_size else 1
    scale = jnp.asarray(np.exp(rng.uniform(-3, 0, (out, groups))), scale_dtype)
    if not zeros:
        return values, scale, None
    return values, scale, jnp.asarray(rng.integers(*LIMITS[format], (out, groups)), jnp.int32)


def float64(values, scale, zero):
    """The weight that canonical arrays mean."""
    width = values.shape[1] // scale.shape[1]
    dense = oracles.decode(np.asarray(values))
    if zero is not None:
        dense = dense - np.repeat(np.asarray(zero, np.float64), width, axis=1)
    return dense * np.repeat(np.asarray(scale, np.float64), width, axis=1)


def activations(tokens, features, dtype, outliers=False):
    x = np.random.default_rng(tokens).normal(size=(tokens, features))
    if outliers:
        x[:, ::97] *= 300
    return jnp.asarray(x, dtype)


def check(y, x, dense, bias=0.0, weight_unit=0.0):
    """Every element is as close as roundings allow.

    One rounding to the type of y; `weight_unit` of each weight; and one in float32 for each number
    that is added up, in any order, and a few for scales.
    """
    wide = np.asarray(x, np.float64)
    exact = wide @ dense.T + bias
    size = np.abs(wide) @ np.abs(dense).T + np.abs(bias)
    slack = (weight_unit + (x.shape[-1] + 8) * 2.0**-24) * size
    bound = slack + UNIT[y.dtype.name] * (np.abs(exact) + slack)
    found = np.asarray(y, np.float64)
    assert found.shape == exact.shape
    assert (np.abs(found - exact) <= bound).all()
    error = oracles.max_row_error(found, exact)
    assert error <= 2 * (UNIT[y.dtype.name] + weight_unit) + 1e-5


SMALL = Config(outs=32, tokens=8, chunks=2, warps=2, stages=3)
LARGE = Config(outs=64, tokens=128, chunks=1, warps=4, stages=3)
FORMATS = [
    ("int4", 128, False), ("int4", 128, True), ("int4", 64, True), ("int4", 32, False),
    ("int4", 32, True), ("int4", 256, False), ("int4", 0, False), ("int4", 0, True),
    ("int8", 0, False), ("int8", 0, True), ("int8", 32, True), ("int8", 128, False),
    ("float8_e4m3fn", 0, False), ("float8_e4m3fn", 128, False), ("float8_e5m2", 0, False),
    ("float8_e5m2", 64, False),
]  # fmt: skip


def fitted(tiles, packed):
    """With so few chunks that a step has one scale, as `candidates` have."""
    width = portable.WIDTHS[packed.format]
    while tiles.chunks > 1 and config.group_of(packed) % (tiles.chunks * width):
        tiles = dataclasses.replace(tiles, chunks=tiles.chunks // 2)
    return tiles


@pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("format", "group_size", "zeros"), FORMATS)
def test_formats(format, group_size, zeros, dtype, tiles):
    arrays = weight(48, 512, format, group_size, zeros)
    packed = portable.prepare_portable(*arrays)
    x = activations(5, 512, dtype, outliers=True)
    bias = np.linspace(-3, 3, 48, dtype=np.float32)
    y = interpreted(
        triton.packed_gemm, x, packed, jnp.asarray(bias), out_dtype=jnp.dtype("float32"),
        config=fitted(tiles, packed),
    )  # fmt: skip
    # Scales of groups go to the weights with many tokens, or where a step has two of them. In
    # float16 the scale is rounded, in bfloat16 it is one.
    rounded = group_size and (tiles is LARGE or (format == "int4" and group_size == 32))
    check(y, x, float64(*arrays), bias, 2 * UNIT[dtype] if rounded else 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["int4", "int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("zeros", [None, -8, -1, 7])
def test_every_code_is_exact(format, dtype, zeros):
    if zeros is not None and format not in LIMITS:
        pytest.skip("no zero points with floats")
    codes = np.arange(256, dtype=np.uint8)
    if format == "int4":
        values = jnp.asarray(codes % 16 - np.float32(8)).astype(format)
    else:
        values = jnp.asarray(codes).view(format)
        values = jnp.where(jnp.isfinite(values), values, jnp.zeros_like(values))
    dense = oracles.decode(np.asarray(values))
    zero = None if zeros is None else jnp.full((1, 1), zeros, jnp.int32)
    packed = portable.prepare_portable(values[None], jnp.ones((1, 1)), zero)
    y = interpreted(
        triton.packed_gemm, jnp.eye(256, dtype=dtype), packed, out_dtype=jnp.dtype("float32"),
        config=Config(outs=16, tokens=64, chunks=1, warps=2, stages=2),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(y)[:, 0], dense - (zeros or 0))


def test_numbers_that_are_not_finite():
    """As documented: most become numbers."""
    codes = np.array([0x7F, 0x7C, 0xFD], np.uint8)
    expected = {
        ("float8_e4m3fn", "bfloat16"): [480, 384, -416],
        ("float8_e4m3fn", "float16"): [480, 384, -416],
        ("float8_e5m2", "bfloat16"): [114688, 65536, -81920],
        ("float8_e5m2", "float16"): [np.nan, np.inf, np.nan],
    }
    for (format, dtype), numbers in expected.items():
        packed = portable.prepare_portable(
            jnp.asarray(codes)[:, None].view(format), jnp.ones((3, 1))
        )
        x = jnp.ones((1, 1), dtype)
        y = interpreted(triton.packed_gemm, x, packed, out_dtype=jnp.dtype("float32"))
        if dtype == "float16" and format == "float8_e5m2":
            assert not np.isfinite(y).any()
        else:
            np.testing.assert_array_equal(np.asarray(y)[0], numbers)


@pytest.mark.parametrize(
    ("tokens", "out", "features", "format", "group_size", "tiles"),
    [
        (1, 32, 64, "int4", 0, SMALL),
        (3, 50, 72, "int4", 0, SMALL),  # nothing divides
        (9, 40, 1000, "int4", 0, dataclasses.replace(SMALL, splits=3)),
        (20, 33, 96, "int4", 32, SMALL),  # an odd number of groups, in pairs
        (20, 200, 384, "int4", 128, dataclasses.replace(SMALL, splits=2, band=2)),
        (5, 40, 100, "int8", 0, SMALL),
        (5, 40, 192, "int8", 96, SMALL),
        (70, 72, 328, "float8_e4m3fn", 0, dataclasses.replace(LARGE, band=1)),
        (129, 136, 128, "int4", 64, LARGE),
        (260, 130, 64, "int8", 64, dataclasses.replace(LARGE, band=2, chunks=2)),
    ],
)
def test_any_shape(tokens, out, features, format, group_size, tiles):
    arrays = weight(out, features, format, group_size)
    packed = portable.prepare_portable(*arrays)
    x = activations(tokens, features, jnp.bfloat16)
    bias = np.linspace(-1, 1, out, dtype=np.float32)
    y = interpreted(
        triton.packed_gemm, x, packed, jnp.asarray(bias), out_dtype=jnp.dtype("bfloat16"),
        config=fitted(tiles, packed),
    )  # fmt: skip
    rounded = group_size and (tiles.tokens > config.FEW or config.paired(packed))
    check(y, x, float64(*arrays), bias, 2 * UNIT["bfloat16"] if rounded else 0)


def test_scales_beyond_float16():
    """Steps of a weight may be smaller than float16's smallest number; results are not."""
    values, scale, _ = weight(16, 256, "int4", 128)
    arrays = values, scale.astype(jnp.float32) * 1e-7, None
    x = activations(3, 256, jnp.float16) * 100
    packed = portable.prepare_portable(*arrays)
    for tiles in (SMALL, LARGE):
        y = interpreted(triton.packed_gemm, x, packed, out_dtype=jnp.dtype("float32"), config=tiles)
        check(y, x, float64(*arrays), weight_unit=2 * UNIT["float16"])


def test_leading_axes_and_one_row_alike():
    packed = portable.prepare_portable(*weight(16, 128, "int4", 64))
    x = activations(6, 128, jnp.bfloat16)

    def run(x):
        return interpreted(triton.packed_gemm, x, packed, out_dtype=jnp.dtype("float32"))

    np.testing.assert_array_equal(run(x.reshape(2, 3, 128)).reshape(6, 16), run(x))
    np.testing.assert_array_equal(run(x[4:5]), run(x)[4:5])


@pytest.mark.parametrize(("format", "group_size", "zeros"), FORMATS)
def test_packing_is_reversible(format, group_size, zeros):
    scale_dtype = {64: "float16", 32: "float32", 256: "float32"}.get(group_size, "bfloat16")
    arrays = weight(7, 768, format, group_size, zeros, scale_dtype)
    found = portable.unpack(portable.prepare_portable(*arrays))
    assert [None if a is None else a.dtype for a in found] == [
        None if a is None else a.dtype for a in arrays
    ]
    assert (oracles.decode(found[0]) == oracles.decode(arrays[0])).all()
    # Beside zero points, 16 bits of a scale are kept, the first of which is always 1.
    kept = 2.0**-16 if zeros and scale_dtype == "float32" else 0.0
    np.testing.assert_allclose(np.float64(found[1]), np.float64(arrays[1]), rtol=kept, atol=0)
    if zeros:
        np.testing.assert_array_equal(found[2], arrays[2])


def test_order_of_bytes():
    """As it is documented, for other kernels that read it."""
    values = np.random.default_rng(0).integers(-8, 8, (3, 128))
    words = portable.prepare_portable(jnp.asarray(values, jnp.int4), jnp.ones((3, 1))).words
    assert words.shape == (2, 3, 32)
    for chunk, row, byte in itertools.product(range(2), range(3), range(32)):
        low, high = (int(values[row, 64 * chunk + byte + half]) + 8 for half in (0, 32))
        assert words[chunk, row, byte] == low + 16 * high
    values = np.random.default_rng(1).integers(-128, 128, (3, 64)).astype(np.int8)
    words = portable.prepare_portable(jnp.asarray(values), jnp.ones((3, 1))).words
    expected = values.reshape(3, 2, 32).swapaxes(0, 1).view(np.uint8)
    np.testing.assert_array_equal(words, expected)


def test_a_scale_for_several_rows():
    values, scale, _ = weight(8, 128, "int8", 64)
    packed = portable.prepare_portable(values, scale[::4])
    np.testing.assert_array_equal(portable.unpack(packed)[1], jnp.repeat(scale[::4], 4, axis=0))


@pytest.mark.parametrize(("format", "group_size", "zeros"), FORMATS[::3])
def test_xla(format, group_size, zeros):
    arrays = weight(24, 256, format, group_size, zeros)
    x, bias = activations(3, 256, jnp.float32), np.ones(24, np.float32)
    y = portable.packed_gemm(
        x, portable.prepare_portable(*arrays), jnp.asarray(bias), out_dtype=jnp.dtype("float32")
    )
    check(y, x, float64(*arrays), bias)


def test_refusals():
    packed = portable.prepare_portable(*weight(16, 64, "int4"))
    x = activations(2, 64, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        portable.packed_gemm(x, packed, out_dtype=jnp.bfloat16, implementation="triton")
    with pytest.raises(NotImplementedError, match="x is float32"):
        interpreted(triton.packed_gemm, x.astype(jnp.float32), packed, out_dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="empty"):
        interpreted(triton.packed_gemm, x[:0], packed, out_dtype=jnp.float32)
    assert portable.packed_gemm(x[:0], packed, out_dtype=jnp.float32).shape == (0, 16)
    with pytest.raises(ValueError, match="last axes must agree"):
        portable.packed_gemm(x[:, :32], packed, out_dtype=jnp.float32)
    with pytest.raises(ValueError, match="bias is"):
        portable.packed_gemm(x, packed, jnp.ones(3), out_dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="groups of 96"):
        portable.prepare_portable(*weight(16, 192, "int4", 96))
    with pytest.raises(NotImplementedError, match="weights in int16"):
        portable.prepare_portable(jnp.ones((16, 64), jnp.int16), jnp.ones((16, 1)))
    values, scale, _ = weight(16, 64, "float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="a zero point with float8"):
        portable.prepare_portable(values, scale, jnp.zeros((16, 1), jnp.int32))


def test_a_gpu_too_old():
    x, one = jnp.ones((2, 64), jnp.float8_e4m3fn), jnp.ones((1, 1))

    def on(kind, function, *args):
        device = AbstractDevice(device_kind=kind, num_cores=80, platform="gpu")
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            jax.eval_shape(function, *args)

    def fp8(x):
        return scaled_gemm(x, one, x, one, out_dtype=jnp.bfloat16, implementation="triton")

    pytest.importorskip("triton")
    on("NVIDIA L4", fp8, x)
    with pytest.raises(NotImplementedError, match=r"8\.9 \(fp8\), not 8\.6"):
        on("NVIDIA A10G", fp8, x)
    on("NVIDIA A10G", fp8, x.astype(jnp.int8))
    with pytest.raises(NotImplementedError, match="Tesla V100"):
        on("Tesla V100-SXM2", fp8, x.astype(jnp.int8))


@pytest.mark.parametrize("capability", GPUS)
def test_candidates(capability):
    shapes = [(64, 64), (8192, 8192), (1024, 4096), (4096, 14336), (100, 192), (128256, 4096)]
    for m, (n, k) in itertools.product((1, 2, 16, 17, 64, 65, 256, 8192), shapes):
        for group, zeros in itertools.product((0, 32, 64), (False, True)):
            packed = jax.eval_shape(
                portable.prepare_portable,
                jax.ShapeDtypeStruct((n, k), jnp.int4),
                jax.ShapeDtypeStruct((n, k // group if group else 1), jnp.bfloat16),
                jax.ShapeDtypeStruct((n, k // group if group else 1), jnp.int8) if zeros else None,
            )
            found = config.candidates(m, packed, capability=capability, cores=CORES[capability])
            assert 1 <= len(found) == len(set(found)) <= 6
            for tiles in found:
                shared = config.shared_memory(tiles, packed, capability)
                assert shared <= gpu(capability).shared
                assert fitted(tiles, packed) == tiles
        for dtype, blocked in ((jnp.int8, False), (jnp.float8_e4m3fn, k % 128 == 0)):
            found = scaled_config.candidates(
                m, n, k, dtype=dtype, blocked=blocked, capability=capability,
                cores=CORES[capability],
            )  # fmt: skip
            assert 1 <= len(found) == len(set(found)) <= 6
            assert all(
                scaled_config.shared_memory(tiles) <= gpu(capability).shared for tiles in found
            )


def test_unlisted_gpus():
    assert gpu(103) == GPUS[100]
    assert gpu(87) == GPUS[86]
    assert gpu(120).shared == GPUS[89].shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call of `scaled_gemm`; scales: 'vector', 'one' or 'blocks'."""

    m: int
    n: int
    k: int
    dtype: str = "int8"
    out: str = "bfloat16"
    scales: str = "vector"
    bias: bool = False
    residual: bool = False
    splits: int = 1
    step: int = 64
    tokens: int = 16


CASES = [
    Case(m=1, n=24, k=64),
    Case(m=3, n=50, k=200, out="float32", bias=True),  # nothing divides
    Case(m=5, n=40, k=1024, residual=True, splits=3),
    Case(m=33, n=130, k=384, scales="one", bias=True, residual=True, out="float16"),
    Case(m=5, n=40, k=256, dtype="float8_e4m3fn", bias=True, step=128),
    Case(m=5, n=40, k=256, dtype="float8_e5m2", splits=2, residual=True, out="float32"),
    Case(m=70, n=64, k=128, dtype="float8_e4m3fn", scales="one", tokens=64),
    Case(m=4, n=300, k=384, dtype="float8_e4m3fn", scales="blocks", residual=True, bias=True),
    Case(m=20, n=128, k=512, dtype="float8_e4m3fn", scales="blocks", splits=2, step=128),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaled(case):
    rng = np.random.default_rng(case.m + case.n)
    m, n, k = case.m, case.n, case.k
    x_scale, scale = {
        "vector": ((m, 1), (n, 1)),
        "one": ((), (1, 1)),
        "blocks": ((m, k // 128), (-(-n // 128), k // 128)),
    }[case.scales]

    def values(shape):
        if case.dtype == "int8":
            return jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)
        return jnp.asarray(rng.normal(size=shape) * 8, case.dtype)

    given = {
        "x": values((m, k)),
        "x_scale": jnp.asarray(10 ** rng.uniform(-3, 0, x_scale), jnp.float32),
        "values": values((n, k)),
        "scale": jnp.asarray(10 ** rng.uniform(-2, 0, scale), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=n), jnp.bfloat16) if case.bias else None,
        "residual": jnp.asarray(rng.normal(size=(m, n)), case.out) if case.residual else None,
    }
    tiles = scaled_config.Config(
        outs=32, tokens=case.tokens, step=case.step, warps=4, stages=3, splits=case.splits
    )
    out = jnp.dtype(case.out)
    y = interpreted(scaled.scaled_gemm, **given, out_dtype=out, config=tiles)
    reference = scaled_xla.scaled_gemm(**given, out_dtype=out)

    x, w = (oracles.decode(np.asarray(given[name])) for name in ("x", "values"))
    x_scale, scale = (np.float64(given[name]) for name in ("x_scale", "scale"))
    if case.scales == "blocks":
        x_scale = np.repeat(x_scale, 128, axis=1)
        scale = np.repeat(np.repeat(scale, 128, axis=0)[:n], 128, axis=1)
    x, w = x * x_scale, w * scale
    exact, size = x @ w.T, np.abs(x) @ np.abs(w).T
    for name in ("bias", "residual"):
        if given[name] is not None:
            exact = exact + np.float64(given[name])
            size = size + np.abs(np.float64(given[name]))
    # Products of integers are exact; of floats, a rounding in float32 for each; then the scales.
    slack = (8 if case.dtype == "int8" else k + 8) * 2.0**-24 * size
    bound = slack + UNIT[case.out] * (np.abs(exact) + slack)
    assert y.dtype == out
    assert (np.abs(np.float64(y) - exact) <= bound).all()
    assert (np.abs(np.float64(reference) - exact) <= bound).all()
    assert oracles.max_row_error(np.float64(y), exact) <= 2 * UNIT[case.out] + 1e-5


def test_scaled_refusals():
    x, one = jnp.ones((2, 64), jnp.int8), jnp.ones((1, 1))

    def run(**given):
        given = {"x": x, "x_scale": one, "values": x, "scale": one} | given
        interpreted(scaled.scaled_gemm, **given, out_dtype=jnp.dtype(jnp.bfloat16))

    with pytest.raises(NotImplementedError, match="not float16"):
        run(x=x.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="and float16, not float32"):
        run(scale=one.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="the bias is int32"):
        run(bias=jnp.ones(2, jnp.int32))
    with pytest.raises(NotImplementedError, match="empty"):
        run(x=x[:0])
    with pytest.raises(NotImplementedError, match="one scale or one for each row"):
        run(x_scale=jnp.ones((2, 2)))
