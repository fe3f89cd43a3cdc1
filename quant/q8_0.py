"""Q8_0: 32 weights in 34 bytes, 8.5 bits per weight.

w[i] = d * q[i]            q signed, -127..127 when written by us

byte   0        2                                  34
       | d  f16 | q[0] q[1] ...       q[31]  int8  |
"""

import numpy as np

from quant.format import Array, Format, encode

LENGTH = 32
BLOCK = np.dtype([("d", "<f2"), ("q", "i1", 32)])
assert BLOCK.itemsize == 34


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 32 n) f32."""
    d = blocks["d"].astype(np.float32)[..., None]
    weights: Array = d * blocks["q"]
    return weights.reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 32 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.q8_0, values, BLOCK, LENGTH)


Q8_0 = Format("Q8_0", 8, BLOCK, LENGTH, dequantize, quantize)
