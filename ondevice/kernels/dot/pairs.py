"""Products for Q4_0 and IQ4_NL, whose blocks are added up in pairs where AVX-512 is to be had.

With p(b) = sum of block b, an integer, times its scales (blocks.py), a row times a token is there

    t = 0;  for each eight blocks from b on, for i = 0 .. 3:  t = t + (p(b + i) + p(b + i + 4))

of fewer at the end of a row, as many as there are. A pair is a product and an fma. One or two
tokens take four blocks of a row at a time, a block in each quarter of a vector, so that eight
blocks cost two operations on 16 floats and four on 4, where one fma after the other would cost
eight on 4, and twelve to take vectors apart. For it the tokens' records are rearranged in scratch,
of each four blocks

      0  codes    64 i8: columns 0 .. 15 of every block
     64  codes    64 i8: columns 16 .. 31
    128  surplus  16 i32: that of a block in all lanes of its quarter
    192  scales   16 f32: in the same way

Elsewhere blocks are added up in order, which is faster there.

Block layouts: quant/q4_0.py, iq4_nl.py.
"""

import numpy as np

from ondevice.kernels.dot.block import BLOCK, scale_at, sums_at
from ondevice.kernels.dot.blocks import (
    BIAS_FACTOR,
    add_full_block,
    add_full_panel,
    add_small_block,
    add_small_panel,
    block_unpackers,
    first_half,
    quad_blocks,
    unpack_blocks,
    unpack_d,
    unpack_nibbles,
)
from ondevice.kernels.dot.tile import (
    ByLayout,
    D,
    Layout,
    ask_eighths,
    ask_quad,
    columns_of_sixteen,
    full_codes,
    high_four,
    low_four,
    multiply,
    panels,
    preparers,
    quads,
    rows_at,
    unpackers,
)
from ondevice.kernels.dot.two_blocks import (
    TWO,
    four_bit_sums,
    full_sums,
    prepare_two_blocks,
    two_blocks_of_quads,
    two_codes,
    two_scales,
    two_sums,
    wide_by_twos,
)
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.products import codes_at, codes_dot, halves_of_four_blocks, wide_dot
from ondevice.kernels.shuffles import (
    halves,
    lane_shuffle,
    load_head_words,
    load_quad,
    load_two,
    pair_shuffle,
    unmerged,
    with_last_quarter,
)
from ondevice.kernels.simd import bitcast, f32x16, i16x32, load, store, u8x64, u32x16, zero
from ondevice.kernels.sums import (
    add_by_lane,
    add_by_quarter,
    add_floats,
    add_in_turn,
    add_scaled,
    add_vectors,
    by_quarter,
    fold_four,
)
from ondevice.kernels.tiles import (
    BY_FOURS,
    NIBBLES,
    SIXTEEN,
    STEPS_4,
    load_floats,
    spread,
    store_floats,
    store_vectors,
    zero_dots,
    zero_floats,
    zero_fours,
    zero_sums,
)
from quant.jit import inner

BLOCK_BYTES = 18
FOUR = 4 * BLOCK_BYTES
PREPARED = 256
"""Bytes of four blocks of a token in scratch."""
Q4_0, IQ4_NL = Layout("Q4_0"), Layout("IQ4_NL")
if not BY_FOURS:
    wide_by_twos(Q4_0, IQ4_NL)
two_sums.register(Q4_0)(four_bit_sums)
two_sums.register(IQ4_NL)(full_sums)

# ---- what the two formats differ in ----


def values_of(layout, numbers):
    """The codes of numbers 0 .. 15, as they are multiplied."""
    raise NotImplementedError("only inside compiled kernels")


def factor_of(layout):
    """What makes a surplus of the sums in the records."""
    raise NotImplementedError("only inside compiled kernels")


def add_block(layout, totals, tile, w, row_bytes, columns, rows, b):
    """totals + block b of four rows at w."""
    raise NotImplementedError("only inside compiled kernels")


def add_panel_block(layout, totals, tile, panel, rows, columns, start, i):
    """totals + block i of a panel that begins with column `start`."""
    raise NotImplementedError("only inside compiled kernels")


values, factors = ByLayout(values_of), ByLayout(factor_of)
adders, panel_adders = ByLayout(add_block), ByLayout(add_panel_block)


@values.register(Q4_0)
def values_of_q4_0(layout, numbers):
    return numbers


@values.register(IQ4_NL)
def values_of_iq4_nl(layout, numbers):
    return full_codes(numbers)


@factors.register(Q4_0)
def factor_of_q4_0(layout):
    return 1


@factors.register(IQ4_NL)
def factor_of_iq4_nl(layout):
    return BIAS_FACTOR


