"""Products for IQ4_XS, with int8 activations scaled per 256.

With activation codes a and activation scale y, superblock by superblock, the sum exact in int32:

    w . a += y d (scales . values . a), values from a table

Block layout: quant/iq4_xs.py.
"""

import numpy as np

from ondevice.kernels.dot.superblock import (
    SUPERBLOCK,
    add_panel,
    d_of_header,
    moved,
    scales_at,
    signed_words,
    sums_of_32_at,
)
from ondevice.kernels.dot.tile import (
    SCALES,
    D,
    Layout,
    ask_eighths,
    ask_quad,
    codes_of_sixteen,
    columns_of_sixteen,
    full_codes,
    high_four,
    low_four,
    multiply,
    panels,
    quads,
    raised,
    unpackers,
    wide_from_two,
)
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.products import quad_dot_bytes, wide_dot_bytes, wide_dots_32
from ondevice.kernels.shuffles import byte_shuffle, half_words, lane_shuffle, load_quad, word_fields
from ondevice.kernels.simd import bitcast, i32x16, load, store, u8x64, u32x16
from ondevice.kernels.sums import add_dots, add_scaled, dots_scale, fold_quads
from ondevice.kernels.tiles import (
    BIASED,
    IN_ONE,
    PAIRED,
    STEPS_FULL,
    spread_words,
    zero_dots,
    zero_floats,
    zero_sums,
)
from quant.jit import inner

IQ4_XS = Layout("IQ4_XS")
wide_from_two(IQ4_XS)

first_words = lane_shuffle([4 * (lane // 4) for lane in range(16)])
second_words = lane_shuffle([4 * (lane // 4) + 1 for lane in range(16)])


@inner
def iq4_xs_scale(first, second, j):
    """Scale j of the rows whose blocks begin with these two words (u32x16), as `add_dots` takes it.

    The words hold d, then the scales' upper 2 bits; their lower 4 bits.
    """
    upper = (first >> np.uint32(16 + 2 * j)) & np.uint32(3)
    lower = (second >> np.uint32(4 * j)) & np.uint32(15)
    return dots_scale(bitcast(i32x16, lower | (upper << np.uint32(4))) - np.int32(32))


# in word i of a quarter of a header: the lower four and the upper two bits of scales i and i + 4
low_scales = byte_shuffle([4, None, 6, None] * 2 + [5, None, 7, None] * 2)
upper_scales = byte_shuffle([2, None, 3, None] * 4)
low_fields = word_fields((0, 4, 0, 4), (15,) * 4)
upper_fields = word_fields((0, 2, 4, 6), (3,) * 4)
first_signed = byte_shuffle([None, 0] * 8)
two_on = moved(2)


@inner
def eight_scales(header):
    """A quad of headers -> in each quarter, two bytes apart, scales 0, 4, 1, 5, 2, 6, 3, 7."""
    upper = raised(upper_fields(upper_scales(header)), 4)
    return (low_fields(low_scales(header)) | upper) - np.uint8(32)


@quads.register(IQ4_XS)
def quad_iq4_xs(layout, tile, w, row_bytes, columns, rows):
    totals = zero_floats(tile)
    for b in range(columns // SUPERBLOCK):
        block = w + 136 * b
        ask_quad(block, row_bytes, 136)
        header = load_quad(block, row_bytes)
        first, second = first_words(bitcast(u32x16, header)), second_words(bitcast(u32x16, header))
        scales, sums = eight_scales(header), zero_sums(tile)
        for i in range(8):
            if PAIRED:  # the sums are exact, in whatever order
                j = i // 2 + i % 2 * 4
                scale = bitcast(i32x16, signed_words(first_signed(scales)))
                scales = two_on(scales)
            else:
                j = i
                scale = iq4_xs_scale(first, second, j)
            x = load_quad(block + 8 + 16 * j, row_bytes)
            low, high = full_codes(low_four(x)), full_codes(high_four(x))
            at = SUPERBLOCK * b + 32 * j
            if BIASED:
                # four lanes of a quarter share the 128
                dots = spread_words(tile, rows, sums_of_32_at(columns) + at // 16, -32)
                dots = quad_dot_bytes(quad_dot_bytes(dots, low, rows, at), high, rows, at + 16)
                sums = add_dots(sums, dots, scale)
            else:
                sums = add_dots(sums, quad_dot_bytes(zero_dots(tile), low, rows, at), scale)
                sums = add_dots(sums, quad_dot_bytes(zero_dots(tile), high, rows, at + 16), scale)
        y_at = scales_at(columns) + 4 * b
        totals = add_scaled(totals, fold_quads(sums), d_of_header(header), rows, y_at)
    return totals


@unpackers.register(IQ4_XS)
def unpack_iq4_xs(layout, w, row_bytes, columns, panel):
    four = np.uint32(0x0F0F0F0F)
    first, second, _, _ = columns_of_sixteen(w, row_bytes)
    store(panel + D, half_words(first, np.uint32(0)))
    for j in range(8):
        store(panel + SCALES + 64 * j, iq4_xs_scale(first, second, j))
        for i, piece in enumerate(codes_of_sixteen(w + 8 + 16 * j, row_bytes)):
            to = panel + 512 * j + 64 * i
            store(to, full_codes(bitcast(u8x64, piece & four)))
            store(to + 256, full_codes(bitcast(u8x64, (piece >> np.uint32(4)) & four)))


@panels.register(IQ4_XS)
def multiply_panel_iq4_xs(layout, tile, panel, rows, columns, start, size, totals, later):
    sums = zero_sums(tile)
    for j in range(8):
        ask_eighths(later, j)
        if IN_ONE:
            dots = wide_dots_32(tile, panel + 512 * j, rows, start + 32 * j)
            sums = add_dots(sums, dots, load(i32x16, panel + SCALES + 64 * j))
            continue
        for first in range(0, 8, STEPS_FULL):
            if BIASED:
                dots = spread_words(tile, rows, sums_of_32_at(columns) + start // 16 + 2 * j, -128)
            else:
                dots = zero_dots(tile)
            for i in range(STEPS_FULL):
                k = 8 * j + first + i
                piece = load(u8x64, panel + 64 * k)
                dots = wide_dot_bytes(dots, piece, rows, start + 4 * k)
            sums = add_dots(sums, dots, load(i32x16, panel + SCALES + 64 * j))
    add_panel(tile, sums, panel, rows, columns, start, totals)


@row_kernel
def multiply_iq4_xs(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(IQ4_XS, 136, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
