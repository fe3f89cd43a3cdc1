"""Q6_K: 256 weights in 210 bytes, 6.5625 bits per weight.

Sixteen sub-blocks of 16 weights; sub-block j has a signed 8-bit scale:

    w[16 j + i] = (d * scale[j]) * (q[16 j + i] - 32)        q 6-bit, 0..63

    byte   0               128           192               208      210
           | ql  128 bytes | qh 64 bytes | scale  16 int8  | d  f16 |

    ql   two halves h of 64 bytes; byte i of half h: lower 4 bits of q[128 h + i] in the low
         nibble, of q[128 h + 64 + i] in the high
    qh   two halves h of 32 bytes; bits 2 k and 2 k + 1 of byte i: upper 2 bits of
         q[128 h + 32 k + i]
"""

import numpy as np

from quant.format import Array, Format, encode

LENGTH = 256
BLOCK = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scale", "i1", 16), ("d", "<f2")])
assert BLOCK.itemsize == 210

_QUARTER_SHIFT = np.array([[0], [2], [4], [6]], np.uint8)


def unpack(blocks: Array) -> Array:
    """(..., n) blocks -> signed codes (..., n, 16, 16) i8 in -32..31: row j is sub-block j."""
    low = blocks["ql"].reshape(*blocks.shape, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*blocks.shape, 2, 4, 32)
    high = blocks["qh"].reshape(*blocks.shape, 2, 1, 32) >> _QUARTER_SHIFT & 3
    codes: Array = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return codes.reshape(*blocks.shape, 16, 16)


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 256 n) f32."""
    scale: Array = blocks["d"].astype(np.float32)[..., None] * blocks["scale"]
    return (scale[..., None] * unpack(blocks)).reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 256 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.q6_k, values, BLOCK, LENGTH)


Q6_K = Format("Q6_K", 14, BLOCK, LENGTH, dequantize, quantize)
