"""Q4_1: 32 weights in 20 bytes, 5 bits per weight. Read only.

w[i] = d * q[i] + m        q 4-bit, 0..15; m is any f16

byte   0        2        4                                           20
       | d  f16 | m  f16 | byte i: q[i] low nibble, q[16+i] high     |
"""

import numpy as np

from quant.format import Array, Format

LENGTH = 32
BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 20


def dequantize(blocks: Array) -> Array:
    """(..., n) blocks -> (..., 32 n) f32."""
    d = blocks["d"].astype(np.float32)[..., None]
    m = blocks["m"].astype(np.float32)[..., None]
    qs = blocks["qs"]
    weights: Array = d * np.concatenate([qs & 15, qs >> 4], axis=-1) + m
    return weights.reshape(*blocks.shape[:-1], -1)


Q4_1 = Format("Q4_1", 3, BLOCK, LENGTH, dequantize, None)
