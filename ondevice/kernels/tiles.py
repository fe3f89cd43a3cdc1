"""Tiles: sums of several tokens held in registers, one vector each.

A `Tile` is 1, 2, 3, 4 or 8 vectors, one per token; each piece of weights is loaded once and meets
every token's activations (kernels/products.py), and what comes of it is scaled and folded
(kernels/sums.py). Here is what tiles are and how they are made and kept.

Dots are collected in the form that the machine's instructions give: int32 sums of four products,
or, where only AVX2's pairs are to be had (PAIRED), int16 sums of two. As many steps may be added up
as fit, see `steps`.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from ondevice.kernels.arithmetic import fold
from ondevice.kernels.simd import (
    FEATURES,
    I8,
    I16,
    I32,
    I64,
    Vec,
    broadcast,
    constant,
    f32x4,
    f32x8,
    f32x16,
    i16x32,
    i32x16,
    llvm_type,
    load_from,
    shuffle_lanes,
    store_to,
)

HAS_AVX512BW = "avx512bw" in FEATURES
HAS_VNNI_512 = {"avx512vnni", "avx512bw"} <= FEATURES
HAS_VNNI_256 = {"avx512vnni", "avx512vl"} <= FEATURES or "avxvnni" in FEATURES
HAS_AVX2 = "avx2" in FEATURES
HAS_SDOT = "dotprod" in FEATURES

PAIRED = HAS_AVX2 and not (HAS_VNNI_512 or HAS_VNNI_256)
SIXTEEN = PAIRED and not HAS_AVX512BW
"""Whether there are no more than sixteen registers, and AVX2's pairs to fill them."""
BIASED = HAS_VNNI_512 or HAS_VNNI_256
IN_ONE = HAS_SDOT
WOVEN = IN_ONE and "i8mm" in FEATURES
BY_FOURS = HAS_VNNI_512
"""Whether few tokens meet four blocks of a row at once, where vectors hold them."""
ROW_BY_ROW = HAS_VNNI_512 or SIXTEEN
"""Whether one or two tokens meet rows of Q6_K one after the other, and not four at once.

A scale has 16 codes there, so that four rows at once save no multiplication, and take more
instructions to put together.
"""
NIBBLES = HAS_VNNI_512
"""Whether panels keep two codes of four bits a byte, and products take them apart.

A store of 64 bytes takes two cycles, and while eight tokens are multiplied shifts cost next to
nothing.
"""
MOST_TOKENS = 8 if HAS_AVX512BW else 4 if HAS_SDOT else 2
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


tile1, tile2, tile3, tile4, tile8 = (Tile(i32x16, count) for count in (1, 2, 3, 4, 8))
DOTS = i16x32 if PAIRED else i32x16


