"""Products for Q4_K and Q5_K, with int8 activations scaled per 256.

With activation codes a, activation scale y, and sums s of 32 activation codes, superblock by
superblock, both sums exact in int32:

    w . a += y d (scales . codes . a);  w . a += y (-dmin) (mins . s)

Block layouts: quant/q4_k.py, q5_k.py.
"""

from typing import Any

import numpy as np

from ondevice.kernels.dot.superblock import (
    SUPERBLOCK,
    moved,
    scales_at,
    sums_of_32_at,
    words,
)
from ondevice.kernels.dot.tile import (
    PAIRS,
    SCALES,
    D,
    Layout,
    M,
    ask_eighths,
    ask_quad,
    codes_of_sixteen,
    columns_of_sixteen,
    high_four,
    low_four,
    lowered,
    multiply,
    panels,
    preparers,
    quads,
    raised,
    rows_at,
    unpackers,
    wide_from_four,
)
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.products import (
    codes_apart,
    codes_at,
    codes_by_quarter,
    codes_dot,
    quad_dot,
    quad_dot_words,
    wide_dot,
    wide_dot_words,
    wide_dots_32,
    words_dot,
)
from ondevice.kernels.shuffles import (
    byte_shuffle,
    half_words,
    halves,
    lane_shuffle,
    load_quad,
    unmerged,
    word_fields,
)
from ondevice.kernels.simd import (
    bitcast,
    f32x4,
    f32x8,
    f32x16,
    i16x32,
    i32x16,
    load,
    store,
    u8x64,
    u32x16,
    zero,
)
from ondevice.kernels.sums import (
    add_dots,
    add_quarters,
    add_scaled,
    add_two_dots,
    both_by_quarter,
    by_quarter,
    dots_scale,
    fold_both,
    fold_rows,
    others_first,
    turn_quads,
)
from ondevice.kernels.tiles import (
    BY_FOURS,
    IN_ONE,
    NIBBLES,
    SIXTEEN,
    STEPS_4,
    STEPS_5,
    load_floats,
    spread,
    store_floats,
    store_vectors,
    zero_dots,
    zero_eights,
    zero_fours,
    zero_sums,
)
from quant.jit import inner

Q4_K, Q5_K = Layout("Q4_K"), Layout("Q5_K")
wide_from_four(Q4_K)
if SIXTEEN:
    wide_from_four(Q5_K)

# a quarter of a header is d, dmin, then 12 bytes of 6-bit scales and mins
header_low = byte_shuffle([*range(4, 8), *range(12, 16), *range(8, 12), *range(12, 16)])
header_high = byte_shuffle([*range(4, 8), *range(4, 8), *range(8, 12), *range(8, 12)])
low_fields = word_fields((0, 0, 0, 4), (0x3F, 0x0F, 0x3F, 0x0F))
high_fields = word_fields((2, 2, 2, 2), (0, 0x30, 0, 0x30))
mins_as_words = byte_shuffle([place for j in range(8) for place in (8 + j, None)])
d_and_dmin_of_both = lane_shuffle(
    [8 * row + word for first in range(2) for word in range(2) for row in (first, first + 2)]
)
dmin_first = lane_shuffle([lane ^ 2 for lane in range(8)])
two_scales = byte_shuffle([0, None] * 4 + [1, None] * 4)
first_scale, second_scale = byte_shuffle([0, None] * 8), byte_shuffle([1, None] * 8)
two_on = moved(2)


# ---- four rows ----


@inner
def six_bit_fields(header):
    """A quad of headers -> in each quarter 8 scales, then 8 mins."""
    return low_fields(header_low(header)) | high_fields(header_high(header))


@inner
def add_even_and_odd(sums, even, odd, scales):
    """sums + even * the first scale of each quarter + odd * the second."""
    if SIXTEEN:
        sums = add_dots(sums, even, bitcast(i32x16, first_scale(scales)))
        return add_dots(sums, odd, bitcast(i32x16, second_scale(scales)))
    return add_two_dots(sums, even, odd, words(two_scales(scales)))


@inner
def add_quads(totals, empty_sums, sums, header, fields, rows, columns, b):
    """The end of a superblock of Q4_K and Q5_K: its mins and the float sums."""
    y_at = scales_at(columns) + 4 * b
    mins = words(mins_as_words(fields))
    below = quad_dot_words(empty_sums, mins, rows, sums_of_32_at(columns) + 16 * b)
    both, factors = fold_both(sums, below), halves(d_and_dmin_of_both(words(header)))
    totals = add_scaled(totals, both, factors, rows, y_at)
    minus_dmin = zero(f32x8) - dmin_first(factors)
    return add_scaled(totals, others_first(both), minus_dmin, rows, y_at)


