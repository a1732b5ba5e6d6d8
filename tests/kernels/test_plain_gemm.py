"""The product of floats against float64: XLA's, and the Mosaic kernel in its interpreter."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import plgpu_shim
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qjax_kernels import target
from qjax_kernels.dispatch import forget, skipped
from qjax_kernels.plain_gemm import api, mosaic
from qjax_kernels.scaled_gemm import choice, plan
from qjax_kernels.scaled_gemm.config import Config

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
# Half the distance of 1 and the number after it: what one rounding may change.
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call of the op."""

    m: int
    n: int
    k: int
    dtype: Any = BF16
    out: Any = BF16
    bias: Any = None
    residual: bool = False
    outliers: bool = False

    def operands(self) -> dict[str, np.ndarray | None]:
        """Random arguments of `api.plain_gemm`, by name."""
        random = np.random.default_rng(self.m + self.n + self.k)
        x, w = (random.normal(size=(rows, self.k)) for rows in (self.m, self.n))
        if self.outliers:  # a few channels a hundred times the others
            x[:, :: self.k // 3] *= 100
        bias = None if self.bias is None else (random.normal(size=self.n) * 9).astype(self.bias)
        residual = (random.normal(size=(self.m, self.n)) * 9).astype(self.out)
        return {
            "x": x.astype(self.dtype),
            "weight": w.astype(self.dtype),
            "bias": bias,
            "residual": residual if self.residual else None,
        }


def check(case: Case, function: Any, **options: Any) -> None:
    """One rounding to the result's type, and one in float32 for each number added up.

    The bound holds for each element, so for the largest error of each row.
    """
    given = case.operands()
    wide = {name: None if v is None else v.astype(np.float64) for name, v in given.items()}
    reference = wide["x"] @ wide["weight"].T
    magnitude = np.abs(wide["x"]) @ np.abs(wide["weight"]).T
    for name in ("bias", "residual"):
        if wide[name] is not None:
            reference, magnitude = reference + wide[name], magnitude + np.abs(wide[name])
    arrays = {name: None if v is None else jnp.asarray(v) for name, v in given.items()}
    y = function(**arrays, out_dtype=jnp.dtype(case.out), **options)
    assert y.shape == reference.shape
    assert y.dtype == case.out
    float32 = (case.k + 8) * ROUNDING[F32]
    bound = ROUNDING[case.out] * np.abs(reference) + float32 * magnitude
    if case.out is F16:
        bound += 2.0**-25  # numbers below 2^-14 have fewer bits
    errors = np.abs(np.asarray(y).astype(np.float64) - reference)
    assert (errors <= bound).all(), f"{(errors > bound).sum()} of {errors.size} are off"


CALLS = [
    Case(m=1, n=24, k=32),
    Case(m=3, n=40, k=100, dtype=F16, out=F16, bias=F32),
    Case(m=5, n=33, k=64, dtype=F32, out=F32, bias=BF16, residual=True),
    Case(m=70, n=16, k=96, out=F32, outliers=True),
]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_xla(case):
    check(case, api.plain_gemm, implementation="xla")


# Sizes that no tile divides, several tiles a block, stages of several lengths.
KERNELS = [
    (Case(m=1, n=200, k=448), Config(stages=2, k_tile=128)),
    (Case(m=1, n=712, k=256, dtype=F16, out=F32), Config(stages=2, k_tile=128, resident=2)),
    (Case(m=5, n=136, k=384, bias=F32), Config(stages=2, k_tile=256, warpgroups=2)),
    (Case(m=16, n=72, k=192, residual=True), Config(stages=3, k_tile=64, columns=16)),
    (
        Case(m=20, n=88, k=224, bias=F32, residual=True, out=F32, outliers=True),
        Config(columns=32, stages=2, k_tile=32),
    ),
    (
        Case(m=70, n=88, k=224, dtype=F16, out=F16, bias=BF16),
        Config(swap=False, warpgroups=2, columns=32, stages=2, k_tile=32),
    ),
]


@pytest.mark.parametrize(("case", "config"), KERNELS, ids=str)
def test_mosaic(case, config):
    """Also: threads use no memory at a time."""
    careful = plgpu.InterpretGPUParams(detect_races=True)
    with mock.patch.object(plgpu, "InterpretGPUParams", return_value=careful):
        try:
            check(case, mosaic.plain_gemm, interpret=True, config=config)
            assert not plgpu_shim.races_found()
        finally:
            plgpu_shim.reset()


def test_a_guess_takes_what_layers_have():
    for m in (1, 8, 64):
        for n, k in ((6144, 4096), (4096, 14336), (1280, 8192), (512, 512), (8, 32)):
            found = plan.candidates(m, n, k, dtype=jnp.bfloat16)
            assert 1 <= len(found) <= 6
            assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("dtype", "m", "n", "k", "expected"),
    [
        (jnp.bfloat16, 1, 6144, 4096, (1, 256, 1)),
        (jnp.bfloat16, 8, 4096, 4096, (1, 256, 1)),
        (jnp.bfloat16, 16, 4096, 14336, (1, 256, 1)),
        (jnp.bfloat16, 1, 28672, 4096, (2, 128, 1)),
        (jnp.bfloat16, 1, 128256, 4096, (2, 128, 1)),
        (jnp.bfloat16, 16, 28672, 4096, (2, 128, 1)),
        (jnp.bfloat16, 64, 6144, 4096, (1, 128, 1)),
        (jnp.bfloat16, 64, 4096, 4096, (1, 128, 1)),
        (jnp.bfloat16, 64, 4096, 14336, (1, 128, 2)),
        (jnp.float8_e4m3fn, 1, 4096, 14336, (1, 512, 1)),
        (jnp.float8_e4m3fn, 64, 6144, 4096, (1, 256, 1)),
        (jnp.float8_e4m3fn, 64, 4096, 4096, (1, 256, 1)),
        (jnp.float8_e4m3fn, 64, 4096, 14336, (1, 256, 2)),
    ],
)
def test_the_first_guess_is_what_an_h200_was_fastest_with(dtype, m, n, k, expected):
    """Warpgroups, k of a stage, blocks that share K; see the tables of candidates."""
    best = plan.candidates(m, n, k, dtype=dtype)[0]
    assert (best.warpgroups, best.k_tile, best.splits) == expected


