"""Q5_1: 32 weights in 24 bytes, 6 bits per weight.

w[i] = d * q[i] + m        q 5-bit, 0..31; m is any f16

byte   0        2        4                        8                                          24
       | d  f16 | m  f16 | qh: bit i is q[i] >> 4 | byte i: q[i] low 4 bits low, q[16+i] high |
"""

import numpy as np

from quant.format import Array, Format, encode
from quant.q5_0 import unpack

LENGTH = 32
BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
assert BLOCK.itemsize == 24


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 32 n) f32."""
    d = blocks["d"].astype(np.float32)[..., None]
    m = blocks["m"].astype(np.float32)[..., None]
    weights: Array = d * unpack(blocks) + m
    return weights.reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 32 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.q5_1, values, BLOCK, LENGTH)


Q5_1 = Format("Q5_1", 7, BLOCK, LENGTH, dequantize, quantize)
