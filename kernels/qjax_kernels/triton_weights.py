"""Weights of 4 or 8 bits, packed in bytes, as numbers of 16 bits, for kernels in Triton.

The order in memory: uint8 [chunks, out, 32], CHUNK bytes of each output in a row. A chunk is 64
columns of 4 bits: byte j has column j in its low nibble and column j + 32 in its high one, each
plus 8. Or it is 32 columns of 8 bits: byte j is column j, as it is. So a tile of outputs is
contiguous in memory, and the nibbles of a byte belong to different products over 32 columns each:
no weight ever moves to another place. Columns that fill up the last chunk are zeros.

Every function here is elementwise, so that Triton can run it in whatever layout the product needs,
and converts four bytes at a time. No conversion instructions for fp8 are used: they need compute
capability 8.9, these shifts 8.0.
"""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

CHUNK = 32  # bytes of an output that lie together

# 128 + n in bfloat16, and 1024 + n in float16, is a constant with n in its low bits.
_INT4 = """{{
.reg .b32 p, q, r, s, one, m0, m1, m2, m3;
mov.b32 one, {one};
mov.b32 m0, {minus[0]};
mov.b32 m1, {minus[1]};
mov.b32 m2, {minus[2]};
mov.b32 m3, {minus[3]};
prmt.b32 p, $4, 0, 0x4140;
prmt.b32 q, $4, 0, 0x4342;
shr.b32 r, p, 4;
shr.b32 s, q, 4;
lop3.b32 p, p, 0x000f000f, {magic}, 0xea;
lop3.b32 q, q, 0x000f000f, {magic}, 0xea;
lop3.b32 r, r, 0x000f000f, {magic}, 0xea;
lop3.b32 s, s, 0x000f000f, {magic}, 0xea;
fma.rn.{pair} $0, p, one, m0;
fma.rn.{pair} $1, q, one, m1;
fma.rn.{pair} $2, r, one, m2;
fma.rn.{pair} $3, s, one, m3;
}}"""
_BF16 = {"pair": "bf16x2", "one": "0x3f803f80", "magic": "0x43004300"}
_F16 = {"pair": "f16x2", "one": "0x3c003c00", "magic": "0x64006400"}
_GIVEN = ("$5", "$6", "$7", "$8")
INT4_BF16 = tl.constexpr(_INT4.format(minus=("0xc308c308",) * 4, **_BF16))  # -136
INT4_F16 = tl.constexpr(_INT4.format(minus=("0xe408e408",) * 4, **_F16))  # -1032
INT4_BF16_MINUS = tl.constexpr(_INT4.format(minus=_GIVEN, **_BF16))
INT4_F16_MINUS = tl.constexpr(_INT4.format(minus=_GIVEN, **_F16))

# 128 + the lower 7 bits, less 128, or 256 if the sign is set: 8 bits do not fit into a mantissa.
INT8_BF16 = tl.constexpr("""{
.reg .b32 p, q, r, s, one;
mov.b32 one, 0x3f803f80;
prmt.b32 p, $2, 0, 0x4140;
prmt.b32 q, $2, 0, 0x4342;
lop3.b32 r, p, 0x00800080, 0xc300c300, 0xea;
lop3.b32 s, q, 0x00800080, 0xc300c300, 0xea;
lop3.b32 p, p, 0x007f007f, 0x43004300, 0xea;
lop3.b32 q, q, 0x007f007f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, p, one, r;
fma.rn.bf16x2 $1, q, one, s;
}""")
# 1024 + 128 + n, less 1152.
INT8_F16 = tl.constexpr("""{
.reg .b32 p, q, r, one, minus;
mov.b32 one, 0x3c003c00;
mov.b32 minus, 0xe480e480;
xor.b32 r, $2, 0x80808080;
prmt.b32 p, r, 0x64646464, 0x4140;
prmt.b32 q, r, 0x64646464, 0x4342;
fma.rn.f16x2 $0, p, one, minus;
fma.rn.f16x2 $1, q, one, minus;
}""")

