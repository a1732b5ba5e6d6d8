"""Numerics of Triton kernels on a CPU: `triton_launch.call(..., interpret=True)` runs them in a
process with Triton's interpreter. Importing this registers it."""

import atexit
import functools
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from qjax_kernels import triton_launch

pytest.importorskip("triton")
WORKER = Path(__file__).with_name("triton_worker.py")
KERNELS = Path(triton_launch.__file__).parent.parent


@functools.cache
def _worker() -> subprocess.Popen:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS)}
    worker = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )

    def stop() -> None:
        worker.stdin.close()
        worker.stdout.close()
        worker.wait()

    atexit.register(stop)
    return worker


def interpret(module, kernel, scalars, outputs, grid, aliases, constants):
    """See `triton_launch.interpreter`."""
    shapes = [(o.shape, np.dtype(o.dtype)) for o in outputs]

    def run(*arrays: jax.Array) -> list[np.ndarray]:
        arguments = [np.asarray(array) for array in arrays]
        for position, scalar in sorted(scalars.items()):
            arguments.insert(position, scalar)
        worker = _worker()
        data = pickle.dumps((module, kernel, arguments, shapes, grid, aliases, constants))
        worker.stdin.write(struct.pack("<q", len(data)) + data)
        worker.stdin.flush()
        answer = pickle.loads(worker.stdout.read(*struct.unpack("<q", worker.stdout.read(8))))
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    return run


triton_launch.interpreter = interpret
