"""Integer dot products of one piece of weights with several tokens at once.

A `Tile` is 1, 2, 4 or 8 vectors in registers, one per token; each piece of weights is loaded once
and meets every token's activations. A piece (u8x64) lies in one of two ways:

    wide   16 rows x 4 columns: the tokens' 4 codes go to all lanes; a lane is a row
    quad   4 rows x 16 columns: the tokens' 16 codes go to all quarters; a quarter is a row

ARM's instructions take several wide pieces in one go (IN_ONE: `wide_dots_16`, `wide_dots_32`), and
with i8mm (WOVEN) two pieces are kept as one of 128 bytes, 8 x (2 rows x 8 columns), as smmla takes
them: the products of two rows with two tokens by one instruction.

Dots are collected in the form that the machine's instructions give: int32 sums of four products,
or, where only AVX2's pairs are to be had (PAIRED), int16 sums of two. `tile_add_scaled` turns both
into int32 sums, times a scale; until then as many steps may be added up as fit, see `steps`.
All sums are exact. The instructions follow from what the compile target reports: AVX-512 VNNI,
AVX-VNNI, AVX2, NEON dot product, plain code otherwise.

Weight codes are either small (0 .. 63) or full bytes (-127 .. 127, -128 where the scale allows).
Full bytes are kept with 128 added where dot products take unsigned weights (BIASED).
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from ondevice.kernels.simd import (
    F32,
    FEATURES,
    I8,
    I16,
    I32,
    I64,
    Vec,
    broadcast,
    call,
    constant,
    f32x4,
    f32x16,
    fold,
    i16x16,
    i16x32,
    i32x4,
    i32x8,
    i32x16,
    join,
    llvm_type,
    load_from,
    part,
    shuffle_lanes,
    store_to,
    u8x16,
    u8x32,
    u8x64,
)

_HAS_AVX512BW = "avx512bw" in FEATURES
_HAS_VNNI_512 = {"avx512vnni", "avx512bw"} <= FEATURES
_HAS_VNNI_256 = {"avx512vnni", "avx512vl"} <= FEATURES or "avxvnni" in FEATURES
_HAS_AVX2 = "avx2" in FEATURES
_HAS_SDOT = "dotprod" in FEATURES

PAIRED = _HAS_AVX2 and not (_HAS_VNNI_512 or _HAS_VNNI_256)
BIASED = _HAS_VNNI_512 or _HAS_VNNI_256
IN_ONE = _HAS_SDOT
WOVEN = IN_ONE and "i8mm" in FEATURES
BY_FOURS = _HAS_VNNI_512
"""Whether one shuffle takes what it likes from two vectors: four blocks of a row at once pay."""
MOST_TOKENS = 8 if _HAS_AVX512BW else 4 if _HAS_SDOT else 2
"""Tokens of the largest tile whose sums stay in the registers of this machine."""


class Tile(types.Type):
    """`count` vectors of one kind, held in registers."""

    def __init__(self, vec: Vec, count: int) -> None:
        self.vec = vec
        self.count = count
        super().__init__(name=f"tile<{vec} x {count}>")


@register_model(Tile)
class TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend: Tile) -> None:
        super().__init__(manager, frontend, ir.ArrayType(llvm_type(frontend.vec), frontend.count))


tile1, tile2, tile4, tile8 = (Tile(i32x16, count) for count in (1, 2, 4, 8))
DOTS = i16x32 if PAIRED else i32x16


def steps(greatest: int, wanted: int) -> int:
    """How many of `wanted` dots of codes up to `greatest` can be added up before scaling."""
    return min(wanted, max(1, 32767 // (2 * 127 * greatest))) if PAIRED else wanted


STEPS_4, STEPS_5, STEPS_6, STEPS_FULL = steps(15, 8), steps(31, 8), steps(63, 4), steps(128, 8)
"""Of codes of so many bits, and of full bytes, in what shares a scale."""


def _floats(tile: Tile) -> Tile:
    return Tile(f32x16, tile.count)


def _addresses(tile: Tile) -> types.Type:
    """The type of the addresses of a tile's tokens."""
    return types.UniTuple(types.int64, tile.count)


def _vectors(builder: ir.IRBuilder, tile: Any) -> list[Any]:
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


