"""A process that runs Triton kernels on NumPy arrays with Triton's interpreter.

Triton decides at its import whether kernels are compiled or interpreted, so the interpreter needs
a process of its own. It reads pickled calls from its standard input and answers on its standard
output, each with its length before it.
"""

import importlib
import os
import pickle
import struct
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import ptx_emulator

NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
    "uint32": "u32",
}


def pointer(array: np.ndarray) -> SimpleNamespace:
    """What the interpreter takes for a tensor."""
    address = array.ctypes.data
    assert address % 16 == 0, "kernels assume what XLA guarantees"
    return SimpleNamespace(data_ptr=lambda: address, dtype=NAMES[array.dtype.name])


def aligned(array: np.ndarray) -> np.ndarray:
    """A contiguous copy at an address that is a multiple of 16."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def float_type(name):
    """NumPy's name for a float type of Triton."""
    floats = {
        "bf16": ml_dtypes.bfloat16,
        "fp8e4nv": ml_dtypes.float8_e4m3fn,
        "fp8e5": ml_dtypes.float8_e5m2,
    }
    return np.dtype(floats.get(name, name.replace("fp", "float")))


def convert_float(data, source, destination, rounding_mode):
    """In place of the interpreter's own, which truncates where GPUs round to nearest even."""
    value = data.view(float_type(source.name)).astype(np.float32)
    if destination.name == "fp8e4nv":
        value = np.clip(value, -448, 448)  # as the instruction does; NaN stays
    result = value.astype(float_type(destination.name))
    return result.view(f"uint{8 * result.itemsize}")


def inline_asm(self, asm, constraints, values, types, is_pure, pack):
    """The few instructions that kernels name, which the interpreter lacks."""
    handle = type(values[0])
    functions = {"ex2.approx.ftz.f32": np.exp2, "rcp.approx.ftz.f32": np.reciprocal}
    if (name := asm.split()[0]) in functions:
        results = [handle(functions[name](values[0].data), values[0].dtype)]
    else:
        scalars = [t.scalar for t in types]
        stored = [np.dtype(f"uint{t.primitive_bitwidth}") for t in scalars]
        arrays = ptx_emulator.elementwise(asm, [v.data for v in values], stored, pack)
        results = [
            handle(array.view(np.float16) if t.name == "fp16" else array, t)
            for array, t in zip(arrays, scalars, strict=True)
        ]
    return SimpleNamespace(get_result=lambda i: results[i])


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """In place of the interpreter's own, which takes bfloat16 for integers."""

    def wide(operand):
        if not operand.dtype.scalar.is_floating():
            return operand.data
        return operand.data.view(float_type(operand.dtype.scalar.name)).astype(np.float32)

    result = np.matmul(wide(a), wide(b), dtype=d.data.dtype) + d.data
    return type(d)(result, d.dtype.scalar)


def patch(interpreter):
    """Put right what the interpreter does otherwise than a GPU, or one element at a time."""
    import triton.language as tl

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_inline_asm = inline_asm
    interpreter.InterpreterBuilder.create_dot = dot

    # Triton's language is patched anew for every function that is called, and back again: here
    # once for each module, for good.
    patch_language, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch_language(function)
            # NumPy makes numbers of arrays without axes only.
            tl.core.tensor.__index__ = lambda self: self.handle.data.item()
        return SimpleNamespace(restore=lambda: None)

    def topk(x, k, dim=None):
        data = np.flip(np.sort(x.handle.data, axis=-1), axis=-1)[..., :k]
        return tl.tensor(type(x.handle)(data, x.dtype), tl.block_type(x.dtype, list(data.shape)))

    interpreter._patch_lang = patch_once
    tl.topk = topk


def call(module, kernel, arguments, outputs, grid, aliases, constants):
    """Run one kernel; outputs it does not write are full of ones (NaN, in floats)."""
    from triton.runtime import interpreter

    if interpreter._convert_float is not convert_float:
        patch(interpreter)

    class Executor(interpreter.GridExecutor):
        """Arrays are in this memory already."""

        def _init_args_hst(self, args_dev, kwargs):
            return args_dev, kwargs

        def _restore_args_dev(self, *args):
            pass

    arrays = [a if isinstance(a, int) else aligned(a) for a in arguments]
    results = []
    for i, (shape, dtype) in enumerate(outputs):
        source = [k for k, v in aliases.items() if v == i]
        ones = np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8)
        results.append(arrays[source[0]] if source else aligned(ones.view(dtype).reshape(shape)))
    function = getattr(importlib.import_module(module), kernel)
    everything = [a if isinstance(a, int) else pointer(a) for a in (*arrays, *results)]
    run = Executor(function.rewrite(), function.arg_names, tuple(grid))
    with np.errstate(all="ignore"):
        run(*everything, **constants)
    return results


def main() -> None:
    """Serve until the input ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print must not mix with the answers
    while header := sys.stdin.buffer.read(8):
        request = pickle.loads(sys.stdin.buffer.read(*struct.unpack("<q", header)))
        try:
            answer = call(*request)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        data = pickle.dumps(answer)
        replies.write(struct.pack("<q", len(data)) + data)
        replies.flush()


if __name__ == "__main__":
    main()
