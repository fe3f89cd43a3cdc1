"""What the formats of 256 weights share: where in a token's record its numbers are, panels' ends.

After its int8 codes a record (kernels/activation.py) has the scales of its superblocks, f32, then
their sums of 16 codes, then those of 32, int16.
"""

from typing import Any

import numpy as np

from ondevice.kernels.dot.tile import D
from ondevice.kernels.shuffles import byte_shuffle, half_in_each
from ondevice.kernels.simd import bitcast, f32x16, i16x32, load
from ondevice.kernels.sums import add_scaled
from ondevice.kernels.tiles import load_floats, store_floats
from quant.jit import inner

SUPERBLOCK = 256
d_of_header = half_in_each(0)
"""A quad of headers that begin with d, a half -> d."""


def moved(count: int) -> Any:
    """An intrinsic: bytes of quarters moved down by `count`."""
    return byte_shuffle([*range(count, 16), *[None] * count])


@inner
def words(x):
    return bitcast(i16x32, x)


@inner
def signed_words(x):
    return bitcast(i16x32, x) >> np.int16(8)


@inner
def scales_at(columns):
    """Where in a record the scales are; in the same way below."""
    return columns


@inner
def sums_of_16_at(columns):
    return columns + columns // SUPERBLOCK * 4


@inner
def sums_of_32_at(columns):
    return columns + columns // SUPERBLOCK * 36


@inner
def add_panel(tile, sums, panel, rows, columns, start, totals):
    """The tokens' totals + the scaled sums of a panel."""
    total = load_floats(tile, totals)
    d = load(f32x16, panel + D)
    store_floats(totals, add_scaled(total, sums, d, rows, scales_at(columns) + start // 64))
