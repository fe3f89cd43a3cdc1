"""One row of blocks -> float32: embedding rows, a weight at a time.

Bit for bit what quant's `dequantize` gives; formulas and layouts are in quant/<format>.py.
"""

import numpy as np

from ondevice.kernels.dot.tile import ByLayout, Layout
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
from quant import iq4_nl, mxfp4
from quant.jit import inner

F32, F16, BF16, Q8_0 = (Layout(name) for name in ("F32", "F16", "BF16", "Q8_0"))
Q4_0, Q4_1, Q5_0, Q5_1 = (Layout(name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"))
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = (Layout(f"Q{bits}_K") for bits in range(2, 7))
IQ4_NL, IQ4_XS, MXFP4 = (Layout(name) for name in ("IQ4_NL", "IQ4_XS", "MXFP4"))

IQ4_VALUES = np.array(iq4_nl.VALUES, np.float32)
MXFP4_VALUES = np.array(mxfp4.VALUES, np.float32)

call_expand = function_call(3)


@operation
def embed(op, step, t, scratch):
    """x := the embedding of a token: (table, row bytes, columns, expand kernel, x, bytes)."""
    table, row_bytes, columns = argument(op, 0), argument(op, 1), argument(op, 2)
    kernel, x, x_bytes = argument(op, 3), argument(op, 4), argument(op, 5)
    row = table + load_i32(word(step, TOKENS) + 4 * t) * row_bytes
    call_expand(kernel, (row, columns, x + t * x_bytes))


def weight(layout, row, c):
    """Weight c of a row of blocks of `layout`, as a float32."""
    raise NotImplementedError("only inside compiled kernels")


weights = ByLayout(weight)


@inner
def expand(layout, row, columns, out):
    """All of a row's weights."""
    for c in range(columns):
        store_f32(out + 4 * c, weight(layout, row, c))


@inner
def nibble(codes, i):
    """Code i of 32: the low nibbles of 16 bytes, then the high ones."""
    return (load_u8(codes + i % 16) >> (4 * (i // 16))) & 15


@inner
def pair(codes, i):
    """Two bits i of 256: those of 32 bytes, two by two from the lowest, and then of 32 more."""
    return (load_u8(codes + 32 * (i // 128) + i % 32) >> (2 * (i % 128 // 32))) & 3


@weights.register(F32)
def weight_f32(layout, row, c):
    return load_f32(row + 4 * c)


@weights.register(F16)
def weight_f16(layout, row, c):
    return load_f16(row + 2 * c)


@weights.register(BF16)
def weight_bf16(layout, row, c):
    return load_bf16(row + 2 * c)


@weights.register(Q8_0)
def weight_q8_0(layout, row, c):
    block = row + 34 * (c // 32)
    return np.float32(load_i8(block + 2 + c % 32)) * load_f16(block)


@weights.register(Q4_0)
def weight_q4_0(layout, row, c):
    block = row + 18 * (c // 32)
    return np.float32(nibble(block + 2, c % 32) - 8) * load_f16(block)


@weights.register(Q4_1)
def weight_q4_1(layout, row, c):
    block = row + 20 * (c // 32)
    return np.float32(nibble(block + 4, c % 32)) * load_f16(block) + load_f16(block + 2)


@weights.register(Q5_0)
def weight_q5_0(layout, row, c):
    block, i = row + 22 * (c // 32), c % 32
    high = (np.int64(load_u32(block + 2)) >> i) & 1
    return np.float32((nibble(block + 6, i) | high << 4) - 16) * load_f16(block)


@weights.register(Q5_1)
def weight_q5_1(layout, row, c):
    block, i = row + 24 * (c // 32), c % 32
    high = (np.int64(load_u32(block + 4)) >> i) & 1
    product = np.float32(nibble(block + 8, i) | high << 4) * load_f16(block)
    return product + load_f16(block + 2)


@weights.register(IQ4_NL)
def weight_iq4_nl(layout, row, c):
    block = row + 18 * (c // 32)
    return IQ4_VALUES[nibble(block + 2, c % 32)] * load_f16(block)


@weights.register(MXFP4)
def weight_mxfp4(layout, row, c):
    block = row + 17 * (c // 32)
    e = load_u8(block)
    # 2 ** (e - 128): below e = 2 a subnormal
    scale = np.uint32(0x200000 << e if e < 2 else (e - 1) << 23).view(np.float32)
    return MXFP4_VALUES[nibble(block + 1, c % 32)] * scale


@weights.register(Q2_K)
def weight_q2_k(layout, row, c):
    block, i = row + 84 * (c // 256), c % 256
    packed = load_u8(block + i // 16)
    product = load_f16(block + 80) * np.float32(packed & 15) * np.float32(pair(block + 16, i))
    return product - load_f16(block + 82) * np.float32(packed >> 4)


@weights.register(Q3_K)
def weight_q3_k(layout, row, c):
    block, i = row + 110 * (c // 256), c % 256
    j = i // 16
    low = (load_u8(block + 96 + j % 8) >> (4 * (j // 8))) & 15
    high = (load_u8(block + 104 + j % 4) >> (2 * (j // 4))) & 3
    code = pair(block + 32, i) | ((load_u8(block + i % 32) >> (i // 32)) & 1) << 2
    return load_f16(block + 108) * np.float32((low | high << 4) - 32) * np.float32(code - 4)


@inner
def six_bit_pair(scales, j):
    """(scale, min) of sub-block j from the 12 packed bytes of Q4_K and Q5_K."""
    if j < 4:
        return load_u8(scales + j) & 63, load_u8(scales + j + 4) & 63
    packed = load_u8(scales + j + 4)
    scale = (packed & 15) | (load_u8(scales + j - 4) >> 6) << 4
    return scale, (packed >> 4) | (load_u8(scales + j) >> 6) << 4


@weights.register(Q4_K)
def weight_q4_k(layout, row, c):
    block, i = row + 144 * (c // 256), c % 256
    j = i // 32
    scale, low = six_bit_pair(block + 4, j)
    code = (load_u8(block + 16 + 32 * (j // 2) + i % 32) >> (4 * (j % 2))) & 15
    product = load_f16(block) * np.float32(scale) * np.float32(code)
    return product - load_f16(block + 2) * np.float32(low)


@weights.register(Q5_K)
def weight_q5_k(layout, row, c):
    block, i = row + 176 * (c // 256), c % 256
    j = i // 32
    scale, low = six_bit_pair(block + 4, j)
    code = (load_u8(block + 48 + 32 * (j // 2) + i % 32) >> (4 * (j % 2))) & 15
    code |= ((load_u8(block + 16 + i % 32) >> j) & 1) << 4
    product = load_f16(block) * np.float32(scale) * np.float32(code)
    return product - load_f16(block + 2) * np.float32(low)


@weights.register(Q6_K)
def weight_q6_k(layout, row, c):
    block, i = row + 210 * (c // 256), c % 256
    half, quarter, lane = i // 128, i % 128 // 32, i % 32
    low = load_u8(block + 64 * half + 32 * (quarter % 2) + lane) >> (4 * (quarter // 2)) & 15
    scale = load_f16(block + 208) * np.float32(load_i8(block + 192 + i // 16))
    return scale * np.float32((low | pair(block + 128, i) << 4) - 32)


@weights.register(IQ4_XS)
def weight_iq4_xs(layout, row, c):
    block, i = row + 136 * (c // 256), c % 256
    j = i // 32
    low = (load_u8(block + 4 + j // 2) >> (4 * (j % 2))) & 15
    high = (load_u8(block + 2 + j // 4) >> (2 * (j % 4))) & 3
    scale = load_f16(block) * np.float32((low | high << 4) - 32)
    return scale * IQ4_VALUES[nibble(block + 8 + 16 * j, i % 32)]


@expand_kernel
def expand_f32(row, columns, out):
    expand(F32, row, columns, out)


@expand_kernel
def expand_f16(row, columns, out):
    expand(F16, row, columns, out)


@expand_kernel
def expand_bf16(row, columns, out):
    expand(BF16, row, columns, out)


@expand_kernel
def expand_q8_0(row, columns, out):
    expand(Q8_0, row, columns, out)


@expand_kernel
def expand_q4_0(row, columns, out):
    expand(Q4_0, row, columns, out)


@expand_kernel
def expand_q4_1(row, columns, out):
    expand(Q4_1, row, columns, out)


@expand_kernel
def expand_q5_0(row, columns, out):
    expand(Q5_0, row, columns, out)


@expand_kernel
def expand_q5_1(row, columns, out):
    expand(Q5_1, row, columns, out)


@expand_kernel
def expand_iq4_nl(row, columns, out):
    expand(IQ4_NL, row, columns, out)


@expand_kernel
def expand_mxfp4(row, columns, out):
    expand(MXFP4, row, columns, out)


@expand_kernel
def expand_q2_k(row, columns, out):
    expand(Q2_K, row, columns, out)


@expand_kernel
def expand_q3_k(row, columns, out):
    expand(Q3_K, row, columns, out)


@expand_kernel
def expand_q4_k(row, columns, out):
    expand(Q4_K, row, columns, out)


@expand_kernel
def expand_q5_k(row, columns, out):
    expand(Q5_K, row, columns, out)


@expand_kernel
def expand_q6_k(row, columns, out):
    expand(Q6_K, row, columns, out)


@expand_kernel
def expand_iq4_xs(row, columns, out):
    expand(IQ4_XS, row, columns, out)
