"""The int8 and fp8 products against float64: XLA's, and the Mosaic kernel in its interpreter."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import plgpu_shim
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qjax_kernels.scaled_gemm import api, mosaic, plan, xla
from qjax_kernels.scaled_gemm.config import Config
from qjax_kernels.scaled_gemm.memory import refusal, shared_memory
from qjax_kernels.scaled_gemm.tiling import Tiling

INT8, E4M3, E5M2 = np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
# Half the distance of 1 and the number after it: what one rounding may change.
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call of the op; `scales` is 'vector', 'one' or 'blocks'."""

    m: int
    n: int
    k: int
    dtype: Any = E4M3
    out: Any = BF16
    scales: str = "vector"
    bias: Any = None
    residual: bool = False
    outliers: bool = False

    def operands(self) -> dict[str, np.ndarray | None]:
        """Random arguments of `api.scaled_gemm`, by name."""
        random = np.random.default_rng(self.m + self.n + self.k)
        blocks = self.k // 128
        x_scale, scale = {
            "vector": ((self.m, 1), (self.n, 1)),
            "one": ((), (1, 1)),
            "blocks": ((self.m, blocks), (-(-self.n // 128), blocks)),
        }[self.scales]
        return {
            "x": self._values(random, (self.m, self.k)),
            "x_scale": 10 ** random.uniform(-3, 1, x_scale).astype(F32),
            "values": self._values(random, (self.n, self.k)),
            "scale": 10 ** random.uniform(-2, 2, scale).astype(F32),
            "bias": None if self.bias is None else _normal(random, (self.n,), self.bias),
            "residual": _normal(random, (self.m, self.n), self.out) if self.residual else None,
        }

    def _values(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = random.normal(size=shape)
        if self.outliers:  # a few channels a hundred times the others
            values[:, :: shape[1] // 3] *= 100
        if self.dtype is INT8:
            return np.clip(np.rint(values * 40), -127, 127).astype(INT8)
        limit = float(ml_dtypes.finfo(self.dtype).max)
        return np.clip(values * 8, -limit, limit).astype(self.dtype)


def _normal(random: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return (random.normal(size=shape) * 1000).astype(dtype)


def expected(case: Case, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and the sum of the magnitudes of everything that was added up."""
    wide = {name: None if v is None else v.astype(np.float64) for name, v in given.items()}
    x, w, x_scale, scale = wide["x"], wide["values"], wide["x_scale"], wide["scale"]
    if case.scales == "blocks":
        x_scale = np.repeat(x_scale, 128, axis=1)
        scale = np.repeat(np.repeat(scale, 128, axis=0)[: case.n], 128, axis=1)
    x, w = x * x_scale, w * scale
    result, magnitude = x @ w.T, np.abs(x) @ np.abs(w).T
    for name in ("bias", "residual"):
        if wide[name] is not None:
            result = result + wide[name]
            magnitude = magnitude + np.abs(wide[name])
    return result, magnitude


def check(case: Case, function: Any, **options: Any) -> None:
    """One rounding to the result's type, and one in float32 for each number added up or scaled.

    The bound holds for each element, so for the largest error of each row.
    """
    given = case.operands()
    reference, magnitude = expected(case, given)
    arrays = {name: None if v is None else jnp.asarray(v) for name, v in given.items()}
    y = function(**arrays, out_dtype=jnp.dtype(case.out), **options)
    assert y.shape == reference.shape
    assert y.dtype == case.out
    float32 = (case.k + 8) * ROUNDING[F32]
    bound = ROUNDING[case.out] * np.abs(reference) + float32 * magnitude
    if case.out is F16:
        assert np.abs(reference).max() < 6e4
        bound += 2.0**-25  # numbers below 2^-14 have fewer bits
    errors = np.abs(np.asarray(y).astype(np.float64) - reference)
    assert (errors <= bound).all(), f"{(errors > bound).sum()} of {errors.size} are off"


CALLS = [
    Case(m=1, n=24, k=32),
    Case(m=3, n=40, k=256, dtype=INT8, out=F32),
    Case(m=5, n=200, k=384, dtype=E5M2, bias=BF16, residual=True),
    Case(m=5, n=200, k=384, scales="one", out=F32, bias=F32),
    Case(m=4, n=300, k=384, scales="blocks", out=F32, residual=True, bias=BF16),
    Case(m=1, n=128, k=128, scales="blocks", outliers=True),
    Case(m=7, n=64, k=512, dtype=INT8, out=F32, outliers=True),
]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_xla(case):
    check(case, api.scaled_gemm, implementation="xla")


def test_leading_axes_and_one_row_alike():
    given = Case(m=6, n=16, k=64).operands()
    x, x_scale, w, scale = (jnp.asarray(given[k]) for k in ("x", "x_scale", "values", "scale"))
    flat = api.scaled_gemm(x, x_scale, w, scale, out_dtype=jnp.float32)
    deep = api.scaled_gemm(
        x.reshape(2, 3, 64), x_scale.reshape(2, 3, 1), w, scale, out_dtype=jnp.float32
    )
    assert deep.shape == (2, 3, 16)
    assert (deep.reshape(6, 16) == flat).all()


# Configurations whose blocks stand alone: few enough threads for the interpreter as it is.
ALONE = [
    (Case(m=1, n=136, k=256), Config(stages=3)),
    (Case(m=5, n=136, k=384, out=F32), Config(stages=3, warpgroups=2, k_tile=256)),
    (Case(m=8, n=128, k=96, dtype=E5M2, out=F16, scales="one"), Config(stages=2, k_tile=32)),
    (Case(m=12, n=200, k=320, bias=BF16), Config(stages=2, columns=16, k_tile=64)),
    (
        Case(m=70, n=136, k=640, bias=F32, residual=True, outliers=True),
        Config(stages=2, columns=64, store=8),
    ),
    (Case(m=130, n=320, k=256, dtype=INT8), Config(swap=False, warpgroups=2, columns=64, stages=3)),
    (
        Case(m=72, n=320, k=256, bias=BF16, residual=True),
        Config(swap=False, warpgroups=2, columns=128, store=16, stages=2, snake=2),
    ),
    (Case(m=24, n=128, k=896, out=F32), Config(columns=32, stages=3, promote=2)),
    (Case(m=20, n=200, k=640, scales="blocks"), Config(columns=32, stages=3, warpgroups=2)),
    (
        Case(m=70, n=200, k=256, scales="blocks", out=F32, residual=True),
        Config(swap=False, warpgroups=2, columns=64, stages=2),
    ),
]
# Configurations with clusters. The interpreter's threads wait for each other on those of XLA, which
# must not be fewer: they run in a process that has more of them.
CLUSTERS = [
    (Case(m=8, n=136, k=512), Config(stages=3, splits=2)),
    (Case(m=8, n=200, k=512), Config(stages=3, splits=2, resident=2)),
    (Case(m=12, n=72, k=640, dtype=INT8, out=F32), Config(columns=16, stages=2, splits=3)),
    (
        Case(m=30, n=328, k=384, bias=BF16, residual=True),
        Config(columns=32, stages=2, splits=2, warpgroups=2, store=8),
    ),
    (Case(m=32, n=136, k=384), Config(columns=32, stages=2, splits=2, multicast=2, warpgroups=2)),
    (
        Case(m=300, n=328, k=256),
        Config(swap=False, warpgroups=2, columns=64, multicast=2, stages=2),
    ),
    (Case(m=40, n=328, k=512, scales="blocks"), Config(columns=32, stages=2, splits=2)),
    (Case(m=32, n=136, k=512, out=F32), Config(columns=32, stages=3, splits=2, promote=1)),
]


def interpret(case: Case, config: Config) -> None:
    """In the interpreter, which also looks for shared memory that two threads use at a time.

    Not for blocks: their scales are read by threads and then written over by a copy. The barrier
    between the two suffices, but the interpreter wants a fence too.
    """
    races = case.scales != "blocks"
    careful = functools.partial(plgpu.InterpretGPUParams, detect_races=races)
    with mock.patch.object(plgpu, "InterpretGPUParams", careful):
        try:
            check(case, mosaic.scaled_gemm, config=config, interpret=True)
            assert not (races and plgpu_shim.races_found())
        finally:
            plgpu_shim.reset()


@pytest.mark.parametrize(("case", "config"), ALONE, ids=str)
def test_mosaic(case, config):
    interpret(case, config)


@pytest.mark.heavy
def test_mosaic_clusters():
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=16",
    }
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["right"] * len(CLUSTERS)


def test_a_guess_takes_any_shape():
    ms, ns, ks = (1, 9, 64, 300, 5000), (8, 136, 4096, 128256), (32, 192, 2752, 14336)
    for m, n, k in itertools.product(ms, ns, ks):
        found = plan.candidates(m, n, k)
        assert 1 <= len(found) <= 6
        assert len(set(found)) == len(found)
        for config in found:
            tiling = Tiling(
                m=m,
                n=n,
                k=k,
                config=config,
                dtype=jnp.dtype(jnp.float8_e4m3fn),
                out_dtype=jnp.dtype(jnp.bfloat16),
            )
            assert refusal(tiling) is None
            assert shared_memory(tiling) <= 232448


def test_without_a_hopper_gpu_xla_runs():
    given = Case(m=2, n=16, k=32).operands()
    arguments = [jnp.asarray(given[name]) for name in ("x", "x_scale", "values", "scale")]
    with pytest.raises(NotImplementedError, match=r"mosaic: .* not cpu"):
        api.scaled_gemm(*arguments, out_dtype=jnp.bfloat16, implementation="mosaic")
    y = api.scaled_gemm(*arguments, out_dtype=jnp.bfloat16)
    assert (y == xla.scaled_gemm(*arguments, jnp.bfloat16)).all()


def _arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "x": jnp.zeros((2, 64), jnp.int8),
        "x_scale": jnp.ones((2, 1)),
        "values": jnp.zeros((16, 64), jnp.int8),
        "scale": jnp.ones((16, 1)),
        "out_dtype": jnp.bfloat16,
    }
    return given | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": jnp.zeros((12, 64), jnp.int8), "scale": jnp.ones((12, 1))}, "N = 12"),
        ({"x": jnp.zeros((2, 40), jnp.int8), "values": jnp.zeros((16, 40), jnp.int8)}, "K = 40"),
        ({"x": jnp.zeros((2, 64)), "values": jnp.zeros((16, 64))}, "not float32"),
        ({"x": jnp.zeros((0, 64), jnp.int8), "x_scale": jnp.ones((0, 1))}, "empty"),
        ({"out_dtype": jnp.int8}, "not .*int8"),
        ({"x_scale": jnp.ones((2, 1), jnp.bfloat16)}, "scales are bfloat16"),
        ({"x_scale": jnp.ones((1, 16))}, r"not \(1, 16\)"),
        ({"residual": jnp.zeros((2, 16))}, "the residual is float32"),
        ({"bias": jnp.zeros(16, jnp.int32)}, "the bias is int32"),
        ({"config": Config(columns=12)}, "12 columns"),
        ({"config": Config(warpgroups=4, columns=256)}, "registers"),
        ({"config": Config(splits=2, k_tile=64)}, "fewer than 2 tiles"),
        ({"config": Config(k_tile=64, stages=40)}, "40 stages"),
        ({"config": Config(k_tile=128)}, "K = 64 is no multiple of 128"),
        ({"config": Config(k_tile=64, warpgroups=2, columns=256, stages=16)}, "shared memory"),
    ],
)
def test_what_the_kernel_refuses(changed, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic.scaled_gemm(**_arguments(**changed), interpret=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros((2, 32), jnp.int8)}, "must agree"),
        ({"x": jnp.zeros((2, 64), jnp.float8_e4m3fn)}, "must agree"),
        ({"scale": jnp.ones((16, 2))}, "blocks of 128"),
        ({"bias": jnp.zeros(15)}, r"bias is \(15,\)"),
        ({"residual": jnp.zeros((3, 16))}, r"residual is \(3, 16\)"),
        (
            {
                "x": jnp.zeros((2, 128), jnp.int8),
                "values": jnp.zeros((256, 128), jnp.int8),
                "scale": jnp.ones((2, 1)),
            },
            "int8 operands take no scales for blocks",
        ),
    ],
)
def test_calls_that_mean_nothing(changed, message):
    with pytest.raises(ValueError, match=message):
        api.scaled_gemm(**_arguments(**changed))


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for cluster_case, cluster_config in CLUSTERS:
        interpret(cluster_case, cluster_config)
        print("right", flush=True)
