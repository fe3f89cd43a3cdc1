"""Scales with the least squared error, for the encoders of `quant.encoders`.

Rounding to a given scale is easy; the work is to find the scale. Lines q -> a q + b are tried
many at a time, one per lane: `assign` rounds every weight to each lane's nearest code q and sums
what the error depends on,

    sum (x - a q - b)^2 = sum x^2 - 2 a sum q x - 2 b sum x + a^2 sum q^2 + 2 a b sum q + n b^2

which also gives the best (a, b) for those codes in closed form. For IQ4_NL and IQ4_XS q is not a
code but what it stands for, one of sixteen uneven values (`assign_values`). Formats with one float
scale per block (Q4_0, Q5_0, Q5_1, IQ4_NL) take the best line. Formats with integer sub-block scales
(Q4_K, Q5_K, Q6_K, IQ4_XS) need three steps:

    1. the best line of every sub-block; the largest one fixes the block's float scale
    2. for every sub-block, the integer scale (and minimum) near it that leaves the least error
    3. the float scale again, as the least-squares solution for the codes chosen

In all of them the last word is `round_codes`: codes are rounded to the line as it is stored. So
an f16 scale that is subnormal, or that stops at 65504, costs precision and nothing else.

No importance weights: every weight of a block counts the same. Sums run in a fixed order and
without fused operations, so the bytes do not depend on the width of the vector unit.

Limits: input must be finite. Weights count as at most +-2^28, beyond the reach of any format with
an f16 scale, so that squares stay finite; where all weights of a (sub-)block are below 2^-26, less
than half of the smallest f16, they become zeros. MXFP4's scales are not f16, and `fit_power` has no
such limits.
"""

import math
from typing import Any

import numpy as np

from quant import iq4_nl, mxfp4
from quant.format import Array
from quant.jit import inner

Float = np.floating[Any] | float

LANES = 32  # enough for LLVM to keep the loop over lanes, and so to vectorise it
# Rows of the lane table: the line a q + b as a, b and 1 / a, the sums over q, and the integers
# that a and b are made of.
SLOPE, OFFSET, INVERSE, Q, QQ, QX, SCALE, MINIMUM = range(0, 8 * LANES, LANES)
TABLE = 8 * LANES

LIMIT = np.float32(2.0**28)
LARGEST = np.finfo(np.float32).max
TINY = np.float32(2.0**-26)
ZERO = np.float32(0)
ONE = np.float32(1)

