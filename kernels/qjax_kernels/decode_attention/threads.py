"""Code for the threads of a warpgroup: addresses and instructions where array operations cannot say
which lane holds what.

Functions named emit_* take a `Threads`, which turns every operation on int32 values into
instructions. A test gives them one that computes instead, for all 128 threads at once.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

Value = Any  # of each thread: an int32, a predicate, or two 16-bit floats
Memory = Any  # a memref
F16_MAX = 65504.0


class Threads:
    """Instructions of a warpgroup of 4 warps by 32 lanes."""

    def index(self) -> Value:
        """Of the thread in its warpgroup."""
        return self.divmod(utils.thread_idx(), 128)[1]

    def constant(self, x: int) -> Value:
        """x in every thread."""
        return utils.c(x, ir.IntegerType.get_signless(32))

    def number(self, x: float) -> Value:
        """x as float32 in every thread."""
        return utils.c(x, ir.F32Type.get())

    def repeat(
        self, count: int, body: Callable[[Value, list[Value]], list[Value]], carry: list[Value]
    ) -> list[Value]:
        """body(i, carry) for i = 0, 1 ... count - 1, each with what the one before returned."""
        if count == 1:
            return body(self.constant(0), carry)
        loop = utils.fori(self.constant(count), carry)(body)
        return list(loop.results)

    def add(self, x: Value, y: Any) -> Value:
        """x + y."""
        return arith.addi(x, self.constant(y) if isinstance(y, int) else y)

    def mul(self, x: Value, y: int) -> Value:
        """x * y."""
        return arith.muli(x, self.constant(y))

    def divmod(self, x: Value, y: int) -> tuple[Value, Value]:
        """(x // y, x % y) of x >= 0."""
        return arith.divui(x, self.constant(y)), arith.remui(x, self.constant(y))

    def xor(self, x: Value, y: Value) -> Value:
        """x ^ y."""
        return arith.xori(x, y)

    def less(self, x: Value, y: Any) -> Value:
        """x < y."""
        y = self.constant(y) if isinstance(y, int) else y
        return arith.cmpi(arith.CmpIPredicate.slt, x, y)

    def either(self, x: Value, y: Value) -> Value:
        """Both predicates or one of them."""
        return arith.ori(x, y)

    @contextlib.contextmanager
    def when(self, predicate: Value) -> Iterator[None]:
        """Only threads for which it holds do what is in here."""
        with utils.when(predicate):
            yield

    def load_pair(self, memory: Memory, byte: Value) -> Value:
        """Two 16-bit floats."""
        kind = ir.VectorType.get((2,), ir.MemRefType(memory.type).element_type)
        return llvm.load(kind, _address(memory, byte))

    def store_pair(self, memory: Memory, byte: Value, pair: Value) -> None:
        """Two 16-bit floats."""
        llvm.store(pair, _address(memory, byte))

    def read_word(self, memory: Memory, index: Value) -> Value:
        """A number of 32 bits from global memory. No pass moves the instruction."""
        element, i32 = ir.MemRefType(memory.type).element_type, ir.IntegerType.get_signless(32)
        address = utils.getelementptr(utils.memref_ptr(memory), [index], i32)
        word = utils.inline_ptx(
            "ld.relaxed.gpu.global.b32 $0, [$1];", address, result_types=i32, has_side_effects=True
        )
        return word if element == i32 else utils.bitcast(word, element)

    def load_floats(self, memory: Memory, byte: Value, count: int) -> list[Value]:
        """Neighbouring float32."""
        kind = ir.VectorType.get((count,), ir.F32Type.get())
        found = llvm.load(kind, _address(memory, byte))
        return [self.part(found, i) for i in range(count)]

    def store_floats(self, memory: Memory, byte: Value, values: list[Value]) -> None:
        """Neighbouring float32."""
        llvm.store(_vector(values), _address(memory, byte))

    def send_floats(
        self, memory: Memory, byte: Value, values: list[Value], block: Value, barrier: Memory
    ) -> None:
        """4 neighbouring float32, to the memory of another block of the cluster. That one's
        barrier counts their bytes when they are there."""
        targets = [_in_block(_address(x, at), block) for x, at in ((memory, byte), (barrier, None))]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [targets[0], *values, targets[1]],
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
            "[$0], {$1, $2, $3, $4}, [$5];",
            "r,f,f,f,f,r",
            has_side_effects=True,
        )

    def store_rounded(
        self,
        memory: Memory,
        byte: Value,
        values: list[Value],
        through: np.dtype,
        scale: Value | None,
    ) -> None:
        """Neighbouring floats, 1 or 2, rounded to a 16-bit type. Memory of 8 bits gets what these
        divided by the scale round to, which the ends of its range bound."""
        element = ir.MemRefType(memory.type).element_type
        rounded = arith.truncf(
            ir.VectorType.get((len(values),), utils.dtype_to_ir_type(through)), _vector(values)
        )
        if scale is not None:
            wide = arith.extf(ir.VectorType.get((len(values),), ir.F32Type.get()), rounded)
            wide = [_divide(self.part(wide, i), scale) for i in range(len(values))]
            convert = _to_int8 if isinstance(element, ir.IntegerType) else _to_e4m3
            rounded = convert(wide)
        llvm.store(rounded, _address(memory, byte))

    def store_zeros(self, memory: Memory, byte: Value) -> None:
        """16 bytes of 0."""
        zero = utils.c(0, ir.VectorType.get((4,), ir.IntegerType.get_signless(32)))
        llvm.store(zero, _address(memory, byte))

    def part(self, pair: Value, i: int) -> Value:
        """One of neighbouring floats."""
        return llvm.extractelement(pair, utils.c(i, ir.IntegerType.get_signless(32)))

    def plus(self, x: Value, y: Value) -> Value:
        """x + y of float32."""
        return arith.addf(x, y)

    def minus(self, x: Value, y: Value) -> Value:
        """x - y of float32."""
        return arith.subf(x, y)

    def times(self, x: Value, y: Value) -> Value:
        """x * y of float32."""
        return arith.mulf(x, y)

    def larger(self, x: Value, y: Value) -> Value:
        """The larger of two float32."""
        return arith.maximumf(x, y)

    def exp2(self, x: Value) -> Value:
        """2 ** x of float32, to 22 bits."""
        return utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=x.type)

    def one_over(self, x: Value) -> Value:
        """1 / x of float32, 0 for x that is not positive."""
        zero, one = (utils.c(i, x.type) for i in (0.0, 1.0))
        positive = arith.cmpf(arith.CmpFPredicate.OGT, x, zero)
        return arith.select(positive, arith.divf(one, x), zero)

    def to_f16(self, pair: Value) -> Value:
        """Two 16-bit floats as float16; beyond its range they saturate."""
        f16 = _pair(jnp.float16)
        if pair.type == f16:
            return pair
        wide = arith.extf(_pair(jnp.float32), pair)
        limit = utils.c(F16_MAX, wide.type)
        return arith.truncf(f16, arith.maximumf(arith.minimumf(wide, limit), arith.negf(limit)))

    def ldmatrix(self, memory: Memory, byte: Value, count: int, *, transposed: bool) -> list[Value]:
        """`count` 8 x 8 matrices of pairs of bytes, a word of each; lane i's address is that of row
        i % 8 of matrix i / 8. Lane i has pairs 2 (i % 4) and the next of row i / 4; or, transposed,
        of column i / 4."""
        words = nvvm.ldmatrix(
            _address(memory, byte),
            layout=nvvm.MMALayout.col if transposed else nvvm.MMALayout.row,
            num=count,
            shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
            elt_type=nvvm.LdStMatrixEltType.B16,
        )
        i32 = ir.IntegerType.get_signless(32)
        return [llvm.extractvalue(i32, words, [i]) for i in range(count)]

    def widen(self, word: Value, dtype: np.dtype, *pairs: tuple[int, int]) -> list[Value]:
        """float16 pairs of the bytes named, of the 4 in a word of an 8-bit dtype."""
        i32 = ir.IntegerType.get_signless(32)
        if dtype == jnp.int8:
            # 0x6400 + n is 1024 + n in float16, for n = byte + 128 in its last 8 bits.
            ptx = "{ .reg .b32 n, bias; xor.b32 n, $2, 0x80808080; mov.b32 bias, 0x64806480; "
            for i, (low, high) in enumerate(pairs):
                ptx += f"prmt.b32 ${i}, n, 0x64646464, 0x4{high}4{low}; "
                ptx += f"sub.rn.f16x2 ${i}, ${i}, bias; "
        else:
            order = "".join(str(i) for i in itertools.chain(*pairs))[::-1]
            ptx = f"{{ .reg .b32 n; .reg .b16 a, b; prmt.b32 n, $2, 0, 0x{order}; "
            ptx += "mov.b32 {a, b}, n; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; "
        words = utils.inline_ptx(ptx + "}", word, result_types=(i32, i32))
        return [utils.bitcast(x, _pair(jnp.float16)) for x in words]