@adders.register(Q4_0)
def add_block_q4_0(layout, totals, tile, w, row_bytes, columns, rows, b):
    return add_small_block(totals, Q4_0, BLOCK_BYTES, 1, tile, w, row_bytes, columns, rows, b)


@adders.register(IQ4_NL)
def add_block_iq4_nl(layout, totals, tile, w, row_bytes, columns, rows, b):
    return add_full_block(totals, IQ4_NL, BLOCK_BYTES, tile, w, row_bytes, columns, rows, b)


@panel_adders.register(Q4_0)
def add_panel_q4_0(layout, totals, tile, panel, rows, columns, start, i):
    if NIBBLES:
        return add_nibbles(totals, tile, panel, rows, columns, start, i)
    return add_small_panel(totals, 1, STEPS_4, tile, panel, rows, columns, start, i)


@inner
def add_nibbles(totals, tile, panel, rows, columns, start, i):
    """The same of a panel whose bytes hold two codes each."""
    b, four = start // BLOCK + i, np.uint32(0x0F0F0F0F)
    sums, at = spread(tile, rows, sums_at(columns, b), 1), BLOCK * b
    for k in range(4):
        piece = load(u32x16, panel + 512 * i + 64 * k)
        sums = wide_dot(sums, bitcast(u8x64, piece & four), rows, at + 4 * k)
        piece = (piece >> np.uint32(4)) & four
        sums = wide_dot(sums, bitcast(u8x64, piece), rows, at + 16 + 4 * k)
    d = load(f32x16, panel + D + 64 * i)
    return add_scaled(totals, sums, d, rows, scale_at(columns, b))


@panel_adders.register(IQ4_NL)
def add_panel_iq4_nl(layout, totals, tile, panel, rows, columns, start, i):
    return add_full_panel(totals, tile, panel, rows, columns, start, i)


@quad_blocks.register(Q4_0)
def quad_q4_0(layout, block, row_bytes):
    x, header = load_quad(block + 2, row_bytes), load_quad(block, row_bytes)
    return low_four(x), high_four(x), first_half(header), zero(f32x16)


@quad_blocks.register(IQ4_NL)
def quad_iq4_nl(layout, block, row_bytes):
    x, header = load_quad(block + 2, row_bytes), load_quad(block, row_bytes)
    low, high = full_codes(low_four(x)), full_codes(high_four(x))
    return low, high, first_half(header), zero(f32x16)


@block_unpackers.register(Q4_0)
def unpack_q4_0(layout, w, row_bytes, codes, d, m):
    unpack_d(w, row_bytes, d)
    if NIBBLES:
        for i, piece in enumerate(columns_of_sixteen(w + 2, row_bytes)):
            store(codes + 64 * i, piece)
    else:
        unpack_nibbles(w + 2, row_bytes, codes)


@block_unpackers.register(IQ4_NL)
def unpack_iq4_nl(layout, w, row_bytes, codes, d, m):
    unpack_d(w, row_bytes, d)
    unpack_nibbles(w + 2, row_bytes, codes)
    for k in range(8):
        store(codes + 64 * k, full_codes(load(u8x64, codes + 64 * k)))


# ---- four rows, four blocks at a time ----

# of 32 words from the first of four blocks on; a block has 9, the last one's codes are not there
codes_of_three = lane_shuffle(
    [9 * block + word for block in range(3) for word in range(1, 9)] + [0] * 8
)
heads_of_two = pair_shuffle([9 * block + 32 * row for block in range(4) for row in range(2)])
heads_of_four = pair_shuffle(
    [2 * block + 8 * pair + row for block in range(4) for pair in range(2) for row in range(2)]
)


