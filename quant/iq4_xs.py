"""IQ4_XS: 256 weights in 136 bytes, 4.25 bits per weight.

Eight sub-blocks of 32 weights with the codes of IQ4_NL; sub-block j has a 6-bit scale:

    w[32 j + i] = (d * (scale[j] - 32)) * VALUES[q[32 j + i]]        scale 0..63

    byte   0        2             4                 8                                     136
           | d  f16 | scales_h u2 | scales_l 4 bytes | qs  128 bytes                       |

    scales_l   byte j: lower 4 bits of scale[2 j] low nibble, of scale[2 j + 1] high
    scales_h   bits 2 j and 2 j + 1: upper 2 bits of scale[j]
    qs         eight sub-blocks j of 16 bytes; byte i of j: q[32 j + i] low nibble,
               q[32 j + 16 + i] high
"""

import numpy as np

from quant.format import Array, Format, encode
from quant.iq4_nl import look_up

LENGTH = 256
BLOCK = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])
assert BLOCK.itemsize == 136

_UPPER_SHIFT = np.arange(0, 16, 2, dtype=np.uint16)


def unpack_scales(blocks: Array) -> Array:
    """(..., n) blocks -> (..., n, 8) i8 in -32..31: scale[j] - 32."""
    low = np.stack([blocks["scales_l"] & 15, blocks["scales_l"] >> 4], axis=-1)
    high = (blocks["scales_h"][..., None] >> _UPPER_SHIFT & 3).astype(np.uint8)
    scale: Array = low.reshape(*blocks.shape, 8) | (high << 4)
    return scale.astype(np.int8) - np.int8(32)


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 256 n) f32."""
    slope: Array = blocks["d"].astype(np.float32)[..., None] * unpack_scales(blocks)
    values = look_up(blocks["qs"].reshape(*blocks.shape, 8, 16))
    return (slope[..., None] * values).reshape(*blocks.shape[:-1], -1)


def quantize(values: Array) -> Array:
    """(..., 256 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.iq4_xs, values, BLOCK, LENGTH)


IQ4_XS = Format("IQ4_XS", 23, BLOCK, LENGTH, dequantize, quantize)
