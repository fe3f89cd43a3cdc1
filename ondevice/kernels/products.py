"""Integer dot products of one piece of weights with several tokens at once.

A piece (u8x64) lies in one of two ways:

    wide   16 rows x 4 columns: the tokens' 4 codes go to all lanes; a lane is a row
    quad   4 rows x 16 columns: the tokens' 16 codes go to all quarters; a quarter is a row

ARM's instructions take several wide pieces in one go (IN_ONE: `wide_dots_16`, `wide_dots_32`), and
with i8mm (WOVEN) two pieces are kept as one of 128 bytes, 8 x (2 rows x 8 columns), as smmla takes
them: the products of two rows with two tokens by one instruction.

All sums are exact. The instructions follow from what the compile target reports: AVX-512 VNNI,
AVX-VNNI, AVX2, NEON dot product, plain code otherwise.

Weight codes are either small (0 .. 63) or full bytes (-127 .. 127, -128 where the scale allows).
Full bytes are kept with 128 added where dot products take unsigned weights (BIASED).
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.simd import (
    I8,
    I16,
    I32,
    I64,
    broadcast,
    call,
    constant,
    i16x16,
    i16x32,
    i32x8,
    join,
    llvm_type,
    load_from,
    part,
    shuffle_lanes,
    u8x32,
    u8x64,
)
from ondevice.kernels.tiles import (
    BIASED,
    HAS_AVX2,
    HAS_AVX512BW,
    HAS_SDOT,
    HAS_VNNI_512,
    PAIRED,
    SIXTEEN,
    WOVEN,
    Tile,
    _fours_of_all_rows,
    _sixteen_of_all_rows,
    addresses_of,
    places_of,
    tile_of,
    vectors_of,
)


def add_word_pairs(builder: ir.IRBuilder, a: Any, b: Any) -> ir.Value:
    """x86 pmaddwd: pairs of int16 products summed in int32; any width that the host has."""
    lanes = a.type.count
    name = {32: "avx512.pmaddw.d.512", 16: "avx2.pmadd.wd", 8: "sse2.pmadd.wd"}[lanes]
    return call(builder, f"llvm.x86.{name}", ir.VectorType(I32, lanes // 2), [a, b])


def _maddubs(builder: ir.IRBuilder, w: Any, a: Any) -> ir.Value:
    """x86 pmaddubsw: pairs of products of unsigned and signed bytes summed in int16."""
    lanes = w.type.count
    name = {64: "avx512.pmaddubs.w.512", 32: "avx2.pmadd.ub.sw"}[lanes]
    return call(builder, f"llvm.x86.{name}", ir.VectorType(I16, lanes // 2), [w, a])


def _unsigned(builder: ir.IRBuilder, w: Any, a: Any) -> tuple[Any, Any]:
    """Factors with the same products, the first of which are not negative."""
    zeros = constant(w.type, None)
    negative = builder.icmp_signed("<", w, zeros)
    positive = builder.select(negative, builder.sub(zeros, w), w)
    return positive, builder.select(negative, builder.sub(zeros, a), a)


def by_registers(builder: ir.IRBuilder, emit: Any, *operands: Any) -> ir.Value:
    """emit for all operands at once where vectors have 64 bytes, else for parts of them."""
    pieces = 1 if HAS_AVX512BW else 2 if HAS_AVX2 else 4
    if pieces == 1:
        return emit(*operands)
    results = []
    for i in range(pieces):
        sizes = [operand.type.count // pieces for operand in operands]
        pairs = zip(operands, sizes, strict=True)
        results.append(emit(*(part(builder, x, i * size, size) for x, size in pairs)))
    return join(builder, results)


def plain_dot(builder: ir.IRBuilder, total: Any, w: Any, a: Any, full: bool) -> ir.Value:
    wide = ir.VectorType(I32, w.type.count)
    extended = builder.sext(w, wide) if full else builder.zext(w, wide)
    products = builder.mul(extended, builder.sext(a, wide))
    for i in range(4):
        lanes = range(i, w.type.count, 4)
        total = builder.add(total, shuffle_lanes(builder, products, products, lanes))
    return total


def _dot(builder: ir.IRBuilder, dots: Any, w: Any, a: Any, full: bool) -> ir.Value:
    """dots + w * a; `full`: the weights are full bytes."""

    def vnni(total: Any, w: Any, a: Any) -> Any:
        lanes = total.type.count
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{lanes * 32}", total.type, [total, w, a])

    def pairs(total: Any, w: Any, a: Any) -> Any:
        if full:
            w, a = _unsigned(builder, w, a)
        return builder.add(total, _maddubs(builder, w, a))

    def neon(total: Any, w: Any, a: Any) -> Any:
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total, w, a])

    def plain(total: Any, w: Any, a: Any) -> Any:
        return plain_dot(builder, total, w, a, full)

    if BIASED and not (HAS_AVX512BW and HAS_VNNI_512):
        halves = [part(builder, x, 0, x.type.count // 2) for x in (dots, w, a)]
        others = [part(builder, x, x.type.count // 2, x.type.count // 2) for x in (dots, w, a)]
        return join(builder, [vnni(*halves), vnni(*others)])
    if BIASED:
        return vnni(dots, w, a)
    emit = pairs if PAIRED else neon if HAS_SDOT else plain
    return by_registers(builder, emit, dots, w, a)


def in_order(builder: ir.IRBuilder, dots: Any) -> ir.Value:
    """The same, with what comes later in the program kept behind it; where there is AVX2.

    For LLVM would do all steps of one token first, and have no registers for what it read of the
    weights meanwhile.
    """
    lanes = dots.type.count // 2
    kind = ir.VectorType(dots.type.element, lanes)
    signature, results = ir.FunctionType(kind, [kind]), []
    for half in range(2):
        piece = part(builder, dots, half * lanes, lanes)
        results.append(builder.asm(signature, "", "=x,0", [piece], side_effect=True))
    return join(builder, results)


def _product(codes_at: Any, full: bool, ordered: bool = False) -> Any:
    """An intrinsic (dots, w, tokens' addresses, offset) -> dots + w * codes."""

    @intrinsic
    def product(typing: Any, dots: Any, w: Any, rows: Any, offset: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            places = places_of(builder, args[2], args[3])
            vectors = zip(places, vectors_of(builder, args[0]), strict=True)
            dots = [_dot(builder, v, args[1], codes_at(builder, at), full) for at, v in vectors]
            return tile_of(builder, [in_order(builder, x) for x in dots] if ordered else dots)

        return dots(dots, u8x64, addresses_of(dots), types.int64), lower

    return product


wide_dot = _product(_fours_of_all_rows, full=False)
wide_dot_in_order = _product(_fours_of_all_rows, full=False, ordered=PAIRED)
"""The same, a step of all tokens after the other: with AVX2 it pays where little is added up."""
wide_dot_bytes = _product(_fours_of_all_rows, full=True)
quad_dot = _product(_sixteen_of_all_rows, full=False)
quad_dot_bytes = _product(_sixteen_of_all_rows, full=True)


@intrinsic
def halves_of_four_blocks(typing: Any, kind: Any, rows: Any, offset: Any) -> Any:
    """(tile, rows, offset) -> two tiles of bytes from the tokens' codes of four blocks of 32.

    A quarter holds 16 codes of a block, in the first tile its columns 0 .. 15.
    """
    codes = Tile(u8x64, kind.instance_type.count)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        halves: list[list[Any]] = [[], []]
        for at in places_of(builder, args[1], args[2]):
            a, b = (
                builder.bitcast(
                    load_from(builder, builder.add(at, constant(I64, start)), llvm_type(u8x64)),
                    ir.VectorType(I64, 8),
                )
                for start in (0, 64)
            )
            for half in range(2):
                pieces = [4 * block + 2 * half + i for block in range(4) for i in range(2)]
                chosen = shuffle_lanes(builder, a, b, pieces)
                halves[half].append(builder.bitcast(chosen, llvm_type(u8x64)))
        tiles = [tile_of(builder, half) for half in halves]
        return context.make_tuple(builder, sig.return_type, tiles)

    return types.UniTuple(codes, 2)(kind, addresses_of(kind.instance_type), types.int64), lower


@intrinsic
def anew(typing: Any, rows: Any) -> Any:
    """The same addresses; where registers are SIXTEEN what was read there already is read again.

    For LLVM would keep it, in more registers than there are.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not SIXTEEN:
            return args[0]
        kind, result = ir.FunctionType(I64, [I64]), args[0]
        for i, address in enumerate(vectors_of(builder, args[0])):
            same = builder.asm(kind, "", "=r,0", [address], side_effect=True)
            result = builder.insert_value(result, same, i)
        return result

    return rows(rows), lower


def _codes_from(starts: tuple[int, ...]) -> Any:
    @intrinsic
    def codes(typing: Any, kind: Any, rows: Any, offset: Any) -> Any:
        tile = Tile(u8x64, kind.instance_type.count)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            piece = ir.VectorType(I8, 64 // len(starts))
            result = []
            for at in places_of(builder, args[1], args[2]):
                places = [builder.add(at, constant(I64, start)) for start in starts]
                pieces = [load_from(builder, place, piece) for place in places]
                result.append(join(builder, pieces))
            return tile_of(builder, result)

        return tile(kind, addresses_of(kind.instance_type), types.int64), lower

    return codes


codes_at = _codes_from((0,))
"""(tile, rows, offset) -> a tile of bytes: the tokens' 64 codes there."""
codes_apart = _codes_from((0, 64))
"""The same of 32 codes there and 32 from 64 on."""


@intrinsic
def codes_by_quarter(typing: Any, kind: Any, rows: Any, offset: Any) -> Any:
    """(tile, rows, offset) -> a tile of bytes: the tokens' 16 codes there in each quarter."""
    tile = Tile(u8x64, kind.instance_type.count)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = places_of(builder, args[1], args[2])
        return tile_of(builder, [_sixteen_of_all_rows(builder, at) for at in places])

    return tile(kind, addresses_of(kind.instance_type), types.int64), lower


@intrinsic
def codes_dot(typing: Any, dots: Any, w: Any, codes: Any) -> Any:
    """dots + w * codes, the latter a tile of bytes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(vectors_of(builder, args[0]), vectors_of(builder, args[2]), strict=True)
        return tile_of(builder, [_dot(builder, x, args[1], a, False) for x, a in pairs])

    return dots(dots, u8x64, codes), lower


def _two_dots(dot: Any, element: Any) -> Any:
    @intrinsic
    def dots(typing: Any, kind: Any, low: Any, high: Any, rows: Any, offset: Any) -> Any:
        result = Tile(element, kind.instance_type.count)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            sums = []
            for at in places_of(builder, args[3], args[4]):
                places = [at, builder.add(at, constant(I64, 32))]
                codes = [load_from(builder, place, llvm_type(u8x32)) for place in places]
                products = [dot(builder, *pair) for pair in zip(args[1:3], codes, strict=True)]
                sums.append(builder.add(*products))
            return tile_of(builder, sums)

        return result(kind, u8x32, u8x32, addresses_of(kind.instance_type), types.int64), lower

    return dots


def _maddubs_of_bytes(builder: ir.IRBuilder, w: Any, a: Any) -> ir.Value:
    """Sums of four products of signed bytes."""
    pairs = _maddubs(builder, *_unsigned(builder, w, a))
    return add_word_pairs(builder, pairs, broadcast(builder, constant(I16, 1), 16))


two_dots = _two_dots(_maddubs, i16x16)
"""(tile, low, high, rows, offset) -> low * the tokens' 32 codes there + high * the next 32.

low, high: u8x32 of codes up to 63. With AVX2 only; a lane is a sum of four products, int16.
"""
two_dots_bytes = _two_dots(_maddubs_of_bytes, i32x8)
"""The same of full bytes; a lane is a sum of eight products, int32."""


def _rows_by_lanes(builder: ir.IRBuilder, pieces: Any, codes: list[Any], columns: int) -> list[Any]:
    """Products of pieces at an address with the tokens' codes, 16 columns a vector, by sdot."""
    kind, sixteen = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    sums = [[constant(kind, None)] * 4 for _ in codes]
    for k in range(columns // 4):
        fours = [builder.bitcast(vectors[k // 4], kind) for vectors in codes]
        fours = [builder.bitcast(shuffle_lanes(builder, x, x, [k % 4] * 4), sixteen) for x in fours]
        for quarter in range(4):
            at = builder.add(pieces, constant(I64, 64 * k + 16 * quarter))
            w = load_from(builder, at, sixteen)
            for total, four in zip(sums, fours, strict=True):
                total[quarter] = call(builder, name, kind, [total[quarter], w, four])
    return [join(builder, total) for total in sums]


def _pairs_by_matrices(
    builder: ir.IRBuilder, pieces: Any, codes: list[Any], columns: int
) -> list[Any]:
    """The same of woven pieces, by smmla: [r0 t0, r0 t1, r1 t0, r1 t1] for rows r, tokens t."""
    kind, sixteen = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
    name = "llvm.aarch64.neon.smmla.v4i32.v16i8"
    pairs = [(codes[t], codes[min(t + 1, len(codes) - 1)]) for t in range(0, len(codes), 2)]
    sums = [[constant(kind, None)] * 8 for _ in pairs]
    for k in range(columns // 8):
        lanes = [*range(8 * (k % 2), 8 * (k % 2) + 8)]
        lanes += [16 + lane for lane in lanes]
        eights = [shuffle_lanes(builder, a[k // 2], b[k // 2], lanes) for a, b in pairs]
        for rows in range(8):
            at = builder.add(pieces, constant(I64, 128 * k + 16 * rows))
            w = load_from(builder, at, sixteen)
            for total, eight in zip(sums, eights, strict=True):
                total[rows] = call(builder, name, kind, [total[rows], w, eight])
    result = []
    for total in sums:
        both = join(builder, total)
        result += [shuffle_lanes(builder, both, both, range(i, 32, 2)) for i in (0, 1)]
    return result[: len(codes)]


def _products_in_one(columns: int) -> Any:
    @intrinsic
    def products(typing: Any, kind: Any, pieces: Any, rows: Any, offset: Any) -> Any:
        tile = kind.instance_type

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            sixteen = ir.VectorType(I8, 16)
            codes = [
                [
                    load_from(builder, builder.add(at, constant(I64, start)), sixteen)
                    for start in range(0, columns, 16)
                ]
                for at in places_of(builder, args[2], args[3])
            ]
            emit = _pairs_by_matrices if WOVEN else _rows_by_lanes
            return tile_of(builder, emit(builder, args[1], codes, columns))

        return tile(kind, types.int64, addresses_of(tile), types.int64), lower

    return products


wide_dots_16, wide_dots_32 = _products_in_one(16), _products_in_one(32)
"""(tile, address of wide pieces, rows, offset) -> sums over 16 or 32 columns; where IN_ONE."""


def dot_pairs(builder: ir.IRBuilder, a: Any, b: Any) -> ir.Value:
    """i16x32, i16x32 -> i32x16; each lane the sum of its own two products."""

    def plain(a: Any, b: Any) -> Any:
        lanes = a.type.count
        wide = ir.VectorType(I32, lanes)
        products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
        even, odd = (shuffle_lanes(builder, products, products, range(i, lanes, 2)) for i in (0, 1))
        return builder.add(even, odd)

    emit = (lambda x, y: add_word_pairs(builder, x, y)) if HAS_AVX2 else plain
    return by_registers(builder, emit, a, b)


def _add_word_products(builder: ir.IRBuilder, total: Any, w: Any, words: Any) -> ir.Value:
    """total + w * words, i16x32 both, two products a lane."""
    if HAS_VNNI_512:
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", total.type, [total, w, words])
    return builder.add(total, dot_pairs(builder, w, words))


def _word_product(words_at: Any) -> Any:
    @intrinsic
    def product(typing: Any, sums: Any, w: Any, rows: Any, offset: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            places = places_of(builder, args[2], args[3])
            vectors = zip(places, vectors_of(builder, args[0]), strict=True)
            result = []
            for at, total in vectors:
                words = builder.bitcast(words_at(builder, at), ir.VectorType(I16, 32))
                result.append(_add_word_products(builder, total, args[1], words))
            return tile_of(builder, result)

        return sums(sums, i16x32, addresses_of(sums), types.int64), lower

    return product


def _sixty_four(builder: ir.IRBuilder, address: Any) -> ir.Value:
    return load_from(builder, address, ir.VectorType(I8, 64))


words_dot = _word_product(_sixty_four)
"""sums + the two products, per lane, of w (i16x32) and the token's 32 int16 there."""
wide_dot_words = _word_product(_fours_of_all_rows)
"""sums + the two products, per lane, of w (i16x32) and the token's two int16 there."""
quad_dot_words = _word_product(_sixteen_of_all_rows)
"""sums + the products, per quarter, of w (i16x32) and the token's eight int16 there."""


@intrinsic
def half_dot_words(typing: Any, sums: Any, w: Any, rows: Any, offset: Any) -> Any:
    """sums + the products, in two quarters, of w (i16x16) and the token's 16 int16 there."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        nothing = constant(args[1].type, None)
        weights, result = join(builder, [args[1], nothing]), []
        places = places_of(builder, args[2], args[3])
        for at, total in zip(places, vectors_of(builder, args[0]), strict=True):
            words = join(builder, [load_from(builder, at, args[1].type), nothing])
            result.append(_add_word_products(builder, total, weights, words))
        return tile_of(builder, result)

    return sums(sums, i16x16, addresses_of(sums), types.int64), lower
