"""Compile Triton kernels for GPUs that are not there, and read what the assembler says of each."""

import dataclasses
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

# A device of each compute capability that kernels are compiled for, and ptxas's name for it.
KINDS = {
    80: ("NVIDIA A100-SXM4-80GB", "sm_80"),
    86: ("NVIDIA A10G", "sm_86"),
    89: ("NVIDIA L4", "sm_89"),
    90: ("NVIDIA H200", "sm_90a"),
    100: ("NVIDIA B200", "sm_100a"),
}
FP8 = 89  # the first capability that converts to fp8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Triton kernel as ptxas left it.

    Attributes:
      name: of its function.
      registers: of a thread.
      spills: bytes of spill stores and loads and of the stack frame.
      shared: bytes of shared memory.
      ptx: its source.
    """

    name: str
    registers: int
    spills: int
    shared: int
    ptx: str


def compile_triton(
    function: Any, *arguments: Any, capability: int = 90, **static: Any
) -> list[Kernel]:
    """Lower `function` (jitted here) for a GPU of that capability, and assemble its kernels."""
    triton_lib = pytest.importorskip("jax_triton.triton_lib")
    kind, architecture = KINDS[capability]
    found = []
    original = triton_lib.compile_ttir_to_ptx_inplace

    def record(*args: Any) -> Any:
        found.append(original(*args))
        return found[-1]

    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_lib, "compile_ttir_to_ptx_inplace", record)
        patch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            traced = jax.jit(functools.partial(function, **static)).trace(*arguments)
            traced.lower(lowering_platforms=("cuda",))
    return [_assemble(result, architecture) for result in found]


def _assemble(result: Any, architecture: str) -> Kernel:
    import triton

    # Triton ships a second assembler for the newest GPUs.
    name = "ptxas-blackwell" if architecture >= "sm_100" and len(architecture) > 6 else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(result.binary)
        report = subprocess.run(
            [ptxas, "-v", f"-arch={architecture}", source, "-o", Path(directory) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    sizes = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
    return Kernel(
        name=result.name,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spills=sum(map(int, sizes)),
        shared=result.shared_mem_bytes,
        ptx=result.binary,
    )
