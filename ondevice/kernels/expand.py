"""One row of blocks -> float32: embedding rows, a weight at a time.

Bit for bit what quant's `dequantize` gives; formulas and layouts are in quant/<format>.py.
"""

import numpy as np

from ondevice.kernels.calls import function_call
from ondevice.kernels.dot.tile import ByLayout, Layout
from ondevice.kernels.layout import TOKENS, argument, word
from ondevice.kernels.operation import expand_kernel, operation
from ondevice.kernels.simd import (
    convert,
    f32x16,
    load,
    load_bf16,
    load_f16,
    load_f32,
    load_i8,
    load_i32,
    load_u8,
    load_u32,
    splat,
    store,
    store_f32,
    u8x16,
)
from quant import iq4_nl, mxfp4
from quant.jit import inner

Q4_1, Q2_K, Q3_K = Layout("Q4_1"), Layout("Q2_K"), Layout("Q3_K")
IQ4_NL, IQ4_XS, MXFP4 = Layout("IQ4_NL"), Layout("IQ4_XS"), Layout("MXFP4")
IQ4_VALUES = np.array(iq4_nl.VALUES, np.float32)
MXFP4_VALUES = np.array(mxfp4.VALUES, np.float32)

call_expand = function_call(3)


def expand(layout, row, columns, out):
    """A row of `layout`; for those formats whose products begin with it."""
    raise NotImplementedError("only inside compiled kernels")


expansions = ByLayout(expand)


@operation
def embed(op, step, t, scratch):
    """x := the embedding of a token: (table, row bytes, columns, expand kernel, x, bytes)."""
    table, row_bytes, columns = argument(op, 0), argument(op, 1), argument(op, 2)
    kernel, x, x_bytes = argument(op, 3), argument(op, 4), argument(op, 5)
    row = table + load_i32(word(step, TOKENS) + 4 * t) * row_bytes
    call_expand(kernel, (row, columns, x + t * x_bytes))


@expand_kernel
def expand_f32(row, columns, out):
    for c in range(columns):
        store_f32(out + 4 * c, load_f32(row + 4 * c))


@expand_kernel
def expand_f16(row, columns, out):
    for c in range(columns):
        store_f32(out + 4 * c, load_f16(row + 2 * c))


@expand_kernel
def expand_bf16(row, columns, out):
    for c in range(columns):
        store_f32(out + 4 * c, load_bf16(row + 2 * c))