def _tile(builder: ir.IRBuilder, vectors: list[Any]) -> ir.Value:
    result = constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        result = builder.insert_value(result, vector, i)
    return result


def _places(builder: ir.IRBuilder, rows: Any, offset: Any) -> list[Any]:
    """The tokens' addresses, moved on by `offset`."""
    return [builder.add(address, offset) for address in _vectors(builder, rows)]


def _fours_of_all_rows(builder: ir.IRBuilder, address: Any) -> ir.Value:
    """Wide: the 4 codes at address in every lane."""
    fours = broadcast(builder, load_from(builder, address, I32), 16)
    return builder.bitcast(fours, ir.VectorType(I8, 64))


def _sixteen_of_all_rows(builder: ir.IRBuilder, address: Any) -> ir.Value:
    """Quad: the 16 codes at address in every quarter."""
    codes = load_from(builder, address, ir.VectorType(I8, 16))
    return shuffle_lanes(builder, codes, codes, [*range(16)] * 4)


# ---- making and keeping ----


def _zeros(kind_of: Any) -> Any:
    """An intrinsic: a tile of the kind that `kind_of` makes of the given one, all zero."""

    @intrinsic
    def zeros(typing: Any, kind: Any) -> Any:
        tile = kind_of(kind.instance_type)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return constant(context.get_value_type(tile), None)

        return tile(kind), lower

    return zeros


zero_sums = _zeros(lambda tile: tile)
"""zero_sums(tile4): int32 sums of 0."""
zero_dots = _zeros(lambda tile: Tile(DOTS, tile.count))
"""zero_dots(tile4): dots of 0, see the module's text."""
zero_floats = _zeros(_floats)
"""zero_floats(tile4): float32 sums of 0."""
zero_fours = _zeros(lambda tile: Tile(f32x4, tile.count))
"""zero_fours(tile4): float32 sums of 0, four a token."""


@intrinsic
def load_floats(typing: Any, kind: Any, address: Any) -> Any:
    """load_floats(tile4, address): a tile of f32x16, 64 bytes each."""
    tile = _floats(kind.instance_type)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = [builder.add(args[1], constant(I64, 64 * i)) for i in range(tile.count)]
        return _tile(builder, [load_from(builder, place, llvm_type(f32x16)) for place in at])

    return tile(kind, types.int64), lower


@intrinsic
def store_floats(typing: Any, address: Any, tile: Any) -> Any:
    """Store a tile of f32x16 at address, 64 bytes each."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for i, vector in enumerate(_vectors(builder, args[1])):
            store_to(builder, builder.add(args[0], constant(I64, 64 * i)), vector)
        return context.get_dummy_value()

    return types.none(types.int64, tile), lower


@intrinsic
def store_first(typing: Any, tile: Any, rows: Any, offset: Any) -> Any:
    """Store the first lane of each vector at the token's address + offset."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = _places(builder, args[1], args[2])
        for place, vector in zip(places, _vectors(builder, args[0]), strict=True):
            store_to(builder, place, builder.extract_element(vector, constant(I32, 0)))
        return context.get_dummy_value()

    return types.none(tile, _addresses(tile), types.int64), lower


@intrinsic
def store_apart(typing: Any, tile: Any, rows: Any, offset: Any, stride: Any) -> Any:
    """Store the first lane of each quarter, `stride` bytes apart from the address + offset on."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = _places(builder, args[1], args[2])
        for place, vector in zip(places, _vectors(builder, args[0]), strict=True):
            for quarter in range(4):
                value = builder.extract_element(vector, constant(I32, 4 * quarter))
                store_to(builder, place, value)
                place = builder.add(place, args[3])
        return context.get_dummy_value()

    return types.none(tile, _addresses(tile), types.int64, types.int64), lower


@intrinsic
def store_folded(typing: Any, totals: Any, rows: Any, offset: Any) -> Any:
    """Store the sum of the lanes of each f32x16, added in a fixed tree, at address + offset."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = _places(builder, args[1], args[2])
        for place, vector in zip(places, _vectors(builder, args[0]), strict=True):
            store_to(builder, place, fold(builder, vector, builder.fadd))
        return context.get_dummy_value()

    return types.none(totals, _addresses(totals), types.int64), lower


