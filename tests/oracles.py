"""Reference implementations in NumPy float64, written from the definitions.

They import nothing from qjax, so that a mistake in the library cannot hide in its own test. What
the library stores in a narrow type is rounded to that type here too, at the same place.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np

# Unit roundoff: the largest relative error of one rounding to nearest.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

INTEGERS = {f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(2, 9)}
# name -> exponent bits, mantissa bits, bias, bit patterns at the top that are not finite numbers.
FLOATS = {"fp4_e2m1": (2, 1, 1, 0), "fp8_e4m3": (4, 3, 7, 1), "fp8_e5m2": (5, 2, 15, 4)}
FORMATS = (*INTEGERS, *FLOATS)
# One of each kind: tests of what has nothing to do with the number of bits take these.
COMMON = ("int4", "int8", "fp8_e4m3", "fp8_e5m2")


DTYPES = {
    "float4_e2m1fn": "fp4_e2m1",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}


@cache
def float_table(name: str) -> np.ndarray:
    """The finite numbers >= 0 of a narrow float; the index of each is its bit pattern."""
    exponent_bits, mantissa_bits, bias, not_finite = FLOATS[name]
    numbers = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                numbers.append(fraction * 2.0 ** (1 - bias))
            else:
                numbers.append((1 + fraction) * 2.0 ** (exponent - bias))
    return np.array(numbers[: len(numbers) - not_finite])


@cache
def grid(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All finite numbers of a format, ascending, and which of them win a tie (the even ones)."""
    if name in INTEGERS:
        low, high = INTEGERS[name]
        numbers = np.arange(low, high + 1)
        return numbers.astype(np.float64), numbers % 2 == 0
    positive = float_table(name)
    even = np.arange(len(positive)) % 2 == 0
    return np.concatenate([-positive[:0:-1], positive]), np.concatenate([even[:0:-1], even])


def round_to(x: np.ndarray, name: str) -> np.ndarray:
    """The nearest number of the format, by comparing with each of them; NaN stays NaN."""
    numbers, even = grid(name)
    x = np.asarray(x, np.float64)
    finite = np.clip(np.where(np.isnan(x), 0, x), numbers[0], numbers[-1])
    distance = np.abs(finite[..., None] - numbers)
    nearest = distance == distance.min(axis=-1, keepdims=True)
    # One number is nearest, or two at the same distance, of which one is even.
    winner = np.where(nearest.sum(axis=-1, keepdims=True) == 1, nearest, nearest & even)
    return np.where(np.isnan(x), np.nan, numbers[winner.argmax(axis=-1)])


