"""The sums of a tile scaled, and folded to one number for each row.

`add_dots` and `add_two_dots` turn dots, in the form that the machine gives them (kernels/tiles.py),
into int32 sums, times integer scales; `add_scaled` and its like add those to float32 totals, by one
fma each. Folds add lanes in a fixed order.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.products import add_word_pairs, by_registers, dot_pairs, in_order
from ondevice.kernels.simd import (
    F32,
    I16,
    I32,
    Vec,
    broadcast,
    call,
    constant,
    f32x8,
    f32x16,
    i16x32,
    i32x4,
    i32x8,
    i32x16,
    join,
    llvm_type,
    load_from,
    part,
    shuffle_lanes,
)
from ondevice.kernels.tiles import (
    BIASED,
    DOTS,
    HAS_VNNI_512,
    PAIRED,
    SIXTEEN,
    Tile,
    addresses_of,
    places_of,
    tile_of,
    vectors_of,
)


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
        pairs = zip(vectors_of(builder, args[0]), vectors_of(builder, args[1]), strict=True)
        return tile_of(builder, [builder.add(x, dot_pairs(builder, y, ones)) for x, y in pairs])

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


def _add_dots(ordered: bool) -> Any:
    @intrinsic
    def add(typing: Any, sums: Any, dots: Any, scale: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            result = []
            pairs = zip(vectors_of(builder, args[0]), vectors_of(builder, args[1]), strict=True)
            for total, vector in pairs:
                if PAIRED:
                    factors = builder.bitcast(args[2], ir.VectorType(I16, 32))
                    scaled = dot_pairs(builder, vector, factors)
                else:
                    scaled = builder.mul(vector, args[2])
                total = builder.add(total, scaled)
                result.append(in_order(builder, total) if ordered else total)
            return tile_of(builder, result)

        return sums(sums, dots, i32x16), lower

    return add


add_dots = _add_dots(ordered=False)
"""sums + dots * scale, an i32x16 from `dots_scale`."""
add_dots_in_order = _add_dots(ordered=SIXTEEN)
"""The same, one token after the other where registers are SIXTEEN."""


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
                total = builder.add(total, add_word_pairs(builder, dots, scale))
            return total

        def other(total: Any, x: Any, y: Any, factors: Any) -> Any:
            for dots, place in ((x, 0), (y, 4)):
                scale = builder.sext(part(builder, factors, place, 4), total.type)
                total = builder.add(total, builder.mul(dots, scale))
            return total

        result = []
        columns = (vectors_of(builder, tile) for tile in args[:3])
        for total, x, y in zip(*columns, strict=True):
            if BIASED and not HAS_VNNI_512:
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
                emit = paired if PAIRED else other
                result.append(by_registers(builder, emit, total, x, y, args[3]))
        return tile_of(builder, result)

    return sums(sums, first, first, i16x32), lower


@intrinsic
def add_multiple(typing: Any, sums: Any, others: Any, factor: Any) -> Any:
    """sums + others * factor, a small constant."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        factor = broadcast(builder, builder.trunc(args[2], I32), 16)
        pairs = zip(vectors_of(builder, args[0]), vectors_of(builder, args[1]), strict=True)
        return tile_of(builder, [builder.add(x, builder.mul(y, factor)) for x, y in pairs])

    return sums(sums, sums, types.int64), lower


@intrinsic
def fold_quads(typing: Any, sums: Any) -> Any:
    """Each lane becomes the sum of the four lanes of its quarter."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = []
        for total in vectors_of(builder, args[0]):
            for distance in (1, 2):
                lanes = [lane ^ distance for lane in range(16)]
                total = builder.add(total, shuffle_lanes(builder, total, total, lanes))
            result.append(total)
        return tile_of(builder, result)

    return sums(sums), lower


def _add_pairs(builder: ir.IRBuilder, x: Any, y: Any, of_a_quarter: Sequence[int]) -> ir.Value:
    """The lanes of quarters of x (0 .. 3) and y (4 .. 7) at these places + those two later."""
    count = x.type.count
    places = [(i // 4 * 4, of_a_quarter[i % 4]) for i in range(count)]
    lanes = [first + place % 4 + place // 4 * count for first, place in places]
    low = shuffle_lanes(builder, x, y, lanes)
    high = shuffle_lanes(builder, x, y, [lane + 2 for lane in lanes])
    return builder.add(low, high)


def _halved(builder: ir.IRBuilder, x: Any, y: Any) -> ir.Value:
    """In each quarter the two halves of x's and of y's added up: x, y, x, y."""
    return _add_pairs(builder, x, y, (0, 4, 1, 5))


def _halved_again(builder: ir.IRBuilder, x: Any, y: Any) -> ir.Value:
    """Of two that were `_halved` the sums of all four: x, x, y, y."""
    return _add_pairs(builder, x, y, (0, 1, 4, 5))


@intrinsic
def fold_both(typing: Any, sums: Any, others: Any) -> Any:
    """The sums of the quarters of two tiles: i32x8 of s0, s2, o0, o2, s1, s3, o1, o3."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = []
        for pair in zip(*(vectors_of(builder, tile) for tile in args), strict=True):
            parts = [(part(builder, x, 0, 8), part(builder, x, 8, 8)) for x in pair]
            sums_of, others_of = (_halved(builder, *halves) for halves in parts)
            result.append(_halved_again(builder, sums_of, others_of))
        return tile_of(builder, result)

    return Tile(i32x8, sums.count)(sums, sums), lower