# Sign, exponent and mantissa go to the places of a wider number; the exponent's bias is made good
# by a factor. That is exact for subnormal numbers too.
_FP8 = """{{
.reg .b32 p, q, r, s, factor, zero;
mov.b32 factor, {factor};
mov.b32 zero, 0x80008000;
prmt.b32 p, $2, 0, 0x1404;
prmt.b32 q, $2, 0, 0x3424;
shr.b32 r, p, {shift};
shr.b32 s, q, {shift};
and.b32 r, r, {mask};
and.b32 s, s, {mask};
lop3.b32 p, p, 0x80008000, r, 0xea;
lop3.b32 q, q, 0x80008000, s, 0xea;
fma.rn.{pair} $0, p, factor, zero;
fma.rn.{pair} $1, q, factor, zero;
}}"""
E4M3_BF16 = tl.constexpr(  # 2^120
    _FP8.format(pair="bf16x2", shift=4, mask="0x07f007f0", factor="0x7b807b80")
)
E5M2_BF16 = tl.constexpr(  # 2^112
    _FP8.format(pair="bf16x2", shift=3, mask="0x0fe00fe0", factor="0x77807780")
)
E4M3_F16 = tl.constexpr(  # 2^8
    _FP8.format(pair="f16x2", shift=1, mask="0x3f803f80", factor="0x5c005c00")
)
E5M2_F16 = tl.constexpr("prmt.b32 $0, $2, 0, 0x1404;\nprmt.b32 $1, $2, 0, 0x3424;")

TIMES_BF16 = tl.constexpr("""{
.reg .b32 zero;
mov.b32 zero, 0x80008000;
fma.rn.bf16x2 $0, $1, $2, zero;
}""")
TIMES_F16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
_MINUS = "{{\n.reg .b32 minus;\nmov.b32 minus, {minus};\nfma.rn.{pair} $0, $2, minus, $1;\n}}"
MINUS_BF16 = tl.constexpr(_MINUS.format(pair="bf16x2", minus="0xbf80bf80"))
MINUS_F16 = tl.constexpr(_MINUS.format(pair="f16x2", minus="0xbc00bc00"))


@triton.jit
def decode_int4(codes, low_zero, high_zero, DTYPE: tl.constexpr):
    """uint8 codes -> (low, high), both like codes: nibble - 8 - zero in DTYPE.

    low_zero, high_zero: DTYPE, broadcast against codes, integers from -8 to 7; or both None.
    DTYPE: tl.bfloat16 or tl.float16. The results are exact.
    """
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if low_zero is None:
        low, high = _decode_int4(INT4_BF16 if BF16 else INT4_F16, "", [codes], BF16)
    else:
        BIAS: tl.constexpr = -136.0 if BF16 else -1032.0
        low_minus = (BIAS - low_zero.to(tl.float32)).to(DTYPE)
        high_minus = (BIAS - high_zero.to(tl.float32)).to(DTYPE)
        CODE: tl.constexpr = INT4_BF16_MINUS if BF16 else INT4_F16_MINUS
        low, high = _decode_int4(CODE, ",r,r,r,r", [codes, low_minus, high_minus], BF16)
    return low, high


@triton.jit
def _decode_int4(CODE: tl.constexpr, MORE: tl.constexpr, arguments, BF16: tl.constexpr):
    REGISTERS: tl.constexpr = "=&r,=&r,=&r,=&r,r" + MORE
    if BF16:  # types must be named where they are used
        return tl.inline_asm_elementwise(
            CODE, REGISTERS, arguments, dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            CODE, REGISTERS, arguments, dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )


@triton.jit
def decode_8bit(codes, zero, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 codes -> numbers in DTYPE, less zero.

    zero: DTYPE, broadcasts against codes, integers from -128 to 127; or None.
    FORMAT: 'int8', 'float8_e4m3fn' or 'float8_e5m2'.
    DTYPE: tl.bfloat16 or tl.float16. The results are exact; only e5m2 in float16 knows infinity and
    NaN (else they become the finite numbers that their bits would be, 480 for e4m3's NaN).
    """
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if FORMAT == "int8":
        CODE: tl.constexpr = INT8_BF16 if BF16 else INT8_F16
    elif FORMAT == "float8_e4m3fn":
        CODE: tl.constexpr = E4M3_BF16 if BF16 else E4M3_F16
    else:
        tl.static_assert(FORMAT == "float8_e5m2")
        CODE: tl.constexpr = E5M2_BF16 if BF16 else E5M2_F16
    if BF16:
        result = tl.inline_asm_elementwise(
            CODE, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        result = tl.inline_asm_elementwise(
            CODE, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    if zero is not None:
        result = _minus(result, zero)
    return result


@triton.jit
def _minus(a, b):
    BF16: tl.constexpr = a.dtype == tl.bfloat16
    return tl.inline_asm_elementwise(
        MINUS_BF16 if BF16 else MINUS_F16, "=&r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2
    )


@triton.jit
def times(a, b):
    """a * b, both bfloat16 or both float16, two at a time on every GPU; b broadcasts against a."""
    BF16: tl.constexpr = a.dtype == tl.bfloat16
    return tl.inline_asm_elementwise(
        TIMES_BF16 if BF16 else TIMES_F16, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2
    )