def steps(greatest: int, wanted: int) -> int:
    """How many of `wanted` dots of codes up to `greatest` can be added up before scaling."""
    return min(wanted, max(1, 32767 // (2 * 127 * greatest))) if PAIRED else wanted


STEPS_4, STEPS_5, STEPS_6, STEPS_FULL = steps(15, 8), steps(31, 8), steps(63, 4), steps(128, 8)
"""Of codes of so many bits, and of full bytes, in what shares a scale."""


def floats_of(tile: Tile) -> Tile:
    return Tile(f32x16, tile.count)


def addresses_of(tile: Tile) -> types.Type:
    """The type of the addresses of a tile's tokens."""
    return types.UniTuple(types.int64, tile.count)


def vectors_of(builder: ir.IRBuilder, tile: Any) -> list[Any]:
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


def tile_of(builder: ir.IRBuilder, vectors: list[Any]) -> ir.Value:
    result = constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        result = builder.insert_value(result, vector, i)
    return result


def places_of(builder: ir.IRBuilder, rows: Any, offset: Any) -> list[Any]:
    """The tokens' addresses, moved on by `offset`."""
    return [builder.add(address, offset) for address in vectors_of(builder, rows)]


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
zero_floats = _zeros(floats_of)
"""zero_floats(tile4): float32 sums of 0."""
zero_fours = _zeros(lambda tile: Tile(f32x4, tile.count))
"""zero_fours(tile4): float32 sums of 0, four a token."""
zero_eights = _zeros(lambda tile: Tile(f32x8, tile.count))
"""zero_eights(tile4): float32 sums of 0, eight a token."""


@intrinsic
def load_floats(typing: Any, kind: Any, address: Any) -> Any:
    """load_floats(tile4, address): a tile of f32x16, 64 bytes each."""
    tile = floats_of(kind.instance_type)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = [builder.add(args[1], constant(I64, 64 * i)) for i in range(tile.count)]
        return tile_of(builder, [load_from(builder, place, llvm_type(f32x16)) for place in at])

    return tile(kind, types.int64), lower


@intrinsic
def store_floats(typing: Any, address: Any, tile: Any) -> Any:
    """Store a tile of f32x16 at address, 64 bytes each."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for i, vector in enumerate(vectors_of(builder, args[1])):
            store_to(builder, builder.add(args[0], constant(I64, 64 * i)), vector)
        return context.get_dummy_value()

    return types.none(types.int64, tile), lower


@intrinsic
def store_vectors(typing: Any, rows: Any, offset: Any, tile: Any) -> Any:
    """Store each vector at the token's address + offset."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = places_of(builder, args[0], args[1])
        for place, vector in zip(places, vectors_of(builder, args[2]), strict=True):
            store_to(builder, place, vector)
        return context.get_dummy_value()

    return types.none(rows, types.int64, tile), lower


@intrinsic
def store_first(typing: Any, tile: Any, rows: Any, offset: Any) -> Any:
    """Store the first lane of each vector at the token's address + offset."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = places_of(builder, args[1], args[2])
        for place, vector in zip(places, vectors_of(builder, args[0]), strict=True):
            store_to(builder, place, builder.extract_element(vector, constant(I32, 0)))
        return context.get_dummy_value()

    return types.none(tile, addresses_of(tile), types.int64), lower


@intrinsic
def store_apart(typing: Any, tile: Any, rows: Any, offset: Any, stride: Any) -> Any:
    """Store the first lane of each quarter, `stride` bytes apart from the address + offset on."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = places_of(builder, args[1], args[2])
        for place, vector in zip(places, vectors_of(builder, args[0]), strict=True):
            for quarter in range(4):
                value = builder.extract_element(vector, constant(I32, 4 * quarter))
                store_to(builder, place, value)
                place = builder.add(place, args[3])
        return context.get_dummy_value()

    return types.none(tile, addresses_of(tile), types.int64, types.int64), lower


@intrinsic
def store_folded(typing: Any, totals: Any, rows: Any, offset: Any) -> Any:
    """Store the sum of the lanes of each f32x16, added in a fixed tree, at address + offset."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = places_of(builder, args[1], args[2])
        for place, vector in zip(places, vectors_of(builder, args[0]), strict=True):
            store_to(builder, place, fold(builder, vector, builder.fadd))
        return context.get_dummy_value()

    return types.none(totals, addresses_of(totals), types.int64), lower


def _spread(bits: ir.IntType) -> Any:
    @intrinsic
    def spread(typing: Any, kind: Any, rows: Any, offset: Any, factor: Any) -> Any:
        tile = kind.instance_type

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            factor = builder.trunc(args[3], I32)
            result = []
            for at in places_of(builder, args[1], args[2]):
                number = load_from(builder, at, bits)
                number = builder.sext(number, I32) if bits is not I32 else number
                result.append(broadcast(builder, builder.mul(number, factor), 16))
            return tile_of(builder, result)

        return tile(kind, addresses_of(tile), types.int64, types.int64), lower

    return spread


spread = _spread(I32)
"""spread(tile4, rows, offset, factor): the tokens' int32 there, times factor, in all lanes."""
spread_words = _spread(I16)
"""The same of int16."""
