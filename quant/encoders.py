"""The encoders: blocks of weights -> bytes, one kernel per format. Layouts: the format's own file.

Each takes values (blocks, length) f32 and fills out (blocks, bytes per block) u8. The scales come
from `quant.search`, except Q8_0's, which is the plain d = max |x| / 127: a search takes 10 % off an
error that is already a tenth of the other formats', at a seventh of the speed.
"""

import functools
from collections.abc import Iterable

import numpy as np
from numba.core import types

from quant.format import Array, Format
from quant.jit import Compiled, inner
from quant.search import (
    LARGEST,
    LIMIT,
    TABLE,
    ZERO,
    Float,
    best_line,
    best_slope,
    fit_lines,
    fit_power,
    fit_slopes,
    half_bits,
    half_scale,
    half_value,
    load,
    round_codes,
    round_power,
    round_values,
)

_VALUES = types.Array(types.float32, 2, "C", readonly=True)
encoder = functools.partial(Compiled, signature=types.void(_VALUES, types.uint8[:, ::1]))
"""A function of values (blocks, length) f32, which it does not change, and out (blocks, bytes)."""


@inner
def put_half(out: Array, at: int, bits: int) -> None:
    """Store f16 bits at out[at : at + 2], little-endian."""
    out[at] = bits & 0xFF
    out[at + 1] = bits >> 8


@inner
def put_nibbles(codes: Array, start: int, half: int, out: Array, at: int) -> None:
    """out[at + i]: low 4 bits of codes[start + i], and above them those of [start + half + i]."""
    for i in range(half):
        out[at + i] = (codes[start + i] & 15) | ((codes[start + half + i] & 15) << 4)


@inner
def put_fifth_bits(codes: Array, out: Array, at: int) -> None:
    """Bit i % 8 of out[at + i // 8]: bit 4 of codes[i], for 32 codes."""
    for i in range(4):
        bits = 0
        for j in range(8):
            bits |= (codes[8 * i + j] >> 4) << j
        out[at + i] = bits


@encoder
def q8_0(values: Array, out: Array) -> None:
    """values (blocks, 32) f32 -> out (blocks, 34) u8."""
    x = np.empty(32, np.float32)
    codes = np.empty(32, np.uint8)
    high = np.float32(127)
    for row in range(len(values)):
        d = half_scale(load(values[row], x, LIMIT) / high)
        put_half(out[row], 0, d)
        round_codes(x, 0, 32, half_value(d), ZERO, -high, high, codes)
        for i in range(32):
            out[row, 2 + i] = codes[i] - 127


@inner
def encode_slope(values: Array, low: Float, x: Array, table: Array, codes: Array) -> int:
    """Codes 0..-2 low - 1 of 32 weights d (code + low); returns the f16 bits of d."""
    high = -low - np.float32(1)
    load(values, x, LIMIT)
    d: int = half_scale(best_slope(x, 0, 32, low, high, False, table))
    round_codes(x, 0, 32, half_value(d), ZERO, low, high, codes)
    return d


@encoder
def q4_0(values: Array, out: Array) -> None:
    """values (blocks, 32) f32 -> out (blocks, 18) u8."""
    x = np.empty(32, np.float32)
    table = np.empty(TABLE, np.float32)
    codes = np.empty(32, np.uint8)
    for row in range(len(values)):
        put_half(out[row], 0, encode_slope(values[row], np.float32(-8), x, table, codes))
        put_nibbles(codes, 0, 16, out[row], 2)


@encoder
def q5_0(values: Array, out: Array) -> None:
    """values (blocks, 32) f32 -> out (blocks, 22) u8."""
    x = np.empty(32, np.float32)
    table = np.empty(TABLE, np.float32)
    codes = np.empty(32, np.uint8)
    for row in range(len(values)):
        put_half(out[row], 0, encode_slope(values[row], np.float32(-16), x, table, codes))
        put_fifth_bits(codes, out[row], 2)
        put_nibbles(codes, 0, 16, out[row], 6)


@encoder
def iq4_nl(values: Array, out: Array) -> None:
    """values (blocks, 32) f32 -> out (blocks, 18) u8."""
    x = np.empty(32, np.float32)
    table = np.empty(TABLE, np.float32)
    codes = np.empty(32, np.uint8)
    for row in range(len(values)):
        largest = load(values[row], x, LIMIT)
        d = half_scale(best_slope(x, 0, 32, np.float32(-127), np.float32(113), True, table))
        if largest < np.float32(2.0**-21):
            d = 0  # no code stands for zero: with the smallest scale, 2^-24, the error is larger
        round_values(x, 0, 32, half_value(d), codes)
        put_half(out[row], 0, d)
        put_nibbles(codes, 0, 16, out[row], 2)


@encoder
def mxfp4(values: Array, out: Array) -> None:
    """values (blocks, 32) f32 -> out (blocks, 17) u8."""
    x = np.empty(32, np.float32)
    codes = np.empty(32, np.uint8)
    for row in range(len(values)):
        e = fit_power(x, load(values[row], x, LARGEST))
        round_power(x, e, codes)
        out[row, 0] = e
        put_nibbles(codes, 0, 16, out[row], 1)


