"""What a trace is for: the device there, one that is named, one that is not there."""

import h200
import jax
import jax.numpy as jnp
import pytest
from qjax_kernels.target import Target, require_hopper, target


def test_the_device_there():
    assert target() == Target("cpu", "cpu", 1)
    with jax.default_device("cpu"):
        assert target().platform == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert target().platform == "cpu"
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, not cpu"):
        require_hopper()


@pytest.mark.heavy
def test_a_device_that_is_not_there():
    seen = []

    def function(x):
        seen.append(require_hopper())
        return x + 1

    h200.compile_for_h200(function, h200.shape((8,), jnp.float32))
    assert seen[0] == Target("gpu", "NVIDIA H200", 132)


@pytest.mark.parametrize(
    ("kind", "hopper"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA GH200", True),
                         ("NVIDIA A100", False), ("NVIDIA B200", False)],
)  # fmt: skip
def test_kinds(kind, hopper):
    assert Target("gpu", kind, 132).hopper is hopper
    assert not Target("cpu", kind, 132).hopper