# Which lines are tried, around the plain one that spans the block exactly; tuned for the least
# error on Gaussian and Student-t weights. For lines through zero: codes beyond the extreme
# weight, as a share of all codes.
_SPAN = np.linspace(-0.1, 0.1, LANES // 2, dtype=np.float32)
# For lines with an offset, in codes: how many more than the plain line the block spans, and how
# far above the smallest weight the line starts.
_LINE_SPAN = np.repeat(np.linspace(-1.8, 1.2, 8, dtype=np.float32), 4)
_LINE_START = np.tile(np.linspace(-0.6, 0.6, 4, dtype=np.float32), 8)
# Integer scales and minima, relative to the nearest ones.
_NEAR = np.arange(-LANES // 2, LANES // 2, dtype=np.float32)
_NEAR_SCALE = np.repeat(np.arange(-3, 5, dtype=np.float32), 4)
_NEAR_MINIMUM = np.tile(np.arange(-1, 3, dtype=np.float32), 8)

# What uneven codes stand for, and the middles between neighbours.
_VALUES = np.array(iq4_nl.VALUES, np.float32)
_STEPS = np.diff(_VALUES)
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / 2
_FLOATS = np.array(mxfp4.VALUES[:8], np.float64)
_FLOAT_MIDDLES = (_FLOATS[1:] + _FLOATS[:-1]) / 2


@inner
def half_bits(value: Float) -> int:
    """The bits of the f16 nearest to an f32, ties to even; beyond +-65504, of +-65504."""
    sign = 0x8000 if value < ZERO else 0
    size = np.float32(np.minimum(np.abs(value), np.float32(65504)))
    if size < np.float32(2.0**-14):  # subnormal: a multiple of 2^-24
        return sign | int(np.rint(size * np.float32(2.0**24)))
    bits = int(size.view(np.uint32))
    bits += 0xFFF + (bits >> 13 & 1)
    return sign | (bits - (112 << 23) >> 13)


@inner
def half_value(bits: int) -> Float:
    """The f32 value of a finite f16."""
    rest = bits & 0x7FFF
    if rest < 0x400:
        size = np.float32(rest) * np.float32(2.0**-24)
    else:
        size = np.uint32((rest << 13) + (112 << 23)).view(np.float32)
    return -size if bits & 0x8000 else size


@inner
def half_scale(value: Float) -> int:
    """The bits of an f16 near an f32: not zero, nor so much smaller that it clips the extremes."""
    bits: int = half_bits(value)
    if bits & 0x7FFF < 0x400 and abs(half_value(bits)) < np.abs(value) * np.float32(1 - 2.0**-8):
        bits += 1
    return bits


@inner
def inverse(value: Float) -> Float:
    """1 / value, and 0 for 0."""
    return ONE / value if value != ZERO else ZERO


@inner
def load(values: Array, x: Array, limit: Float) -> Float:
    """Copy values to x, within +-limit; returns the largest magnitude."""
    largest = ZERO
    for i in range(x.size):
        x[i] = min(max(values[i], -limit), limit)
        largest = max(largest, abs(x[i]))
    return largest


@inner
def round_codes(
    x: Array, start: int, n: int, slope: Float, offset: Float, low: Float, high: Float, codes: Array
) -> None:
    """codes[start : start + n] = q - low, with q in low..high nearest to (x - offset) / slope."""
    factor = inverse(slope)
    for i in range(start, start + n):
        q = min(max(np.rint((x[i] - offset) * factor), low), high)
        codes[i] = np.uint8(np.int32(q - low))


@inner
def assign(x: Array, start: int, n: int, low: Float, high: Float, table: Array) -> None:
    """For x[start : start + n] and each lane's line: sums of q, q q, q x; q the nearest code."""
    for k in range(LANES):
        table[Q + k] = ZERO
        table[QQ + k] = ZERO
        table[QX + k] = ZERO
    for i in range(start, start + n):
        value = x[i]
        for k in range(LANES):
            q = np.rint((value - table[OFFSET + k]) * table[INVERSE + k])
            q = min(max(q, low), high)
            table[Q + k] += q
            table[QQ + k] += q * q
            table[QX + k] += q * value


@inner
def assign_values(x: Array, start: int, n: int, table: Array) -> None:
    """`assign` for lines through zero, and q the nearest of the uneven values."""
    for k in range(LANES):
        table[Q + k] = ZERO
        table[QQ + k] = ZERO
        table[QX + k] = ZERO
    for i in range(start, start + n):
        value = x[i]
        for k in range(LANES):
            scaled = value * table[INVERSE + k]
            q = _VALUES[0]
            for j in range(_STEPS.size):
                q += _STEPS[j] if scaled > _MIDDLES[j] else ZERO
            table[Q + k] += q
            table[QQ + k] += q * q
            table[QX + k] += q * value


@inner
def round_values(x: Array, start: int, n: int, slope: Float, codes: Array) -> None:
    """codes[start : start + n]: those of the uneven values nearest to x / slope."""
    factor = inverse(slope)
    for i in range(start, start + n):
        scaled = x[i] * factor
        code = ZERO
        for j in range(_MIDDLES.size):
            code += ONE if scaled > _MIDDLES[j] else ZERO
        codes[i] = np.uint8(np.int32(code))


@inner
def best_slope(
    x: Array, start: int, n: int, low: Float, high: Float, uneven: bool, table: Array
) -> Float:
    """The a of the line a q, low <= q <= high, nearest to x[start : start + n]; low < 0.

    With `uneven` only the uneven values count as q.
    """
    extreme = ZERO
    for i in range(start, start + n):
        if abs(x[i]) > abs(extreme):
            extreme = x[i]
    if abs(extreme) < TINY:
        return ZERO
    factor = ONE / extreme
    codes = high - low
    for k in range(LANES // 2):  # the extreme weight at the lowest code, or at the highest
        table[INVERSE + k] = (low - codes * _SPAN[k]) * factor
        table[INVERSE + LANES // 2 + k] = (high + codes * _SPAN[k]) * factor
    if uneven:
        assign_values(x, start, n, table)
    else:
        for k in range(LANES):
            table[OFFSET + k] = ZERO
        assign(x, start, n, low, high, table)
    gain = 0.0
    slope = 0.0
    for k in range(LANES):
        qq = np.float64(table[QQ + k])
        qx = np.float64(table[QX + k])
        if qx * qx > gain * qq:
            gain = qx * qx / qq
            slope = qx / qq
    return np.float32(slope)


@inner
def best_line(
    x: Array, start: int, n: int, high: Float, negative: bool, table: Array
) -> tuple[Float, Float, Float]:
    """The line a q + b, 0 <= q <= high, nearest to x[start : start + n].

    Returns a, b and the sum of x; `negative` asks for b <= 0.
    """
    lowest = x[start]
    highest = x[start]
    total = 0.0
    for i in range(start, start + n):
        lowest = min(lowest, x[i])
        highest = max(highest, x[i])
        total += float(x[i])
    if negative:
        lowest = min(lowest, ZERO)
        highest = max(highest, ZERO)
    width = highest - lowest
    for k in range(LANES):
        step = width / (high + _LINE_SPAN[k])
        table[INVERSE + k] = ONE / step if width >= TINY else ZERO
        table[OFFSET + k] = lowest + step * _LINE_START[k]
    assign(x, start, n, ZERO, high, table)
    gain = -math.inf
    slope = 0.0
    offset = 0.0
    for k in range(LANES):
        q = np.float64(table[Q + k])
        qq = np.float64(table[QQ + k])
        qx = np.float64(table[QX + k])
        spread = n * qq - q * q
        a = (n * qx - q * total) / spread if spread > 0.0 else np.float64(0)
        b = (total - a * q) / n
        if negative and b > 0.0:
            a = qx / qq if qq > 0.0 else np.float64(0)
            b = np.float64(0)
        g = 2.0 * (a * qx + b * total) - a * a * qq - 2.0 * a * b * q - n * b * b
        if g > gain:
            gain = g
            slope = a
            offset = b
    return np.float32(slope), np.float32(offset), total


@inner
def best_lane(n: int, total: Float, table: Array) -> int:
    """The lane whose line leaves the least error, after `assign` over n weights of that total."""
    least = math.inf
    best = 0
    for k in range(LANES):
        a = np.float64(table[SLOPE + k])
        b = np.float64(table[OFFSET + k])
        q = np.float64(table[Q + k])
        error = a * (a * np.float64(table[QQ + k]) - 2.0 * np.float64(table[QX + k]))
        error += b * (n * b - 2.0 * total + 2.0 * a * q)
        if error < least:
            least = error
            best = k
    return best


@inner
def fit_slopes(
    x: Array, low: Float, high: Float, uneven: bool, lowest: Float, table: Array, scale: Array
) -> int:
    """Q6_K's and IQ4_XS's scales: w = (d scale) q for sub-blocks of equal size; low <= q <= high.

    Fills scale, f32, with integers from `lowest` to -lowest - 1 and returns the f16 bits of d.
    """
    size = x.size // scale.size
    largest = ZERO
    for j in range(scale.size):
        scale[j] = best_slope(x, size * j, size, low, high, uneven, table)
        if abs(scale[j]) > abs(largest):
            largest = scale[j]
    d_bits: int = half_scale(largest / lowest)
    d = half_value(d_bits)
    ss = 0.0
    sx = 0.0
    for j in range(scale.size):
        if scale[j] == ZERO:
            continue
        nearest = np.rint(scale[j] * inverse(d))
        for k in range(LANES):
            s = min(max(nearest + _NEAR[k], lowest), -lowest - ONE)
            table[SCALE + k] = s
            table[SLOPE + k] = d * s
            table[INVERSE + k] = inverse(d * s)
            table[OFFSET + k] = ZERO
        if uneven:
            assign_values(x, size * j, size, table)
        else:
            assign(x, size * j, size, low, high, table)
        k = best_lane(size, 0.0, table)
        scale[j] = table[SCALE + k]
        best_s = np.float64(scale[j])
        ss += best_s * best_s * np.float64(table[QQ + k])
        sx += best_s * np.float64(table[QX + k])
    if ss > 0.0:
        d_bits = half_bits(np.float32(sx / ss))
    return d_bits


@inner
def fit_lines(x: Array, high: Float, table: Array, scale: Array, minimum: Array) -> tuple[int, int]:
    """Q4_K's and Q5_K's scales: w = (d scale) q - dmin minimum for 8 sub-blocks of 32.

    0 <= q <= high. Fills scale and minimum, (8,) f32, with integers 0..63 and returns the f16
    bits of d and dmin.
    """
    total = np.empty(8, np.float64)
    largest = ZERO
    deepest = ZERO
    for j in range(8):
        slope, offset, total[j] = best_line(x, 32 * j, 32, high, True, table)
        scale[j] = slope
        minimum[j] = -offset
        largest = max(largest, slope)
        deepest = max(deepest, -offset)
    d_bits = half_scale(largest / np.float32(63))
    dmin_bits = half_scale(deepest / np.float32(63))
    d = half_value(d_bits)
    dmin = half_value(dmin_bits)
    top = np.float32(63)
    ss = sm = mm = sx = mx = 0.0
    for j in range(8):
        nearest = np.rint(scale[j] * inverse(d))
        for k in range(LANES):
            s = min(max(nearest + _NEAR_SCALE[k], ZERO), top)
            # A steeper line must start lower to pass through the middle of the weights.
            start = minimum[j] + (d * s - scale[j]) * (high * np.float32(0.5))
            m = min(max(np.rint(start * inverse(dmin)) + _NEAR_MINIMUM[k], ZERO), top)
            table[SCALE + k] = s
            table[MINIMUM + k] = m
            table[SLOPE + k] = d * s
            table[INVERSE + k] = inverse(d * s)
            table[OFFSET + k] = -(dmin * m)
        assign(x, 32 * j, 32, ZERO, high, table)
        k = best_lane(32, total[j], table)
        scale[j] = table[SCALE + k]
        minimum[j] = table[MINIMUM + k]
        best_s = np.float64(scale[j])
        best_m = np.float64(minimum[j])
        ss += best_s * best_s * np.float64(table[QQ + k])
        sm += best_s * best_m * np.float64(table[Q + k])
        mm += best_m * best_m * 32.0
        sx += best_s * np.float64(table[QX + k])
        mx += best_m * total[j]
    spread = ss * mm - sm * sm
    if spread > 0.0:
        new_d_bits = half_bits(np.float32(max((mm * sx - sm * mx) / spread, 0.0)))
        new_dmin_bits = half_bits(np.float32(max((sm * sx - ss * mx) / spread, 0.0)))
        new_d = half_value(new_d_bits)
        new_dmin = half_value(new_dmin_bits)
        if _error(new_d, new_dmin, ss, sm, mm, sx, mx) < _error(d, dmin, ss, sm, mm, sx, mx):
            return new_d_bits, new_dmin_bits
    return d_bits, dmin_bits


@inner
def _error(d: Float, dmin: Float, ss: Float, sm: Float, mm: Float, sx: Float, mx: Float) -> Float:
    """Squared error of a block, but for sum x^2, when its codes, scales and minima are fixed."""
    return d * (d * ss - 2.0 * sx) + dmin * (dmin * mm + 2.0 * mx - 2.0 * d * sm)


@inner
def fit_power(x: Array, largest: Float) -> int:
    """MXFP4's scale: the e with which w = 2^(e - 128) q is nearest to x, 0 <= e <= 252.

    `largest` is the largest magnitude. Sums are in float64, to which no float32 is too large or too
    small. 252 is the last e with which rounding a finite weight cannot give an infinite one.
    """
    _, exponent = math.frexp(np.float64(largest))
    plain = exponent + 124  # the largest weight is 8 to 16 times 2^(plain - 128)
    least = math.inf
    best = 0
    for candidate in range(plain - 1, plain + 2):
        e = min(max(candidate, 0), 252)
        scale = math.ldexp(1.0, e - 128)
        error = 0.0
        for i in range(x.size):
            size = abs(np.float64(x[i]))
            difference = size - scale * _FLOATS[_float_code(size / scale)]
            error += difference * difference
        if error < least:
            least = error
            best = e
    return best


@inner
def round_power(x: Array, e: int, codes: Array) -> None:
    """codes: those of MXFP4's values nearest to x / 2^(e - 128)."""
    scale = math.ldexp(1.0, e - 128)
    for i in range(x.size):
        code = _float_code(abs(np.float64(x[i])) / scale)
        codes[i] = code | 8 if x[i] < ZERO and code > 0 else code


@inner
def _float_code(size: Float) -> int:
    """The code, 0..7, of the one of MXFP4's values nearest to size >= 0."""
    code = 0
    for j in range(_FLOAT_MIDDLES.size):
        code += size > _FLOAT_MIDDLES[j]
    return code