@encoder
def q5_1(values: Array, out: Array) -> None:
    """values (blocks, 32) f32 -> out (blocks, 24) u8."""
    x = np.empty(32, np.float32)
    table = np.empty(TABLE, np.float32)
    codes = np.empty(32, np.uint8)
    high = np.float32(31)
    for row in range(len(values)):
        load(values[row], x, LIMIT)
        slope, offset, _ = best_line(x, 0, 32, high, False, table)
        d = half_scale(slope)
        m = half_bits(offset)
        round_codes(x, 0, 32, half_value(d), half_value(m), ZERO, high, codes)
        put_half(out[row], 0, d)
        put_half(out[row], 2, m)
        put_fifth_bits(codes, out[row], 4)
        put_nibbles(codes, 0, 16, out[row], 8)


@inner
def encode_lines(
    values: Array,
    high: Float,
    x: Array,
    table: Array,
    scale: Array,
    minimum: Array,
    codes: Array,
    out: Array,
) -> None:
    """Codes 0..high of 256 weights; stores d, dmin and the packed scales at out[0:16]."""
    load(values, x, LIMIT)
    d_bits, dmin_bits = fit_lines(x, high, table, scale, minimum)
    d = half_value(d_bits)
    dmin = half_value(dmin_bits)
    for j in range(8):
        round_codes(x, 32 * j, 32, d * scale[j], -(dmin * minimum[j]), ZERO, high, codes)
    put_half(out, 0, d_bits)
    put_half(out, 2, dmin_bits)
    for j in range(4):
        s = int(scale[4 + j])
        m = int(minimum[4 + j])
        out[4 + j] = int(scale[j]) | (s >> 4) << 6
        out[8 + j] = int(minimum[j]) | (m >> 4) << 6
        out[12 + j] = (s & 15) | (m & 15) << 4


@encoder
def q4_k(values: Array, out: Array) -> None:
    """values (blocks, 256) f32 -> out (blocks, 144) u8."""
    x = np.empty(256, np.float32)
    table = np.empty(TABLE, np.float32)
    scale = np.empty(8, np.float32)
    minimum = np.empty(8, np.float32)
    codes = np.empty(256, np.uint8)
    for row in range(len(values)):
        encode_lines(values[row], np.float32(15), x, table, scale, minimum, codes, out[row])
        for group in range(4):
            put_nibbles(codes, 64 * group, 32, out[row], 16 + 32 * group)


@encoder
def q5_k(values: Array, out: Array) -> None:
    """values (blocks, 256) f32 -> out (blocks, 176) u8."""
    x = np.empty(256, np.float32)
    table = np.empty(TABLE, np.float32)
    scale = np.empty(8, np.float32)
    minimum = np.empty(8, np.float32)
    codes = np.empty(256, np.uint8)
    for row in range(len(values)):
        encode_lines(values[row], np.float32(31), x, table, scale, minimum, codes, out[row])
        for i in range(32):
            bits = 0
            for j in range(8):
                bits |= (codes[32 * j + i] >> 4) << j
            out[row, 16 + i] = bits
        for group in range(4):
            put_nibbles(codes, 64 * group, 32, out[row], 48 + 32 * group)


@encoder
def q6_k(values: Array, out: Array) -> None:
    """values (blocks, 256) f32 -> out (blocks, 210) u8."""
    x = np.empty(256, np.float32)
    table = np.empty(TABLE, np.float32)
    scale = np.empty(16, np.float32)
    codes = np.empty(256, np.uint8)
    low = np.float32(-32)
    high = np.float32(31)
    for row in range(len(values)):
        load(values[row], x, LIMIT)
        d_bits = fit_slopes(x, low, high, False, np.float32(-128), table, scale)
        d = half_value(d_bits)
        for j in range(16):
            round_codes(x, 16 * j, 16, d * scale[j], ZERO, low, high, codes)
            out[row, 192 + j] = int(scale[j]) & 0xFF
        for half in range(2):
            put_nibbles(codes, 128 * half, 64, out[row], 64 * half)
            for i in range(32):
                bits = 0
                for k in range(4):
                    bits |= (codes[128 * half + 32 * k + i] >> 4) << (2 * k)
                out[row, 128 + 32 * half + i] = bits
        put_half(out[row], 208, d_bits)


@encoder
def iq4_xs(values: Array, out: Array) -> None:
    """values (blocks, 256) f32 -> out (blocks, 136) u8."""
    x = np.empty(256, np.float32)
    table = np.empty(TABLE, np.float32)
    scale = np.empty(8, np.float32)
    scales = np.empty(8, np.uint8)
    codes = np.empty(256, np.uint8)
    for row in range(len(values)):
        load(values[row], x, LIMIT)
        lowest = np.float32(-32)
        d_bits = fit_slopes(x, np.float32(-127), np.float32(113), True, lowest, table, scale)
        d = half_value(d_bits)
        put_half(out[row], 0, d_bits)
        upper = 0
        for j in range(8):
            round_values(x, 32 * j, 32, d * scale[j], codes)
            scales[j] = int(scale[j]) + 32
            upper |= (int(scales[j]) >> 4) << (2 * j)
            put_nibbles(codes, 32 * j, 16, out[row], 8 + 16 * j)
        put_half(out[row], 2, upper)
        for j in range(4):
            out[row, 4 + j] = (scales[2 * j] & 15) | (scales[2 * j + 1] & 15) << 4


def encoders_of(formats: Iterable[Format]) -> list[Compiled]:
    """The encoders of these formats, of those that are not plain NumPy."""
    named = {format.name.lower(): globals().get(format.name.lower()) for format in formats}
    return [found for found in named.values() if isinstance(found, Compiled)]
