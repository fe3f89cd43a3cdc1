"""Q5_K: 256 weights in 176 bytes, 5.5 bits per weight.

Q4_K with one more bit per weight, kept apart:

    w[32 j + i] = (d * scale[j]) * q[32 j + i] - dmin * minimum[j]        q 5-bit, 0..31

    byte   0        2           4                  16              48                  176
           | d  f16 | dmin  f16 | scales  12 bytes | qh  32 bytes  | qs  128 bytes     |

    scales, qs   as in Q4_K; qs holds the lower 4 bits
    qh           bit j of byte i: bit 4 of q[32 j + i]
"""

import numpy as np

from quant.format import Array, Format, encode
from quant.q4_k import apply_scales, unpack_nibbles

LENGTH = 256
BLOCK = np.dtype(
    [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
)
assert BLOCK.itemsize == 176

_SUB_BLOCK = np.arange(8, dtype=np.uint8)[:, None]


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 256 n) f32."""
    high = blocks["qh"][..., None, :] >> _SUB_BLOCK & 1
    return apply_scales(blocks, unpack_nibbles(blocks["qs"]) | (high << 4))


def quantize(values: Array) -> Array:
    """(..., 256 n) f32 -> (..., n) blocks."""
    from quant import encoders  # here, so that reading a file does not load Numba

    return encode(encoders.q5_k, values, BLOCK, LENGTH)


Q5_K = Format("Q5_K", 13, BLOCK, LENGTH, dequantize, quantize)
