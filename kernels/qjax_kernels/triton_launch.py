"""Calling a Triton kernel from JAX, on the GPU at hand or for one that is not there."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import mlir
from jaxlib.mlir import ir

from qjax_kernels.target import target

# Compute capability by what the vendor's name contains; devices that are there say it themselves.
CAPABILITIES = {
    "H100": 90,
    "H200": 90,
    "H800": 90,
    "H20": 90,
    "GH200": 90,
    "A100": 80,
    "A800": 80,
    "A30": 80,
    "A10": 86,
    "A40": 86,
    "RTX A": 86,
    "L4": 89,
    "RTX 40": 89,
    "B200": 100,
    "B300": 103,
}

# What jax-triton 0.3 calls kernels by, and what 0.4 does: XLA records only the latter in graphs.
OLD_TARGET, TARGET = "triton_kernel_call", "triton_kernel_call_ffi"

# Runs a kernel on a CPU: (module, kernel, scalars by position, outputs, grid, aliases,
# constants) -> a function of the arrays. Tests put Triton's interpreter here.
interpreter: Callable[..., Callable[..., list]] | None = None


def capability() -> int:
    """Compute capability of the GPU that the trace under way is for, 90 for an H200.

    Raises:
      NotImplementedError: it is no NVIDIA GPU, or one that is not known.
    """
    found = target()
    if found.platform not in ("gpu", "cuda"):
        raise NotImplementedError(f"it needs an NVIDIA GPU, not {found.kind}")
    for device in jax.local_devices():
        if device.device_kind == found.kind and hasattr(device, "compute_capability"):
            return int(device.compute_capability.replace(".", ""))
    for name, number in sorted(CAPABILITIES.items(), key=lambda item: -len(item[0])):
        if name in found.kind:
            return number
    raise NotImplementedError(f"the compute capability of {found.kind} is not known")


def require_capability(fp8: bool = False) -> int:
    """The capability, if Triton compiles for it: 80 and up; fp8 conversions need 89.

    Raises:
      NotImplementedError: it does not, or Triton is not installed.
    """
    found = capability()
    if found < (89 if fp8 else 80):
        raise NotImplementedError(
            f"it needs compute capability {'8.9 (fp8)' if fp8 else '8.0'}, not {found / 10}"
        )
    try:
        importlib.import_module("triton")  # without which jax_triton can be imported, not used
        importlib.import_module("jax_triton")
    except ImportError as error:
        raise NotImplementedError("it needs the packages jax-triton and triton") from error
    return found


def call(
    module: str,
    kernel: str,
    *arguments: jax.Array | int,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int = 1,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
    **constants: Any,
) -> list[jax.Array]:
    """Launch `kernel` of `module`, which is imported only now, since it imports Triton.

    Args:
      arguments: the kernel's first parameters; ints are run-time scalars. The outputs follow them.
      aliases: argument -> output that shares its memory.
      interpret: run by `interpreter` instead.
      constants: the kernel's constexpr parameters.

    Raises:
      NotImplementedError: there are aliases, and jax-triton is 0.4 or newer.
    """
    if interpret:
        if interpreter is None:
            raise RuntimeError("no interpreter of Triton kernels is registered")
        scalars = {i: a for i, a in enumerate(arguments) if isinstance(a, int)}
        run = interpreter(module, kernel, scalars, outputs, grid, dict(aliases or {}), constants)
        arrays = [a for a in arguments if not isinstance(a, int)]
        return jax.pure_callback(run, list(outputs), *arrays)
    triton_call = importlib.import_module("jax_triton").triton_call
    # `out_shape` became `out_type` in jax-triton 0.4.
    old = "out_shape" in inspect.signature(triton_call).parameters
    if old:
        _record_in_graphs()
    elif aliases:
        # There an output that shares an argument's memory is no parameter of the kernel.
        raise NotImplementedError("a kernel that writes to its arguments needs jax-triton 0.3")
    return triton_call(
        *arguments,
        kernel=getattr(importlib.import_module(module), kernel),
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=capability(),
        input_output_aliases=dict(aliases or {}),
        **{"out_shape" if old else "out_type": list(outputs)},
        **constants,
    )


@functools.cache
def _record_in_graphs() -> None:
    """Lower the calls of jax-triton 0.3 to what 0.4 lowers them to, which the same jaxlib runs.

    Otherwise none of them is part of a CUDA graph, and each cuts the one it lies in.
    """
    triton_lib = importlib.import_module("jax_triton.triton_lib")

    def lower(ctx: Any, *arrays: Any, **static: Any) -> Any:
        results = triton_lib.triton_kernel_call_lowering(
            triton_lib.get_cuda_backend, ctx, *arrays, **static
        )
        call = results[0].owner
        attributes = call.attributes
        if attributes["call_target_name"].value == OLD_TARGET:
            opaque = attributes["backend_config"]
            attributes["call_target_name"] = ir.StringAttr.get(TARGET)
            attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
            attributes["backend_config"] = ir.DictAttr.get({"opaque": opaque})
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")