def _pair(dtype: Any) -> Any:
    return ir.VectorType.get((2,), utils.dtype_to_ir_type(np.dtype(dtype)))


def _vector(values: list[Value]) -> Value:
    i32 = ir.IntegerType.get_signless(32)
    found = llvm.mlir_undef(ir.VectorType.get((len(values),), ir.F32Type.get()))
    for i, x in enumerate(values):
        found = llvm.insertelement(found, x, utils.c(i, i32))
    return found


def _divide(x: Value, y: Value) -> Value:
    """x / y of float32, correctly rounded, which is not what the compiler makes of a division."""
    return utils.inline_ptx("div.rn.f32 $0, $1, $2;", x, y, result_types=x.type)


def _to_e4m3(values: list[Value]) -> Value:
    """1 or 2 float32 as e4m3 in the bits of an integer, the first one in the last bits."""
    i16 = ir.IntegerType.get_signless(16)
    pair = utils.inline_ptx(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", values[-1], values[0], result_types=i16
    )
    return pair if len(values) == 2 else arith.trunci(ir.IntegerType.get_signless(8), pair)


def _to_int8(values: list[Value]) -> Value:
    """1 or 2 float32 as int8, half to even, in the bits of an integer as above."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    low, high = utils.c(-128.0, f32), utils.c(127.0, f32)
    bounded = [arith.minimumf(arith.maximumf(x, low), high) for x in values]
    found = [utils.inline_ptx("cvt.rni.s32.f32 $0, $1;", x, result_types=i32) for x in bounded]
    if len(found) == 1:
        return arith.trunci(ir.IntegerType.get_signless(8), found[0])
    first = arith.andi(found[0], utils.c(255, i32))
    both = arith.ori(first, arith.shli(found[1], utils.c(8, i32)))
    return arith.trunci(ir.IntegerType.get_signless(16), both)


def _address(memory: Memory, byte: Value | None) -> Value:
    base = utils.memref_ptr(memory)
    if byte is None:
        return base
    return utils.getelementptr(base, [byte], ir.IntegerType.get_signless(8))


def _in_block(address: Value, block: Value) -> Value:
    """The same address in the shared memory of another block of the cluster, 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    own = llvm.ptrtoint(i32, address)
    return utils.inline_ptx("mapa.shared::cluster.u32 $0, $1, $2;", own, block, result_types=i32)


def emit_synchronize_cluster(context: Any) -> None:
    """Wait for all threads of the cluster, and see what they wrote to shared memory."""
    del context
    for what in ("arrive.release", "wait.acquire"):
        utils.inline_ptx(f"barrier.cluster.{what}.aligned;", has_side_effects=True, convergent=True)
