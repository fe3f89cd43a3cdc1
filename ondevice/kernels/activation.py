"""Activations: int8 records for the block formats, and the elementwise functions.

A token's activations become an int8 record beside which a weight block can be multiplied:

    per 256   codes i8 x n | scale f32 x n/256 | sums of 16 codes i16 x n/16 | of 32, i16 x n/32
    per 32    codes i8 x n | scale f32 x n/32  | -8 * sum of 32 codes i32 x n/32

with scale = max |x| / 127 and code = x / scale rounded half to even, so codes lie in -127..127.
The first serves the formats of 256 weights, the second those of 32; its sums are what weights that
are stored with 8 added have too much, and a shift makes them fit other offsets.
"""

import numpy as np

from ondevice.kernels.arithmetic import (
    absolute,
    fma,
    lane_maximum,
    lane_sum,
    maximum,
    minimum,
    nearest,
    nearest_integers,
    power_of_two,
    scale_by_power,
)
from ondevice.kernels.layout import argument
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import (
    convert,
    f32x16,
    i8x16,
    i32x16,
    load,
    load_some,
    splat,
    store_bytes,
    store_f32,
    store_i16,
    store_i32,
    store_some,
    zero,
)
from quant.jit import inner

NONE, PER_256, PER_32 = 0, 1, 2
"""Kinds of activation record; NONE is plain float32."""


