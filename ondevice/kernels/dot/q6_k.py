"""Products for Q6_K, with int8 activations scaled per 256.

With activation codes a, activation scale y, and sums s of 16 activation codes, superblock by
superblock, the sum exact in int32:

    w . a += y d (scales . codes . a - 32 scales . s)

Block layout: quant/q6_k.py.
"""

from typing import Any

import numpy as np

from ondevice.kernels.dot.superblock import (
    SUPERBLOCK,
    add_panel,
    moved,
    scales_at,
    signed_words,
    sums_of_16_at,
    words,
)
from ondevice.kernels.dot.tile import (
    PAIRS,
    PREPARED_PER_COLUMN,
    SCALES,
    D,
    Layout,
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
    anew,
    codes_at,
    codes_dot,
    half_dot_words,
    quad_dot,
    quad_dot_words,
    wide_dot_in_order,
    wide_dot_words,
    wide_dots_16,
)
from ondevice.kernels.shuffles import (
    byte_shuffle,
    half_in_each,
    half_words,
    halves,
    lane_shuffle,
    load_quad,
    load_signed,
    load_twice,
    pair_shuffle,
    quarters_lowered,
    unmerged,
)
from ondevice.kernels.simd import bitcast, i16x32, i32x16, load, store, u8x64
from ondevice.kernels.sums import (
    add_dots,
    add_dots_in_order,
    add_multiple,
    add_scaled,
    add_two_dots,
    by_quarter,
    dots_scale,
    fold_quads,
    fold_rows,
)
from ondevice.kernels.tiles import (
    IN_ONE,
    ROW_BY_ROW,
    SIXTEEN,
    STEPS_6,
    zero_dots,
    zero_floats,
    zero_fours,
    zero_sums,
)
from quant.jit import inner

Q6_K = Layout("Q6_K")
wide_from_four(Q6_K)

# signed bytes go into the upper halves of words and are shifted down
first_two_signed = byte_shuffle([None, 0] * 4 + [None, 2] * 4)
next_two_signed = byte_shuffle([None, 4] * 4 + [None, 6] * 4)
first_signed = byte_shuffle([place for j in range(8) for place in (None, j)])
last_signed = byte_shuffle([place for j in range(8, 16) for place in (None, j)])
d_at_the_end = half_in_each(14)
one_on, six_on = moved(1), moved(6)

