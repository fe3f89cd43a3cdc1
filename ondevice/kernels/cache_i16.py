"""Keys and values in 16 bits a number, no less accurate than half floats.

    keys     (8 groups, width / 2, 16 positions, 2 dimensions) i16
    scales   (128 positions) f32                                  of a key
    values   (width / 16, 64, 16 dimensions, 2 positions) i16, zero beyond the head's size
    scales   (128 positions) f32                                  of a value

Sums are int32 and never overflow. By the inequality of Cauchy and Schwarz, every sum of some
products of a query's and a key's codes is at most the product of their lengths, so a key's scale
is its length / LENGTH, or more where a single code would not fit. A sum of shares times values is
at most the sum of the shares' codes times the greatest value's code: values have codes up to
VALUES, and shares add up to SHARES.

Rounding moves a key by about 1e-4 of its length, as rounding to half floats does; but products of
16-bit integers are twice as many per instruction as those of floats.
"""

import math

import numpy as np

from ondevice.kernels.arithmetic import maximum
from ondevice.kernels.cache import (
    ADD_VALUES,
    GROUP,
    KEEP_TOKEN,
    NEAR,
    SCORE,
    SHARE_SCALE,
    STORE_SHARES,
    TAKE_QUERIES,
    TILE,
    TILE_BYTES,
    VALUE_SCALES,
    code_of,
    codes_of,
    greatest_magnitude,
    inverse_of,
    numbers_of,
)
from ondevice.kernels.dot.tile import Layout
from ondevice.kernels.norm import squared_length
from ondevice.kernels.rows import (
    ROWS,
    fma_dots,
    fma_scaled_dots,
    load_rows,
    scale_rows,
    store_rows,
    word_rows,
    zero_dots,
    zero_rows,
)
from ondevice.kernels.simd import (
    f32x16,
    i16x32,
    load,
    load_f32,
    prefetch,
    prefetch_near,
    store_f32,
    store_i16,
    store_words,
)
from quant.jit import inner

I16 = Layout("i16 cache")
MOST = 32767
LENGTH = 46000
"""Of the codes of a query or a key: its square, and what rounding adds, is below 2 ** 31."""
VALUES = 8191
SHARES = 262000
"""Times VALUES, and what rounding adds, it is below 2 ** 31."""


@TILE_BYTES.register(I16)
def tile_bytes(kind, width):
    return TILE * (4 * width + 8)


@inner
def key_scales_of(tile, width):
    return tile + 2 * TILE * width


@inner
def values_of(tile, width):
    return tile + 2 * TILE * width + 4 * TILE


@inner
def value_scales_of(tile, width):
    return tile + 4 * TILE * width + 4 * TILE


@inner
def vector_scale(x, size):
    """The scale of a query or a key; NaN where a number is not finite."""
    longest = np.float32(math.sqrt(squared_length(x, size))) / np.float32(LENGTH)
    greatest = greatest_magnitude(x, 0, size, size) / np.float32(MOST)
    return greatest if greatest > longest else longest


