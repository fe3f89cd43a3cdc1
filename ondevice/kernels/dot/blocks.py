"""Products for the formats of 32 weights, with int8 activations scaled per 32.

Codes that stand for signed numbers are stored with an offset. With activation codes a, activation
scale y, and the exact int32 sums of a block,

    Q8_0, IQ4_NL (values from a table)           w . a += y d (codes . a)
    Q4_0 (offset 8), Q5_0 (16), MXFP4 (16)       w . a += y d (codes . a - offset sum a)
    Q4_1, Q5_1                                   w . a += y d (codes . a);  w . a += y m (sum a)

Full bytes count as codes with an offset of 128 where dot products need that (tiles.BIASED).
Records hold -8 times the sum of a: `factor` below makes it the surplus to be added. Here is what
these formats share, and those that are only read; the others are in pairs.py (Q4_0, IQ4_NL),
mxfp4.py and q8_0.py.
Block layouts: quant/q4_1.py, q5_0.py, q5_1.py.
"""

import numpy as np

from ondevice.kernels.dot.block import BLOCK, scale_at, sums_at
from ondevice.kernels.dot.tile import (
    ByLayout,
    D,
    Layout,
    M,
    ask_eighths,
    ask_quad,
    codes_of_sixteen,
    columns_of_sixteen,
    high_four,
    low_four,
    multiply,
    panels,
    quads,
    raised,
    unpackers,
    wide_from_two,
    woven_high,
    woven_low,
)
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.products import (
    quad_dot,
    quad_dot_bytes,
    wide_dot_bytes,
    wide_dot_in_order,
    wide_dots_32,
)
from ondevice.kernels.shuffles import byte_shuffle, each_bit, half_in_each, half_words, load_quad
from ondevice.kernels.simd import f32x16, load, store, u8x64, u32x16, zero
from ondevice.kernels.sums import add_multiple, add_scaled, begin_dots, end_dots, fold_quads
from ondevice.kernels.tiles import (
    BIASED,
    IN_ONE,
    STEPS_4,
    STEPS_5,
    STEPS_FULL,
    WOVEN,
    load_floats,
    spread,
    store_floats,
    zero_floats,
    zero_sums,
)
from quant.jit import inner

Q4_1, Q5_0, Q5_1 = (Layout(name) for name in ("Q4_1", "Q5_0", "Q5_1"))
BIAS = np.uint8(128 if BIASED else 0)
BIAS_FACTOR = 16 if BIASED else 0

first_half, second_half = half_in_each(0), half_in_each(2)
MINUS_EIGHTH = np.float32(-0.125)


FIVE_LOW, FIVE_HIGH = [2] * 8 + [3] * 8, [4] * 8 + [5] * 8
five_0_low, five_0_high = byte_shuffle(FIVE_LOW), byte_shuffle(FIVE_HIGH)
five_1_low = byte_shuffle([place + 2 for place in FIVE_LOW])
five_1_high = byte_shuffle([place + 2 for place in FIVE_HIGH])


def quad_block(layout, block, row_bytes):
    """A block of four rows: codes of columns 0 .. 15, of 16 .. 31, d and m."""
    raise NotImplementedError("only inside compiled kernels")


def unpack_block(layout, w, row_bytes, codes, d, m):
    """A block of sixteen rows: codes to 8 x 64 bytes, d and m to 64 bytes each."""
    raise NotImplementedError("only inside compiled kernels")


quad_blocks, block_unpackers = ByLayout(quad_block), ByLayout(unpack_block)
wide_from_two(Q4_1, Q5_0, Q5_1)


@inner
def unpack_halves(words, d, m):
    """The halves of the words to d and -m / 8, beside the records' -8 times the sums."""
    store(d, half_words(words, np.uint32(0)))
    store(m, half_words(words, np.uint32(16)) * MINUS_EIGHTH)


@inner
def unpack_d(w, row_bytes, d):
    """The halves that blocks begin with."""
    store(d, half_words(columns_of_sixteen(w, row_bytes)[0], np.uint32(0)))