# of 16 scales, in each half of a superblock: those of the low and of the high nibbles by quarter
scales_of_first_half = lane_shuffle([q + i // 4 * 4 for q in range(4) for i in range(8)])
scales_of_last_half = lane_shuffle([8 + q + i // 4 * 4 for q in range(4) for i in range(8)])
last_bits_two_on = quarters_lowered((0, 0, 2, 2))


def _eights(first: int) -> Any:
    """Of each quarter of two vectors the 8 codes from `first` on, one after the other."""
    return pair_shuffle(
        [16 * q + first + i + 64 * other for q in range(4) for other in range(2) for i in range(8)]
    )


first_eights, last_eights = _eights(0), _eights(8)
d_of_four = lane_shuffle([8 * row + 7 for row in range(4)])


@preparers.register(Q6_K)
def prepare_q6_k(layout, tile, rows, columns, s):
    if not SIXTEEN:
        return rows
    result = rows_at(tile, s, PREPARED_PER_COLUMN * columns, 0, 0)
    for token in range(len(rows)):
        record, to = rows[token], result[token]
        for i in range(0, columns, 128):
            a, b = load(u8x64, record + i), load(u8x64, record + i + 64)
            store(to + i, first_eights(a, b))
            store(to + i + 64, last_eights(a, b))
        for i in range(columns, columns + columns // SUPERBLOCK * 52, 64):
            store(to + i, load(u8x64, record + i))
    return result


@inner
def half_of_row(tile, sums, low, high, scales, rows, at):
    """sums + a half of a superblock of Q6_K, its lower four and its upper two bits being there."""
    upper, rows = np.uint8(0x30), anew(rows)
    x, bits = load(u8x64, low), last_bits_two_on(load_twice(high))
    a, b = codes_at(tile, rows, at), codes_at(tile, rows, at + 64)
    x, y = low_four(x) | (raised(bits, 4) & upper), high_four(x) | (bits & upper)
    if SIXTEEN:
        dots = codes_dot(zero_dots(tile), first_eights(x, y), a)
        dots = codes_dot(dots, last_eights(x, y), b)
        return add_dots_in_order(sums, dots, bitcast(i32x16, scales))
    first, second = codes_dot(zero_dots(tile), x, a), codes_dot(zero_dots(tile), y, b)
    return add_two_dots(sums, first, second, scales)


@inner
def row_of_q6_k(tile, block, rows, at, sums_at):
    """Scaled dots of a row's superblock, all lanes to be added; `at`: the tokens' codes."""
    scales = unmerged(load_signed(block + 192))
    sums = half_dot_words(zero_sums(tile), scales * np.int16(-32), rows, sums_at)
    first, last = scales_of_first_half(scales), scales_of_last_half(scales)
    sums = half_of_row(tile, sums, block, block + 128, first, rows, at)
    return half_of_row(tile, sums, block + 64, block + 160, last, rows, at + 128)


@inner
def rows_q6_k(tile, w, row_bytes, columns, rows):
    """Four rows, one after the other in each superblock: f32x4, a lane being a row."""
    totals = zero_fours(tile)
    for i in range(columns // SUPERBLOCK):
        block, at = w + 210 * i, SUPERBLOCK * i
        ask_quad(block, row_bytes, 210)
        last = load_quad(block + 194, row_bytes)
        sums_at = sums_of_16_at(columns) + 32 * i
        sums_0 = row_of_q6_k(tile, block, rows, at, sums_at)
        block += row_bytes
        sums_1 = row_of_q6_k(tile, block, rows, at, sums_at)
        block += row_bytes
        sums_2 = row_of_q6_k(tile, block, rows, at, sums_at)
        block += row_bytes
        sums_3 = row_of_q6_k(tile, block, rows, at, sums_at)
        sums = fold_rows(sums_0, sums_1, sums_2, sums_3)
        factors = halves(d_of_four(words(last)))
        totals = add_scaled(totals, sums, factors, rows, scales_at(columns) + 4 * i)
    return totals


@quads.register(Q6_K)
def quad_q6_k(layout, tile, w, row_bytes, columns, rows):
    if ROW_BY_ROW:
        return by_quarter(rows_q6_k(tile, w, row_bytes, columns, rows))
    totals, upper = zero_floats(tile), np.uint8(0x30)
    for b in range(columns // SUPERBLOCK):
        block = w + 210 * b
        ask_quad(block, row_bytes, 210)
        all_scales = load_quad(block + 192, row_bytes)
        scales, sums = all_scales, zero_sums(tile)
        for half in range(2):
            for part in range(2):
                x = load_quad(block + 64 * half + 16 * part, row_bytes)
                y = load_quad(block + 64 * half + 32 + 16 * part, row_bytes)
                high = load_quad(block + 128 + 32 * half + 16 * part, row_bytes)
                at = SUPERBLOCK * b + 128 * half + 16 * part
                code = low_four(x) | (raised(high, 4) & upper)
                first = quad_dot(zero_dots(tile), code, rows, at)
                code = low_four(y) | (raised(high, 2) & upper)
                second = quad_dot(zero_dots(tile), code, rows, at + 32)
                factors = signed_words(first_two_signed(scales))
                sums = add_two_dots(sums, first, second, factors)
                code = high_four(x) | (high & upper)
                first = quad_dot(zero_dots(tile), code, rows, at + 64)
                code = high_four(y) | (lowered(high, 2) & upper)
                second = quad_dot(zero_dots(tile), code, rows, at + 96)
                factors = signed_words(next_two_signed(scales))
                sums = add_two_dots(sums, first, second, factors)
                scales = one_on(scales)
            scales = six_on(scales)
        at = sums_of_16_at(columns) + 32 * b
        surplus = zero_sums(tile)
        surplus = quad_dot_words(surplus, signed_words(first_signed(all_scales)), rows, at)
        surplus = quad_dot_words(surplus, signed_words(last_signed(all_scales)), rows, at + 16)
        sums = fold_quads(add_multiple(sums, surplus, -32))
        d = d_at_the_end(load_quad(block + 194, row_bytes))
        totals = add_scaled(totals, sums, d, rows, scales_at(columns) + 4 * b)
    return totals


@unpackers.register(Q6_K)
def unpack_q6_k(layout, w, row_bytes, columns, panel):
    four, upper = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)
    for half in range(2):
        for part in range(2):
            xs = codes_of_sixteen(w + 64 * half + 16 * part, row_bytes)
            ys = codes_of_sixteen(w + 64 * half + 32 + 16 * part, row_bytes)
            highs = codes_of_sixteen(w + 128 + 32 * half + 16 * part, row_bytes)
            to = panel + 64 * (32 * half + 4 * part)
            for i in range(4):
                x, y, high = xs[i], ys[i], highs[i]
                at = to + 64 * i
                store(at, (x & four) | ((high << np.uint32(4)) & upper))
                store(at + 512, (y & four) | ((high << np.uint32(2)) & upper))
                store(at + 1024, ((x >> np.uint32(4)) & four) | (high & upper))
                third = (high >> np.uint32(2)) & upper
                store(at + 1536, ((y >> np.uint32(4)) & four) | third)
    scales = columns_of_sixteen(w + 192, row_bytes)
    for j, four_scales in enumerate(scales):
        values = bitcast(i32x16, four_scales)
        for i in range(4):
            scale = (values << np.int32(24 - 8 * i)) >> np.int32(24)
            store(panel + SCALES + 64 * (4 * j + i), dots_scale(scale))
        for i in range(2):
            first = (values << np.int32(24 - 16 * i)) >> np.int32(24)
            second = (values << np.int32(16 - 16 * i)) >> np.int32(24)
            pair = (first & np.int32(0xFFFF)) | (second << np.int32(16))
            store(panel + PAIRS + 64 * (2 * j + i), pair)
    end = columns_of_sixteen(w + 194, row_bytes)
    store(panel + D, half_words(end[3], np.uint32(16)))


@panels.register(Q6_K)
def multiply_panel_q6_k(layout, tile, panel, rows, columns, start, size, totals, later):
    sums, surplus = zero_sums(tile), zero_sums(tile)
    for j in range(16):
        if j % 2 == 0:
            ask_eighths(later, j // 2)
        if IN_ONE:
            dots = wide_dots_16(tile, panel + 256 * j, rows, start + 16 * j)
            sums = add_dots(sums, dots, load(i32x16, panel + SCALES + 64 * j))
            continue
        for first in range(0, 4, STEPS_6):
            dots = zero_dots(tile)
            for i in range(STEPS_6):
                k = 4 * j + first + i
                dots = wide_dot_in_order(dots, load(u8x64, panel + 64 * k), rows, start + 4 * k)
            sums = add_dots(sums, dots, load(i32x16, panel + SCALES + 64 * j))
    at = sums_of_16_at(columns) + start // 8
    for j in range(8):
        pairs = load(i16x32, panel + PAIRS + 64 * j)
        surplus = wide_dot_words(surplus, pairs, rows, at + 4 * j)
    sums = add_multiple(sums, surplus, -32)
    add_panel(tile, sums, panel, rows, columns, start, totals)


@row_kernel
def multiply_q6_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q6_K, 210, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
