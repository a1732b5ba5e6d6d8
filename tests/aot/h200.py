"""Compile for an H200 on a machine without one, and read what the assembler says of each kernel.

Everything but running happens: XLA's passes, Mosaic, ptxas. Needs the wheels jax-cuda13-plugin and
jax-cuda13-pjrt, no driver. GEMM autotuning and the choice of cuDNN engines are not covered.
"""

import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

SHARED_MEMORY = 232448  # bytes a block may have

# XLA's description of the chip, as it prints it for one.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4814000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Mosaic kernel as ptxas left it.

    Attributes:
      name: of the kernel's function.
      registers: of a thread.
      spills: bytes of spill stores and loads and of the stack frame.
      shared: bytes of dynamic shared memory, as launched.
      ptx: its source.
    """

    name: str
    registers: int
    spills: int
    shared: int
    ptx: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Attributes: hlo, the optimized module's text; kernels, in the order they were compiled."""

    hlo: str
    kernels: list[Kernel]


@functools.cache
def mesh(devices: int = 1) -> Mesh:
    """A mesh ('x',) of H200s that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET, topology=f"1x1x{devices}"
    )
    return topologies.make_mesh(topology, (devices,), ("x",))


def shape(dimensions: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An argument, on one H200."""
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh(), P()))


def compile_for_h200(function: Any, *arguments: Any, **static: Any) -> Compiled:
    """Lower and compile `function` (jitted here) for arguments made by `shape`.

    Every kernel of the process is compiled anew: Mosaic keeps no cache across lowerings.
    """
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with _dump() as directory:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            lowered = jax.jit(functools.partial(function, **static)).lower(*arguments)
        text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
        return Compiled(hlo=text, kernels=list(_kernels(directory)))


@contextmanager
def _dump() -> Iterator[Path]:
    names = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_TO")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {names[0]: "1", names[1]: "1", names[2]: directory}
        try:
            yield Path(directory)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _kernels(directory: Path) -> Iterator[Kernel]:
    for path in sorted(directory.glob("*.ptxas"), key=lambda p: p.stat().st_mtime_ns):
        report, resources = path.read_text(), path.with_suffix(".resources.txt").read_text()
        sizes = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
        yield Kernel(
            name=path.stem,
            registers=int(re.search(r"Used (\d+) registers", report)[1]),
            spills=sum(map(int, sizes)),
            shared=int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
            ptx=path.with_suffix(".ptx").read_text(),
        )
