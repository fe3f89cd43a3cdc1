"""Q4_K: 256 weights in 144 bytes, 4.5 bits per weight.

Eight sub-blocks of 32 weights; sub-block j has a 6-bit scale and a 6-bit minimum:

    w[32 j + i] = (d * scale[j]) * q[32 j + i] - dmin * minimum[j]        q 4-bit, 0..15

    byte   0        2           4                      16                                     144
           | d  f16 | dmin  f16 | scales  12 bytes     | qs  128 bytes                         |

    qs      four groups g of 32 bytes; byte i of g: q[64 g + i] low nibble, q[64 g + 32 + i] high
    scales  byte j < 4        scale[j]   | upper 2 bits of scale[4 + j]   << 6
            byte 4 + j        minimum[j] | upper 2 bits of minimum[4 + j] << 6
            byte 8 + j        lower 4 bits of scale[4 + j] | lower 4 bits of minimum[4 + j] << 4
"""

import numpy as np

from quant.format import Array, Format, encode

LENGTH = 256
BLOCK = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
assert BLOCK.itemsize == 144


def unpack_scales(packed: Array) -> tuple[Array, Array]:
    """(..., 12) u8 -> scale (..., 8) u8 and minimum (..., 8) u8, each 0..63."""
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minimum = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scale, minimum


def unpack_nibbles(qs: Array) -> Array:
    """(..., 128) u8 -> (..., 8, 32) u8 in 0..15: row j is sub-block j."""
    groups = qs.reshape(*qs.shape[:-1], 4, 1, 32)
    both = np.concatenate([groups & 15, groups >> 4], axis=-2)
    return both.reshape(*qs.shape[:-1], 8, 32)


def apply_scales(blocks: Array, codes: Array) -> Array:
    """(..., n) blocks with d, dmin, scales; codes (..., n, 8, 32) -> (..., 256 n) f32."""
    scale, minimum = unpack_scales(blocks["scales"])
    slope = blocks["d"].astype(np.float32)[..., None] * scale
    offset = blocks["dmin"].astype(np.float32)[..., None] * minimum
    return (slope[..., None] * codes - offset[..., None]).reshape(*blocks.shape[:-1], -1)


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 256 n) f32."""
    return apply_scales(blocks, unpack_nibbles(blocks["qs"]))


def quantize(values: Array) -> Array:
    """(..., 256 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.q4_k, values, BLOCK, LENGTH)


Q4_K = Format("Q4_K", 12, BLOCK, LENGTH, dequantize, quantize)