def _spread(bits: ir.IntType) -> Any:
    @intrinsic
    def spread(typing: Any, kind: Any, rows: Any, offset: Any, factor: Any) -> Any:
        tile = kind.instance_type

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            factor = builder.trunc(args[3], I32)
            result = []
            for at in _places(builder, args[1], args[2]):
                number = load_from(builder, at, bits)
                number = builder.sext(number, I32) if bits is not I32 else number
                result.append(broadcast(builder, builder.mul(number, factor), 16))
            return _tile(builder, result)

        return tile(kind, _addresses(tile), types.int64, types.int64), lower

    return spread


spread = _spread(I32)
"""spread(tile4, rows, offset, factor): the tokens' int32 there, times factor, in all lanes."""
spread_words = _spread(I16)
"""The same of int16."""


# ---- dot products ----


def _madd(builder: ir.IRBuilder, a: Any, b: Any) -> ir.Value:
    """x86 pmaddwd: pairs of int16 products summed in int32; any width that the host has."""
    lanes = a.type.count
    name = {32: "avx512.pmaddw.d.512", 16: "avx2.pmadd.wd", 8: "sse2.pmadd.wd"}[lanes]
    return call(builder, f"llvm.x86.{name}", ir.VectorType(I32, lanes // 2), [a, b])


def _maddubs(builder: ir.IRBuilder, w: Any, a: Any) -> ir.Value:
    """x86 pmaddubsw: pairs of products of unsigned and signed bytes summed in int16."""
    lanes = w.type.count
    name = {64: "avx512.pmaddubs.w.512", 32: "avx2.pmadd.ub.sw"}[lanes]
    return call(builder, f"llvm.x86.{name}", ir.VectorType(I16, lanes // 2), [w, a])


def _split(builder: ir.IRBuilder, emit: Any, *operands: Any) -> ir.Value:
    """emit for all operands at once where vectors have 64 bytes, else for parts of them."""
    pieces = 1 if _HAS_AVX512BW else 2 if _HAS_AVX2 else 4
    if pieces == 1:
        return emit(*operands)
    results = []
    for i in range(pieces):
        sizes = [operand.type.count // pieces for operand in operands]
        pairs = zip(operands, sizes, strict=True)
        results.append(emit(*(part(builder, x, i * size, size) for x, size in pairs)))
    return join(builder, results)


def _plain_dot(builder: ir.IRBuilder, total: Any, w: Any, a: Any, full: bool) -> ir.Value:
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
        if full:  # unsigned weights, the sign goes over to the activation
            zeros = constant(w.type, None)
            negative = builder.icmp_signed("<", w, zeros)
            w, a = (
                builder.select(negative, builder.sub(zeros, w), w),
                builder.select(negative, builder.sub(zeros, a), a),
            )
        return builder.add(total, _maddubs(builder, w, a))

    def neon(total: Any, w: Any, a: Any) -> Any:
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total, w, a])

    def plain(total: Any, w: Any, a: Any) -> Any:
        return _plain_dot(builder, total, w, a, full)

    if BIASED and not (_HAS_AVX512BW and _HAS_VNNI_512):
        halves = [part(builder, x, 0, x.type.count // 2) for x in (dots, w, a)]
        others = [part(builder, x, x.type.count // 2, x.type.count // 2) for x in (dots, w, a)]
        return join(builder, [vnni(*halves), vnni(*others)])
    if BIASED:
        return vnni(dots, w, a)
    emit = pairs if PAIRED else neon if _HAS_SDOT else plain
    return _split(builder, emit, dots, w, a)


def _in_order(builder: ir.IRBuilder, dots: Any) -> ir.Value:
    """The same, with what comes later in the program kept behind it.

    For LLVM would do all steps of one token first, and have no registers for what it read of the
    weights meanwhile.
    """
    lanes = dots.type.count // 2
    kind = ir.VectorType(I16, lanes)
    signature, results = ir.FunctionType(kind, [kind]), []
    for half in range(2):
        piece = part(builder, dots, half * lanes, lanes)
        results.append(builder.asm(signature, "", "=x,0", [piece], side_effect=True))
    return join(builder, results)


def _product(codes_at: Any, full: bool, in_order: bool = False) -> Any:
    """An intrinsic (dots, w, tokens' addresses, offset) -> dots + w * codes."""

    @intrinsic
    def product(typing: Any, dots: Any, w: Any, rows: Any, offset: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            places = _places(builder, args[2], args[3])
            vectors = zip(places, _vectors(builder, args[0]), strict=True)
            dots = [_dot(builder, v, args[1], codes_at(builder, at), full) for at, v in vectors]
            return _tile(builder, [_in_order(builder, x) for x in dots] if in_order else dots)

        return dots(dots, u8x64, _addresses(dots), types.int64), lower

    return product


wide_dot = _product(_fours_of_all_rows, full=False)
wide_dot_in_order = _product(_fours_of_all_rows, full=False, in_order=PAIRED)
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
        for at in _places(builder, args[1], args[2]):
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
        tiles = [_tile(builder, half) for half in halves]
        return context.make_tuple(builder, sig.return_type, tiles)

    return types.UniTuple(codes, 2)(kind, _addresses(kind.instance_type), types.int64), lower


def _codes_from(starts: tuple[int, ...]) -> Any:
    @intrinsic
    def codes(typing: Any, kind: Any, rows: Any, offset: Any) -> Any:
        tile = Tile(u8x64, kind.instance_type.count)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            piece = ir.VectorType(I8, 64 // len(starts))
            result = []
            for at in _places(builder, args[1], args[2]):
                places = [builder.add(at, constant(I64, start)) for start in starts]
                pieces = [load_from(builder, place, piece) for place in places]
                result.append(join(builder, pieces))
            return _tile(builder, result)

        return tile(kind, _addresses(kind.instance_type), types.int64), lower

    return codes


codes_at = _codes_from((0,))
"""(tile, rows, offset) -> a tile of bytes: the tokens' 64 codes there."""
codes_apart = _codes_from((0, 64))
"""The same of 32 codes there and 32 from 64 on."""


@intrinsic
def codes_dot(typing: Any, dots: Any, w: Any, codes: Any) -> Any:
    """dots + w * codes, the latter a tile of bytes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(_vectors(builder, args[0]), _vectors(builder, args[2]), strict=True)
        return _tile(builder, [_dot(builder, x, args[1], a, False) for x, a in pairs])

    return dots(dots, u8x64, codes), lower


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
                for at in _places(builder, args[2], args[3])
            ]
            emit = _pairs_by_matrices if WOVEN else _rows_by_lanes
            return _tile(builder, emit(builder, args[1], codes, columns))

        return tile(kind, types.int64, _addresses(tile), types.int64), lower

    return products


wide_dots_16, wide_dots_32 = _products_in_one(16), _products_in_one(32)
"""(tile, address of wide pieces, rows, offset) -> sums over 16 or 32 columns; where IN_ONE."""


def _dot_pairs(builder: ir.IRBuilder, a: Any, b: Any) -> ir.Value:
    """i16x32, i16x32 -> i32x16; each lane the sum of its own two products."""

    def plain(a: Any, b: Any) -> Any:
        lanes = a.type.count
        wide = ir.VectorType(I32, lanes)
        products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
        even, odd = (shuffle_lanes(builder, products, products, range(i, lanes, 2)) for i in (0, 1))
        return builder.add(even, odd)

    emit = (lambda x, y: _madd(builder, x, y)) if _HAS_AVX2 else plain
    return _split(builder, emit, a, b)


def _add_word_products(builder: ir.IRBuilder, total: Any, w: Any, words: Any) -> ir.Value:
    """total + w * words, i16x32 both, two products a lane."""
    if _HAS_VNNI_512:
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", total.type, [total, w, words])
    return builder.add(total, _dot_pairs(builder, w, words))


def _word_product(words_at: Any) -> Any:
    @intrinsic
    def product(typing: Any, sums: Any, w: Any, rows: Any, offset: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            places = _places(builder, args[2], args[3])
            vectors = zip(places, _vectors(builder, args[0]), strict=True)
            result = []
            for at, total in vectors:
                words = builder.bitcast(words_at(builder, at), ir.VectorType(I16, 32))
                result.append(_add_word_products(builder, total, args[1], words))
            return _tile(builder, result)

        return sums(sums, i16x32, _addresses(sums), types.int64), lower

    return product


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
        places = _places(builder, args[2], args[3])
        for at, total in zip(places, _vectors(builder, args[0]), strict=True):
            words = join(builder, [load_from(builder, at, args[1].type), nothing])
            result.append(_add_word_products(builder, total, weights, words))
        return _tile(builder, result)

    return sums(sums, i16x16, _addresses(sums), types.int64), lower


# ---- scaling and folding ----


@intrinsic
def begin_dots(typing: Any, sums: Any) -> Any:
    """Dots that go on from unscaled sums; `end_dots` takes both."""
    tile = Tile(DOTS, sums.count)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return constant(context.get_value_type(tile), None) if PAIRED else args[0]

    return tile(sums), lower


@intrinsic
def end_dots(typing: Any, sums: Any, dots: Any) -> Any:
    """The sums that dots began from plus what they came to."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not PAIRED:
            return args[1]
        ones = broadcast(builder, constant(I16, 1), 32)
        pairs = zip(_vectors(builder, args[0]), _vectors(builder, args[1]), strict=True)
        return _tile(builder, [builder.add(x, _dot_pairs(builder, y, ones)) for x, y in pairs])

    return sums(sums, dots), lower


@intrinsic
def dots_scale(typing: Any, value: Any) -> Any:
    """i32x16 of int16 numbers -> the form in which `add_dots` takes scales."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not PAIRED:
            return args[0]
        low = builder.and_(args[0], broadcast(builder, constant(I32, 0xFFFF), 16))
        high = builder.shl(args[0], broadcast(builder, constant(I32, 16), 16))
        return builder.or_(low, high)

    return i32x16(i32x16), lower


@intrinsic
def add_dots(typing: Any, sums: Any, dots: Any, scale: Any) -> Any:
    """sums + dots * scale, an i32x16 from `dots_scale`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = []
        pairs = zip(_vectors(builder, args[0]), _vectors(builder, args[1]), strict=True)
        for total, vector in pairs:
            if PAIRED:
                factors = builder.bitcast(args[2], ir.VectorType(I16, 32))
                scaled = _dot_pairs(builder, vector, factors)
            else:
                scaled = builder.mul(vector, args[2])
            result.append(builder.add(total, scaled))
        return _tile(builder, result)

    return sums(sums, dots, i32x16), lower


@intrinsic
def add_two_dots(typing: Any, sums: Any, first: Any, second: Any, scales: Any) -> Any:
    """sums + first * its scale + second * its, of quads.

    scales i16x32: in a quarter, four times the first's and four times the second's. A dot's lanes
    must fit int16, which 8 codes of up to 31 do, and 4 of up to 63.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def vnni(total: Any, x: Any, y: Any, factors: Any) -> Any:
            lanes = total.type.count
            name = {16: "avx512.packssdw.512", 8: "avx2.packssdw"}[lanes]
            kind = ir.VectorType(I16, 2 * lanes)
            both = call(builder, f"llvm.x86.{name}", kind, [x, y])
            name = f"llvm.x86.avx512.vpdpwssd.{lanes * 32}"
            return call(builder, name, total.type, [total, both, factors])

        def paired(total: Any, x: Any, y: Any, factors: Any) -> Any:
            for dots, place in ((x, 0), (y, 4)):
                lanes = [lane // 8 * 8 + place for lane in range(dots.type.count)]
                scale = shuffle_lanes(builder, factors, factors, lanes)
                total = builder.add(total, _madd(builder, dots, scale))
            return total

        def other(total: Any, x: Any, y: Any, factors: Any) -> Any:
            for dots, place in ((x, 0), (y, 4)):
                scale = builder.sext(part(builder, factors, place, 4), total.type)
                total = builder.add(total, builder.mul(dots, scale))
            return total

        result = []
        columns = (_vectors(builder, tile) for tile in args[:3])
        for total, x, y in zip(*columns, strict=True):
            if BIASED and not _HAS_VNNI_512:
                halves = []
                for i in range(2):
                    sizes = [
                        (operand, operand.type.count // 2) for operand in (total, x, y, args[3])
                    ]
                    halves.append(vnni(*(part(builder, v, i * n, n) for v, n in sizes)))
                result.append(join(builder, halves))
            elif BIASED:
                result.append(vnni(total, x, y, args[3]))
            else:
                result.append(_split(builder, paired if PAIRED else other, total, x, y, args[3]))
        return _tile(builder, result)

    return sums(sums, first, first, i16x32), lower


@intrinsic
def add_multiple(typing: Any, sums: Any, others: Any, factor: Any) -> Any:
    """sums + others * factor, a small constant."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        factor = broadcast(builder, builder.trunc(args[2], I32), 16)
        pairs = zip(_vectors(builder, args[0]), _vectors(builder, args[1]), strict=True)
        return _tile(builder, [builder.add(x, builder.mul(y, factor)) for x, y in pairs])

    return sums(sums, sums, types.int64), lower


@intrinsic
def fold_quads(typing: Any, sums: Any) -> Any:
    """Each lane becomes the sum of the four lanes of its quarter."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = []
        for total in _vectors(builder, args[0]):
            for distance in (1, 2):
                lanes = [lane ^ distance for lane in range(16)]
                total = builder.add(total, shuffle_lanes(builder, total, total, lanes))
            result.append(total)
        return _tile(builder, result)

    return sums(sums), lower


@intrinsic
def fold_four(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums of the quarters of four tiles: lane i of a quarter is that of the i-th tile."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def halved(x: Any, y: Any) -> Any:
            first = [lane + 16 * other for lane in (0, 1) for other in (0, 1)]
            lanes = [4 * quarter + lane for quarter in range(4) for lane in first]
            low = shuffle_lanes(builder, x, y, lanes)
            high = shuffle_lanes(builder, x, y, [lane + 2 for lane in lanes])
            return builder.add(low, high)

        result = []
        for x, y, z, w in zip(*(_vectors(builder, tile) for tile in args), strict=True):
            # lanes of a quarter: x, y, x, y and z, w, z, w
            xy, zw = halved(x, y), halved(z, w)
            lanes = [4 * q + lane for q in range(4) for lane in (0, 1, 16, 17)]
            low = shuffle_lanes(builder, xy, zw, lanes)
            high = shuffle_lanes(builder, xy, zw, [lane + 2 for lane in lanes])
            result.append(builder.add(low, high))
        return _tile(builder, result)

    return a(a, a, a, a), lower


@intrinsic
def turn_quads(typing: Any, sums: Any) -> Any:
    """Lane i of quarter j becomes lane j of quarter i."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = [lane % 4 * 4 + lane // 4 for lane in range(16)]
        vectors = _vectors(builder, args[0])
        return _tile(builder, [shuffle_lanes(builder, x, x, lanes) for x in vectors])

    return sums(sums), lower


@intrinsic
def add_quarters(typing: Any, sums: Any) -> Any:
    """The sum of the four quarters: a tile of i32x4."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = []
        for x in _vectors(builder, args[0]):
            eight = builder.add(part(builder, x, 0, 8), part(builder, x, 8, 8))
            result.append(builder.add(part(builder, eight, 0, 4), part(builder, eight, 4, 4)))
        return _tile(builder, result)

    return Tile(i32x4, sums.count)(sums), lower


def _four_by_quarter(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> ir.Value:
    """Four values at address, each in all lanes of a quarter."""
    four = load_from(builder, address, ir.VectorType(kind, 4))
    return shuffle_lanes(builder, four, four, [lane // 4 for lane in range(16)])


@intrinsic
def add_by_quarter(typing: Any, sums: Any, rows: Any, offset: Any, factor: Any) -> Any:
    """sums + factor times the tokens' four int32 there, one for each quarter."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        factor = broadcast(builder, builder.trunc(args[3], I32), 16)
        places = _places(builder, args[1], args[2])
        result = []
        for place, total in zip(places, _vectors(builder, args[0]), strict=True):
            surplus = builder.mul(_four_by_quarter(builder, place, I32), factor)
            result.append(builder.add(total, surplus))
        return _tile(builder, result)

    return sums(sums, _addresses(sums), types.int64, types.int64), lower


@intrinsic
def add_in_turn(typing: Any, totals: Any, sums: Any, factor: Any, rows: Any, offset: Any) -> Any:
    """As four `add_scaled` of f32x4, one for each quarter, with the token's floats from there."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = llvm_type(f32x16)
        places = _places(builder, args[3], args[4])
        values = zip(places, _vectors(builder, args[0]), _vectors(builder, args[1]), strict=True)
        result = []
        for place, total, integers in values:
            scales = builder.fmul(args[2], _four_by_quarter(builder, place, F32))
            numbers = builder.sitofp(integers, kind)
            for quarter in range(0, 16, 4):
                operands = [part(builder, numbers, quarter, 4), part(builder, scales, quarter, 4)]
                total = call(builder, "llvm.fma.v4f32", total.type, [*operands, total])
            result.append(total)
        return _tile(builder, result)

    return totals(totals, sums, f32x16, _addresses(sums), types.int64), lower


@intrinsic
def by_quarter(typing: Any, fours: Any) -> Any:
    """A tile of f32x4 -> a tile of f32x16: lane i in all lanes of quarter i."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = [lane // 4 for lane in range(16)]
        vectors = _vectors(builder, args[0])
        return _tile(builder, [shuffle_lanes(builder, x, x, lanes) for x in vectors])

    return Tile(f32x16, fours.count)(fours), lower


@intrinsic
def add_scaled(typing: Any, totals: Any, sums: Any, factor: Any, rows: Any, offset: Any) -> Any:
    """totals + float(sums) * (factor * the token's float at its address + offset), by one fma."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = llvm_type(factor)
        result = []
        places = _places(builder, args[3], args[4])
        values = zip(places, _vectors(builder, args[0]), _vectors(builder, args[1]), strict=True)
        for place, total, integers in values:
            scale = broadcast(builder, load_from(builder, place, F32), factor.lanes)
            operands = [builder.sitofp(integers, kind), builder.fmul(args[2], scale), total]
            name = f"llvm.fma.v{factor.lanes}f32"
            result.append(call(builder, name, kind, operands))
        return _tile(builder, result)

    return totals(totals, sums, factor, _addresses(sums), types.int64), lower


@intrinsic
def add_products(typing: Any, totals: Any, weights: Any, rows: Any, offset: Any) -> Any:
    """totals + weights (f32x16) * the token's 16 floats at its address + offset, by one fma."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = llvm_type(f32x16)
        places = _places(builder, args[2], args[3])
        result = []
        for place, total in zip(places, _vectors(builder, args[0]), strict=True):
            operands = [args[1], load_from(builder, place, kind), total]
            result.append(call(builder, "llvm.fma.v16f32", kind, operands))
        return _tile(builder, result)

    return totals(totals, f32x16, _addresses(totals), types.int64), lower


# ---- the multipliers' peak, measured by kernels/probe.py ----

_HAS_SMMLA = "i8mm" in FEATURES
if _HAS_VNNI_512:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x64, i32x16, 64
elif _HAS_VNNI_256:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x32, i32x8, 32
elif _HAS_AVX2:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x32, i16x16, 32
else:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x16, i32x4, 32 if _HAS_SMMLA else 16


@intrinsic
def peak_dot(typing: Any, total: Any, w: Any, a: Any) -> Any:
    """total + w * a by the target's best int8 instruction: PEAK_MACS products of PEAK_BYTES.

    AVX2 adds pairs in int16, without which no sum can do; a kernel also has to widen them.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        acc, weights, acts = args
        if _HAS_VNNI_512 or _HAS_VNNI_256:
            name = f"llvm.x86.avx512.vpdpbusd.{PEAK_BYTES.lanes * 8}"
            return call(builder, name, acc.type, [acc, weights, acts])
        if _HAS_AVX2:
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", acc.type, [weights, acts])
            return builder.add(acc, pairs)
        if _HAS_SMMLA or _HAS_SDOT:
            name = "smmla" if _HAS_SMMLA else "sdot"
            name = f"llvm.aarch64.neon.{name}.v4i32.v16i8"
            return call(builder, name, acc.type, [acc, weights, acts])
        return _plain_dot(builder, acc, weights, acts, full=False)

    return total(total, w, a), lower
