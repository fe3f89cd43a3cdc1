"""Q4_0: 32 weights in 18 bytes, 4.5 bits per weight.

w[i] = d * (q[i] - 8)      q 4-bit, 0..15; d may be negative

byte   0        2                                           18
       | d  f16 | byte i: q[i] low nibble, q[16+i] high     |
"""

import numpy as np

from quant.format import Array, Format, encode

LENGTH = 32
BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 32 n) f32."""
    d = blocks["d"].astype(np.float32)[..., None]
    qs = blocks["qs"]
    q = np.concatenate([qs & 15, qs >> 4], axis=-1).astype(np.int8) - np.int8(8)
    weights: Array = d * q
    return weights.reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 32 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.q4_0, values, BLOCK, LENGTH)


Q4_0 = Format("Q4_0", 2, BLOCK, LENGTH, dequantize, quantize)