@inner
def unpack_nibbles(w, row_bytes, codes):
    four = np.uint32(0x0F0F0F0F)
    for i, piece in enumerate(codes_of_sixteen(w, row_bytes)):
        store(codes + 64 * i, piece & four)
        store(codes + 64 * (4 + i), (piece >> np.uint32(4)) & four)


@inner
def fifth_bits(bits, k):
    """Bits 4 k .. 4 k + 3 of a row's word, each as bit 4 of a byte."""
    nibble = (bits >> np.uint32(4 * k)) & np.uint32(15)
    # bit j goes to 7 j + j; the products do not overlap
    return ((nibble * np.uint32(0x204081)) & np.uint32(0x01010101)) << np.uint32(4)


@inner
def add_fifth_bits(bits, codes):
    """Bit 4 k + j of a row's word becomes bit 4 of its byte j of piece k."""
    for k in range(0, 8, 2):
        first, second = fifth_bits(bits, k), fifth_bits(bits, k + 1)
        if WOVEN:
            first, second = woven_low(first, second), woven_high(first, second)
        store(codes + 64 * k, load(u32x16, codes + 64 * k) | first)
        store(codes + 64 * k + 64, load(u32x16, codes + 64 * k + 64) | second)


@quad_blocks.register(Q4_1)
def quad_q4_1(layout, block, row_bytes):
    x, header = load_quad(block + 4, row_bytes), load_quad(block, row_bytes)
    return low_four(x), high_four(x), first_half(header), second_half(header) * MINUS_EIGHTH


@block_unpackers.register(Q4_1)
def unpack_q4_1(layout, w, row_bytes, codes, d, m):
    unpack_halves(columns_of_sixteen(w, row_bytes)[0], d, m)
    unpack_nibbles(w + 4, row_bytes, codes)


@quad_blocks.register(Q5_0)
def quad_q5_0(layout, block, row_bytes):
    x, header = load_quad(block + 6, row_bytes), load_quad(block, row_bytes)
    low = low_four(x) | raised(each_bit(five_0_low(header)), 4)
    high = high_four(x) | raised(each_bit(five_0_high(header)), 4)
    return low, high, first_half(header), zero(f32x16)


@block_unpackers.register(Q5_0)
def unpack_q5_0(layout, w, row_bytes, codes, d, m):
    unpack_d(w, row_bytes, d)
    unpack_nibbles(w + 6, row_bytes, codes)
    add_fifth_bits(columns_of_sixteen(w + 2, row_bytes)[0], codes)


@quad_blocks.register(Q5_1)
def quad_q5_1(layout, block, row_bytes):
    x, header = load_quad(block + 8, row_bytes), load_quad(block, row_bytes)
    low = low_four(x) | raised(each_bit(five_1_low(header)), 4)
    high = high_four(x) | raised(each_bit(five_1_high(header)), 4)
    return low, high, first_half(header), second_half(header) * MINUS_EIGHTH


@block_unpackers.register(Q5_1)
def unpack_q5_1(layout, w, row_bytes, codes, d, m):
    halves, bits, _, _ = columns_of_sixteen(w, row_bytes)
    unpack_halves(halves, d, m)
    unpack_nibbles(w + 8, row_bytes, codes)
    add_fifth_bits(bits, codes)


# ---- four rows ----


@inner
def small_quad(layout, tile, block, row_bytes, rows, at):
    """Sums of a block of small codes, and the block's d and m."""
    x, y, d, m = quad_block(layout, block, row_bytes)
    sums = zero_sums(tile)
    dots = quad_dot(quad_dot(begin_dots(sums), x, rows, at), y, rows, at + 16)
    return fold_quads(end_dots(sums, dots)), d, m


@inner
def full_quad(layout, tile, block, row_bytes, rows, at):
    """Sums of a block of full bytes, and the block's d."""
    x, y, d, _ = quad_block(layout, block, row_bytes)
    sums = zero_sums(tile)
    sums = end_dots(sums, quad_dot_bytes(begin_dots(sums), x, rows, at))
    sums = end_dots(sums, quad_dot_bytes(begin_dots(sums), y, rows, at + 16))
    return fold_quads(sums), d