def odd_lines(nbytes: int) -> int:
    """`nbytes` rounded up to an odd number of cache lines: where rows are so far apart, the same
    columns of many tokens spread over all sets of the caches.
    """
    return (-(-nbytes // 64) | 1) * 64


def record_bytes(kind: int, columns: int) -> int:
    """Bytes of one token's record."""
    if kind == PER_256:
        used = columns + columns // 256 * 4 + columns // 16 * 2 + columns // 32 * 2
    elif kind == PER_32:
        used = columns + columns // 32 * 8
    else:
        used = columns * 4
    return odd_lines(used)


@inner
def quantize_group(x, size, codes):
    """Codes of `size` (a multiple of 16) floats; returns the scale, NaN if not all are finite."""
    greatest, spoilt = zero(f32x16), zero(f32x16)
    for i in range(0, size, 16):
        value = load(f32x16, x + 4 * i)
        greatest = maximum(greatest, absolute(value))
        spoilt = fma(value, np.float32(0), spoilt)  # not 0 where a value is not finite
    top = lane_maximum(greatest) + lane_sum(spoilt)
    inverse = np.float32(0)
    if top > np.float32(0):
        inverse = np.float32(127) / top
    if inverse > np.float32(3.0e38):  # a subnormal maximum: its inverse overflows
        inverse = np.float32(0)
    for i in range(0, size, 16):
        scaled = load(f32x16, x + 4 * i) * splat(f32x16, inverse)
        store_bytes(codes + i, nearest_integers(scaled))
    return top / np.float32(127)


@inner
def quantize_per_256(x, columns, start, end, record):
    """Columns start .. end of x (columns,) f32 at an address -> those of its record."""
    scales = record + columns
    sums = scales + columns // 256 * 4
    wide_sums = sums + columns // 16 * 2
    for b in range(start // 256, end // 256):
        codes = record + 256 * b
        store_f32(scales + 4 * b, quantize_group(x + 1024 * b, 256, codes))
        for i in range(8):
            first, second = code_sum(codes + 32 * i), code_sum(codes + 32 * i + 16)
            store_i16(sums + 2 * (16 * b + 2 * i), first)
            store_i16(sums + 2 * (16 * b + 2 * i + 1), second)
            store_i16(wide_sums + 2 * (8 * b + i), first + second)


@inner
def code_sum(codes):
    """Sum of 16 int8."""
    return np.int64(lane_sum(convert(i32x16, load(i8x16, codes))))


@inner
def quantize_per_32(x, columns, start, end, record):
    """Columns start .. end of x (columns,) f32 at an address -> those of its record."""
    scales = record + columns
    sums = scales + columns // 32 * 4
    for b in range(start // 32, end // 32):
        codes = record + 32 * b
        scale = quantize_group(x + 128 * b, 32, codes)
        store_f32(scales + 4 * b, scale)
        total = code_sum(codes) + code_sum(codes + 16)
        store_i32(sums + 4 * b, -8 * total)


@inner
def quantize_columns(x, columns, start, end, per_256, per_32):
    """Fill columns start .. end, whole blocks, of the records whose address is not 0."""
    if per_256 != 0:
        quantize_per_256(x, columns, start, end, per_256)
    if per_32 != 0:
        quantize_per_32(x, columns, start, end, per_32)


@inner
def quantize_row(x, columns, per_256, per_32):
    """Fill the records whose address is not 0."""
    quantize_columns(x, columns, 0, columns, per_256, per_32)


@inner
def exponential(x):
    """exp of an f32x16, to about one unit in the last place; saturates outside -87 .. 88.

    NaN stays NaN.
    """
    x = minimum(splat(f32x16, np.float32(88.0)), maximum(splat(f32x16, np.float32(-87.0)), x))
    n = nearest(x * np.float32(1.44269504))
    # ln 2 in two parts: n times the first is exact
    r = fma(n, np.float32(-0.693145751953125), x)
    r = fma(n, np.float32(-1.42860677e-6), r)
    p = splat(f32x16, np.float32(1.0 / 5040))
    p = fma(p, r, splat(f32x16, np.float32(1.0 / 720)))
    p = fma(p, r, splat(f32x16, np.float32(1.0 / 120)))
    p = fma(p, r, splat(f32x16, np.float32(1.0 / 24)))
    p = fma(p, r, splat(f32x16, np.float32(1.0 / 6)))
    p = fma(p, r, splat(f32x16, np.float32(0.5)))
    one = splat(f32x16, np.float32(1.0))
    p = fma(p, r, one)
    p = fma(p, r, one)
    # in two halves, for 2 ** 127 times p may need the exponent 128
    half = convert(i32x16, n) >> np.int32(1)
    return p * power_of_two(half) * power_of_two(convert(i32x16, n) - half)


@inner
def exponential_2(x):
    """2 ** x of an f32x16 of numbers below 1, to two units in the last place; about 2 ** -126 below
    that. NaN stays NaN."""
    x = maximum(splat(f32x16, np.float32(-126.0)), x)
    n = nearest(x)
    r = x - n
    # of all polynomials of this degree that are 1 at 0 the one that is nearest for -1/2 .. 1/2
    p = splat(f32x16, np.float32(1.3264727e-3))
    p = fma(p, r, splat(f32x16, np.float32(9.671513e-3)))
    p = fma(p, r, splat(f32x16, np.float32(5.5507336e-2)))
    p = fma(p, r, splat(f32x16, np.float32(2.4022242e-1)))
    p = fma(p, r, splat(f32x16, np.float32(6.93147e-1)))
    p = fma(p, r, splat(f32x16, np.float32(1.0)))
    return scale_by_power(p, n)


@inner
def sigmoid(x):
    """1 / (1 + exp(-x)) of an f32x16."""
    one = splat(f32x16, np.float32(1.0))
    return one / (one + exponential(zero(f32x16) - x))


@inner
def sigmoid_of(x):
    """Sigmoid of one float32, the same function as that of a vector."""
    return lane_maximum(sigmoid(splat(f32x16, x)))


@inner
def silu(x):
    """x sigmoid(x) of an f32x16."""
    return x * sigmoid(x)


@operation
def quantize(op, step, row, scratch):
    """A row to its records: (x, x_bytes, columns, per_256, bytes, per_32, bytes)."""
    x, x_bytes, columns = argument(op, 0), argument(op, 1), argument(op, 2)
    per_256, per_256_bytes = argument(op, 3), argument(op, 4)
    per_32, per_32_bytes = argument(op, 5), argument(op, 6)
    at_256 = per_256 + row * per_256_bytes if per_256 != 0 else 0
    at_32 = per_32 + row * per_32_bytes if per_32 != 0 else 0
    quantize_row(x + row * x_bytes, columns, at_256, at_32)


@inner
def silu_times(gate, up, columns, out):
    """out := silu(gate) * up, over `columns` floats."""
    for c in range(0, columns, 16):
        left = columns - c
        value = silu(load_some(gate + 4 * c, left)) * load_some(up + 4 * c, left)
        store_some(out + 4 * c, value, left)
