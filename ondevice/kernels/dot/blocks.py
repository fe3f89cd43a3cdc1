"""Products for the 32-weight formats Q8_0, Q4_0, Q5_0, Q5_1 with int8 activations scaled per 32.

A block is first unpacked to a *panel* of 64 bytes: 32 codes, then d and c as f32. With activation
codes a, activation scale y and z = y times the sum of a,

    w . a = sum over blocks of  y d (codes . a)  +  c z

where c = -8 d (Q4_0), -16 d (Q5_0), m (Q5_1) turns unsigned codes into weights; Q8_0's codes are
signed and c = 0. Block layouts: quant/q8_0.py, q4_0.py, q5_0.py, q5_1.py.
"""

import numpy as np

from ondevice.kernels.dot.tile import ROWS, ByLayout, Layout, row_at
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.simd import (
    bitcast,
    byte_bits,
    convert,
    dot_signed,
    dot_small,
    f32x8,
    fma,
    halves_of_bytes,
    i8x32,
    lane_sum,
    load,
    load_f16,
    load_f32,
    load_u32,
    store,
    store_f32,
    u8x16,
    u8x32,
    zero,
)
from quant.jit import inner

BLOCK = 32
PANEL = 64
D, C = 32, 36
Q8_0, Q4_0, Q5_0, Q5_1 = (Layout(name) for name in ("Q8_0", "Q4_0", "Q5_0", "Q5_1"))


def unpack(layout, block, panel):
    """One block of `layout` at `block` -> its panel."""
    raise NotImplementedError("only inside compiled kernels")


def dot(layout, panel, activations):
    """Codes of a panel times 32 activation codes, spread over an i32x8."""
    raise NotImplementedError("only inside compiled kernels")


unpackers = ByLayout(unpack)
dots = ByLayout(dot)


@unpackers.register(Q8_0)
def unpack_q8_0(layout, block, panel):
    store(panel, load(u8x32, block + 2))
    store_f32(panel + D, load_f16(block))
    store_f32(panel + C, np.float32(0))


@unpackers.register(Q4_0)
def unpack_q4_0(layout, block, panel):
    d = load_f16(block)
    store(panel, halves_of_bytes(load(u8x16, block + 2)))
    store_f32(panel + D, d)
    store_f32(panel + C, d * np.float32(-8))


@inner
def five_bit_codes(high, low):
    """Bit i of the word `high` above nibble i of the 16 bytes at `low`."""
    return halves_of_bytes(load(u8x16, low)) | (byte_bits(high) << np.uint8(4))


@unpackers.register(Q5_0)
def unpack_q5_0(layout, block, panel):
    d = load_f16(block)
    store(panel, five_bit_codes(load_u32(block + 2), block + 6))
    store_f32(panel + D, d)
    store_f32(panel + C, d * np.float32(-16))


@unpackers.register(Q5_1)
def unpack_q5_1(layout, block, panel):
    store(panel, five_bit_codes(load_u32(block + 4), block + 8))
    store_f32(panel + D, load_f16(block))
    store_f32(panel + C, load_f16(block + 2))


@dots.register(Q4_0)
@dots.register(Q5_0)
@dots.register(Q5_1)
def unsigned(layout, panel, activations):
    return dot_small(load(u8x32, panel), load(i8x32, activations))


@dots.register(Q8_0)
def signed(layout, panel, activations):
    return dot_signed(bitcast(i8x32, load(u8x32, panel)), load(i8x32, activations))


@inner
def one_token(layout, panel, blocks, a, out):
    """One row times one token: its activation record is at a."""
    scales = a + BLOCK * blocks
    sums = scales + 4 * blocks
    total, offset = zero(f32x8), np.float32(0)
    for b in range(blocks):
        p = panel + PANEL * b
        factor = load_f32(p + D) * load_f32(scales + 4 * b)
        total = fma(convert(f32x8, dot(layout, p, a + BLOCK * b)), factor, total)
        offset = fma(load_f32(p + C), load_f32(sums + 4 * b), offset)
    store_f32(out, lane_sum(total) + offset)


@inner
def multiply(
    layout,
    block_bytes,
    w,
    row_bytes,
    rows,
    columns,
    a,
    a_bytes,
    i,
    out,
    o_bytes,
    o,
    tokens,
    s,
):
    """The loop nest of all four formats; arguments as in `dot`, `s` the scratch."""
    blocks = columns // BLOCK
    row_panel = PANEL * blocks
    group = 1 if tokens == 1 else ROWS
    for start in range(0, rows, group):
        count = min(group, rows - start)
        for r in range(count):
            for b in range(blocks):
                block = w + (start + r) * row_bytes + b * block_bytes
                unpack(layout, block, s + r * row_panel + b * PANEL)
        for t in range(tokens):
            a0, o0 = row_at(a, a_bytes, i, t), row_at(out, o_bytes, o, t)
            for r in range(count):
                one_token(layout, s + r * row_panel, blocks, a0, o0 + 4 * (start + r))


def scratch_bytes(columns: int) -> int:
    """Scratch that `multiply` needs for rows of so many columns."""
    return ROWS * PANEL * (columns // BLOCK)


@row_kernel
def multiply_q8_0(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q8_0, 34, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_q4_0(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q4_0, 18, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_q5_0(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q5_0, 22, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_q5_1(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q5_1, 24, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
