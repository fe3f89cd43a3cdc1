"""Q3_K: 256 weights in 110 bytes, 3.4375 bits per weight. Read only.

Sixteen sub-blocks of 16 weights; sub-block j has a 6-bit scale:

    w[16 j + i] = (d * (scale[j] - 32)) * (q[16 j + i] - 4)        q 3-bit, 0..7; scale 0..63

    byte   0               32              96                108      110
           | qh  32 bytes  | qs  64 bytes  | scales 12 bytes | d  f16 |

    qs       two halves h of 32 bytes; bits 2 k and 2 k + 1 of byte i: lower 2 bits of
             q[128 h + 32 k + i]
    qh       bit j of byte i: bit 2 of q[32 j + i]
    scales   byte j < 8: lower 4 bits of scale[j] low nibble, of scale[8 + j] high
             byte 8 + j: bits 2 k and 2 k + 1 are the upper 2 bits of scale[4 k + j]
"""

import numpy as np

from quant.format import Array, Format
from quant.q2_k import unpack_pairs

LENGTH = 256
BLOCK = np.dtype([("qh", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
assert BLOCK.itemsize == 110

_EIGHTH = np.arange(8, dtype=np.uint8)[:, None]
_QUARTER_SHIFT = np.array([[0], [2], [4], [6]], np.uint8)


def unpack_scales(packed: Array) -> Array:
    """(..., 12) u8 -> (..., 16) i8 in -32..31: scale[j] - 32."""
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    high = packed[..., None, 8:] >> _QUARTER_SHIFT & 3
    scale: Array = low | (high.reshape(low.shape) << 4)
    return scale.astype(np.int8) - np.int8(32)


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 256 n) f32."""
    high = blocks["qh"][..., None, :] >> _EIGHTH & 1
    codes = unpack_pairs(blocks["qs"]) | (high.reshape(*blocks.shape, 16, 16) << 2)
    slope = blocks["d"].astype(np.float32)[..., None] * unpack_scales(blocks["scales"])
    weights: Array = slope[..., None] * (codes.astype(np.int8) - np.int8(4))
    return weights.reshape(*blocks.shape[:-1], -1)


Q3_K = Format("Q3_K", 11, BLOCK, LENGTH, dequantize, None)
