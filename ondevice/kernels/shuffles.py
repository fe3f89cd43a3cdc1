"""Vector values rearranged: lanes, bytes and bit fields moved about inside compiled kernels."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.simd import (
    FEATURES,
    I8,
    I16,
    I32,
    I64,
    X86,
    Vec,
    broadcast,
    call,
    constant,
    f32x16,
    half_to_float,
    i16x8,
    i16x16,
    i16x32,
    join,
    llvm_type,
    load_from,
    part,
    shuffle_lanes,
    u8x8,
    u8x32,
    u8x64,
    u32x16,
)


def lane_shuffle(lanes: Sequence[int]) -> Any:
    """An intrinsic v -> the lanes of v at these (constant) places."""
    places = tuple(lanes)

    @intrinsic
    def shuffle(typing: Any, value: Any) -> Any:
        result = Vec(value.element, len(places))

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return shuffle_lanes(builder, args[0], args[0], places)

        return result(value), lower

    return shuffle


def pair_shuffle(lanes: Sequence[int]) -> Any:
    """An intrinsic (a, b) -> the lanes of a, then b, at these (constant) places."""
    places = tuple(lanes)

    @intrinsic
    def shuffle(typing: Any, a: Any, b: Any) -> Any:
        result = Vec(a.element, len(places))

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return shuffle_lanes(builder, args[0], args[1], places)

        return result(a, a), lower

    return shuffle


@intrinsic
def unmerged(typing: Any, value: Any) -> Any:
    """The same vector, of which LLVM does not know where it is from.

    It would merge two shuffles into one of two vectors, which takes some processors twice as long.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, register = args[0].type, "v" if "avx512f" in FEATURES else "x"
        return builder.asm(ir.FunctionType(kind, [kind]), "", f"={register},0", [args[0]], False)

    return value(value), lower