@inner
def add_small_block(totals, layout, block_bytes, factor, tile, w, row_bytes, columns, rows, b):
    """Small codes with an offset: `factor` times what the records hold is added."""
    sums, d, _ = small_quad(layout, tile, w + block_bytes * b, row_bytes, rows, BLOCK * b)
    sums = add_multiple(sums, spread(tile, rows, sums_at(columns, b), factor), 1)
    return add_scaled(totals, sums, d, rows, scale_at(columns, b))


@inner
def small_quads(layout, block_bytes, factor, tile, w, row_bytes, columns, rows):
    totals = zero_floats(tile)
    for b in range(columns // BLOCK):
        if b % 4 == 0:
            ask_quad(w + block_bytes * b, row_bytes, 4 * block_bytes)
        totals = add_small_block(
            totals, layout, block_bytes, factor, tile, w, row_bytes, columns, rows, b
        )
    return totals


@inner
def quads_with_min(layout, block_bytes, tile, w, row_bytes, columns, rows):
    """Small codes with a minimum."""
    totals = zero_floats(tile)
    for b in range(columns // BLOCK):
        block, at = w + block_bytes * b, BLOCK * b
        if b % 4 == 0:
            ask_quad(block, row_bytes, 4 * block_bytes)
        sums, d, m = small_quad(layout, tile, block, row_bytes, rows, at)
        below = spread(tile, rows, sums_at(columns, b), 1)
        totals = add_scaled(totals, sums, d, rows, scale_at(columns, b))
        totals = add_scaled(totals, below, m, rows, scale_at(columns, b))
    return totals


@inner
def add_full_block(totals, layout, block_bytes, tile, w, row_bytes, columns, rows, b):
    """Full bytes."""
    sums, d = full_quad(layout, tile, w + block_bytes * b, row_bytes, rows, BLOCK * b)
    sums = add_multiple(sums, spread(tile, rows, sums_at(columns, b), BIAS_FACTOR), 1)
    return add_scaled(totals, sums, d, rows, scale_at(columns, b))


@inner
def full_quads(layout, block_bytes, tile, w, row_bytes, columns, rows):
    totals = zero_floats(tile)
    for b in range(columns // BLOCK):
        if b % 4 == 0:
            ask_quad(w + block_bytes * b, row_bytes, 4 * block_bytes)
        totals = add_full_block(totals, layout, block_bytes, tile, w, row_bytes, columns, rows, b)
    return totals


# ---- sixteen rows ----


@inner
def unpack_blocks(layout, block_bytes, w, row_bytes, columns, panel):
    for b in range(columns // BLOCK):
        d, m = panel + D + 64 * b, panel + M + 64 * b
        unpack_block(layout, w + block_bytes * b, row_bytes, panel + 512 * b, d, m)


@inner
def small_dots(tile, count, sums, codes, rows, at):
    """sums + a block of small codes, of which `count` steps are added up at a time."""
    if IN_ONE:
        return add_multiple(sums, wide_dots_32(tile, codes, rows, at), 1)
    for first in range(0, 8, count):
        dots = begin_dots(sums)
        for i in range(count):
            k = first + i
            dots = wide_dot_in_order(dots, load(u8x64, codes + 64 * k), rows, at + 4 * k)
        sums = end_dots(sums, dots)
    return sums


@inner
def add_small_panel(totals, factor, count, tile, panel, rows, columns, start, i):
    """totals + block i of the panel."""
    b = start // BLOCK + i
    sums = spread(tile, rows, sums_at(columns, b), factor)
    sums = small_dots(tile, count, sums, panel + 512 * i, rows, BLOCK * b)
    d = load(f32x16, panel + D + 64 * i)
    return add_scaled(totals, sums, d, rows, scale_at(columns, b))


@inner
def small_panel(factor, count, tile, panel, rows, columns, start, size, totals, later):
    total = load_floats(tile, totals)
    for i in range(size // BLOCK):
        ask_eighths(later, i)
        total = add_small_panel(total, factor, count, tile, panel, rows, columns, start, i)
    store_floats(totals, total)


@inner
def panel_with_min(count, tile, panel, rows, columns, start, size, totals, later):
    total = load_floats(tile, totals)
    for i in range(size // BLOCK):
        ask_eighths(later, i)
        b = start // BLOCK + i
        sums = small_dots(tile, count, zero_sums(tile), panel + 512 * i, rows, BLOCK * b)
        below = spread(tile, rows, sums_at(columns, b), 1)
        d, m = load(f32x16, panel + D + 64 * i), load(f32x16, panel + M + 64 * i)
        total = add_scaled(total, sums, d, rows, scale_at(columns, b))
        total = add_scaled(total, below, m, rows, scale_at(columns, b))
    store_floats(totals, total)


@inner
def add_full_panel(totals, tile, panel, rows, columns, start, i):
    """totals + block i of the panel."""
    b = start // BLOCK + i
    sums = spread(tile, rows, sums_at(columns, b), BIAS_FACTOR)
    if IN_ONE:
        pieces = panel + 512 * i
        sums = add_multiple(sums, wide_dots_32(tile, pieces, rows, BLOCK * b), 1)
    for first in range(0, 0 if IN_ONE else 8, STEPS_FULL):
        dots = begin_dots(sums)
        for j in range(STEPS_FULL):
            k = first + j
            piece = load(u8x64, panel + 512 * i + 64 * k)
            dots = wide_dot_bytes(dots, piece, rows, BLOCK * b + 4 * k)
        sums = end_dots(sums, dots)
    d = load(f32x16, panel + D + 64 * i)
    return add_scaled(totals, sums, d, rows, scale_at(columns, b))


@inner
def full_panel(tile, panel, rows, columns, start, size, totals, later):
    total = load_floats(tile, totals)
    for i in range(size // BLOCK):
        ask_eighths(later, i)
        total = add_full_panel(total, tile, panel, rows, columns, start, i)
    store_floats(totals, total)


# ---- formats ----


@quads.register(Q4_1)
def q4_1_quads(layout, tile, w, row_bytes, columns, rows):
    return quads_with_min(Q4_1, 20, tile, w, row_bytes, columns, rows)


@unpackers.register(Q4_1)
def q4_1_unpack(layout, w, row_bytes, columns, panel):
    unpack_blocks(Q4_1, 20, w, row_bytes, columns, panel)


@panels.register(Q4_1)
def q4_1_panel(layout, tile, panel, rows, columns, start, size, totals, later):
    panel_with_min(STEPS_4, tile, panel, rows, columns, start, size, totals, later)


@row_kernel
def multiply_q4_1(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q4_1, 8 * 20, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@quads.register(Q5_0)
def q5_0_quads(layout, tile, w, row_bytes, columns, rows):
    return small_quads(Q5_0, 22, 2, tile, w, row_bytes, columns, rows)


@unpackers.register(Q5_0)
def q5_0_unpack(layout, w, row_bytes, columns, panel):
    unpack_blocks(Q5_0, 22, w, row_bytes, columns, panel)


@panels.register(Q5_0)
def q5_0_panel(layout, tile, panel, rows, columns, start, size, totals, later):
    small_panel(2, STEPS_5, tile, panel, rows, columns, start, size, totals, later)


@row_kernel
def multiply_q5_0(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q5_0, 8 * 22, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@quads.register(Q5_1)
def q5_1_quads(layout, tile, w, row_bytes, columns, rows):
    return quads_with_min(Q5_1, 24, tile, w, row_bytes, columns, rows)


@unpackers.register(Q5_1)
def q5_1_unpack(layout, w, row_bytes, columns, panel):
    unpack_blocks(Q5_1, 24, w, row_bytes, columns, panel)


@panels.register(Q5_1)
def q5_1_panel(layout, tile, panel, rows, columns, start, size, totals, later):
    panel_with_min(STEPS_5, tile, panel, rows, columns, start, size, totals, later)


@row_kernel
def multiply_q5_1(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q5_1, 8 * 24, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
