"""Gated linear units against float64: XLA's, and the Mosaic kernel in its interpreter."""

import dataclasses
import functools
import math
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
from qjax_kernels.gemm_swiglu import api, mosaic, xla
from qjax_kernels.gemm_swiglu.layout import interleave, separate
from qjax_kernels.scaled_gemm import plan
from qjax_kernels.scaled_gemm.config import Config

INT8, E4M3, E5M2 = np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
FLOATS = (BF16, F16, F32)
RANGE = {INT8: (-128, 127), E4M3: (-448, 448)}
_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda z: z * 0.5 * (1 + np.tanh(z / 2)),
    "gelu": lambda z: z * 0.5 * (1 + _erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: z * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call of the op with `features` outputs; scales are one for each row, or `one` for all."""

    m: int
    features: int
    k: int
    dtype: Any = E4M3
    out: Any = BF16
    activation: str = "silu"
    one: bool = False
    outliers: bool = False

    def operands(self) -> dict[str, Any]:
        """Random gates and ups, some far outside of the activation's bend, and all scales."""
        random = np.random.default_rng(self.m + self.features + self.k)
        sides = {"x": self.m, "gate": self.features, "up": self.features}
        given = {name: self._values(random, (rows, self.k)) for name, rows in sides.items()}
        if self.dtype not in FLOATS:
            for name, rows in sides.items():
                size = 1 / (64 * math.sqrt(self.k)) if name == "x" else 1.0
                shape = (1, 1) if self.one else (rows, 1)
                given[f"{name}_scale"] = size * 10 ** random.uniform(-0.5, 1, shape)
            if self.one:
                given["up_scale"] = given["gate_scale"]
        return given

    def _values(self, random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        values = random.normal(size=shape)
        if self.outliers:  # a few channels twenty times the others
            values[:, :: shape[1] // 3] *= 20
        if self.dtype in FLOATS:
            return (values * 2 / shape[1] ** 0.25).astype(self.dtype)
        if self.dtype is INT8:
            return np.clip(np.rint(values * 8), -127, 127).astype(INT8)
        return (values * 8).astype(self.dtype)


def expected(case: Case, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64 before it is rounded, and how far float32 may be off.

    Each product is off by a rounding of 2^-24 for each number added up (sums of int8 are exact) or
    scaled, times the sum of the magnitudes; no activation is steeper than 1.2. The activation
    itself, some roundings of a number no larger than its argument, is off by 16 of them, and the
    exponential's argument of up to 100 by as many as it is large.
    """
    unit = 2.0**-24
    x, parts = given["x"].astype(np.float64), []
    for name in ("gate", "up"):
        w = given[name].astype(np.float64)
        scale = given.get("x_scale", 1.0) * np.transpose(given.get(f"{name}_scale", 1.0))
        terms = 8 if case.dtype is INT8 else case.k + 8
        error = terms * unit * (np.abs(x) @ np.abs(w).T) * scale
        parts.append((x @ w.T * scale, error))
    (gate, gate_error), (up, up_error) = parts
    act = ACTIVATIONS[case.activation](gate)
    act_error = 1.2 * gate_error + 16 * unit * np.abs(gate) + unit * np.abs(gate * act)
    h = act * up
    error = act_error * (np.abs(up) + up_error) + np.abs(act) * up_error + 4 * unit * np.abs(h)
    return h, error


def check(case: Case, function: Any, **options: Any) -> None:
    """Each number is between what the ends of its interval are rounded to, so each row is right."""
    given = case.operands()
    reference, error = expected(case, given)
    arguments = arrays(case, given)
    if case.out in RANGE:  # a twentieth is out of range
        size = F32(np.quantile(np.abs(reference), 0.95) / RANGE[case.out][1])
        arguments["out_scale"] = jnp.asarray(size)
        reference, error = reference / size, error / size
    y = np.asarray(function(**arguments, activation=case.activation, **options))
    assert y.shape == reference.shape
    assert y.dtype == case.out
    low, high = (rounded(end, case.out) for end in (reference - error, reference + error))
    y = y.astype(np.float64)
    off = (y < low) | (y > high)
    assert not off.any(), f"{off.sum()} of {off.size} are off"
    # And the intervals of each row are narrow.
    assert (np.linalg.norm(error, axis=1) < 1e-2 * np.linalg.norm(reference, axis=1)).all()


def arrays(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the op."""
    wide = {"x_scale": None, "scale": None, "out_scale": None}
    if case.dtype not in FLOATS:
        scales = {name: given[f"{name}_scale"].astype(F32) for name in ("x", "gate", "up")}
        wide["x_scale"] = jnp.asarray(scales["x"].reshape(() if case.one else (case.m, 1)))
        both = (jnp.asarray(scales[name]) for name in ("gate", "up"))
        wide["scale"] = jnp.asarray(scales["gate"]) if case.one else interleave(*both)
    weight = interleave(jnp.asarray(given["gate"]), jnp.asarray(given["up"]))
    return {"x": jnp.asarray(given["x"]), "weight": weight, "out_dtype": jnp.dtype(case.out)} | wide


def rounded(values: np.ndarray, out: Any) -> np.ndarray:
    """To the nearest number of a type, in float64."""
    if out in RANGE:
        values = np.clip(values, *RANGE[out])
    values = np.rint(values) if out is INT8 else values
    return values.astype(out).astype(np.float64)


CALLS = [
    Case(m=1, features=24, k=32),
    Case(m=3, features=40, k=256, dtype=INT8, out=F32, activation="gelu"),
    Case(m=5, features=200, k=384, dtype=E5M2, activation="gelu_tanh"),
    Case(m=5, features=16, k=384, one=True, out=INT8),
    Case(m=4, features=48, k=384, dtype=BF16, out=E4M3, outliers=True),
    Case(m=7, features=64, k=512, dtype=F16, out=F16),
    Case(m=2, features=8, k=64, dtype=F32, out=F32),
]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_xla(case):
    check(case, api.gemm_swiglu, implementation="xla")


# Configurations whose blocks stand alone: few enough threads for the interpreter as it is.
TOKENS = Config(swap=False, warpgroups=2, columns=64, stages=2)
ALONE = [
    (Case(m=1, features=72, k=256), Config(stages=3)),
    (Case(m=5, features=136, k=384, dtype=INT8, out=F32), Config(stages=3, warpgroups=2)),
    (Case(m=8, features=64, k=256, dtype=BF16), Config(stages=3, k_tile=64)),
    (
        Case(m=13, features=72, k=96, dtype=F16, out=F16, activation="gelu"),
        Config(columns=16, stages=2, k_tile=32, warpgroups=2),
    ),
    (
        Case(m=70, features=104, k=384, dtype=E5M2, activation="gelu_tanh", outliers=True),
        Config(stages=2, columns=48, store=16),
    ),
    (Case(m=12, features=80, k=256, out=INT8), Config(stages=2, columns=16)),
    (Case(m=8, features=80, k=256, dtype=INT8, out=E4M3, one=True), Config(stages=2)),
    (Case(m=72, features=72, k=256), TOKENS),
    (Case(m=70, features=136, k=192, dtype=BF16, out=F32), Config(**vars(TOKENS) | {"k_tile": 64})),
    (
        Case(m=130, features=160, k=256, dtype=INT8, out=INT8, activation="gelu_tanh"),
        Config(**vars(TOKENS) | {"columns": 160, "snake": 2}),
    ),
    (Case(m=72, features=64, k=256, out=E4M3), Config(**vars(TOKENS) | {"store": 16})),
    (Case(m=24, features=64, k=896, out=F32), Config(columns=32, stages=3, promote=2)),
]
# Configurations with clusters. The interpreter's threads wait for each other on those of XLA, which
# must not be fewer: they run in a process that has more of them.
CLUSTERS = [
    (Case(m=8, features=72, k=512), Config(stages=3, splits=2)),
    (
        Case(m=12, features=40, k=640, dtype=INT8, out=F32),
        Config(columns=16, stages=2, splits=3),
    ),
    (
        Case(m=30, features=88, k=384, dtype=BF16),
        Config(columns=32, stages=2, k_tile=64, splits=2, warpgroups=2, store=8),
    ),
    (Case(m=150, features=168, k=256), Config(**vars(TOKENS) | {"multicast": 2})),
    (Case(m=64, features=80, k=512, out=INT8), Config(**vars(TOKENS) | {"splits": 2})),
]


def interpret(function: Any, *arguments: Any, **options: Any) -> Any:
    """In the interpreter, which also looks for shared memory that two threads use at a time."""
    careful = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    with mock.patch.object(plgpu, "InterpretGPUParams", careful):
        try:
            result = function(*arguments, **options, interpret=True)
            assert not plgpu_shim.races_found()
            return result
        finally:
            plgpu_shim.reset()


@pytest.mark.parametrize(("case", "config"), ALONE, ids=str)
def test_mosaic(case, config):
    interpret(check, case, mosaic.gemm_swiglu, config=config)


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


def test_interleaved_and_back():
    gate, up = (jnp.arange(48).reshape(24, 2) + start for start in (0, 1000))
    both = interleave(gate, up)
    rows = np.asarray(both)[:, 0].reshape(3, 2, 8)
    assert (rows[:, 0] == np.arange(24).reshape(3, 8) * 2).all()
    assert (rows[:, 1] == rows[:, 0] + 1000).all()
    for axis, array in ((0, both), (-1, both.T)):
        found = separate(array, axis=axis)
        assert all(
            (np.asarray(a if axis == 0 else a.T) == b).all()
            for a, b in zip(found, (gate, up), strict=True)
        )


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (jnp.zeros((8, 2)), jnp.zeros((16, 2)), "must be alike"),
        (jnp.zeros((8, 2)), jnp.zeros((8, 2), jnp.int8), "must be alike"),
        (jnp.zeros((12, 2)), jnp.zeros((12, 2)), "12 features"),
    ],
)
def test_what_cannot_be_interleaved(gate, up, message):
    with pytest.raises(ValueError, match=message):
        interleave(gate, up)


def test_candidates_take_any_shape():
    for dtype, m, features in ((E4M3, 1, 72), (BF16, 300, 14336), (INT8, 4096, 1000)):
        for out in (BF16, F32, INT8):
            found = plan.candidates(
                m, 2 * features, 4096, dtype=dtype, out_dtype=out, activation="silu"
            )
            assert 1 <= len(found) == len(set(found)) <= 6


def test_leading_axes():
    case = Case(m=6, features=16, k=64)
    given = arrays(case, case.operands())
    flat = api.gemm_swiglu(**given)
    given |= {"x": given["x"].reshape(2, 3, 64), "x_scale": given["x_scale"].reshape(2, 3, 1)}
    deep = api.gemm_swiglu(**given)
    assert deep.shape == (2, 3, 16)
    assert (deep.reshape(6, 16) == flat).all()


def test_without_a_hopper_gpu_xla_runs():
    case = Case(m=2, features=16, k=32)
    given = arrays(case, case.operands())
    with pytest.raises(NotImplementedError, match=r"mosaic: .* not cpu"):
        api.gemm_swiglu(**given, implementation="mosaic")
    expected = xla.gemm_swiglu(
        *(given[name] for name in ("x", "x_scale", "weight", "scale", "out_scale")),
        out_dtype=given["out_dtype"],
        activation="silu",
    )
    assert (api.gemm_swiglu(**given) == expected).all()


def _arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "x": jnp.zeros((2, 64), jnp.int8),
        "x_scale": jnp.ones((2, 1)),
        "weight": jnp.zeros((48, 64), jnp.int8),
        "scale": jnp.ones((48, 1)),
        "out_scale": None,
        "out_dtype": jnp.bfloat16,
        "activation": "silu",
    }
    return given | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros((2, 40), jnp.int8), "weight": jnp.zeros((48, 40), jnp.int8)}, "K = 40"),
        ({"x": jnp.zeros((2, 64)), "weight": jnp.zeros((48, 64))}, "not float32"),
        ({"x": jnp.zeros((0, 64), jnp.int8), "x_scale": jnp.ones((0, 1))}, "empty"),
        ({"out_dtype": jnp.int8, "out_scale": jnp.float32(1)}, "24 features of 8 bits"),
        ({"scale": jnp.ones((48, 1), jnp.bfloat16)}, "a scale is bfloat16"),
        ({"config": Config(swap=False, columns=24, k_tile=64)}, "8 columns at a time"),
    ],
)
def test_what_the_kernel_refuses(changed, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic.gemm_swiglu(**_arguments(**changed), interpret=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros((2, 32), jnp.int8)}, "must agree"),
        ({"x": jnp.zeros((2, 64), jnp.float8_e4m3fn)}, "must agree"),
        ({"weight": jnp.zeros((40, 64), jnp.int8)}, "8 and 8 in turn"),
        ({"scale": None}, "need an x_scale and a scale"),
        ({"scale": jnp.ones((48, 2))}, r"scale \(48, 2\)"),
        ({"x": jnp.zeros((2, 64)), "weight": jnp.zeros((48, 64))}, "have no scales"),
        ({"activation": "relu"}, "silu, gelu, gelu_tanh"),
        ({"out_dtype": jnp.int8}, "needs an out_scale"),
        ({"out_dtype": jnp.float8_e5m2}, "not float8_e5m2"),
        ({"out_scale": jnp.float32(1)}, "int8 or e4m3, not bfloat16"),
    ],
)
def test_calls_that_mean_nothing(changed, message):
    with pytest.raises(ValueError, match=message):
        api.gemm_swiglu(**_arguments(**changed))


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for cluster_case, cluster_config in CLUSTERS:
        interpret(check, cluster_case, mosaic.gemm_swiglu, config=cluster_config)
        print("right", flush=True)