def _scales_of_row(row: int) -> Any:
    """For each half of a row's superblock an intrinsic: four rows' scales as words -> its own.

    A quarter gets the scale of the low nibbles' block four times, then that of the high nibbles'.
    """
    shuffles = []
    for half in range(2):
        blocks = [4 * half + quarter // 2 * 2 + i // 4 for quarter in range(4) for i in range(8)]
        shuffles.append(lane_shuffle([8 * row + block for block in blocks]))
    return shuffles


scales_as_words = byte_shuffle([place for j in range(8) for place in (j, None)])
row_0_first, row_0_last = _scales_of_row(0)
row_1_first, row_1_last = _scales_of_row(1)
row_2_first, row_2_last = _scales_of_row(2)
row_3_first, row_3_last = _scales_of_row(3)
d_and_dmin = lane_shuffle([8 * row + word for word in range(2) for row in range(4)])
four_first, four_last = lane_shuffle(range(4)), lane_shuffle(range(4, 8))


@inner
def row_of_q4_k(tile, codes, first_scales, last_scales, a, b, c, d):
    """Scaled dots of a row's superblock, its codes being there, all lanes to be added."""
    x, y = load(u8x64, codes), load(u8x64, codes + 64)
    even = codes_dot(zero_dots(tile), low_four(x), a)
    odd = codes_dot(zero_dots(tile), high_four(x), b)
    sums = add_two_dots(zero_sums(tile), even, odd, first_scales)
    even = codes_dot(zero_dots(tile), low_four(y), c)
    odd = codes_dot(zero_dots(tile), high_four(y), d)
    return add_two_dots(sums, even, odd, last_scales)


PREPARED = 384
"""Bytes of a superblock of a token in scratch: codes as they meet 64 nibbles, sums, scale."""


@preparers.register(Q4_K)
def prepare_q4_k(layout, tile, rows, columns, s):
    if not BY_FOURS:
        return rows
    result = rows_at(tile, s, columns // SUPERBLOCK * PREPARED, 0, 0)
    for i in range(columns // SUPERBLOCK):
        at, to = SUPERBLOCK * i, PREPARED * i
        sums = codes_by_quarter(tile, rows, sums_of_32_at(columns) + 16 * i)
        store_vectors(result, to, codes_apart(tile, rows, at))
        store_vectors(result, to + 64, codes_apart(tile, rows, at + 32))
        store_vectors(result, to + 128, codes_apart(tile, rows, at + 128))
        store_vectors(result, to + 192, codes_apart(tile, rows, at + 160))
        store_vectors(result, to + 256, sums)
        store_vectors(result, to + 320, spread(tile, rows, scales_at(columns) + 4 * i, 1))
    return result


@inner
def rows_q4_k(tile, w, row_bytes, columns, rows):
    """Four rows, one after the other in each superblock: f32x4, a lane being a row."""
    totals = zero_fours(tile)
    for i in range(columns // SUPERBLOCK):
        block, at = w + 144 * i, PREPARED * i
        ask_quad(block, row_bytes, 144)
        header = load_quad(block, row_bytes)
        fields = six_bit_fields(header)
        a, b = codes_at(tile, rows, at), codes_at(tile, rows, at + 64)
        c, d = codes_at(tile, rows, at + 128), codes_at(tile, rows, at + 192)
        codes, scales = block + 16, unmerged(words(scales_as_words(fields)))
        first, last = row_0_first(scales), row_0_last(scales)
        sums_0 = row_of_q4_k(tile, codes, first, last, a, b, c, d)
        codes += row_bytes
        first, last = row_1_first(scales), row_1_last(scales)
        sums_1 = row_of_q4_k(tile, codes, first, last, a, b, c, d)
        codes += row_bytes
        first, last = row_2_first(scales), row_2_last(scales)
        sums_2 = row_of_q4_k(tile, codes, first, last, a, b, c, d)
        codes += row_bytes
        first, last = row_3_first(scales), row_3_last(scales)
        sums_3 = row_of_q4_k(tile, codes, first, last, a, b, c, d)
        mins = words(mins_as_words(fields))
        below = words_dot(zero_sums(tile), mins, rows, at + 256)
        factors, y_at = halves(d_and_dmin(words(header))), at + 320
        sums = fold_rows(sums_0, sums_1, sums_2, sums_3)
        totals = add_scaled(totals, sums, four_first(factors), rows, y_at)
        minus_dmin = zero(f32x4) - four_last(factors)
        totals = add_scaled(totals, add_quarters(turn_quads(below)), minus_dmin, rows, y_at)
    return totals


@quads.register(Q4_K)
def quad_q4_k(layout, tile, w, row_bytes, columns, rows):
    if BY_FOURS:
        return by_quarter(rows_q4_k(tile, w, row_bytes, columns, rows))
    totals = zero_eights(tile)
    for b in range(columns // SUPERBLOCK):
        block = w + 144 * b
        ask_quad(block, row_bytes, 144)
        header = load_quad(block, row_bytes)
        fields = six_bit_fields(header)
        scales, sums = fields, zero_sums(tile)
        for j in range(4):
            x = load_quad(block + 16 + 32 * j, row_bytes)
            y = load_quad(block + 32 + 32 * j, row_bytes)
            at = SUPERBLOCK * b + 64 * j
            even = quad_dot(zero_dots(tile), low_four(x), rows, at)
            even = quad_dot(even, low_four(y), rows, at + 16)
            odd = quad_dot(zero_dots(tile), high_four(x), rows, at + 32)
            odd = quad_dot(odd, high_four(y), rows, at + 48)
            sums = add_even_and_odd(sums, even, odd, scales)
            scales = two_on(scales)
        totals = add_quads(totals, zero_sums(tile), sums, header, fields, rows, columns, b)
    return both_by_quarter(totals)


@quads.register(Q5_K)
def quad_q5_k(layout, tile, w, row_bytes, columns, rows):
    totals, sixteen = zero_eights(tile), np.uint8(16)
    for b in range(columns // SUPERBLOCK):
        block = w + 176 * b
        ask_quad(block, row_bytes, 176)
        header = load_quad(block, row_bytes)
        fields = six_bit_fields(header)
        scales, sums = fields, zero_sums(tile)
        # bits 2 j and 2 j + 1 of a byte are moved to bit 4
        fifth_x, fifth_y = load_quad(block + 16, row_bytes), load_quad(block + 32, row_bytes)
        for j in range(4):
            x = load_quad(block + 48 + 32 * j, row_bytes)
            y = load_quad(block + 64 + 32 * j, row_bytes)
            at = SUPERBLOCK * b + 64 * j
            code = low_four(x) | (raised(fifth_x, 4) & sixteen)
            even = quad_dot(zero_dots(tile), code, rows, at)
            code = low_four(y) | (raised(fifth_y, 4) & sixteen)
            even = quad_dot(even, code, rows, at + 16)
            code = high_four(x) | (raised(fifth_x, 3) & sixteen)
            odd = quad_dot(zero_dots(tile), code, rows, at + 32)
            code = high_four(y) | (raised(fifth_y, 3) & sixteen)
            odd = quad_dot(odd, code, rows, at + 48)
            sums = add_even_and_odd(sums, even, odd, scales)
            scales, fifth_x, fifth_y = two_on(scales), lowered(fifth_x, 2), lowered(fifth_y, 2)
        totals = add_quads(totals, zero_sums(tile), sums, header, fields, rows, columns, b)
    return both_by_quarter(totals)


# ---- sixteen rows ----


@inner
def unpack_header(w, row_bytes, panel):
    """Scales, mins, d and -dmin of Q4_K and Q5_K."""
    halves, u0, u1, u2 = columns_of_sixteen(w, row_bytes)
    six, four = np.uint32(0x3F3F3F3F), np.uint32(0x0F0F0F0F)
    two = np.uint32(0x30303030)
    unpack_scales(u0 & six, panel, 0)
    unpack_scales((u2 & four) | ((u0 >> np.uint32(2)) & two), panel, 4)
    unpack_mins(u1 & six, panel + PAIRS)
    unpack_mins(((u2 >> np.uint32(4)) & four) | ((u1 >> np.uint32(2)) & two), panel + PAIRS + 128)
    store(panel + D, half_words(halves, np.uint32(0)))
    store(panel + M, zero(f32x16) - half_words(halves, np.uint32(16)))


@inner
def unpack_scales(bytes_of_rows, panel, first):
    """Four scales of each row."""
    for i in range(4):
        scale = (bytes_of_rows >> np.uint32(8 * i)) & np.uint32(0xFF)
        store(panel + SCALES + 64 * (first + i), dots_scale(bitcast(i32x16, scale)))


@inner
def unpack_mins(bytes_of_rows, pairs):
    """Four mins of each row, as two pairs of words."""
    for i in range(2):
        both = bytes_of_rows >> np.uint32(16 * i)
        low, high = both & np.uint32(0xFF), (both << np.uint32(8)) & np.uint32(0xFF0000)
        store(pairs + 64 * i, low | high)


@unpackers.register(Q4_K)
def unpack_q4_k(layout, w, row_bytes, columns, panel):
    unpack_header(w, row_bytes, panel)
    four = np.uint32(0x0F0F0F0F)
    for j in range(4):
        for part in range(2):
            pieces = codes_of_sixteen(w + 16 + 32 * j + 16 * part, row_bytes)
            if NIBBLES:
                for i, piece in enumerate(pieces):
                    store(panel + 64 * (8 * j + 4 * part + i), piece)
            else:
                to = panel + 64 * (16 * j + 4 * part)
                for i, piece in enumerate(pieces):
                    store(to + 64 * i, piece & four)
                    store(to + 64 * (8 + i), (piece >> np.uint32(4)) & four)


@unpackers.register(Q5_K)
def unpack_q5_k(layout, w, row_bytes, columns, panel):
    unpack_header(w, row_bytes, panel)
    four, sixteen = np.uint32(0x0F0F0F0F), np.uint32(0x10101010)
    for part in range(2):
        fifths = codes_of_sixteen(w + 16 + 16 * part, row_bytes)
        for i, fifth in enumerate(fifths):
            store(panel + 64 * (4 * part + i), fifth)
    # the first 8 pieces of codes are written last
    for j in range(3, -1, -1):
        for part in range(2):
            pieces = codes_of_sixteen(w + 48 + 32 * j + 16 * part, row_bytes)
            for i, piece in enumerate(pieces):
                fifth = load(u32x16, panel + 64 * (4 * part + i)) >> np.uint32(2 * j)
                to = panel + 64 * (16 * j + 4 * part + i)
                odd = ((piece >> np.uint32(4)) & four) | ((fifth << np.uint32(3)) & sixteen)
                store(to + 512, odd)
                store(to, (piece & four) | ((fifth << np.uint32(4)) & sixteen))


@inner
def add_mins(tile, sums, panel, rows, columns, start, totals):
    """The tokens' totals + the scaled sums of a panel of Q4_K or Q5_K, and its mins."""
    below, at = zero_sums(tile), sums_of_32_at(columns) + start // 16
    for j in range(4):
        pairs = load(i16x32, panel + PAIRS + 64 * j)
        below = wide_dot_words(below, pairs, rows, at + 4 * j)
    y_at = scales_at(columns) + start // 64
    total = load_floats(tile, totals)
    total = add_scaled(total, sums, load(f32x16, panel + D), rows, y_at)
    total = add_scaled(total, below, load(f32x16, panel + M), rows, y_at)
    store_floats(totals, total)


@inner
def multiply_with_mins(tile, count, panel, rows, columns, start, totals, later):
    """A panel of Q4_K or Q5_K; `count` dots are added up before scaling."""
    sums = zero_sums(tile)
    for j in range(8):
        ask_eighths(later, j)
        if IN_ONE:
            dots = wide_dots_32(tile, panel + 512 * j, rows, start + 32 * j)
            sums = add_dots(sums, dots, load(i32x16, panel + SCALES + 64 * j))
            continue
        for first in range(0, 8, count):
            dots = zero_dots(tile)
            for i in range(count):
                k = 8 * j + first + i
                dots = wide_dot(dots, load(u8x64, panel + 64 * k), rows, start + 4 * k)
            sums = add_dots(sums, dots, load(i32x16, panel + SCALES + 64 * j))
    add_mins(tile, sums, panel, rows, columns, start, totals)


@inner
def multiply_nibbles(tile, panel, rows, columns, start, totals, later):
    """A panel of Q4_K whose bytes hold the codes of two blocks."""
    sums, four = zero_sums(tile), np.uint32(0x0F0F0F0F)
    for j in range(4):
        at, codes, scales = start + 64 * j, panel + 512 * j, panel + SCALES + 128 * j
        even, odd = zero_dots(tile), zero_dots(tile)
        ask_eighths(later, 2 * j, 2)
        for k in range(8):
            piece = load(u32x16, codes + 64 * k) & four
            even = wide_dot(even, bitcast(u8x64, piece), rows, at + 4 * k)
        sums = add_dots(sums, even, load(i32x16, scales))
        for k in range(8):
            piece = (load(u32x16, codes + 64 * k) >> np.uint32(4)) & four
            odd = wide_dot(odd, bitcast(u8x64, piece), rows, at + 32 + 4 * k)
        sums = add_dots(sums, odd, load(i32x16, scales + 64))
    add_mins(tile, sums, panel, rows, columns, start, totals)


@panels.register(Q4_K)
def multiply_panel_q4_k(layout, tile, panel, rows, columns, start, size, totals, later):
    if NIBBLES:
        multiply_nibbles(tile, panel, rows, columns, start, totals, later)
    else:
        multiply_with_mins(tile, STEPS_4, panel, rows, columns, start, totals, later)


@panels.register(Q5_K)
def multiply_panel_q5_k(layout, tile, panel, rows, columns, start, size, totals, later):
    multiply_with_mins(tile, STEPS_5, panel, rows, columns, start, totals, later)


@row_kernel
def multiply_q4_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q4_K, 144, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_q5_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q5_K, 176, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
