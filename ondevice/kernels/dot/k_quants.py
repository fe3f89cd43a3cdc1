"""Products for the 256-weight formats Q4_K, Q5_K, Q6_K with int8 activations scaled per 256.

A superblock is first unpacked to a *panel* of 576 bytes

      0  codes   4 x 64 u8       in the order of the weights
    256  scales  4 x 32 i16      one lane for two codes
    512  mins    16 i16          one for 16 codes
    544  d, 548  dmin            f32

and then, with activation codes a, activation scale y and sums of 16 activation codes s,

    w . a = sum over superblocks of  y d (scales . codes . a)  -  y dmin (mins . s)

Both integer sums are exact. They stay spread over lanes and are added up in float lanes that are
folded once per row, in a fixed tree. Q6_K's offset of 32 is a min: dmin = 32 d, mins = scales.
Block layouts: quant/q4_k.py, q5_k.py, q6_k.py.
"""

import numpy as np

from ondevice.kernels.dot.tile import ROWS, ByLayout, Layout, row_at
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.simd import (
    bit_field,
    bitcast,
    convert,
    dot_scaled,
    dot_words,
    f32x8,
    f32x16,
    fma,
    four_words,
    i8x16,
    i8x64,
    i16x16,
    i16x32,
    i32x16,
    lane_shuffle,
    lane_sum,
    load,
    load_f16,
    load_f32,
    load_u32,
    nibbles,
    prefetch,
    store,
    store_f32,
    u8x16,
    u8x32,
    u8x64,
    zero,
)
from quant.jit import inner

SUPERBLOCK = 256
PANEL = 576
SCALES, MINS, D, DMIN = 256, 512, 544, 548
AHEAD = 4096  # bytes between what is unpacked and what is asked of memory
Q4_K, Q5_K, Q6_K = Layout("Q4_K"), Layout("Q5_K"), Layout("Q6_K")

_Q5_HIGH = [bit_field((2 * j, 2 * j + 1), 1) for j in range(4)]
q5_high_0, q5_high_1, q5_high_2, q5_high_3 = _Q5_HIGH
q6_high_low, q6_high_high = bit_field((0, 2), 3), bit_field((4, 6), 3)