@expand_kernel
def expand_q8_0(row, columns, out):
    for c in range(columns):
        block = row + 34 * (c // 32)
        store_f32(out + 4 * c, np.float32(load_i8(block + 2 + c % 32)) * load_f16(block))


@inner
def nibble(codes, i):
    """Code i of 32: the low nibbles of 16 bytes, then the high ones."""
    return (load_u8(codes + i % 16) >> (4 * (i // 16))) & 15


@expand_kernel
def expand_q4_0(row, columns, out):
    for c in range(columns):
        block = row + 18 * (c // 32)
        code = nibble(block + 2, c % 32) - 8
        store_f32(out + 4 * c, np.float32(code) * load_f16(block))


@expand_kernel
def expand_q5_0(row, columns, out):
    for c in range(columns):
        block, i = row + 22 * (c // 32), c % 32
        high = (np.int64(load_u32(block + 2)) >> i) & 1
        code = (nibble(block + 6, i) | high << 4) - 16
        store_f32(out + 4 * c, np.float32(code) * load_f16(block))


@expand_kernel
def expand_q5_1(row, columns, out):
    for c in range(columns):
        block, i = row + 24 * (c // 32), c % 32
        high = (np.int64(load_u32(block + 4)) >> i) & 1
        product = np.float32(nibble(block + 8, i) | high << 4) * load_f16(block)
        store_f32(out + 4 * c, product + load_f16(block + 2))


@inner
def six_bit_pair(scales, j):
    """(scale, min) of sub-block j from the 12 packed bytes of Q4_K and Q5_K."""
    if j < 4:
        return load_u8(scales + j) & 63, load_u8(scales + j + 4) & 63
    packed = load_u8(scales + j + 4)
    scale = (packed & 15) | (load_u8(scales + j - 4) >> 6) << 4
    return scale, (packed >> 4) | (load_u8(scales + j) >> 6) << 4


@expand_kernel
def expand_q4_k(row, columns, out):
    for c in range(columns):
        block, i = row + 144 * (c // 256), c % 256
        j = i // 32
        scale, low = six_bit_pair(block + 4, j)
        code = (load_u8(block + 16 + 32 * (j // 2) + i % 32) >> (4 * (j % 2))) & 15
        product = load_f16(block) * np.float32(scale) * np.float32(code)
        store_f32(out + 4 * c, product - load_f16(block + 2) * np.float32(low))


@expand_kernel
def expand_q5_k(row, columns, out):
    for c in range(columns):
        block, i = row + 176 * (c // 256), c % 256
        j = i // 32
        scale, low = six_bit_pair(block + 4, j)
        code = (load_u8(block + 48 + 32 * (j // 2) + i % 32) >> (4 * (j % 2))) & 15
        code |= ((load_u8(block + 16 + i % 32) >> j) & 1) << 4
        product = load_f16(block) * np.float32(scale) * np.float32(code)
        store_f32(out + 4 * c, product - load_f16(block + 2) * np.float32(low))


@expand_kernel
def expand_q6_k(row, columns, out):
    for c in range(columns):
        block, i = row + 210 * (c // 256), c % 256
        half, quarter, lane = i // 128, i % 128 // 32, i % 32
        low = load_u8(block + 64 * half + 32 * (quarter % 2) + lane) >> (4 * (quarter // 2)) & 15
        high = load_u8(block + 128 + 32 * half + lane) >> (2 * quarter) & 3
        scale = load_f16(block + 208) * np.float32(load_i8(block + 192 + i // 16))
        store_f32(out + 4 * c, scale * np.float32((low | high << 4) - 32))


@inner
def times(codes, scale):
    """The codes of a u8x16 times a float32, as f32x16."""
    return convert(f32x16, codes) * scale


@expansions.register(Q4_1)
def row_q4_1(layout, row, columns, out):
    for b in range(columns // 32):
        block, at = row + 20 * b, out + 128 * b
        d, m = load_f16(block), splat(f32x16, load_f16(block + 2))
        packed = load(u8x16, block + 4)
        store(at, times(packed & np.uint8(15), d) + m)
        store(at + 64, times(packed >> np.uint8(4), d) + m)


@expansions.register(Q2_K)
def row_q2_k(layout, row, columns, out):
    for b in range(columns // 256):
        block, at = row + 84 * b, out + 1024 * b
        d, dmin = load_f16(block + 80), load_f16(block + 82)
        for j in range(16):
            scales = load_u8(block + j)
            codes = sub_block_pairs(block + 16, j)
            low = splat(f32x16, dmin * np.float32(scales >> 4))
            store(at + 64 * j, times(codes, d * np.float32(scales & 15)) - low)


@expansions.register(Q3_K)
def row_q3_k(layout, row, columns, out):
    for b in range(columns // 256):
        block, at = row + 110 * b, out + 1024 * b
        d = load_f16(block + 108)
        for j in range(16):
            low = (load_u8(block + 96 + j % 8) >> (4 * (j // 8))) & 15
            high = (load_u8(block + 104 + j % 4) >> (2 * (j // 4))) & 3
            scale = d * np.float32((low | high << 4) - 32)
            third = (load(u8x16, block + 16 * (j % 2)) >> np.uint8(j // 2)) & np.uint8(1)
            codes = sub_block_pairs(block + 32, j) | (third << np.uint8(2))
            store(at + 64 * j, (convert(f32x16, codes) - splat(f32x16, np.float32(4))) * scale)


@inner
def sub_block_pairs(codes, j):
    """The lower two bits of sub-block j's 16 codes, from the 64 bytes of Q2_K and Q3_K."""
    packed = load(u8x16, codes + 32 * (j // 8) + 16 * (j % 2))
    return (packed >> np.uint8(2 * (j % 8 // 2))) & np.uint8(3)


@inner
def look_up(values, codes, scale, out):
    """32 weights: what their nibbles stand for, times the scale."""
    for i in range(16):
        byte = load_u8(codes + i)
        store_f32(out + 4 * i, values[byte & 15] * scale)
        store_f32(out + 4 * i + 64, values[byte >> 4] * scale)


@expansions.register(IQ4_NL)
def row_iq4_nl(layout, row, columns, out):
    for b in range(columns // 32):
        block = row + 18 * b
        look_up(IQ4_VALUES, block + 2, load_f16(block), out + 128 * b)


@expansions.register(MXFP4)
def row_mxfp4(layout, row, columns, out):
    for b in range(columns // 32):
        block = row + 17 * b
        e = load_u8(block)
        # 2 ** (e - 128): below e = 2 a subnormal
        scale = np.uint32(0x200000 << e if e < 2 else (e - 1) << 23).view(np.float32)
        look_up(MXFP4_VALUES, block + 1, scale, out + 128 * b)


@expansions.register(IQ4_XS)
def row_iq4_xs(layout, row, columns, out):
    for b in range(columns // 256):
        block, at = row + 136 * b, out + 1024 * b
        for j in range(8):
            low = (load_u8(block + 4 + j // 2) >> (4 * (j % 2))) & 15
            high = (load_u8(block + 2 + j // 4) >> (2 * (j % 4))) & 3
            scale = load_f16(block) * np.float32((low | high << 4) - 32)
            look_up(IQ4_VALUES, block + 8 + 16 * j, scale, at + 128 * j)


@expand_kernel
def expand_q4_1(row, columns, out):
    expand(Q4_1, row, columns, out)


@expand_kernel
def expand_q2_k(row, columns, out):
    expand(Q2_K, row, columns, out)


@expand_kernel
def expand_q3_k(row, columns, out):
    expand(Q3_K, row, columns, out)


@expand_kernel
def expand_iq4_nl(row, columns, out):
    expand(IQ4_NL, row, columns, out)


@expand_kernel
def expand_iq4_xs(row, columns, out):
    expand(IQ4_XS, row, columns, out)


@expand_kernel
def expand_mxfp4(row, columns, out):
    expand(MXFP4, row, columns, out)