def test_two_blocks_on_a_multiprocessor_halve_its_memory():
    assert 2 * (Config(resident=2).memory + 1024) <= 233472 < 2 * (Config().memory + 1024)
    config = Config(stages=12, k_tile=128)
    sizes = {"m": 1, "n": 64, "k": 512, "dtype": jnp.bfloat16, "out_dtype": jnp.bfloat16}
    assert choice.valid(config, **sizes)
    assert not choice.valid(dataclasses.replace(config, resident=2), **sizes)
    assert choice.valid(dataclasses.replace(config, resident=2, stages=6), **sizes)


@pytest.mark.parametrize(
    ("m", "n", "chosen"),
    [(1, 4096, "mosaic"), (64, 28672, "mosaic"), (65, 4096, "xla"), (1, 128256, "mosaic")],
)
def test_where_each_implementation_runs(m, n, chosen):
    """Of a Hopper GPU; and where XLA is as fast nothing is said to have been skipped."""
    ran = []
    functions = {
        name: lambda *a, name=name, **k: ran.append(name) or jnp.zeros((m, n), jnp.bfloat16)
        for name in api.IMPLEMENTATIONS
    }
    shapes = [jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16) for rows in (m, n)]
    forget()
    with mock.patch.object(api, "IMPLEMENTATIONS", functions):
        jax.eval_shape(lambda x, w: api.plain_gemm(x, w, out_dtype=jnp.bfloat16), *shapes)
    assert ran == [chosen]
    assert skipped() == {}


def test_without_a_hopper_gpu_xla_runs():
    assert not target.target().hopper
    x, w = jnp.ones((2, 32), jnp.bfloat16), jnp.ones((8, 32), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"mosaic: .* not cpu"):
        api.plain_gemm(x, w, out_dtype=jnp.bfloat16, implementation="mosaic")
    assert (api.plain_gemm(x, w, out_dtype=jnp.bfloat16) == 32).all()


def _arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "x": jnp.zeros((2, 64), jnp.bfloat16),
        "weight": jnp.zeros((16, 64), jnp.bfloat16),
        "out_dtype": jnp.bfloat16,
    }
    return given | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": jnp.zeros((12, 64), jnp.bfloat16)}, "N = 12"),
        (
            {"x": jnp.zeros((2, 40), jnp.bfloat16), "weight": jnp.zeros((16, 40), jnp.bfloat16)},
            "K = 40",
        ),
        ({"x": jnp.zeros((2, 64)), "weight": jnp.zeros((16, 64))}, "not float32"),
        ({"x": jnp.zeros((0, 64), jnp.bfloat16)}, "empty"),
        ({"residual": jnp.zeros((2, 16))}, "the residual is float32"),
        ({"bias": jnp.zeros(16, jnp.int32)}, "the bias is int32"),
        ({"config": Config(warpgroups=4, resident=2, columns=64)}, "registers"),
        ({"config": Config(warpgroups=2, resident=2, columns=64)}, "no registers to hand over"),
    ],
)
def test_what_the_kernel_refuses(changed, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic.plain_gemm(**_arguments(**changed), interpret=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros((2, 32), jnp.bfloat16)}, "must agree"),
        ({"x": jnp.zeros((2, 64), jnp.float16)}, "must agree"),
        ({"out_dtype": jnp.int8}, "takes and writes"),
        ({"bias": jnp.zeros(15)}, r"bias is \(15,\)"),
        ({"residual": jnp.zeros((3, 16))}, r"residual is \(3, 16\)"),
    ],
)
def test_calls_that_mean_nothing(changed, message):
    with pytest.raises(ValueError, match=message):
        api.plain_gemm(**_arguments(**changed))