_PAIR = [lane_shuffle([2 * j] * 16 + [2 * j + 1] * 16) for j in range(4)]
pair_0, pair_1, pair_2, pair_3 = _PAIR
_QUAD = [lane_shuffle([4 * j + lane // 8 for lane in range(32)]) for j in range(4)]
quad_0, quad_1, quad_2, quad_3 = _QUAD
mins_twice = lane_shuffle([8 + lane // 2 for lane in range(16)])


def unpack(layout, block, panel):
    """One superblock of `layout` at `block` -> its panel."""
    raise NotImplementedError("only inside compiled kernels")


unpackers = ByLayout(unpack)


@inner
def unpack_scales(block, panel):
    """The 6-bit scales and mins of Q4_K and Q5_K, and d and dmin."""
    u0, u1, u2 = load_u32(block + 4), load_u32(block + 8), load_u32(block + 12)
    low, high = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)
    six = np.uint32(0x3F3F3F3F)
    two, four = np.uint32(2), np.uint32(4)
    packed = four_words(
        u0 & six,
        (u2 & low) | ((u0 >> two) & high),
        u1 & six,
        ((u2 >> four) & low) | ((u1 >> two) & high),
    )
    values = convert(i16x16, bitcast(u8x16, packed))
    store(panel + SCALES, pair_0(values))
    store(panel + SCALES + 64, pair_1(values))
    store(panel + SCALES + 128, pair_2(values))
    store(panel + SCALES + 192, pair_3(values))
    store(panel + MINS, mins_twice(values))
    store_f32(panel + D, load_f16(block))
    store_f32(panel + DMIN, load_f16(block + 2))


@unpackers.register(Q4_K)
def unpack_q4_k(layout, block, panel):
    prefetch(block + AHEAD)
    prefetch(block + AHEAD + 64)
    unpack_scales(block, panel)
    for j in range(4):
        store(panel + 64 * j, nibbles(load(u8x32, block + 16 + 32 * j)))


@unpackers.register(Q5_K)
def unpack_q5_k(layout, block, panel):
    prefetch(block + AHEAD)
    prefetch(block + AHEAD + 64)
    unpack_scales(block, panel)
    high = load(u8x32, block + 16)
    four = np.uint8(4)
    low = block + 48
    store(panel, nibbles(load(u8x32, low)) | (q5_high_0(high) << four))
    store(panel + 64, nibbles(load(u8x32, low + 32)) | (q5_high_1(high) << four))
    store(panel + 128, nibbles(load(u8x32, low + 64)) | (q5_high_2(high) << four))
    store(panel + 192, nibbles(load(u8x32, low + 96)) | (q5_high_3(high) << four))


@unpackers.register(Q6_K)
def unpack_q6_k(layout, block, panel):
    prefetch(block + AHEAD)
    prefetch(block + AHEAD + 64)
    prefetch(block + AHEAD + 128)
    four, fifteen = np.uint8(4), np.uint8(15)
    for half in range(2):
        low = load(u8x64, block + 64 * half)
        high = load(u8x32, block + 128 + 32 * half)
        target = panel + 128 * half
        store(target, (low & fifteen) | (q6_high_low(high) << four))
        store(target + 64, (low >> four) | (q6_high_high(high) << four))
    values = convert(i16x16, load(i8x16, block + 192))
    store(panel + SCALES, quad_0(values))
    store(panel + SCALES + 64, quad_1(values))
    store(panel + SCALES + 128, quad_2(values))
    store(panel + SCALES + 192, quad_3(values))
    store(panel + MINS, values)
    d = load_f16(block + 208)
    store_f32(panel + D, d)
    store_f32(panel + DMIN, d * np.float32(32))


@inner
def add_scaled(total, panel, activations, y):
    """total + y d (scales . codes . activations), spread over lanes."""
    dots = zero(i32x16)
    for j in range(4):
        codes = load(u8x64, panel + 64 * j)
        scales = load(i16x32, panel + SCALES + 64 * j)
        dots = dot_scaled(dots, codes, load(i8x64, activations + 64 * j), scales)
    return fma(convert(f32x16, dots), load_f32(panel + D) * y, total)


@inner
def add_mins(total, panel, sums, y):
    """total + y dmin (mins . sums), spread over lanes."""
    dots = dot_words(load(i16x16, panel + MINS), load(i16x16, sums))
    return fma(convert(f32x8, dots), load_f32(panel + DMIN) * y, total)


@inner
def one_token(panel, blocks, a, out):
    """One row times one token: its activation record is at a."""
    scales = a + SUPERBLOCK * blocks
    sums = scales + 4 * blocks
    total, mins = zero(f32x16), zero(f32x8)
    for b in range(blocks):
        p = panel + PANEL * b
        y = load_f32(scales + 4 * b)
        total = add_scaled(total, p, a + SUPERBLOCK * b, y)
        mins = add_mins(mins, p, sums + 32 * b, y)
    store_f32(out, lane_sum(total) - lane_sum(mins))


@inner
def four_tokens(panel, blocks, a0, a1, a2, a3, out0, out1, out2, out3):
    """One row times four tokens: `one_token` four times over, each panel load used four times."""
    scales = SUPERBLOCK * blocks
    sums = scales + 4 * blocks
    total0, total1, total2, total3 = zero(f32x16), zero(f32x16), zero(f32x16), zero(f32x16)
    mins0, mins1, mins2, mins3 = zero(f32x8), zero(f32x8), zero(f32x8), zero(f32x8)
    for b in range(blocks):
        p = panel + PANEL * b
        at, y_at, s_at = SUPERBLOCK * b, scales + 4 * b, sums + 32 * b
        y0, y1 = load_f32(a0 + y_at), load_f32(a1 + y_at)
        y2, y3 = load_f32(a2 + y_at), load_f32(a3 + y_at)
        dots0, dots1, dots2, dots3 = zero(i32x16), zero(i32x16), zero(i32x16), zero(i32x16)
        for j in range(4):
            codes = load(u8x64, p + 64 * j)
            factors = load(i16x32, p + SCALES + 64 * j)
            place = at + 64 * j
            dots0 = dot_scaled(dots0, codes, load(i8x64, a0 + place), factors)
            dots1 = dot_scaled(dots1, codes, load(i8x64, a1 + place), factors)
            dots2 = dot_scaled(dots2, codes, load(i8x64, a2 + place), factors)
            dots3 = dot_scaled(dots3, codes, load(i8x64, a3 + place), factors)
        d = load_f32(p + D)
        total0 = fma(convert(f32x16, dots0), d * y0, total0)
        total1 = fma(convert(f32x16, dots1), d * y1, total1)
        total2 = fma(convert(f32x16, dots2), d * y2, total2)
        total3 = fma(convert(f32x16, dots3), d * y3, total3)
        mins0 = add_mins(mins0, p, a0 + s_at, y0)
        mins1 = add_mins(mins1, p, a1 + s_at, y1)
        mins2 = add_mins(mins2, p, a2 + s_at, y2)
        mins3 = add_mins(mins3, p, a3 + s_at, y3)
    store_f32(out0, lane_sum(total0) - lane_sum(mins0))
    store_f32(out1, lane_sum(total1) - lane_sum(mins1))
    store_f32(out2, lane_sum(total2) - lane_sum(mins2))
    store_f32(out3, lane_sum(total3) - lane_sum(mins3))


@inner
def multiply(
    layout, block_bytes, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s
):
    """The loop nest of all three formats; arguments as in `dot`, `s` the scratch."""
    blocks = columns // SUPERBLOCK
    row_panel = PANEL * blocks
    group = 1 if tokens == 1 else ROWS
    for start in range(0, rows, group):
        count = min(group, rows - start)
        for r in range(count):
            for b in range(blocks):
                block = w + (start + r) * row_bytes + b * block_bytes
                unpack(layout, block, s + r * row_panel + b * PANEL)
        t = 0
        while t + 4 <= tokens:
            a0, a1 = row_at(a, a_bytes, i, t), row_at(a, a_bytes, i, t + 1)
            a2, a3 = row_at(a, a_bytes, i, t + 2), row_at(a, a_bytes, i, t + 3)
            o0, o1 = row_at(out, o_bytes, o, t), row_at(out, o_bytes, o, t + 1)
            o2, o3 = row_at(out, o_bytes, o, t + 2), row_at(out, o_bytes, o, t + 3)
            for r in range(count):
                at = 4 * (start + r)
                panel = s + r * row_panel
                four_tokens(panel, blocks, a0, a1, a2, a3, o0 + at, o1 + at, o2 + at, o3 + at)
            t += 4
        while t < tokens:
            a0, o0 = row_at(a, a_bytes, i, t), row_at(out, o_bytes, o, t)
            for r in range(count):
                one_token(s + r * row_panel, blocks, a0, o0 + 4 * (start + r))
            t += 1


def scratch_bytes(columns: int) -> int:
    """Scratch that `multiply` needs for rows of so many columns."""
    return ROWS * PANEL * (columns // SUPERBLOCK)


@row_kernel
def multiply_q4_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q4_K, 144, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_q5_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q5_K, 176, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_q6_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q6_K, 210, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
