"""Q2_K: 256 weights in 84 bytes, 2.625 bits per weight. Read only.

Sixteen sub-blocks of 16 weights; sub-block j has a 4-bit scale and a 4-bit minimum:

    w[16 j + i] = (d * scale[j]) * q[16 j + i] - dmin * minimum[j]        q 2-bit, 0..3

    byte   0                 16              80       82         84
           | scales 16 bytes | qs  64 bytes  | d  f16 | dmin f16 |

    scales   byte j: scale[j] low nibble, minimum[j] high
    qs       two halves h of 32 bytes; bits 2 k and 2 k + 1 of byte i: q[128 h + 32 k + i]
"""

import numpy as np

from quant.format import Array, Format

LENGTH = 256
BLOCK = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
assert BLOCK.itemsize == 84

_QUARTER_SHIFT = np.array([[0], [2], [4], [6]], np.uint8)


def unpack_pairs(qs: Array) -> Array:
    """(..., 64) u8 -> (..., 16, 16) u8 in 0..3: row j is sub-block j."""
    pairs = qs.reshape(*qs.shape[:-1], 2, 1, 32) >> _QUARTER_SHIFT & 3
    return pairs.reshape(*qs.shape[:-1], 16, 16)


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 256 n) f32."""
    slope = blocks["d"].astype(np.float32)[..., None] * (blocks["scales"] & 15)
    offset = blocks["dmin"].astype(np.float32)[..., None] * (blocks["scales"] >> 4)
    weights: Array = slope[..., None] * unpack_pairs(blocks["qs"]) - offset[..., None]
    return weights.reshape(*blocks.shape[:-1], -1)


Q2_K = Format("Q2_K", 10, BLOCK, LENGTH, dequantize, None)
