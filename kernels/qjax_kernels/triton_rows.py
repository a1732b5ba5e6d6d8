"""What the row kernels in Triton share: a reduction, rounding to 8 bits, and the scale for it."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

# float32 numbers from 2^23 to 2^24 are integers: adding 1.5 * 2^23 rounds half to even and leaves
# the integer, in two's complement, in the low bits.
ROUND = tl.constexpr(12582912.0)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def sum_and_max(sum_a, max_a, sum_b, max_b):
    """For tl.reduce: both in one exchange between warps."""
    return sum_a + sum_b, tl.maximum(max_a, max_b)


@triton.jit
def scale_of(amax, dtype: tl.constexpr):
    """The step for which int8 or fp8 covers [-amax, amax]; 1 for zeros. amax is a tensor."""
    TOP: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, TOP, tl.float32)), TINY)
    return tl.where(amax > 0, scale, 1.0)


@triton.jit
def quantized(x, dtype: tl.constexpr, CLIP: tl.constexpr):
    """float32 x, divided by its scale, in int8 or fp8; CLIP where it may lie outside the range."""
    if dtype == tl.int8:
        if CLIP:
            x = tl.clamp(x, -128.0, 127.0)
        x = (x + ROUND).to(tl.int32, bitcast=True)
    elif CLIP:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def store_sums(sums, values, row, rows, c, FEATURES: tl.constexpr):
    """Sums over 128 neighbours of chunk c of some rows, [ROWS, CHUNK] -> [rows, FEATURES / 128]."""
    ROWS: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1] // 128
    group = c * GROUPS + tl.arange(0, GROUPS)[None, :]
    total = tl.sum(tl.reshape(values.to(tl.float32), [ROWS, GROUPS, 128]), axis=2)
    at = sums + row * (FEATURES // 128) + group
    tl.store(at, total, mask=(row < rows) & (group < FEATURES // 128))


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)), relative error 2^-22 + |x| 2^-24: two special function instructions.

    tl.sigmoid takes three times as many instructions, for subnormal powers and divisors over
    2^126. Here they are 0.
    """
    power = _approximate("ex2.approx.ftz.f32 $0, $1;", x * -1.4426950408889634)
    return _approximate("rcp.approx.ftz.f32 $0, $1;", 1.0 + power)


@triton.jit
def _approximate(INSTRUCTION: tl.constexpr, x):
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], tl.float32, is_pure=True, pack=1)