def prepare_fours(layout, tile, rows, columns, s):
    if BY_FOURS and columns % (4 * BLOCK) == 0:
        result = rows_at(tile, s, columns // (4 * BLOCK) * PREPARED, 0, 0)
        for four in range(columns // (4 * BLOCK)):
            b, to, none = 4 * four, PREPARED * four, zero_sums(tile)
            low, high = halves_of_four_blocks(tile, rows, BLOCK * b)
            surplus = add_by_quarter(none, rows, sums_at(columns, b), factor_of(layout))
            store_vectors(result, to, low)
            store_vectors(result, to + 64, high)
            store_vectors(result, to + 128, surplus)
            # floats are moved as integers
            store_vectors(result, to + 192, add_by_quarter(none, rows, scale_at(columns, b), 1))
        return result
    return prepare_two_blocks(tile, rows, columns, s, factor_of(layout))


@inner
def row_of_four(layout, tile, words, block, low, high):
    """Dots of a row's four blocks, the first words of which are given: a quarter is a block."""
    three = unmerged(codes_of_three(words))
    numbers = bitcast(u8x64, with_last_quarter(three, block + FOUR - 16))
    dots = codes_dot(zero_dots(tile), values_of(layout, low_four(numbers)), low)
    return codes_dot(dots, values_of(layout, high_four(numbers)), high)


@inner
def four_of_quad(layout, tile, a, row_bytes, rows, at):
    """Sums and scales of four blocks of four rows: a quarter is a block, its lanes are rows."""
    low, high = codes_at(tile, rows, at), codes_at(tile, rows, at + 64)
    words_a = load(i16x32, a)
    dots_a = row_of_four(layout, tile, words_a, a, low, high)
    a += row_bytes
    words_b = load(i16x32, a)
    dots_b = row_of_four(layout, tile, words_b, a, low, high)
    a += row_bytes
    words_c = load(i16x32, a)
    dots_c = row_of_four(layout, tile, words_c, a, low, high)
    a += row_bytes
    words_d = load(i16x32, a)
    dots_d = row_of_four(layout, tile, words_d, a, low, high)
    d = halves(heads_of_four(heads_of_two(words_a, words_b), heads_of_two(words_c, words_d)))
    return add_vectors(fold_four(dots_a, dots_b, dots_c, dots_d), rows, at + 128), d


@inner
def fours_of_quads(layout, tile, w, row_bytes, columns, rows):
    """Four rows: f32x4, a lane being a row."""
    totals, fours = zero_fours(tile), columns // (4 * BLOCK)
    for four in range(0, fours, 2):
        block, at = w + FOUR * four, PREPARED * four
        ask_quad(block, row_bytes, 2 * FOUR)
        sums, d = four_of_quad(layout, tile, block, row_bytes, rows, at)
        pairs = add_by_lane(zero_floats(tile), sums, d, rows, at + 192)
        if four + 1 < fours:
            at += PREPARED
            sums, d = four_of_quad(layout, tile, block + FOUR, row_bytes, rows, at)
            pairs = add_by_lane(pairs, sums, d, rows, at + 192)
        totals = add_in_turn(totals, pairs)
    return totals


# ---- any number of blocks ----


def multiply_quad(layout, tile, w, row_bytes, columns, rows):
    if SIXTEEN and columns % TWO == 0:
        return two_blocks_of_quads(layout, BLOCK_BYTES, tile, w, row_bytes, columns, rows)
    if BY_FOURS and columns % (4 * BLOCK) == 0:
        return by_quarter(fours_of_quads(layout, tile, w, row_bytes, columns, rows))
    totals, blocks = zero_floats(tile), columns // BLOCK
    for b in range(blocks):
        if b % 4 == 0:
            ask_quad(w + BLOCK_BYTES * b, row_bytes, FOUR)
        if not BY_FOURS:
            totals = add_block(layout, totals, tile, w, row_bytes, columns, rows, b)
        elif b % 8 < 4:
            pair = add_block(layout, zero_floats(tile), tile, w, row_bytes, columns, rows, b)
            if b + 4 < blocks:
                pair = add_block(layout, pair, tile, w, row_bytes, columns, rows, b + 4)
            totals = add_floats(totals, pair)
    return totals


def multiply_blocks(layout, tile, panel, rows, columns, start, size, totals, later):
    total, blocks = load_floats(tile, totals), size // BLOCK
    if BY_FOURS:
        for i in range(min(4, blocks)):
            ask_eighths(later, i)
            pair = add_panel_block(layout, zero_floats(tile), tile, panel, rows, columns, start, i)
            if i + 4 < blocks:
                ask_eighths(later, i + 4)
                pair = add_panel_block(layout, pair, tile, panel, rows, columns, start, i + 4)
            total = add_floats(total, pair)
    else:
        for i in range(blocks):
            ask_eighths(later, i)
            total = add_panel_block(layout, total, tile, panel, rows, columns, start, i)
    store_floats(totals, total)


def codes_of_neighbours(layout, block):
    numbers = load_two(block + 2, BLOCK_BYTES)
    return values_of(layout, low_four(numbers)), values_of(layout, high_four(numbers))


def scales_of_neighbours(layout, block, row_bytes):
    return halves(load_head_words(block, row_bytes, BLOCK_BYTES))


def unpack_in_blocks(layout, w, row_bytes, columns, panel):
    unpack_blocks(layout, BLOCK_BYTES, w, row_bytes, columns, panel)


for layout in (Q4_0, IQ4_NL):
    preparers.register(layout)(prepare_fours)
    quads.register(layout)(multiply_quad)
    two_codes.register(layout)(codes_of_neighbours)
    two_scales.register(layout)(scales_of_neighbours)
    unpackers.register(layout)(unpack_in_blocks)
    panels.register(layout)(multiply_blocks)

STEP = 8 * BLOCK_BYTES


@row_kernel
def multiply_q4_0(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q4_0, STEP, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_iq4_nl(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(IQ4_NL, STEP, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
