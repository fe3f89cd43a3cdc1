"""IQ4_NL: 32 weights in 18 bytes, 4.5 bits per weight.

w[i] = d * VALUES[q[i]]      q 4-bit, 0..15, not evenly spaced; d may be negative

byte   0        2                                           18
       | d  f16 | byte i: q[i] low nibble, q[16+i] high     |
"""

import numpy as np

from quant.format import Array, Format, encode

LENGTH = 32
BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the sixteen codes stand for: closer together near zero, where most weights are."""

_VALUES = np.array(VALUES, np.int8)


def look_up(qs: Array) -> Array:
    """(..., 16) u8 -> (..., 32) i8, what the low and then the high nibbles stand for."""
    values: Array = _VALUES[np.concatenate([qs & 15, qs >> 4], axis=-1)]
    return values


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 32 n) f32."""
    weights: Array = blocks["d"].astype(np.float32)[..., None] * look_up(blocks["qs"])
    return weights.reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 32 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.iq4_nl, values, BLOCK, LENGTH)


IQ4_NL = Format("IQ4_NL", 20, BLOCK, LENGTH, dequantize, quantize)