def decode(values: np.ndarray) -> np.ndarray:
    """float64 numbers of an integer, float or narrow float array; narrow floats by bit pattern."""
    values = np.asarray(values)
    if values.dtype.name == "float8_e8m0fnu":
        bits = values.view(np.uint8)
        return np.where(bits == 255, np.nan, 2.0 ** (bits.astype(np.float64) - 127))
    name = DTYPES.get(values.dtype.name)
    if name is None:
        return values.astype(np.float64)
    bits, sign = values.view(np.uint8), 2 ** sum(FLOATS[name][:2])
    table = np.full(sign, np.nan)
    table[: len(float_table(name))] = float_table(name)
    return np.where(bits >= sign, -1.0, 1.0) * table[bits % sign]


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to float32 or bfloat16 (through float32, as hardware does), as float64."""
    single = np.asarray(x, np.float32)
    if dtype == "bfloat16":
        # The upper half of a float32: add half of its last place, a bit less if it is even.
        bits = single.view(np.uint32)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        single = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return single.astype(np.float64)


def blocks_of(shape: tuple[int, ...], block: tuple[int, int]) -> Iterator[tuple[tuple, tuple]]:
    """(index into the scales, index into the values) of each block of the last two axes."""
    rows, columns = (shape[i - 2] if block[i] == -1 else block[i] for i in range(2))
    for lead in np.ndindex(*shape[:-2]):
        for i, j in np.ndindex(shape[-2] // rows, shape[-1] // columns):
            row, column = i * rows, j * columns
            tile = (slice(row, row + rows), slice(column, column + columns))
            yield (*lead, i, j), (*lead, *tile)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    indices = [index for index, _ in blocks_of(shape, block)]
    return tuple(1 + max(index[axis] for index in indices) for axis in range(len(shape)))


def scales(
    x: np.ndarray,
    name: str,
    block: tuple[int, int],
    *,
    symmetric: bool = True,
    rule: str = "absmax",
) -> np.ndarray:
    """The scale of each block by its formula, in float64, not rounded to a storage type."""
    numbers, _ = grid(name)
    out = np.zeros(scale_shape(x.shape, block))
    for index, tile in blocks_of(x.shape, block):
        if symmetric:
            span = np.abs(x[tile]).max()
            steps = numbers[-1] + (0.5 if rule == "absmax_half" else 0)
        else:
            span = max(x[tile].max(), 0) - min(x[tile].min(), 0)
            steps = numbers[-1] - numbers[0]
        out[index] = span / steps if span > 0 else 1
    return out


def power_of_two(amax: np.ndarray, name: str, rule: str) -> np.ndarray:
    """The scale of blocks with these magnitudes, a power of 2; 1 for zeros.

    floor: the exponent of amax less that of the largest number. even: of amax rounded to the
    mantissa of the format. rceil: the first power of 2 that reaches amax / largest number.
    """
    _, mantissa_bits, _, _ = FLOATS[name]
    top = grid(name)[0][-1]
    if rule == "rceil":
        _, exponent = np.frexp(amax / top)
        exponent = exponent - (2.0 ** (exponent - 1) * top >= amax)
    else:
        half_a_place = 2.0 ** -(mantissa_bits + 2)  # of mantissas in 1/2..1
        mantissa, exponent = np.frexp(amax)
        exponent = exponent + ((rule == "even") & (mantissa + half_a_place >= 1)) - np.frexp(top)[1]
    return np.where(amax > 0, 2.0**exponent, 1)


def quantize(
    x: np.ndarray,
    name: str,
    block: tuple[int, int],
    scale: np.ndarray,
    *,
    symmetric: bool = True,
    reciprocal: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the format, and zero points (0 if symmetric), for stored scales.

    Quotients are rounded to float32, the type that the library computes in. (A float64 quotient
    of float32 numbers rounded to float32 is the correctly rounded one: 53 >= 2 * 24 + 2 bits.)
    reciprocal: x / s is computed as x * (1 / s), two roundings.
    """
    values, zeros = np.zeros(x.shape), np.zeros(scale.shape)
    low, high = grid(name)[0][[0, -1]]
    for index, tile in blocks_of(x.shape, block):
        quotient = x[tile] / scale[index]
        if reciprocal:
            quotient = x[tile] * narrow(1 / scale[index], "float32")
        quotient = narrow(quotient, "float32")
        if symmetric:
            values[tile] = round_to(quotient, name)
        else:
            smallest = narrow(min(x[tile].min(), 0) / scale[index], "float32")
            zeros[index] = round_to(narrow(low - smallest, "float32"), name)
            values[tile] = np.clip(np.rint(quotient) + zeros[index], low, high)
    return values, zeros


def dequantize(
    values: np.ndarray, block: tuple[int, int], scale: np.ndarray, zeros: np.ndarray | None = None
) -> np.ndarray:
    """(values - zeros) * scale, block by block, in float64."""
    out = np.zeros(values.shape)
    for index, tile in blocks_of(values.shape, block):
        out[tile] = (values[tile] - (0 if zeros is None else zeros[index])) * scale[index]
    return out


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def rope(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate x [batch, tokens, heads, dim] by angles [batch, tokens, dim/2] in the complex plane.

    Feature i is the real part and feature i + dim/2 the imaginary part of number i.
    """
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """q [batch, tokens, heads, dim] over k, v [batch, kv_heads, length, dim], query by query."""
    out = np.zeros(q.shape)
    batch, tokens, heads, dim = q.shape
    for b, t, h in np.ndindex(batch, tokens, heads):
        group = h * k.shape[1] // heads
        seen = positions[b, t] + 1
        scores = np.array([q[b, t, h] @ k[b, group, s] for s in range(seen)]) / np.sqrt(dim)
        out[b, t, h] = softmax(scores) @ v[b, group, :seen]
    return out


def kept_tokens(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Which logits [batch, vocab] survive top_k, then top_p; what ties with the last one stays."""
    keep = np.zeros(logits.shape, bool)
    for row, logit in enumerate(logits):
        chosen = sorted(range(len(logit)), key=lambda i: -logit[i])[:top_k]
        if top_p is not None:
            probabilities = softmax(logit[chosen])
            total, count = 0.0, 0
            while count < len(chosen) and total < top_p:
                total += probabilities[count]
                count += 1
            chosen = chosen[:count]
        for i in range(len(logit)):
            keep[row, i] = logit[i] >= logit[chosen[-1]]
    return keep


def rel_norm(y: np.ndarray, reference: np.ndarray) -> float:
    """|y - reference| / |reference|, over all of it."""
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def max_row_error(y: np.ndarray, reference: np.ndarray) -> float:
    """The largest `rel_norm` of a row: a few bad rows among many hide from the norm over all."""
    width = reference.shape[-1]
    rows = zip(y.reshape(-1, width), reference.reshape(-1, width), strict=True)
    return max(rel_norm(row, expected) for row, expected in rows)
