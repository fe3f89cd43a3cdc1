"""Several rows at once: ROWS vectors held in registers, one for each row of a small matrix product.

What is loaded once meets every row: `word_rows(dots, x, address, stride)` adds to row r what the
vector x makes with the pair of numbers at address + r * stride. Rows are LLVM arrays of f32x16,
dots of i32x16; ROWS is as many as leave two vectors per row in the registers of this machine.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.simd import (
    F32,
    FEATURES,
    I8,
    I16,
    I32,
    I64,
    X86,
    broadcast,
    call,
    constant,
    f32x16,
    i8x64,
    i16x32,
    i32x16,
    join,
    llvm_type,
    load_from,
    part,
    shuffle_lanes,
    store_to,
)

ROWS = 8 if "avx512f" in FEATURES else 4
ROWS_TYPE, DOTS_TYPE = types.UniTuple(f32x16, ROWS), types.UniTuple(i32x16, ROWS)

_VNNI = 512 if {"avx512vnni", "avx512bw"} <= FEATURES else 0
if not _VNNI and ("avxvnni" in FEATURES or {"avx512vnni", "avx512vl"} <= FEATURES):
    _VNNI = 256
_AVX2, _SDOT = X86 and "avx2" in FEATURES, not X86 and "dotprod" in FEATURES
SUMS_FIRST = _VNNI == 512 and "sse4a" in FEATURES
"""Whether `pair_rows` is faster than `word_rows`. AMD's processors, which alone have SSE4a, add in
other units too than those that multiply; Intel's have no others for 64 bytes.
"""
SHARES = 255 if _VNNI else 127
"""The greatest share: two of its products with bytes must fit what this machine adds them up in."""


def _at(builder: ir.IRBuilder, address: Any, stride: Any, row: int) -> Any:
    return builder.add(address, builder.mul(stride, constant(I64, row)))


def _number(builder: ir.IRBuilder, address: Any) -> Any:
    """The float at address in all lanes."""
    return broadcast(builder, load_from(builder, address, F32), 16)


@intrinsic
def zero_rows(typing: Any) -> Any:
    """Rows of zeros."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return constant(context.get_value_type(ROWS_TYPE), None)

    return ROWS_TYPE(), lower


@intrinsic
def load_rows(typing: Any, address: Any, stride: Any) -> Any:
    """16 floats of each row."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = constant(context.get_value_type(ROWS_TYPE), ir.Undefined)
        for row in range(ROWS):
            at = _at(builder, args[0], args[1], row)
            result = builder.insert_value(result, load_from(builder, at, llvm_type(f32x16)), row)
        return result

    return ROWS_TYPE(types.int64, types.int64), lower


@intrinsic
def store_rows(typing: Any, address: Any, stride: Any, rows: Any) -> Any:
    """Store the 16 floats of each row."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for row in range(ROWS):
            at = _at(builder, args[0], args[1], row)
            store_to(builder, at, builder.extract_value(args[2], row))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, ROWS_TYPE), lower


@intrinsic
def scale_rows(typing: Any, rows: Any, address: Any, stride: Any) -> Any:
    """Each row times its number."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = args[0]
        for row in range(ROWS):
            number = _number(builder, _at(builder, args[1], args[2], row))
            product = builder.fmul(builder.extract_value(args[0], row), number)
            result = builder.insert_value(result, product, row)
        return result

    return ROWS_TYPE(ROWS_TYPE, types.int64, types.int64), lower


def _fold(combine: Any) -> Any:
    """An intrinsic that makes of each row one number, in its lane; other lanes repeat them.

    Of each row's lanes the upper half is combined with the lower, until one is left: in the same
    tree as `lane_sum`, but for two rows, then four and eight, in one vector.
    """

    @intrinsic
    def fold_rows(typing: Any, rows: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vectors = [builder.extract_value(args[0], row) for row in range(ROWS)]
            lanes = 16  # of each row in a vector
            while lanes > 1:
                half = lanes // 2
                lower_half = [place for place in range(32) if place % lanes < half]
                upper_half = [place + half for place in lower_half]
                vectors = [
                    combine(
                        builder,
                        shuffle_lanes(builder, a, b, lower_half),
                        shuffle_lanes(builder, a, b, upper_half),
                    )
                    # the last one is folded with itself
                    for a, b in zip(vectors[::2], vectors[1::2] or vectors, strict=True)
                ]
                lanes = half
            return vectors[0]

        return f32x16(ROWS_TYPE), lower

    return fold_rows


def _greater(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


sum_rows = _fold(lambda builder, a, b: builder.fadd(a, b))
"""The sum of each row, added in a fixed tree: row r's is in lane r."""
greatest_of_rows = _fold(_greater)
"""The greatest number of each row, NaN or any of them where one is NaN: row r's is in lane r."""


# ---- integers ----


