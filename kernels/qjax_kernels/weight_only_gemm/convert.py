"""Packed words -> floating-point registers of `wgmma`, in one to two instructions a weight.

An integer is put into the mantissa of a power of two, by one `lop3`, and the power is subtracted,
which is exact. An fp8 number is moved to the exponent and mantissa of the wider type and multiplied
by the difference of their biases, which is exact too. So is an fp4 number.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qjax_kernels.weight_only_gemm.layout import (
    LANES,
    REST,
    SIGNS,
    TILE,
    unpack,
    words_per_tile,
)

L = plgpu.Layout
MMA = L.WGMMA
ROW = L.WGMMA.reduce(1)  # a number for each row, beside MMA

# Per type of the activations: the power of two whose mantissa steps are 1, and its bits, twice.
_MAGIC = {"bfloat16": 0x43004300, "float16": 0x64006400}
_SUFFIX = {"bfloat16": "bf16x2", "float16": "f16x2"}
_POWER = {"bfloat16": 128, "float16": 1024}
# (format, type) -> right shift of the byte at the top of a half word, mask, and factor (twice).
_FP8 = {
    ("float8_e4m3fn", "bfloat16"): (4, 0x07F007F0, 0x7B807B80),  # 2**120
    ("float8_e5m2", "bfloat16"): (3, 0x0FE00FE0, 0x77807780),  # 2**112
    ("float8_e4m3fn", "float16"): (1, 0x3F803F80, 0x5C005C00),  # 2**8
    ("float8_e5m2", "float16"): (0, 0x7F007F00, None),
}
# type -> place of the lowest of an fp4 number's three bits beside the sign, and factor (twice).
_FP4 = {"bfloat16": (6, 0x7E807E80), "float16": (9, 0x74007400)}  # 2**126, 2**14


def strided(rows: int) -> Any:
    """The layout of words [rows, 128] in registers: 16 bytes of a thread lie together."""
    return L.WG_STRIDED((rows, LANES), 4)


def to_registers(
    words: jax.Array,
    format: str,
    dtype: jnp.dtype,
    zeros: Sequence[jax.Array] = (),
    scales: Sequence[jax.Array] = (),
    *,
    interpret: bool = False,
) -> jax.Array:
    """Words of some tiles -> their weights, (w - zero) * scale.

    Args:
      words: int32 [rows, 128] in the layout `strided`.
      format: of the weights.
      dtype: bfloat16 or float16.
      zeros, scales: arrays [64] of dtype in the layout ROW, each for an equal part of the columns;
        none: 0 and 1.
      interpret: compute it with jax.numpy.

    Returns:
      dtype [64, 64 tiles], in the layout of wgmma's operand in registers. Exact without scales.
    """
    tiles = words.shape[0] // words_per_tile(format)
    if interpret:
        return _interpreted(words, format, dtype, zeros, scales)
    shape = (64, TILE * tiles)
    name = jnp.dtype(dtype).name

    @plgpu.inline_mgpu(
        arg_types=(strided(words.shape[0]), [ROW] * len(zeros), [ROW] * len(scales)),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=MMA),
    )
    def convert(ctx, words, zeros, scales):  # type: ignore[no-untyped-def]
        element = ir.BF16Type.get() if name == "bfloat16" else ir.F16Type.get()
        pair = ir.VectorType.get((2,), element)
        layout = MMA.to_mgpu()
        steps = 4 * tiles
        out = np.empty(layout.registers_shape(shape), dtype=object)
        # Columns by 8, halves of 16 rows: the order of both is that of the layout's registers.
        registers = out.reshape(2 * steps, 2)
        flat = [
            vector.extract(register, dynamic_position=[], static_position=[i])
            for register in words.registers.flat
            for i in range(4)
        ]
        per_step = len(flat) // steps
        for step in range(steps):
            values = _step(flat[step * per_step : (step + 1) * per_step], format, name)
            for index, value in enumerate(values):
                p, h = divmod(index, 2)
                value = _shift_and_scale(value, format, name, zeros, scales, step, steps, h)
                registers[2 * step + p, h] = utils.bitcast(value, pair)
        return fa.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    return convert(words, list(zeros), list(scales))


def to_fp8(words: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Words of int4 weights -> w / 512 in e4m3, exactly: nine instructions for 8 weights.

    The codes 0 to 8 of e4m3 are its numbers 0 to 8 times 2^-9, through the subnormals into the
    first normal one. A weight below 0 is kept as 8 + |w| - 1 and becomes 0x80 + |w|.

    Args:
      words: int32 [4 tiles, 128] in the layout `strided`, prepared for fp8.
      interpret: compute it with jax.numpy.

    Returns:
      float8_e4m3fn [64, 64 tiles], in the layout of wgmma's operand in registers.
    """
    rows = words.shape[0]
    shape = (64, TILE * rows // words_per_tile("int4"))
    if interpret:
        values = unpack(words[None], "int4", "float8_e4m3fn")
        return (values.astype(jnp.float32) / 512).astype(jnp.float8_e4m3fn)

    @plgpu.inline_mgpu(
        arg_types=(strided(rows),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float8_e4m3fn, layout=L.WGMMA_8BIT),
    )
    def convert(ctx, words):  # type: ignore[no-untyped-def]
        four = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
        layout = L.WGMMA_8BIT.to_mgpu()
        out = np.empty(layout.registers_shape(shape), dtype=object)
        registers = out.reshape(-1, 2)  # columns by 16, halves of 16 rows
        flat = [
            vector.extract(register, dynamic_position=[], static_position=[i])
            for register in words.registers.flat
            for i in range(4)
        ]
        for index, word in enumerate(flat):
            for half in range(2):
                code = _asm("and.b32 $0, $1, $2;", _shifted(word, 4 * half), 0x0F0F0F0F)
                below_0 = _asm("and.b32 $0, $1, $2;", _shifted(word, 4 * half + 3), 0x01010101)
                # 0x81 in place of the 8.
                code = _asm("mad.lo.u32 $0, $1, $2, $3;", below_0, 0x81 - 8, code)
                registers[index, half] = utils.bitcast(code, four)
        return fa.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    return convert(words)


def _step(words: list[ir.Value], format: str, name: str) -> list[ir.Value]:
    """The words of one thread for 16 columns -> four pairs, integers with their power still on."""
    if format == "float4_e2m1fn":
        (word,) = words
        return [_fp4(word, i, name) for i in range(4)]
    if format == "int4":
        (word,) = words
        magic = _MAGIC[name]
        return [_masked(_shifted(word, 4 * i), 0x000F000F, magic) for i in range(4)]
    if format == "int8":
        return [_int8(_shifted(word, 8 * i), name) for word in words for i in range(2)]
    return [_fp8(word, i, format, name) for word in words for i in range(2)]


def _int8(word: ir.Value, name: str) -> ir.Value:
    """Bytes 0 and 2 of a word, signed."""
    if name == "float16":  # 1024 + the byte with its sign flipped, less 1152
        flipped = _asm("lop3.b32 $0, $1, $2, $3, 0x6A;", word, 0x00FF00FF, 0x64806480)
        return _asm("sub.rn.f16x2 $0, $1, $2;", flipped, 0x64806480)
    # The mantissa has 7 bits: 128 + the low ones, less 128 or, with the sign, 256.
    low = _masked(word, 0x007F007F, _MAGIC[name])
    sign = _masked(word, 0x00800080, _MAGIC[name])
    return _asm("sub.rn.bf16x2 $0, $1, $2;", low, sign)


def _fp8(word: ir.Value, index: int, format: str, name: str) -> ir.Value:
    """Bytes 0 and 2 (index 0) or 1 and 3 of a word."""
    shift, mask, factor = _FP8[format, name]
    if index == 0:
        word = arith.shli(word, _constant(8))
    rest = _asm("and.b32 $0, $1, $2;", _shifted(word, shift), mask)
    value = _asm("lop3.b32 $0, $1, $2, $3, 0xEA;", word, 0x80008000, rest)
    if factor is None:
        return value
    return _asm(f"mul.rn.{_SUFFIX[name]} $0, $1, $2;", value, factor)


def _fp4(word: ir.Value, index: int, name: str) -> ir.Value:
    """Number `index` of each half of a word, whose bits are where `layout` puts them."""
    place, factor = _FP4[name]
    sign, rest = 15 - SIGNS[index], place - REST[index]  # to the left
    mask = 0x00010001 * (7 << place)
    if sign == rest:
        value = _asm("and.b32 $0, $1, $2;", _left(word, rest), mask | 0x80008000)
    else:
        value = _asm("and.b32 $0, $1, $2;", _left(word, rest), mask)
        value = _asm("lop3.b32 $0, $1, $2, $3, 0xEA;", _left(word, sign), 0x80008000, value)
    return _asm(f"mul.rn.{_SUFFIX[name]} $0, $1, $2;", value, factor)


def _left(word: ir.Value, by: int) -> ir.Value:
    return arith.shli(word, _constant(by)) if by > 0 else _shifted(word, -by)


def _shift_and_scale(  # type: ignore[no-untyped-def]
    value, format, name, zeros, scales, step, steps, half
) -> ir.Value:
    """(value - power - zero) * scale for the rows of one half."""
    subtract, multiply = f"sub.rn.{_SUFFIX[name]}", f"mul.rn.{_SUFFIX[name]}"
    if format == "int4":
        # 128 + 8 + the weight; exact, and so is what a zero point leaves.
        offset = _half_words(_POWER[name] + 8, name)
        value = _asm(f"{subtract} $0, $1, $2;", value, offset)
    if zeros:
        value = _asm(f"{subtract} $0, $1, $2;", value, _twice(zeros, step, steps, half))
    if scales:
        value = _asm(f"{multiply} $0, $1, $2;", value, _twice(scales, step, steps, half))
    return value


def _twice(arrays, step: int, steps: int, half: int) -> ir.Value:  # type: ignore[no-untyped-def]
    """The number of a row's group, in both halves of a word."""
    array = arrays[step * len(arrays) // steps]
    number = array.registers.flat[half]  # the rows g and g + 8 of a thread
    element = vector.extract(number, dynamic_position=[], static_position=[0])
    both = vector.from_elements(ir.VectorType.get((2,), element.type), [element, element])
    return utils.bitcast(both, _i32())


def _half_words(value: int, name: str) -> int:
    bits = int(np.asarray(value, jnp.dtype(name)).view(np.uint16))
    return bits << 16 | bits


def _masked(word: ir.Value, mask: int, bits: int) -> ir.Value:
    return _asm("lop3.b32 $0, $1, $2, $3, 0xEA;", word, mask, bits)  # (word & mask) | bits


def _shifted(word: ir.Value, by: int) -> ir.Value:
    return arith.shrui(word, _constant(by)) if by else word


def _asm(text: str, *operands: ir.Value | int) -> ir.Value:
    values = [_constant(x) if isinstance(x, int) else x for x in operands]
    constraints = ",".join(["=r"] + ["r"] * len(values))
    return llvm.inline_asm(_i32(), values, text, constraints, has_side_effects=False)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> ir.Value:
    signed = value - 2**32 if value >= 2**31 else value
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed))


def _interpreted(words, format, dtype, zeros, scales):  # type: ignore[no-untyped-def]
    values = unpack(words[None], format, "float16").astype(jnp.float32)

    def columns(parts):  # type: ignore[no-untyped-def]
        widths = values.shape[1] // len(parts)
        return jnp.concatenate([jnp.repeat(x[:, None], widths, axis=1) for x in parts], axis=1)

    if zeros:
        values = values - columns(zeros).astype(jnp.float32)
    values = values.astype(dtype)
    return values * columns(scales) if scales else values
