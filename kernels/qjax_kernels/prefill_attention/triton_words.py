"""Words of two 8-bit numbers, of a cache, as two numbers of 16 bits, for kernels in Triton.

A tile of 16-bit words can be read from shared memory in any order that tensor cores want, keys and
values alike; one of bytes cannot. So a row is read as words, of which the low byte is an even
feature and the high byte the odd one behind it, and these are operands of different products.
"""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

# Each takes two words, (b, a) and (d, c) with a and c in the low bytes, and gives the pairs (a, c)
# and (b, d) in float16.

# 1024 + 128 + n has n + 128 in its low bits.
INT8 = tl.constexpr("""{
.reg .b32 biased, low, high, one, minus;
mov.b32 one, 0x3c003c00;
mov.b32 minus, 0xe480e480;
xor.b32 biased, $2, 0x80808080;
prmt.b32 low, biased, 0x64646464, 0x4240;
prmt.b32 high, biased, 0x64646464, 0x4341;
fma.rn.f16x2 $0, low, one, minus;
fma.rn.f16x2 $1, high, one, minus;
}""")
# Sign, exponent and mantissa go to their places in float16, whose exponent has a bias that is 8
# larger: exact for subnormal numbers too. NaN becomes 480.
E4M3 = tl.constexpr("""{
.reg .b32 low, high, bits, factor, zero;
mov.b32 factor, 0x5c005c00;
mov.b32 zero, 0x80008000;
prmt.b32 low, $2, 0, 0x2404;
shr.b32 bits, low, 1;
and.b32 bits, bits, 0x3f803f80;
lop3.b32 low, low, 0x80008000, bits, 0xea;
shr.b32 bits, $2, 1;
and.b32 bits, bits, 0x3f803f80;
lop3.b32 high, $2, 0x80008000, bits, 0xea;
fma.rn.f16x2 $0, low, factor, zero;
fma.rn.f16x2 $1, high, factor, zero;
}""")

# By the instruction of compute capability 8.9, after which NaN is NaN.
E4M3_CONVERTED = tl.constexpr("""{
.reg .b32 low, high;
.reg .b16 pair, pair2;
prmt.b32 low, $2, 0, 0x4420;
prmt.b32 high, $2, 0, 0x4431;
cvt.u16.u32 pair, low;
cvt.u16.u32 pair2, high;
cvt.rn.f16x2.e4m3x2 $0, pair;
cvt.rn.f16x2.e4m3x2 $1, pair2;
}""")


@triton.jit
def split_words(words, FORMAT: tl.constexpr):
    """int16 words -> (low bytes, high bytes), float16, in the layout of words.

    FORMAT: 'int8', 'e4m3' or, for compute capability 8.9 and up, 'e4m3 converted'.
    """
    if FORMAT == "int8":
        CODE: tl.constexpr = INT8
    elif FORMAT == "e4m3":
        CODE: tl.constexpr = E4M3
    else:
        tl.static_assert(FORMAT == "e4m3 converted")
        CODE: tl.constexpr = E4M3_CONVERTED
    return tl.inline_asm_elementwise(
        CODE, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )
