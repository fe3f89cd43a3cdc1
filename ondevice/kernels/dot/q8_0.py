"""Products for Q8_0, with int8 activations scaled per 32.

The arithmetic is in blocks.py.
Block layout: quant/q8_0.py.
"""

from ondevice.kernels.dot.blocks import (
    BIAS,
    BIAS_FACTOR,
    block_unpackers,
    first_half,
    full_panel,
    full_quads,
    quad_blocks,
    unpack_blocks,
    unpack_d,
)
from ondevice.kernels.dot.tile import (
    Layout,
    codes_of_sixteen,
    multiply,
    panels,
    preparers,
    quads,
    unpackers,
)
from ondevice.kernels.dot.two_blocks import (
    TWO,
    full_sums,
    prepare_two_blocks,
    two_blocks_of_quads,
    two_codes,
    two_scales,
    two_sums,
    wide_by_twos,
)
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.shuffles import halves, load_head_words, load_quad, load_two
from ondevice.kernels.simd import bitcast, f32x16, store, u8x64, zero
from ondevice.kernels.tiles import SIXTEEN

Q8_0 = Layout("Q8_0")
wide_by_twos(Q8_0)
two_sums.register(Q8_0)(full_sums)


@quad_blocks.register(Q8_0)
def quad_q8_0(layout, block, row_bytes):
    x, y = load_quad(block + 2, row_bytes), load_quad(block + 18, row_bytes)
    header = load_quad(block, row_bytes)
    return x ^ BIAS, y ^ BIAS, first_half(header), zero(f32x16)


@block_unpackers.register(Q8_0)
def unpack_q8_0(layout, w, row_bytes, codes, d, m):
    unpack_d(w, row_bytes, d)
    for half in range(2):
        pieces = codes_of_sixteen(w + 2 + 16 * half, row_bytes)
        for i, piece in enumerate(pieces):
            store(codes + 64 * (4 * half + i), bitcast(u8x64, piece) ^ BIAS)


@quads.register(Q8_0)
def q8_0_quads(layout, tile, w, row_bytes, columns, rows):
    if SIXTEEN and columns % TWO == 0:
        return two_blocks_of_quads(Q8_0, 34, tile, w, row_bytes, columns, rows)
    return full_quads(Q8_0, 34, tile, w, row_bytes, columns, rows)


@preparers.register(Q8_0)
def q8_0_prepared(layout, tile, rows, columns, s):
    return prepare_two_blocks(tile, rows, columns, s, BIAS_FACTOR)


@two_codes.register(Q8_0)
def q8_0_two_codes(layout, block):
    return load_two(block + 2, 34), load_two(block + 18, 34)


@two_scales.register(Q8_0)
def q8_0_two_scales(layout, block, row_bytes):
    return halves(load_head_words(block, row_bytes, 34))


@unpackers.register(Q8_0)
def q8_0_unpack(layout, w, row_bytes, columns, panel):
    unpack_blocks(Q8_0, 34, w, row_bytes, columns, panel)


@panels.register(Q8_0)
def q8_0_panel(layout, tile, panel, rows, columns, start, size, totals, later):
    full_panel(tile, panel, rows, columns, start, size, totals, later)


@row_kernel
def multiply_q8_0(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q8_0, 8 * 34, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