def _dot_unsigned(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any) -> Any:
    """total + the four products of each dword of u8 (0 .. SHARES) and of i8."""
    if _VNNI:
        name = f"llvm.x86.avx512.vpdpbusd.{_VNNI}"
        return call(builder, name, total.type, [total, unsigned, signed])
    if _AVX2:
        kind = ir.VectorType(I16, 16)
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", kind, [unsigned, signed])
        ones = broadcast(builder, constant(I16, 1), 16)
        fours = call(builder, "llvm.x86.avx2.pmadd.wd", total.type, [pairs, ones])
        return builder.add(total, fours)
    return _dot_plain(builder, total, unsigned, signed)


def _dot_plain(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> Any:
    """total (i32x4) + the four products of each dword of two i8x16."""
    if _SDOT:
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total, a, b])
    wide = ir.VectorType(I32, 16)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    for i in range(4):
        total = builder.add(total, shuffle_lanes(builder, products, products, range(i, 16, 4)))
    return total


def _dot_signed(builder: ir.IRBuilder, total: Any, x: Any, codes: Any) -> Any:
    """total + the four products of each dword of two i8; with VNNI, x has 128 added."""
    if _VNNI:
        return _dot_unsigned(builder, total, x, codes)
    if _AVX2:
        magnitude = call(builder, "llvm.abs.v32i8", x.type, [x, constant(ir.IntType(1), 0)])
        signed = call(builder, "llvm.x86.avx2.psign.b", x.type, [codes, x])
        return _dot_unsigned(builder, total, magnitude, signed)
    return _dot_plain(builder, total, x, codes)


def _dot_words(builder: ir.IRBuilder, total: Any, x: Any, codes: Any) -> Any:
    """total + the two products of each dword of two vectors of int16."""
    if _VNNI:
        name = f"llvm.x86.avx512.vpdpwssd.{_VNNI}"
        return call(builder, name, total.type, [total, x, codes])
    if _AVX2:
        pairs = call(builder, "llvm.x86.avx2.pmadd.wd", total.type, [x, codes])
        return builder.add(total, pairs)
    for i in range(2):
        lanes = range(i, x.type.count, 2)
        a, b = (builder.sext(shuffle_lanes(builder, v, v, lanes), total.type) for v in (x, codes))
        total = builder.add(total, builder.mul(a, b))
    return total