@KEEP_TOKEN.register(I16)
def keep_token(kind, tile, place, width, size, key, value):
    scale = vector_scale(key, size)
    inverse = inverse_of(scale)
    store_f32(key_scales_of(tile, width) + 4 * place, scale)
    keys = tile + 2 * GROUP * width * (place // GROUP) + 4 * (place % GROUP)
    for d in range(width):
        code = code_of(load_f32(key + 4 * d), inverse, MOST) if d < size else 0
        store_i16(keys + 64 * (d // 2) + 2 * (d % 2), code)
    scale = greatest_magnitude(value, 0, width, size) / np.float32(VALUES)
    inverse = inverse_of(scale)
    store_f32(value_scales_of(tile, width) + 4 * place, scale)
    values = values_of(tile, width) + 64 * (place // 2) + 2 * (place % 2)
    for d in range(width):
        code = code_of(load_f32(value + 4 * d), inverse, VALUES) if d < size else 0
        store_i16(values + 32 * TILE * (d // 16) + 4 * (d % 16), code)


@TAKE_QUERIES.register(I16)
def take_queries(kind, rows, width, x, size, used):
    """Per row: codes i16 x width | scale f32."""
    for r in range(ROWS):
        source, target = x + 8 * r * size, rows + 4 * r * width
        have = size if r < used else 0
        scale = vector_scale(source, have)
        inverse = inverse_of(scale)
        for c in range(0, width, 16):
            store_words(target + 2 * c, codes_of(source, c, have, inverse))
        store_f32(target + 2 * width, scale)


@SCORE.register(I16)
def score(kind, rows, width, tile, group, both, later):
    keys, scales = tile + 2 * GROUP * width * group, key_scales_of(tile, width) + 4 * GROUP * group
    other = keys + 2 * GROUP * width
    target = rows + 4 * (3 * ROWS * width + GROUP * group)
    query_scales = rows + 2 * width
    low = zero_dots()
    if both:
        high = zero_dots()
        for d in range(0, width, 2):
            at = 32 * d
            if later > 0:
                prefetch(later + 2 * at)
                prefetch(later + 2 * at + 64)
                prefetch_near(keys + at + NEAR)
                prefetch_near(other + at + NEAR)
            low = word_rows(low, load(i16x32, keys + at), rows + 2 * d, 4 * width)
            high = word_rows(high, load(i16x32, other + at), rows + 2 * d, 4 * width)
        scale = load(f32x16, scales + 4 * GROUP)
        products = fma_scaled_dots(zero_rows(), high, scale, query_scales, 4 * width)
        store_rows(target + 4 * GROUP, 4 * TILE, products)
        later += 4 * GROUP * width if later > 0 else 0
    else:
        for d in range(0, width, 2):
            low = word_rows(low, load(i16x32, keys + 32 * d), rows + 2 * d, 4 * width)
    scale = load(f32x16, scales)
    products = fma_scaled_dots(zero_rows(), low, scale, query_scales, 4 * width)
    store_rows(target, 4 * TILE, products)
    return later


@VALUE_SCALES.register(I16)
def value_scales(kind, tile, width, place):
    return load(f32x16, value_scales_of(tile, width) + 4 * place)


@SHARE_SCALE.register(I16)
def share_scale(kind, greatest, total):
    return maximum(greatest * np.float32(1 / MOST), total * np.float32(1 / SHARES))


@STORE_SHARES.register(I16)
def store_shares(kind, row, place, codes):
    store_words(row + 2 * place, codes)


@ADD_VALUES.register(I16)
def add_values(kind, rows, width, c, count, tile, later):
    outputs, codes = rows + 4 * (ROWS * width + c), rows + 12 * ROWS * width
    numbers = numbers_of(rows, width)
    factors, worth = numbers + 128, numbers + 192
    values = values_of(tile, width) + 2 * TILE * c
    other = values + 32 * TILE
    low_dots, high_dots = zero_dots(), zero_dots()
    for p in range(0, count, 2):
        at = 32 * p
        if later > 0:
            prefetch(later + 2 * at)
            prefetch(later + 2 * at + 64)
            prefetch_near(values + at + NEAR)
            prefetch_near(other + at + NEAR)
        low_dots = word_rows(low_dots, load(i16x32, values + at), codes + 2 * p, 4 * TILE)
        high_dots = word_rows(high_dots, load(i16x32, other + at), codes + 2 * p, 4 * TILE)
    low = scale_rows(load_rows(outputs, 4 * width), factors, 4)
    store_rows(outputs, 4 * width, fma_dots(low, low_dots, worth, 4))
    high = scale_rows(load_rows(outputs + 64, 4 * width), factors, 4)
    store_rows(outputs + 64, 4 * width, fma_dots(high, high_dots, worth, 4))
    return later + 64 * TILE if later > 0 else 0
