"""Products for MXFP4, with int8 activations scaled per 32.

The arithmetic is in blocks.py, values being from a table, with an offset of 16.
Block layout: quant/mxfp4.py.
"""

import numpy as np

from ondevice.kernels.dot.blocks import (
    block_unpackers,
    quad_blocks,
    small_panel,
    small_quads,
    unpack_blocks,
    unpack_nibbles,
)
from ondevice.kernels.dot.tile import (
    Layout,
    columns_of_sixteen,
    high_four,
    low_four,
    multiply,
    panels,
    preparers,
    quads,
    unpackers,
)
from ondevice.kernels.dot.two_blocks import (
    TWO,
    five_bit_sums,
    prepare_two_blocks,
    two_blocks_of_quads,
    two_codes,
    two_scales,
    two_sums,
    wide_by_twos,
)
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.shuffles import (
    byte_shuffle,
    byte_table,
    exponent_scale,
    load_head_bytes,
    load_quad,
    load_two,
)
from ondevice.kernels.simd import bitcast, convert, f32x16, load, store, u8x64, u32x8, u32x16, zero
from ondevice.kernels.tiles import SIXTEEN, STEPS_5
from quant.mxfp4 import VALUES

MXFP4 = Layout("MXFP4")
wide_by_twos(MXFP4)
two_sums.register(MXFP4)(five_bit_sums)

mxfp4_codes = byte_table([value + 16 for value in VALUES])
exponent_of_header = byte_shuffle([0, None, None, None] * 4)


@quad_blocks.register(MXFP4)
def quad_mxfp4(layout, block, row_bytes):
    x, header = load_quad(block + 1, row_bytes), load_quad(block, row_bytes)
    d = exponent_scale(bitcast(u32x16, exponent_of_header(header)))
    return mxfp4_codes(low_four(x)), mxfp4_codes(high_four(x)), d, zero(f32x16)


@block_unpackers.register(MXFP4)
def unpack_mxfp4(layout, w, row_bytes, codes, d, m):
    headers = columns_of_sixteen(w, row_bytes)[0]
    store(d, exponent_scale(headers & np.uint32(0xFF)))
    unpack_nibbles(w + 1, row_bytes, codes)
    for k in range(8):
        store(codes + 64 * k, mxfp4_codes(load(u8x64, codes + 64 * k)))


@quads.register(MXFP4)
def mxfp4_quads(layout, tile, w, row_bytes, columns, rows):
    if SIXTEEN and columns % TWO == 0:
        return two_blocks_of_quads(MXFP4, 17, tile, w, row_bytes, columns, rows)
    return small_quads(MXFP4, 17, 2, tile, w, row_bytes, columns, rows)


@preparers.register(MXFP4)
def mxfp4_prepared(layout, tile, rows, columns, s):
    return prepare_two_blocks(tile, rows, columns, s, 2)


@two_codes.register(MXFP4)
def mxfp4_two_codes(layout, block):
    numbers = load_two(block + 1, 17)
    return mxfp4_codes(low_four(numbers)), mxfp4_codes(high_four(numbers))


@two_scales.register(MXFP4)
def mxfp4_two_scales(layout, block, row_bytes):
    return exponent_scale(convert(u32x8, load_head_bytes(block, row_bytes, 17)))


@unpackers.register(MXFP4)
def mxfp4_unpack(layout, w, row_bytes, columns, panel):
    unpack_blocks(MXFP4, 17, w, row_bytes, columns, panel)


@panels.register(MXFP4)
def mxfp4_panel(layout, tile, panel, rows, columns, start, size, totals, later):
    # the table holds up to 28: five bits
    small_panel(2, STEPS_5, tile, panel, rows, columns, start, size, totals, later)


@row_kernel
def multiply_mxfp4(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(MXFP4, 8 * 17, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
