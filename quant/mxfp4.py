"""MXFP4: 32 weights in 17 bytes, 4.25 bits per weight.

The 4-bit floats (sign, 2 exponent bits, 1 fraction bit) and the power-of-two scale of OCP
Microscaling 1.0. VALUES holds those floats doubled, so that they are integers, and the scale is
halved instead:

    w[i] = 2^(e - 128) * VALUES[q[i]]        e 8-bit, 0..255; q 4-bit, 0..15

byte   0        1                                           17
       | e  u8  | byte i: q[i] low nibble, q[16+i] high     |

OCP reserves e = 255 for NaN; here, as in ggml, it is one more power. Code 8, minus zero, is zero.
"""

import numpy as np

from quant.format import Array, Format, encode

LENGTH = 32
BLOCK = np.dtype([("e", "u1"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 17

VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_VALUES = np.array(VALUES, np.int8)


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 32 n) f32."""
    scale = np.ldexp(np.float32(1), blocks["e"].astype(np.int32) - 128)[..., None]
    qs = blocks["qs"]
    codes = np.concatenate([qs & 15, qs >> 4], axis=-1)
    with np.errstate(over="ignore"):  # from 2^126 on the largest codes are infinite
        weights: Array = scale * _VALUES[codes]
    return weights.reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 32 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.mxfp4, values, BLOCK, LENGTH)


MXFP4 = Format("MXFP4", 39, BLOCK, LENGTH, dequantize, quantize)
