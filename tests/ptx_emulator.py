"""The few PTX instructions of inline assembly in Triton kernels, on NumPy arrays of registers."""

import re

import ml_dtypes
import numpy as np

PAIRS = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}


def run(code: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """uint32 arrays of one shape, the registers of many threads -> the output registers.

    Registers are numbered from the outputs on: $0 is the first output, then come the inputs.
    """
    names: dict[str, np.ndarray] = {f"${outputs + i}": array for i, array in enumerate(inputs)}
    shape = inputs[0].shape

    def value(name: str) -> np.ndarray:
        if name in names:
            return names[name]
        return np.full(shape, int(name, 0), np.uint32)

    for line in re.split(r"[;\n]", code):
        instruction, _, rest = line.strip().partition(" ")
        if instruction in ("", "{", "}", ".reg"):
            continue
        target, *sources = (name.strip() for name in rest.split(","))
        names[target] = _execute(instruction, [value(name) for name in sources])
    return [names[f"${i}"] for i in range(outputs)]


def _execute(instruction: str, x: list[np.ndarray]) -> np.ndarray:
    name, *modifiers = instruction.split(".")
    if name == "mov":
        return x[0]
    if name in ("and", "xor", "or"):
        return getattr(np, f"bitwise_{name}")(x[0], x[1])
    if name == "shr":
        return x[0] >> x[1]
    if name == "lop3":
        return _lop3(*x)
    if name == "prmt":
        return _prmt(*x)
    # Products and sums of 16-bit numbers are exact in float64, but for extreme exponents.
    a, *more = (_halves(array, PAIRS[modifiers[-1]]).astype(np.float64) for array in x)
    if name == "mul":
        result = a * more[0]
    elif name == "fma":
        result = a * more[0] + more[1]
    else:
        raise NotImplementedError(instruction)
    return result.astype(PAIRS[modifiers[-1]]).view(np.uint32)[..., 0]


def _halves(registers: np.ndarray, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(registers)[..., None].view(dtype)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each bit of the result is the bit of the table that the three bits number."""
    result = np.zeros_like(a)
    for bit in range(32):
        index = sum(((v >> bit) & 1) << place for v, place in ((a, 2), (b, 1), (c, 0)))
        result |= ((table >> index.astype(np.uint32)) & 1) << np.uint32(bit)
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each byte of the result is one of the eight of a and b."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for byte in range(4):
        which = ((selector >> np.uint32(4 * byte)) & np.uint32(7)).astype(np.uint64)
        picked = (both >> (which * np.uint64(8))) & np.uint64(255)
        result |= picked.astype(np.uint32) << np.uint32(8 * byte)
    return result


def elementwise(code: str, values: list[np.ndarray], dtypes: list, pack: int) -> list[np.ndarray]:
    """Arrays of one shape, `pack` neighbours at a time in as many registers as they fill."""
    shape = values[0].shape
    inputs: list[np.ndarray] = []
    for array in values:
        registers = np.ascontiguousarray(array).reshape(-1, pack).view(np.uint32)
        inputs.extend(registers[:, i] for i in range(registers.shape[1]))
    counts = [pack * np.dtype(dtype).itemsize // 4 for dtype in dtypes]
    found = run(code, inputs, sum(counts))
    results = []
    for dtype, count in zip(dtypes, counts, strict=True):
        registers = np.stack([found.pop(0) for _ in range(count)], axis=-1)
        results.append(np.ascontiguousarray(registers).view(dtype).reshape(shape))
    return results
