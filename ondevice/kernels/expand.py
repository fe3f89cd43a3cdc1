"""One row of blocks -> float32: embedding rows, a weight at a time.

Bit for bit what quant's `dequantize` gives; formulas and layouts are in quant/<format>.py.
"""

import numpy as np

from ondevice.kernels.layout import TOKENS, argument, word
from ondevice.kernels.operation import expand_kernel, operation
from ondevice.kernels.simd import (
    function_call,
    load_bf16,
    load_f16,
    load_f32,
    load_i8,
    load_i32,
    load_u8,
    load_u32,
    store_f32,
)
from quant.jit import inner

call_expand = function_call(3)


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
