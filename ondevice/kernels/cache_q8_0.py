"""Keys and values in bytes.

    keys     (8 groups, width / 4, 16 positions, 4 dimensions) i8
    scales   (8 groups, width / 32, 16 positions) f16             of 32 dimensions of a key
    values   (width / 16, 32, 16 dimensions, 4 positions) i8, zero beyond the head's size
    scales   (128 positions) f16                                   of a value

A scale is the greatest magnitude / 127; shares are whole numbers up to SHARES.
"""

import numpy as np

from ondevice.kernels.arithmetic import lane_sum
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
from ondevice.kernels.rows import (
    ROWS,
    SHARES,
    begin_dots,
    dot_rows,
    fma_dots,
    fma_scaled_dots,
    load_rows,
    scale_rows,
    share_rows,
    store_rows,
    zero_dots,
    zero_rows,
)
from ondevice.kernels.simd import (
    i8x64,
    load,
    load_f16,
    load_f32,
    load_halves,
    prefetch,
    prefetch_near,
    store_bytes,
    store_f16,
    store_f32,
    store_i8,
    store_i32,
)
from quant.jit import inner

Q8_0 = Layout("q8_0 cache")


@TILE_BYTES.register(Q8_0)
def tile_bytes(kind, width):
    return TILE * (2 * width + width // 16 + 2)


@inner
def values_of(tile, width):
    """Address of a tile's values."""
    return tile + TILE * width + TILE // 16 * width


@KEEP_TOKEN.register(Q8_0)
def keep_token(kind, tile, place, width, size, key, value):
    group, lane = place // GROUP, place % GROUP
    for b in range(width // 32):
        scale_at = tile + TILE * width + 2 * (GROUP * (group * (width // 32) + b) + lane)
        store_f16(scale_at, greatest_magnitude(key, 32 * b, 32 * b + 32, size) / np.float32(127))
        inverse = inverse_of(load_f16(scale_at))
        for d in range(32 * b, 32 * b + 32):
            code = code_of(load_f32(key + 4 * d), inverse, 127) if d < size else 0
            at = tile + GROUP * width * group + 64 * (d // 4) + 4 * lane + d % 4
            store_i8(at, code)
    values = values_of(tile, width)
    scale_at = values + TILE * width + 2 * place
    store_f16(scale_at, greatest_magnitude(value, 0, width, size) / np.float32(127))
    inverse = inverse_of(load_f16(scale_at))
    for d in range(width):
        code = code_of(load_f32(value + 4 * d), inverse, 127) if d < size else 0
        at = values + 16 * TILE * (d // 16) + 64 * (place // 4) + 4 * (d % 16) + place % 4
        store_i8(at, code)


@TAKE_QUERIES.register(Q8_0)
def take_queries(kind, rows, width, x, size, used):
    """Per row: codes i8 x width | scales f32 x width / 32 | what `begin_dots` takes i32."""
    for r in range(ROWS):
        source, target = x + 8 * r * size, rows + 4 * r * width
        have = size if r < used else 0
        for b in range(width // 32):
            scale = greatest_magnitude(source, 32 * b, 32 * b + 32, have) / np.float32(127)
            inverse, total = inverse_of(scale), 0
            for c in range(32 * b, 32 * b + 32, 16):
                codes = codes_of(source, c, have, inverse)
                total += np.int64(lane_sum(codes))
                store_bytes(target + c, codes)
            store_f32(target + width + 4 * b, scale)
            store_i32(target + width + width // 8 + 4 * b, total)


@inner
def score_group(rows, width, tile, group, later, mask):
    """Products of ROWS queries with 16 keys."""
    blocks = width // 32
    keys = tile + GROUP * width * group
    scales = tile + TILE * width + 2 * GROUP * blocks * group
    sums = zero_rows()
    for b in range(blocks):
        dots = begin_dots(rows + width + width // 8 + 4 * b, 4 * width)
        for i in range(8):
            at = keys + 64 * (8 * b + i)
            if i & mask == 0:
                prefetch(later)
                later += 64
            if mask == 0:
                prefetch_near(at + NEAR)
            dots = dot_rows(dots, load(i8x64, at), rows + 32 * b + 4 * i, 4 * width)
        scale = load_halves(scales + 2 * GROUP * b)
        sums = fma_scaled_dots(sums, dots, scale, rows + width + 4 * b, 4 * width)
    store_rows(rows + 4 * (3 * ROWS * width + GROUP * group), 4 * TILE, sums)
    return later


@SCORE.register(Q8_0)
def score(kind, rows, width, tile, group, both, spare, products, later, mask):
    later = score_group(rows, width, tile, group, later, mask)
    return score_group(rows, width, tile, group + 1, later, mask) if both else later


@VALUE_SCALES.register(Q8_0)
def value_scales(kind, tile, width, place):
    return load_halves(values_of(tile, width) + TILE * width + 2 * place)


@SHARE_SCALE.register(Q8_0)
def share_scale(kind, greatest, total):
    return greatest * np.float32(1 / SHARES)


@STORE_SHARES.register(Q8_0)
def store_shares(kind, row, inverse):
    for p in range(0, TILE, 16):
        store_bytes(row + p, codes_of(row, p, TILE, inverse))


@ADD_VALUES.register(Q8_0)
def add_values(kind, rows, width, c, count, tile, spare, products, later, mask):
    outputs, codes = rows + 4 * (ROWS * width + c), rows + 12 * ROWS * width
    numbers = numbers_of(rows, width)
    factors, worth = numbers + 128, numbers + 192
    values = values_of(tile, width) + TILE * c
    low_dots, high_dots = zero_dots(), zero_dots()
    for p in range(0, count, 4):
        at = values + 16 * p
        if mask == 0:
            prefetch(later)
            prefetch(later + 64)
            later += 128
            prefetch_near(at + NEAR)
            prefetch_near(at + 16 * TILE + NEAR)
        elif (p // 4) & (mask // 2) == 0:
            prefetch(later)
            later += 64
        low_dots = share_rows(low_dots, load(i8x64, at), codes + p, 4 * TILE)
        high_dots = share_rows(high_dots, load(i8x64, at + 16 * TILE), codes + p, 4 * TILE)
    low = scale_rows(load_rows(outputs, 4 * width), factors, 4)
    store_rows(outputs, 4 * width, fma_dots(low, low_dots, worth, 4))
    high = scale_rows(load_rows(outputs + 64, 4 * width), factors, 4)
    store_rows(outputs + 64, 4 * width, fma_dots(high, high_dots, worth, 4))
    return later
