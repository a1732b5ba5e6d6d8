"""Checks of quantized rows against exact rows, for the tests of the row kernels."""

import numpy as np
import oracles
import pytest

FORMATS = {"int8": "int8", "float8_e4m3fn": "fp8_e4m3"}
TOPS = {"int8": 127.0, "float8_e4m3fn": 448.0}
UNIT = 2.0**-24  # largest relative error of one float32 operation
TINY = 2.0**-126


def implementations(xla, triton):
    """Parameters: the reference, and the Triton kernel under Triton's interpreter."""

    def interpreted(*args, **kwargs):
        pytest.importorskip("triton")
        import triton_interpreter  # noqa: F401

        return triton(*args, **kwargs, interpret=True)

    return pytest.mark.parametrize("run", [xla, interpreted], ids=["xla", "triton"])


def check(values, scale, exact, slack, static=None):
    """Assert that rows were rounded right, and none worse than arithmetic in float32 allows.

    Args:
      values: [rows, features], the result.
      scale: float32 [rows, 1], the result; None for a float dtype.
      exact: float64 [rows, features], what was to be rounded.
      slack: float64, broadcasts against exact: how far float32 arithmetic may be off.
      static: the scale that was given.
    """
    assert values.shape == exact.shape
    slack = np.broadcast_to(slack, exact.shape)
    name = values.dtype.name
    if name not in FORMATS:
        got = np.asarray(values, np.float64)
        low, high = (_narrow(exact + sign * slack, name) for sign in (-1, 1))
    else:
        got = oracles.decode(values)
        if static is None:
            amax = np.abs(exact).max(axis=-1, keepdims=True)
            step = np.where(amax > 0, np.maximum(amax / TOPS[name], TINY), 1)
            # The largest magnitude is off by its slack, the division by a unit.
            error = np.abs(scale - step)
            assert (error <= slack.max(axis=-1, keepdims=True) / TOPS[name] + 2 * UNIT * step).all()
        # y / s as y * (factor / s): two more roundings, three with a reciprocal.
        quotient = exact / np.asarray(scale if static is None else static, np.float64)
        slack = slack / np.asarray(scale if static is None else static, np.float64)
        slack = slack + 3 * UNIT * np.abs(quotient)
        low, high = (oracles.round_to(quotient + sign * slack, FORMATS[name]) for sign in (-1, 1))
    wrong = ~((low <= got) & (got <= high))
    worst = wrong.sum(axis=-1)
    assert not worst.any(), f"row {worst.argmax()}: {worst.max()} of {exact.shape[-1]} are wrong"


def _narrow(x, name):
    return x.astype(np.float16) if name == "float16" else oracles.narrow(x, name)


def check_sums(sums, values):
    """Assert that sums [rows, features / 128] are those of the values, whatever the order."""
    exact = oracles.decode(values) if values.dtype.name in FORMATS else values.astype(np.float64)
    groups = exact.reshape(*exact.shape[:-1], -1, 128)
    error = np.abs(sums - groups.sum(axis=-1))
    assert sums.dtype == np.float32
    assert (error <= 128 * UNIT * np.abs(groups).sum(axis=-1)).all()
    if values.dtype == np.int8:
        assert not error.any()
