"""Quantization of rows against float64."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import row_oracles
from qjax_kernels.quantize_rows import triton, xla
from qjax_kernels.quantize_rows.api import quantize_rows
from qjax_kernels.quantize_rows.config import Config

implementations = row_oracles.implementations(xla.quantize_rows, triton.quantize_rows)
FORMATS = pytest.mark.parametrize("out", ["int8", "float8_e4m3fn"])


def rows(seed, count, features, dtype="bfloat16"):
    """Rows of very different sizes, with outliers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features)) * 10.0 ** rng.uniform(-3, 2, (count, 1))
    x[:, rng.integers(features)] *= 50
    return np.asarray(jnp.asarray(x, dtype), np.float64)


def check(run, x, out, *, static=None, dtype="bfloat16", **extra):
    """Only the scale and the quotient are rounded: x itself is exact."""
    step = None if static is None else jnp.float32(static)
    result = run(jnp.asarray(x, dtype), step, out_dtype=jnp.dtype(out), **extra)
    values = np.asarray(result.values)
    assert values.dtype == out
    row_oracles.check(values, np.asarray(result.scale), x, 0.0, static)
    return result


@pytest.mark.parametrize("features", [1, 64, 100, 128, 1001, 4096])
@FORMATS
@implementations
def test_row_lengths(run, out, features):
    check(run, rows(1, 5, features), out)


@FORMATS
@implementations
def test_static_scale_clips(run, out):
    x = rows(2, 3, 512)
    static = np.float32(np.quantile(np.abs(x), 0.9) / row_oracles.TOPS[out])
    result = check(run, x, out, static=static)
    assert result.scale == static
    assert np.abs(oracles.decode(np.asarray(result.values))).max() >= row_oracles.TOPS[out]


@pytest.mark.parametrize("rows_of_block", [1, 2, 4])
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("static", [None, 0.25])
def test_every_split_of_rows(warps, rows_of_block, static):
    pytest.importorskip("triton")
    import triton_interpreter  # noqa: F401

    config = Config(warps, rows_of_block)
    check(
        triton.quantize_rows, rows(3, 5, 1280), "int8", static=static, config=config, interpret=True
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@implementations
def test_other_float_types(run, dtype):
    check(run, rows(4, 3, 256, dtype), "int8", dtype=dtype)


@FORMATS
@implementations
def test_rows_of_zeros_and_of_next_to_nothing(run, out):
    x = rows(5, 3, 256)
    x[0] = 0
    x[1] = 0
    x[1, 7] = 2.0**-120
    result = check(run, x, out)
    assert float(result.scale[0, 0]) == 1
    assert not np.asarray(result.values[0], np.float32).any()


def test_the_kernel_is_not_for_cpus():
    x = jnp.ones((2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="triton: it needs an NVIDIA GPU"):
        quantize_rows(x, out_dtype=jnp.int8, implementation="triton")
    assert quantize_rows(x, out_dtype=jnp.int8).values.shape == x.shape
    three = quantize_rows(x.reshape(1, 2, 64), out_dtype=jnp.int8)
    assert three.scale.shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (jnp.ones((2, 64), jnp.int8), {"out_dtype": jnp.int8}, "takes bfloat16"),
        (jnp.ones((2, 64)), {"out_dtype": jnp.bfloat16}, "writes int8"),
        (jnp.ones((2, 64)), {"out_dtype": jnp.int8, "scale": jnp.ones(64)}, "scale"),
    ],
)
def test_wrong_arguments(x, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(x, **arguments)