def byte_shuffle(places: Sequence[int | None]) -> Any:
    """An intrinsic: in each quarter of a u8x64 the bytes at these places, None for zero."""
    assert len(places) == 16

    @intrinsic
    def shuffle(typing: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            zeros = constant(args[0].type, None)
            lanes = [
                64 if place is None else 16 * quarter + place
                for quarter in range(4)
                for place in places
            ]
            return shuffle_lanes(builder, args[0], zeros, lanes)

        return u8x64(u8x64), lower

    return shuffle


def word_fields(shifts: Sequence[int], masks: Sequence[int]) -> Any:
    """An intrinsic on u8x64: word i of each quarter >> shifts[i], & masks[i] in every byte."""
    assert len(shifts) == len(masks) == 4

    @intrinsic
    def fields(typing: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = llvm_type(u32x16)
            amounts = constant(kind, [constant(I32, shift) for shift in shifts] * 4)
            kept = constant(kind, [constant(I32, mask * 0x01010101) for mask in masks] * 4)
            moved = builder.lshr(builder.bitcast(args[0], kind), amounts)
            return builder.bitcast(builder.and_(moved, kept), llvm_type(u8x64))

        return u8x64(u8x64), lower

    return fields


def quarters_lowered(shifts: Sequence[int]) -> Any:
    """An intrinsic on u8x64: the 16-bit words of quarter i >> shifts[i]."""
    assert len(shifts) == 4

    @intrinsic
    def moved(typing: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = llvm_type(i16x32)
            amounts = constant(kind, [constant(I16, shift) for shift in shifts for _ in range(8)])
            words = builder.lshr(builder.bitcast(args[0], kind), amounts)
            return builder.bitcast(words, llvm_type(u8x64))

        return u8x64(u8x64), lower

    return moved


def byte_table(values: Sequence[int]) -> Any:
    """An intrinsic: each byte (0 .. 15) of a vector -> the int8 value of that number."""
    assert len(values) == 16
    table = [constant(I8, value & 255) for value in values]

    @intrinsic
    def look_up(typing: Any, numbers: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def shuffled(name: str, lanes: int) -> Any:
                kind = ir.VectorType(I8, lanes)
                rows = constant(kind, table * (lanes // 16))
                starts = range(0, numbers.lanes, lanes)
                parts = [part(builder, args[0], start, lanes) for start in starts]
                return join(builder, [call(builder, name, kind, [rows, x]) for x in parts])

            if "avx512bw" in FEATURES and numbers.lanes == 64:
                return shuffled("llvm.x86.avx512.pshuf.b.512", 64)
            if "avx2" in FEATURES:
                return shuffled("llvm.x86.avx2.pshuf.b", 32)
            if not X86:
                return shuffled("llvm.aarch64.neon.tbl1.v16i8", 16)
            result = constant(args[0].type, None)
            for number, value in enumerate(table):
                every = broadcast(builder, constant(I8, number), numbers.lanes)
                same = builder.icmp_signed("==", args[0], every)
                value = broadcast(builder, value, numbers.lanes)
                result = builder.select(same, value, result)
            return result

        return numbers(numbers), lower

    return look_up


@intrinsic
def each_bit(typing: Any, value: Any) -> Any:
    """Byte i of a u8x64 -> its bit i % 8, as 0 or 1."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        masks = constant(args[0].type, [constant(I8, 1 << (i % 8)) for i in range(64)])
        kept = builder.and_(args[0], masks)
        return builder.zext(builder.icmp_unsigned("==", kept, masks), args[0].type)

    return u8x64(u8x64), lower


@intrinsic
def exponent_scale(typing: Any, exponents: Any) -> Any:
    """2 ** (e - 128) for a vector of u32 e in 0 .. 255, as float32."""
    result = Vec(types.float32, exponents.lanes)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def filled(value: int) -> Any:
            return broadcast(builder, constant(I32, value), result.lanes)

        normal = builder.shl(builder.sub(args[0], filled(1)), filled(23))
        subnormal = builder.shl(filled(1 << 21), builder.and_(args[0], filled(1)))
        small = builder.icmp_unsigned("<", args[0], filled(2))
        return builder.bitcast(builder.select(small, subnormal, normal), llvm_type(result))

    return result(exponents), lower


def half_in_each(place: int) -> Any:
    """An intrinsic: the half at byte `place` of each quarter of a u8x64, four times, as f32x16."""

    @intrinsic
    def halves(typing: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            words = builder.bitcast(args[0], ir.VectorType(I16, 32))
            lanes = [8 * (lane // 4) + place // 2 for lane in range(16)]
            return half_to_float(builder, shuffle_lanes(builder, words, words, lanes))

        return f32x16(u8x64), lower

    return halves


@intrinsic
def load_signed(typing: Any, address: Any) -> Any:
    """The 16 int8 at address, as i16x16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        codes = load_from(builder, args[0], ir.VectorType(I8, 16))
        return builder.sext(codes, llvm_type(i16x16))

    return i16x16(types.intp), lower


@intrinsic
def load_twice(typing: Any, address: Any) -> Any:
    """The 32 bytes at address, twice, as a u8x64."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        codes = load_from(builder, args[0], ir.VectorType(I8, 32))
        return join(builder, [codes, codes])

    return u8x64(types.intp), lower


@intrinsic
def load_quad(typing: Any, address: Any, stride: Any) -> Any:
    """16 bytes at each of address, address + stride, ... as a u8x64 of four quarters."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at, pieces = args[0], []
        for _ in range(4):
            pieces.append(load_from(builder, at, ir.VectorType(I8, 16)))
            at = builder.add(at, args[1])
        return join(builder, pieces)

    return u8x64(types.intp, types.intp), lower


@intrinsic
def load_two(typing: Any, address: Any, stride: Any) -> Any:
    """16 bytes at address and at address + stride, as a u8x32."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = [args[0], builder.add(args[0], args[1])]
        pieces = [load_from(builder, at, ir.VectorType(I8, 16)) for at in places]
        return join(builder, pieces)

    return u8x32(types.intp, types.intp), lower


def _heads(kind: Vec) -> Any:
    """Numbers are put together by scalar instructions: shuffles are what products wait for."""
    vector = llvm_type(kind)
    width = vector.element.width

    @intrinsic
    def heads(typing: Any, address: Any, row_bytes: Any, block_bytes: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            numbers = []
            for at in (args[0], builder.add(args[0], args[2])):
                for _ in range(4):
                    numbers.append(builder.zext(load_from(builder, at, vector.element), I64))
                    at = builder.add(at, args[1])
            words, count = [], 64 // width
            for first in range(0, 8, count):
                word = numbers[first]
                for i in range(1, count):
                    moved = builder.shl(numbers[first + i], constant(I64, width * i))
                    word = builder.or_(word, moved)
                words.append(broadcast(builder, word, 1))
            return builder.bitcast(join(builder, words), vector)

        return kind(types.intp, types.intp, types.intp), lower

    return heads


load_head_words, load_head_bytes = _heads(i16x8), _heads(u8x8)
"""What the blocks of four rows begin with, then their next blocks: two bytes, or one, of each."""


@intrinsic
def with_last_quarter(typing: Any, words: Any, address: Any) -> Any:
    """An i16x32 with its last quarter replaced by the 16 bytes at address."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        last = load_from(builder, args[1], ir.VectorType(I16, 8))
        wide = shuffle_lanes(builder, last, last, [*range(8)] * 4)
        return shuffle_lanes(builder, args[0], wide, [*range(24), *range(56, 64)])

    return i16x32(i16x32, types.intp), lower


@intrinsic
def halves(typing: Any, words: Any) -> Any:
    """The halves whose bits are given as int16, as float32."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return half_to_float(builder, args[0])

    return Vec(types.float32, words.lanes)(words), lower


@intrinsic
def half_words(typing: Any, words: Any, shift: Any) -> Any:
    """The halves in bits shift .. shift + 15 of a u32x16, as f32x16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        moved = builder.lshr(args[0], broadcast(builder, args[1], 16))
        return half_to_float(builder, builder.trunc(moved, ir.VectorType(I16, 16)))

    return f32x16(u32x16, types.uint32), lower
