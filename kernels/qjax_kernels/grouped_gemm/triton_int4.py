"""The same tiles for int4 weights: packed words, which become numbers of 16 bits in registers."""

# Triton's language: neither typed nor all of Python (no starred expressions).
# mypy: ignore-errors

import triton
import triton.language as tl

from qjax_kernels.grouped_gemm.triton_kernel import find, store, store_zeros, tile_of
from qjax_kernels.triton_weights import times

# Two words of 16 bits, the nibbles of which are columns 32 apart: four pairs of neighbours.
# 128 + n in bfloat16, and 1024 + n in float16, is a constant with n in its low bits.
_NIBBLES = """{{
.reg .b32 p, q, r, one, minus;
mov.b32 one, {one};
mov.b32 minus, {minus};
shr.b32 p, $4, 4;
shr.b32 q, $4, 8;
shr.b32 r, $4, 12;
lop3.b32 $0, $4, 0x000f000f, {magic}, 0xea;
lop3.b32 $1, p, 0x000f000f, {magic}, 0xea;
lop3.b32 $2, q, 0x000f000f, {magic}, 0xea;
lop3.b32 $3, r, 0x000f000f, {magic}, 0xea;
fma.rn.{pair} $0, $0, one, {bias[0]};
fma.rn.{pair} $1, $1, one, {bias[1]};
fma.rn.{pair} $2, $2, one, {bias[2]};
fma.rn.{pair} $3, $3, one, {bias[3]};
}}"""
_BF16 = dict(pair="bf16x2", one="0x3f803f80", magic="0x43004300", minus="0xc308c308")  # -136
_F16 = dict(pair="f16x2", one="0x3c003c00", magic="0x64006400", minus="0xe408e408")  # -1032
_FIXED, _GIVEN = ["minus"] * 4, ["$5", "$6", "$7", "$8"]
BF16 = tl.constexpr(_NIBBLES.format(bias=_FIXED, **_BF16))
F16 = tl.constexpr(_NIBBLES.format(bias=_FIXED, **_F16))
BF16_ZERO = tl.constexpr(_NIBBLES.format(bias=_GIVEN, **_BF16))
F16_ZERO = tl.constexpr(_NIBBLES.format(bias=_GIVEN, **_F16))


@triton.jit
def decode(words, biases, DTYPE: tl.constexpr):
    """int16 words -> four tensors like them in DTYPE, bfloat16 or float16: nibbles less 8.

    biases: four of DTYPE, to be added to the nibbles as DTYPE has them, instead of what makes -8;
    they broadcast against words. The results are exact.
    """
    B: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300
    if biases is None:
        a, b, c, d = _decode(BF16 if B else F16, "", [words], B)
    else:
        a, b, c, d = _decode(
            BF16_ZERO if B else F16_ZERO,
            ",r,r,r,r",
            [words, biases[0], biases[1], biases[2], biases[3]],
            B,
        )
    return a, b, c, d