def _in_registers(builder: ir.IRBuilder, dot: Any, operands: list[Any]) -> Any:
    """Apply a dot product to as many lanes at a time as its instruction has."""
    bits = _VNNI or (256 if _AVX2 else 128)
    pieces = 512 // bits
    results = []
    for i in range(pieces):
        counts = [x.type.count // pieces for x in operands]
        parts = [part(builder, x, i * n, n) for x, n in zip(operands, counts, strict=True)]
        results.append(dot(builder, *parts))
    return join(builder, results)


def _dots(dot: Any, kind: Any, biased: bool = False) -> Any:
    @intrinsic
    def dot_of_rows(typing: Any, dots: Any, x: Any, address: Any, stride: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            result, x = args[0], args[1]
            if biased:
                x = builder.xor(x, broadcast(builder, constant(I8, 128), 64))
            for row in range(ROWS):
                four = load_from(builder, _at(builder, args[2], args[3], row), I32)
                codes = builder.bitcast(broadcast(builder, four, 16), llvm_type(kind))
                total = builder.extract_value(args[0], row)
                operands = [total, codes, x] if dot is _dot_unsigned else [total, x, codes]
                total = _in_registers(builder, dot, operands)
                result = builder.insert_value(result, total, row)
            return result

        return DOTS_TYPE(DOTS_TYPE, kind, types.int64, types.int64), lower

    return dot_of_rows


dot_rows = _dots(_dot_signed, i8x64, biased=bool(_VNNI))
"""Each row's dots (from `begin_dots`) + the products of each dword of x with the row's four i8."""
share_rows = _dots(_dot_unsigned, i8x64)
"""Each row's dots + the products of each dword of x (i8) with the row's four u8, up to SHARES."""
word_rows = _dots(_dot_words, i16x32)
"""Each row's dots + the products of each dword of x (i16) with the row's two i16."""


# Of neighbouring dwords a, b of a row and x, y of a lane, each of two int16 (Winograd, 1968, "A New
# Algorithm for Inner Product"):
#
#     a x + b y = (a + y)(b + x) - a b - x y
#
# One product and two additions instead of two products: all lanes share a b, all rows x y. Whatever
# sum overflows on the way, the result is exact, so long as a + y and b + x are int16.


@intrinsic
def pair_rows(typing: Any, dots: Any, lanes: Any, others: Any, address: Any, stride: Any) -> Any:
    """Two dots of each row (from `begin_pairs`) + the products of x and y with the row's next two
    dwords; `lanes` and `others` are x and y (i16x32), of one and of the other.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        two = [builder.extract_value(args[0], i) for i in (0, 1)]
        pairs = [[builder.extract_value(arg, i) for i in (0, 1)] for arg in args[1:3]]
        # row by row, so that the registers hold what two rows take from memory, not all of them
        for row in range(ROWS):
            at = _at(builder, args[3], args[4], row)
            dwords = [load_from(builder, builder.add(at, constant(I64, i)), I32) for i in (0, 4)]
            a, b = (builder.bitcast(broadcast(builder, x, 16), llvm_type(i16x32)) for x in dwords)
            for i, (x, y) in enumerate(pairs):
                operands = [
                    builder.extract_value(two[i], row),
                    builder.add(y, a),
                    builder.add(x, b),
                ]
                total = _in_registers(builder, _dot_words, operands)
                two[i] = builder.insert_value(two[i], total, row)
        return context.make_tuple(builder, sig.return_type, two)

    two = types.UniTuple(DOTS_TYPE, 2)
    words = types.UniTuple(i16x32, 2)
    return two(two, words, words, types.int64, types.int64), lower


@intrinsic
def begin_pairs(typing: Any, address: Any, stride: Any, lanes: Any) -> Any:
    """What `pair_rows` starts from: minus the row's int32, a b, and minus x y of the lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = constant(context.get_value_type(DOTS_TYPE), None)
        nothing = builder.neg(args[2])
        for row in range(ROWS):
            total = load_from(builder, _at(builder, args[0], args[1], row), I32)
            start = builder.sub(nothing, broadcast(builder, total, 16))
            result = builder.insert_value(result, start, row)
        return result

    return DOTS_TYPE(types.int64, types.int64, i32x16), lower


@intrinsic
def subtract_lanes(typing: Any, dots: Any, lanes: Any) -> Any:
    """Each row minus a vector."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = args[0]
        for row in range(ROWS):
            total = builder.sub(builder.extract_value(args[0], row), args[1])
            result = builder.insert_value(result, total, row)
        return result

    return DOTS_TYPE(DOTS_TYPE, i32x16), lower


@intrinsic
def add_word_products(typing: Any, total: Any, x: Any, y: Any) -> Any:
    """total + the two products of each dword of x with that of y, int16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _in_registers(builder, _dot_words, list(args))

    return i32x16(i32x16, i16x32, i16x32), lower


@intrinsic
def neighbour_products(typing: Any, words: Any) -> Any:
    """int32 that add up to the products of the words' even dwords with the odd ones after them."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.bitcast(args[0], ir.VectorType(I64, 8))
        odd = builder.lshr(wide, broadcast(builder, constant(I64, 32), 8))
        nothing = constant(llvm_type(i32x16), None)
        operands = [nothing, args[0], builder.bitcast(odd, args[0].type)]
        return _in_registers(builder, _dot_words, operands)

    return i32x16(i16x32), lower


@intrinsic
def zero_dots(typing: Any) -> Any:
    """Rows of integer zeros."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return constant(context.get_value_type(DOTS_TYPE), None)

    return DOTS_TYPE(), lower


@intrinsic
def begin_dots(typing: Any, address: Any, stride: Any) -> Any:
    """What `dot_rows` starts from, given the sums of each row's codes, int32 `stride` apart."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = constant(context.get_value_type(DOTS_TYPE), None)
        if _VNNI:
            for row in range(ROWS):
                total = load_from(builder, _at(builder, args[0], args[1], row), I32)
                start = broadcast(builder, builder.mul(total, constant(I32, -128)), 16)
                result = builder.insert_value(result, start, row)
        return result

    return DOTS_TYPE(types.int64, types.int64), lower


@intrinsic
def fma_dots(typing: Any, rows: Any, dots: Any, address: Any, stride: Any) -> Any:
    """Each row + its dots times its number."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result, kind = args[0], llvm_type(f32x16)
        for row in range(ROWS):
            number = _number(builder, _at(builder, args[2], args[3], row))
            values = builder.sitofp(builder.extract_value(args[1], row), kind)
            operands = [values, number, builder.extract_value(args[0], row)]
            total = call(builder, "llvm.fma.v16f32", kind, operands)
            result = builder.insert_value(result, total, row)
        return result

    return ROWS_TYPE(ROWS_TYPE, DOTS_TYPE, types.int64, types.int64), lower


@intrinsic
def fma_scaled_dots(
    typing: Any, rows: Any, dots: Any, scale: Any, address: Any, stride: Any
) -> Any:
    """Each row + its dots times (scale, a vector, times its number)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result, kind = args[0], llvm_type(f32x16)
        for row in range(ROWS):
            number = _number(builder, _at(builder, args[3], args[4], row))
            values = builder.sitofp(builder.extract_value(args[1], row), kind)
            factor = builder.fmul(args[2], number)
            operands = [values, factor, builder.extract_value(args[0], row)]
            total = call(builder, "llvm.fma.v16f32", kind, operands)
            result = builder.insert_value(result, total, row)
        return result

    return ROWS_TYPE(ROWS_TYPE, DOTS_TYPE, f32x16, types.int64, types.int64), lower