def _shuffled(lanes: Sequence[int], element: Any) -> Any:
    """An intrinsic: each vector of a tile -> its lanes at these places."""
    places = tuple(lanes)

    @intrinsic
    def shuffle(typing: Any, tile: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            vectors = vectors_of(builder, args[0])
            return tile_of(builder, [shuffle_lanes(builder, x, x, places) for x in vectors])

        return Tile(Vec(element, len(places)), tile.count)(tile), lower

    return shuffle


others_first = _shuffled([lane ^ 2 for lane in range(8)], types.int32)
"""Of a tile from `fold_both`, the others where the sums were, and the other way around."""
both_by_quarter = _shuffled([lane for lane in (0, 4, 1, 5) for _ in range(4)], types.float32)
"""Totals of what `fold_both` gives -> a tile of f32x16: those of the sums by quarter."""
by_quarter = _shuffled([lane // 4 for lane in range(16)], types.float32)
"""A tile of f32x4 -> a tile of f32x16: lane i in all lanes of quarter i."""
turn_quads = _shuffled([lane % 4 * 4 + lane // 4 for lane in range(16)], types.int32)
"""Lane i of quarter j becomes lane j of quarter i."""


def _fold_four(builder: ir.IRBuilder, vectors: Any) -> ir.Value:
    """The sums of the quarters of four: lane i of a quarter is that of the i-th."""
    x, y, z, w = vectors
    return _halved_again(builder, _halved(builder, x, y), _halved(builder, z, w))


def _add_parts(builder: ir.IRBuilder, vector: Any, lanes: int) -> ir.Value:
    """Halves added up until so many lanes are left."""
    while vector.type.count > lanes:
        half = vector.type.count // 2
        vector = builder.add(part(builder, vector, 0, half), part(builder, vector, half, half))
    return vector


@intrinsic
def fold_four(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums of the quarters of four tiles: lane i of a quarter is that of the i-th tile."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        columns = zip(*(vectors_of(builder, tile) for tile in args), strict=True)
        return tile_of(builder, [_fold_four(builder, vectors) for vectors in columns])

    return a(a, a, a, a), lower


def _add_pieces(builder: ir.IRBuilder, x: Any, y: Any, bits: int) -> ir.Value:
    """In each half every other piece of x's, then of y's, + the pieces between them."""
    kind, same, count = ir.VectorType(ir.IntType(bits), 256 // bits), x.type, 128 // bits
    even = [
        source + half + i
        for half in (0, count)
        for source in (0, 2 * count)
        for i in range(0, count, 2)
    ]
    x, y = builder.bitcast(x, kind), builder.bitcast(y, kind)
    pieces = (shuffle_lanes(builder, x, y, [i + odd for i in even]) for odd in (0, 1))
    return builder.add(*(builder.bitcast(piece, same) for piece in pieces))


def _fold_two(fitting: int) -> Any:
    """fitting: how many additions of lanes fit int16, where lanes are of that."""

    @intrinsic
    def fold(typing: Any, a: Any, b: Any, c: Any, d: Any, rows: Any, offset: Any) -> Any:
        sums = Tile(i32x8, a.count)

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def widened(vectors: list[Any], additions: int) -> list[Any]:
                if additions != fitting:
                    return vectors
                ones = broadcast(builder, constant(I16, 1), 16)
                return [add_word_pairs(builder, vector, ones) for vector in vectors]

            result = []
            columns = zip(*(vectors_of(builder, tile) for tile in args[:4]), strict=True)
            for place, (x, y, z, w) in zip(
                places_of(builder, args[4], args[5]), columns, strict=True
            ):
                pairs = [_add_pieces(builder, x, y, 64), _add_pieces(builder, z, w, 64)]
                first, second = widened(pairs, 1)
                four = _add_pieces(builder, first, second, 32)
                surplus = load_from(builder, place, llvm_type(i32x8))
                result.append(builder.add(*widened([four], 2), surplus))
            return tile_of(builder, result)

        return sums(a, a, a, a, addresses_of(sums), types.int64), lower

    return fold


fold_two_sums = _fold_two(0)
"""Sums of the halves of four tiles of eight int32 + the tokens' eight int32 at address + offset.

Lane i of a half is the sum of that of the i-th tile. With AVX2 only.
"""
fold_two_pairs = _fold_two(1)
"""The same of tiles of sixteen int16, two of which must fit int16 when added up."""
fold_two_fours = _fold_two(2)
"""The same where four of them must."""


@intrinsic
def add_two_in_turn(typing: Any, totals: Any, sums: Any, d: Any, rows: Any, offset: Any) -> Any:
    """totals (f32x4) + the first half of float(sums) * (d * the tokens' eight floats there), by one
    fma, + the second half."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        eight, result = llvm_type(f32x8), []
        places = places_of(builder, args[3], args[4])
        values = zip(
            places, vectors_of(builder, args[0]), vectors_of(builder, args[1]), strict=True
        )
        for place, total, integers in values:
            scale = builder.fmul(args[2], load_from(builder, place, eight))
            floats = builder.sitofp(integers, eight)
            for half in (0, 4):
                operands = [part(builder, x, half, 4) for x in (floats, scale)]
                total = call(builder, "llvm.fma.v4f32", total.type, [*operands, total])
            result.append(total)
        return tile_of(builder, result)

    return totals(totals, sums, d, addresses_of(sums), types.int64), lower


@intrinsic
def fold_rows(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """All lanes of four tiles added up: a tile of i32x4, a lane for each."""
    lanes = 8 if SIXTEEN else 16

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = []
        for column in zip(*(vectors_of(builder, tile) for tile in args), strict=True):
            vectors = [_add_parts(builder, vector, lanes) for vector in column]
            result.append(_add_parts(builder, _fold_four(builder, vectors), 4))
        return tile_of(builder, result)

    return Tile(i32x4, a.count)(a, a, a, a), lower


@intrinsic
def add_quarters(typing: Any, sums: Any) -> Any:
    """The sum of the four quarters: a tile of i32x4."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors = vectors_of(builder, args[0])
        return tile_of(builder, [_add_parts(builder, x, 4) for x in vectors])

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
        places = places_of(builder, args[1], args[2])
        result = []
        for place, total in zip(places, vectors_of(builder, args[0]), strict=True):
            surplus = builder.mul(_four_by_quarter(builder, place, I32), factor)
            result.append(builder.add(total, surplus))
        return tile_of(builder, result)

    return sums(sums, addresses_of(sums), types.int64, types.int64), lower


@intrinsic
def add_vectors(typing: Any, sums: Any, rows: Any, offset: Any) -> Any:
    """sums + the tokens' 16 int32 there."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = places_of(builder, args[1], args[2])
        result = []
        for place, total in zip(places, vectors_of(builder, args[0]), strict=True):
            result.append(builder.add(total, load_from(builder, place, total.type)))
        return tile_of(builder, result)

    return sums(sums, addresses_of(sums), types.int64), lower


@intrinsic
def add_floats(typing: Any, totals: Any, others: Any) -> Any:
    """totals + others, both tiles of floats."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(vectors_of(builder, args[0]), vectors_of(builder, args[1]), strict=True)
        return tile_of(builder, [builder.fadd(total, other) for total, other in pairs])

    return totals(totals, others), lower


@intrinsic
def add_in_turn(typing: Any, totals: Any, parts: Any) -> Any:
    """totals (f32x4) + the first quarter of parts (f32x16), + the second, and so on."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = []
        pairs = zip(vectors_of(builder, args[0]), vectors_of(builder, args[1]), strict=True)
        for total, other in pairs:
            for quarter in range(0, 16, 4):
                total = builder.fadd(total, part(builder, other, quarter, 4))
            result.append(total)
        return tile_of(builder, result)

    return totals(totals, parts), lower


def _add_scaled(scale_at: Any) -> Any:
    @intrinsic
    def add(typing: Any, totals: Any, sums: Any, factor: Any, rows: Any, offset: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = llvm_type(factor)
            result = []
            places = places_of(builder, args[3], args[4])
            values = zip(
                places, vectors_of(builder, args[0]), vectors_of(builder, args[1]), strict=True
            )
            for place, total, integers in values:
                scale = builder.fmul(args[2], scale_at(builder, place, kind))
                operands = [builder.sitofp(integers, kind), scale, total]
                name = f"llvm.fma.v{factor.lanes}f32"
                result.append(call(builder, name, kind, operands))
            return tile_of(builder, result)

        return totals(totals, sums, factor, addresses_of(sums), types.int64), lower

    return add


def _same_in_all_lanes(builder: ir.IRBuilder, place: Any, kind: Any) -> ir.Value:
    return broadcast(builder, load_from(builder, place, F32), kind.count)


add_scaled = _add_scaled(_same_in_all_lanes)
"""totals + float(sums) * (factor * the token's float at its address + offset), by one fma."""
add_by_lane = _add_scaled(load_from)
"""The same with a float of the token's for each lane, from its address + offset on."""


@intrinsic
def add_products(typing: Any, totals: Any, weights: Any, rows: Any, offset: Any) -> Any:
    """totals + weights (f32x16) * the token's 16 floats at its address + offset, by one fma."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = llvm_type(f32x16)
        places = places_of(builder, args[2], args[3])
        result = []
        for place, total in zip(places, vectors_of(builder, args[0]), strict=True):
            operands = [args[1], load_from(builder, place, kind), total]
            result.append(call(builder, "llvm.fma.v16f32", kind, operands))
        return tile_of(builder, result)

    return totals(totals, f32x16, addresses_of(totals), types.int64), lower
