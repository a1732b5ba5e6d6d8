"""Compile for an H200 on a machine without one.

Everything but running happens: XLA's passes, Mosaic, ptxas. Needs the wheels jax-cuda13-plugin and
jax-cuda13-pjrt, no driver. GEMM autotuning and the choice of cuDNN engines are not covered.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from qjax_kernels.tuning.assembly import Kernel, dumped, kernels_in

SHARED_MEMORY = 232448  # bytes a block may have
KIND, CORES = "NVIDIA H200", 132

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
class Compiled:
    """What came out.

    Attributes:
      hlo: the optimized module's text.
      kernels: of Mosaic, in the order they were compiled.
      thunks: what the host launches, a line each; what is one CUDA graph is indented below a
        kCommandBuffer.
    """

    hlo: str
    kernels: list[Kernel]
    thunks: str


@functools.cache
def mesh(devices: int = 1) -> Mesh:
    """A mesh ('x',) of H200s that are not there.

    Raises:
      NotImplementedError: the wheels that compile for them are not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET, topology=f"1x1x{devices}"
        )
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(
            "compiling for a GPU that is not there needs the packages jax-cuda13-plugin and "
            f"jax-cuda13-pjrt: {str(error).splitlines()[0]}"
        ) from error
    return topologies.make_mesh(topology, (devices,), ("x",))


def shape(dimensions: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An argument, on one H200."""
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh(), P()))


def compile_for_h200(function: Callable[..., Any], *arguments: Any, **static: Any) -> Compiled:
    """Lower and compile `function` (jitted here) for arguments made by `shape`.

    Every kernel of the process is compiled anew: Mosaic keeps no cache across lowerings.
    """
    device = AbstractDevice(device_kind=KIND, num_cores=CORES, platform="gpu")
    with dumped() as directory:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            lowered = jax.jit(functools.partial(function, **static)).lower(*arguments)
        options = {"xla_gpu_autotune_level": 0, "xla_dump_to": str(directory)}
        text = lowered.compile(compiler_options=options).as_text()
        # The last one: it is written anew by passes that change it.
        dumps = sorted(directory.glob("*.thunk_sequence*.txt"))
        return Compiled(
            hlo=text or "",
            kernels=list(kernels_in(directory)),
            thunks=dumps[-1].read_text() if dumps else "",
        )
