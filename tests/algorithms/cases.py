"""Problems for the tests of algorithms, and their answers in NumPy float64 from the papers."""

import jax.numpy as jnp
import numpy as np
import oracles

from qjax.algorithms.scales import WeightSpec

# One of each kind: groups, zero points, channels, floats, two axes, two levels, powers of 2.
SPECS = {
    "int4_group": WeightSpec(format="int4", block=(1, 32)),
    "int4_group_bf16": WeightSpec(format="int4", block=(1, 32), scale_dtype="bfloat16"),
    "int4_half": WeightSpec(format="int4", block=(1, 32), scale_rule="absmax_half"),
    "int4_asymmetric": WeightSpec(format="int4", block=(1, 32), symmetric=False),
    "int3_group": WeightSpec(format="int3", block=(1, 32), symmetric=False),
    "int8_channel": WeightSpec(format="int8"),
    "fp8_channel": WeightSpec(format="fp8_e4m3"),
    "fp8_tensor": WeightSpec(format="fp8_e4m3", block=(-1, -1)),
    "fp8_block": WeightSpec(format="fp8_e4m3", block=(32, 32)),
    "nvfp4": WeightSpec(format="fp4_e2m1", block=(1, 16), scale_dtype="float8_e4m3fn"),
    "mxfp4": WeightSpec(
        format="fp4_e2m1", block=(1, 32), scale_rule="rceil", scale_dtype="float8_e8m0fnu"
    ),
}


def inputs(tokens: int, features: int, *, seed: int = 0) -> np.ndarray:
    """float64 [tokens, features], correlated and of very different sizes, as activations are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, features)) @ rng.standard_normal((features, features))
    return mixed / np.sqrt(features) * np.exp(rng.standard_normal(features))


def weights(out: int, features: int, *, seed: int = 1) -> np.ndarray:
    """float32 [out, features]."""
    return np.random.default_rng(seed).standard_normal((out, features)).astype(np.float32)


def gram_of(x: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(x.T @ x, jnp.float32)


def output_error(change: np.ndarray, x: np.ndarray) -> float:
    """Squared error of the outputs for x, from the outputs themselves."""
    return float(np.sum((np.asarray(x, np.float64) @ np.asarray(change, np.float64).T) ** 2))


def scales_of(columns: np.ndarray, spec: WeightSpec) -> tuple[np.ndarray, np.ndarray]:
    """Step and zero point [out] of one group of columns [out, group] of an integer grid."""
    low, high = oracles.INTEGERS[spec.format]
    if spec.symmetric:
        top = high + 0.5 if spec.scale_rule == "absmax_half" else high
        step = np.abs(columns).max(axis=1) / top
        return oracles.narrow(step, spec.scale_dtype), np.zeros(len(columns))
    least, most = np.minimum(columns.min(axis=1), 0), np.maximum(columns.max(axis=1), 0)
    step = oracles.narrow((most - least) / (high - low), spec.scale_dtype)
    return step, np.clip(np.round(low - least / step), low, high)


def gptq_by_the_paper(
    weight: np.ndarray, gram: np.ndarray, spec: WeightSpec, *, damping: float, act_order: bool
) -> np.ndarray:
    """Codes [out, in] of Algorithm 1: H^-1, its Cholesky factor, all later columns updated at once.

    Scales of a group are from its updated columns; with act_order, from the original ones.
    """
    w, h = weight.astype(np.float64).copy(), gram.astype(np.float64).copy()
    low, high = oracles.INTEGERS[spec.format]
    features, group = w.shape[1], spec.block[1] if spec.block[1] != -1 else w.shape[1]
    dead = np.diag(h) == 0
    mean = np.diag(h)[~dead].mean()
    h[dead, dead] = mean
    w[:, dead] = 0
    fixed = [scales_of(w[:, at : at + group], spec) for at in range(0, features, group)]
    h[np.diag_indices(features)] += damping * mean
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(features)
    w, h = w[:, order], h[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.empty_like(w)
    for j in range(features):
        if act_order:
            step, zero = fixed[order[j] // group]
        elif j % group == 0:
            step, zero = scales_of(w[:, j : j + group], spec)
        codes[:, j] = np.clip(np.round(w[:, j] / step) + zero, low, high)
        error = (w[:, j] - (codes[:, j] - zero) * step) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    back = np.empty_like(codes)
    back[:, order] = codes
    return back