@triton.jit
def _decode(CODE: tl.constexpr, MORE: tl.constexpr, arguments, B: tl.constexpr):
    REGISTERS: tl.constexpr = "=&r,=&r,=&r,=&r,r" + MORE
    if B:  # types must be named where they are used
        return tl.inline_asm_elementwise(
            CODE,
            REGISTERS,
            arguments,
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            CODE,
            REGISTERS,
            arguments,
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def four_rows(table, group, column, OUT: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows of table [GROUPS, OUT] from row `group` on, or the last ones, [columns, 1] each;
    four of them, for the four nibbles of a word."""
    last = GROUPS - 1
    a = tl.load(table + tl.minimum(group, last) * OUT + column)[:, None]
    b, c, d = a, a, a
    if COUNT == 2:
        c = tl.load(table + tl.minimum(group + 1, last) * OUT + column)[:, None]
        d = c
    if COUNT == 4:
        b = tl.load(table + tl.minimum(group + 1, last) * OUT + column)[:, None]
        c = tl.load(table + tl.minimum(group + 2, last) * OUT + column)[:, None]
        d = tl.load(table + tl.minimum(group + 3, last) * OUT + column)[:, None]
    return a, b, c, d


@triton.jit
def scale_in(word, HAS_ZERO: tl.constexpr):
    """The scale, float32, of a word that has a zero point in its low byte if HAS_ZERO."""
    if HAS_ZERO:
        word = word & -256
    return word.to(tl.float32, bitcast=True)


@triton.jit
def bias_of(word, DTYPE: tl.constexpr):
    """What `decode` adds for the zero point in the low byte of a word."""
    BIAS: tl.constexpr = -136 if DTYPE == tl.bfloat16 else -1032  # noqa: SIM300
    return (BIAS - (word << 24 >> 24)).to(tl.float32).to(DTYPE)


@triton.jit
def grouped_int4(
    x,
    values,
    group_sizes,
    scale,
    row_ids,
    row_scale,
    y,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    BAND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
):
    """values and scale as in `layout.Prepared`. A step has PARTS times BK columns, BK of them of
    one group: GROUP is all IN, or a multiple of BK; or 32 or 64 with a BK of 128.

    SCALE_SUMS: scales multiply the sums over BK columns, not the weights, if GROUP is 128 or more.
    """
    COLUMN_TILES: tl.constexpr = (OUT + BN - 1) // BN
    GROUPS: tl.constexpr = IN // GROUP
    SMALL: tl.constexpr = 128 // GROUP if GROUP < 128 and GROUP < IN else 1  # groups of a part
    SUMS: tl.constexpr = SCALE_SUMS and GROUP < IN and SMALL == 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    row_tile, column_tile = tile_of(tl.program_id(0), ROW_TILES, COLUMN_TILES, BAND)
    expert, first, end = find(group_sizes, row_tile, EXPERTS, ROWS, BM)
    if first >= end:
        return
    STEPS: tl.constexpr = (IN + PARTS * BK - 1) // (PARTS * BK)
    CHUNKS: tl.constexpr = (IN + 127) // 128
    row = first + tl.arange(0, BM)
    live = row < end
    column = column_tile * BN + tl.arange(0, BN)
    if expert >= EXPERTS:
        store_zeros(y, row, live, column, OUT)
        return

    token = row
    if HAS_IDS:
        token = tl.load(row_ids + row, mask=live, other=0)
    inside = tl.minimum(column, OUT - 1)  # the columns after the last are computed, not stored
    word = tl.arange(0, BK // 4)
    k = tl.arange(0, BK)
    expert = expert.to(tl.int64)
    x_at = x + token.to(tl.int64)[:, None] * IN + k[None, :]
    w_at = values.to(tl.pointer_type(tl.int16)) + expert * (CHUNKS * OUT * 32)
    w_at += (word // 32 * (OUT * 32) + word % 32)[None, :] + inside[:, None] * 32
    scale += expert * (GROUPS * OUT)

    acc = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        for part in tl.static_range(PARTS):
            rest = IN - (step * PARTS + part) * BK
            if IN % (PARTS * BK) == 0:
                words = tl.load(w_at)
                x_tile = tl.load(x_at, mask=live[:, None], other=0.0)
            else:
                words = tl.load(w_at, mask=(word // 32 * 128 < rest)[None, :], other=0)
                x_tile = tl.load(x_at, mask=live[:, None] & (k < rest)[None, :], other=0.0)
            if GROUP < IN or HAS_ZERO:
                group = 0 if GROUP == IN else (step * PARTS + part) * BK // GROUP
                by = four_rows(scale, group, inside, OUT, GROUPS, SMALL)
            biases = None
            if HAS_ZERO:
                biases = (
                    bias_of(by[0], DTYPE),
                    bias_of(by[1], DTYPE),
                    bias_of(by[2], DTYPE),
                    bias_of(by[3], DTYPE),
                )
            w0, w1, w2, w3 = decode(words, biases, DTYPE)
            if GROUP < IN and not SUMS:
                w0 = times(w0, scale_in(by[0], HAS_ZERO).to(DTYPE))
                w1 = times(w1, scale_in(by[1], HAS_ZERO).to(DTYPE))
                w2 = times(w2, scale_in(by[2], HAS_ZERO).to(DTYPE))
                w3 = times(w3, scale_in(by[3], HAS_ZERO).to(DTYPE))
            # Registers are renamed by this, none moves: the nibbles' columns follow each other.
            w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
            w = tl.reshape(w, [BN, BK // 128, 32, 2, 2])
            w = tl.reshape(tl.permute(w, (0, 1, 3, 4, 2)), [BN, BK])
            if SUMS:
                acc += tl.dot(w, tl.trans(x_tile)) * scale_in(by[0], HAS_ZERO)
            else:
                acc = tl.dot(w, tl.trans(x_tile), acc)
            x_at += BK
            w_at += BK // 128 * OUT * 32
    if GROUP == IN:
        acc *= scale_in(tl.load(scale + inside), HAS_ZERO)[:, None]
    store(
        tl.trans(acc),
        y,
        row,
        token,
        live,
        column,
        inside,
        scale,  # of x there is none, and this one is in the sums
        scale,
        row_scale,
        OUT,
        False,
        False,
        HAS_ROW_SCALE,
    )
