"""Q5_0: 32 weights in 22 bytes, 5.5 bits per weight.

w[i] = d * (q[i] - 16)     q 5-bit, 0..31; d may be negative

byte   0        2                        6                                                 22
       | d  f16 | qh: bit i is q[i] >> 4 | byte i: q[i] low 4 bits low, q[16+i] in the high |
"""

import numpy as np

from quant.format import Array, Format, encode

LENGTH = 32
BLOCK = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
assert BLOCK.itemsize == 22


def unpack(blocks: Array) -> Array:
    """(..., n) blocks with fields qh and qs -> codes (..., n, 32) u8 in 0..31."""
    qs = blocks["qs"]
    high = np.unpackbits(blocks["qh"], axis=-1, bitorder="little")
    codes: Array = np.concatenate([qs & 15, qs >> 4], axis=-1) | (high << 4)
    return codes


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 32 n) f32."""
    d = blocks["d"].astype(np.float32)[..., None]
    q = unpack(blocks).astype(np.int8) - np.int8(16)
    weights: Array = d * q
    return weights.reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 32 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.q5_0, values, BLOCK, LENGTH)


Q5_0 = Format("Q5_0", 6, BLOCK, LENGTH, dequantize, quantize)
