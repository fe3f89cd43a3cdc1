"""Keys and values in bytes, multiplied as integers.

    keys     (4 groups, width / 4, 16 positions, 4 dimensions) i8
    scales   (4 groups, width / 32, 16 positions) f16             of 32 dimensions of a key
    values   (width / 16, 16, 16 dimensions, 4 positions) i8, zero beyond the head's size
    scales   (64 positions) f16                                   of a value

A scale is the greatest magnitude / 127. Queries are quantized like keys; a tile's shares, each
times its value's scale, to whole numbers up to SHARES. Integer sums are exact, so only the sums
over blocks of 32 dimensions and over tiles have an order.
"""

import numpy as np

from ondevice.kernels.activation import exponential
from ondevice.kernels.cache import (
    ATTEND_TILE,
    GROUP,
    KEEP_TOKEN,
    LOWEST,
    TAKE_QUERIES,
    TILE,
    TILE_BYTES,
    bytes_of_set,
    numbers_of,
    tile_positions,
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
    absolute,
    convert,
    f32x16,
    first_lanes,
    fma,
    i8x64,
    i32x16,
    lane_maximum,
    lane_sum,
    load,
    load_f16,
    load_f32,
    load_halves,
    load_some,
    maximum,
    nearest,
    prefetch,
    splat,
    store,
    store_bytes,
    store_f16,
    store_f32,
    store_i8,
    store_i32,
    zero,
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


@inner
def greatest_magnitude(x, start, end, size):
    """Of dimensions start .. end of x, which has `size`; NaN where one is NaN."""
    greatest, spoilt = zero(f32x16), zero(f32x16)
    for c in range(start, end, 16):
        value = load_some(x + 4 * c, size - c)
        greatest = maximum(greatest, absolute(value))
        spoilt = fma(value, np.float32(0), spoilt)
    return lane_maximum(greatest) + lane_sum(spoilt)


@inner
def inverse_of(scale):
    """1 / scale, 0 where that is none."""
    return np.float32(1) / scale if scale > np.float32(0) else np.float32(0)


@inner
def codes_of(x, c, size, inverse):
    """The codes of 16 dimensions as i32x16."""
    return convert(i32x16, nearest(load_some(x + 4 * c, size - c) * inverse))


@KEEP_TOKEN.register(Q8_0)
def keep_token(kind, tile, place, width, size, key, value):
    group, lane = place // GROUP, place % GROUP
    for b in range(width // 32):
        scale_at = tile + TILE * width + 2 * (GROUP * (group * (width // 32) + b) + lane)
        store_f16(scale_at, greatest_magnitude(key, 32 * b, 32 * b + 32, size) / np.float32(127))
        inverse = inverse_of(load_f16(scale_at))
        for d in range(32 * b, 32 * b + 32):
            code = code_of(load_f32(key + 4 * d), inverse) if d < size else 0
            at = tile + GROUP * width * group + 64 * (d // 4) + 4 * lane + d % 4
            store_i8(at, code)
    values = values_of(tile, width)
    scale_at = values + TILE * width + 2 * place
    store_f16(scale_at, greatest_magnitude(value, 0, width, size) / np.float32(127))
    inverse = inverse_of(load_f16(scale_at))
    for d in range(width):
        code = code_of(load_f32(value + 4 * d), inverse) if d < size else 0
        at = values + 16 * TILE * (d // 16) + 64 * (place // 4) + 4 * (d % 16) + place % 4
        store_i8(at, code)


@inner
def code_of(x, inverse):
    """x / scale, rounded; a half's scale may be too small by one part in 2048."""
    scaled = x * inverse
    if not abs(scaled) < np.float32(127):
        return 127 if scaled > np.float32(0) else -127
    return np.int64(np.rint(scaled))


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
def score_group(rows, width, size, tile, group):
    """Products of ROWS queries with 16 keys."""
    blocks, ahead = width // 32, tile_bytes_of(width)
    keys = tile + GROUP * width * group
    scales = tile + TILE * width + 2 * GROUP * blocks * group
    sums = zero_rows()
    for b in range(blocks):
        dots = begin_dots(rows + width + width // 8 + 4 * b, 4 * width)
        for i in range(8):
            at = keys + 64 * (8 * b + i)
            prefetch(at + ahead)
            dots = dot_rows(dots, load(i8x64, at), rows + 32 * b + 4 * i, 4 * width)
        scale = load_halves(scales + 2 * GROUP * b)
        sums = fma_scaled_dots(sums, dots, scale, rows + width + 4 * b, 4 * width)
    store_rows(rows + 4 * (3 * ROWS * width + GROUP * group), 4 * TILE, sums)


@inner
def tile_bytes_of(width):
    return TILE * (2 * width + width // 16 + 2)


@inner
def share_out(rows, width, count, scale, scales):
    """Scores of a tile to whole numbers; `greatest` becomes what one of them is worth."""
    numbers = numbers_of(rows, width)
    maxima, sums, factors, worth = numbers, numbers + 64, numbers + 128, numbers + 192
    shares = rows + 12 * ROWS * width
    for r in range(ROWS):
        row = shares + 4 * TILE * r
        greatest = splat(f32x16, LOWEST)
        for p in range(0, count, 16):
            score = first_lanes(load(f32x16, row + 4 * p) * scale, count - p, LOWEST)
            store(row + 4 * p, score)
            greatest = maximum(greatest, score)
        store_f32(worth + 4 * r, lane_maximum(greatest))
    before = load(f32x16, maxima)
    now = maximum(load(f32x16, worth), before)
    store(maxima, now)
    store(factors, exponential(before - now))
    for r in range(ROWS):
        row = shares + 4 * TILE * r
        top, total, greatest = load_f32(maxima + 4 * r), zero(f32x16), zero(f32x16)
        for p in range(0, count, 16):
            share = exponential(load(f32x16, row + 4 * p) - splat(f32x16, top))
            total = total + share
            worthy = first_lanes(share * load_halves(scales + 2 * p), count - p, np.float32(0))
            store(row + 4 * p, worthy)
            greatest = maximum(greatest, worthy)
        factor = load_f32(factors + 4 * r)
        store_f32(sums + 4 * r, fma(load_f32(sums + 4 * r), factor, lane_sum(total)))
        one = lane_maximum(greatest) / np.float32(SHARES) + lane_sum(total) * np.float32(0)
        store_f32(worth + 4 * r, one)
        inverse = inverse_of(one)
        if inverse > np.float32(3e38):
            inverse = np.float32(0)
        # a row's codes take the place of its first scores
        for p in range(0, TILE, 16):
            codes = zero(i32x16)
            if p < count:
                codes = convert(i32x16, nearest(load(f32x16, row + 4 * p) * inverse))
            store_bytes(row + p, codes)


@inner
def add_values(rows, width, c, count, values):
    """Outputs of dimensions c .. c + 31: times the factors, plus shares times values."""
    outputs, codes = rows + 4 * (ROWS * width + c), rows + 12 * ROWS * width
    numbers = numbers_of(rows, width)
    factors, worth = numbers + 128, numbers + 192
    ahead = tile_bytes_of(width)
    low_dots, high_dots = zero_dots(), zero_dots()
    for p in range(0, count, 4):
        at = values + 16 * p
        prefetch(at + ahead)
        prefetch(at + 16 * TILE + ahead)
        low_dots = share_rows(low_dots, load(i8x64, at), codes + p, 4 * TILE)
        high_dots = share_rows(high_dots, load(i8x64, at + 16 * TILE), codes + p, 4 * TILE)
    low = scale_rows(load_rows(outputs, 4 * width), factors, 4)
    store_rows(outputs, 4 * width, fma_dots(low, low_dots, worth, 4))
    high = scale_rows(load_rows(outputs + 64, 4 * width), factors, 4)
    store_rows(outputs + 64, 4 * width, fma_dots(high, high_dots, worth, 4))


@ATTEND_TILE.register(Q8_0)
def attend_tile(kind, panel, sets, per_token, first, count, start, chunk, size, tile, scale):
    width = (size + 31) // 32 * 32
    values = values_of(tile, width)
    for group in range(TILE // GROUP):
        for t in range(count):
            if tile_positions(first + t, chunk, start) > GROUP * group:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * bytes_of_set(width)
                    score_group(rows, width, size, tile, group)
    for t in range(count):
        positions = tile_positions(first + t, chunk, start)
        if positions > 0:
            for i in range(per_token):
                rows = sets + (t * per_token + i) * bytes_of_set(width)
                share_out(rows, width, positions, scale, values + TILE * width)
    for c in range(0, width, 32):
        for t in range(count):
            positions = tile_positions(first + t, chunk, start)
            if positions > 0:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * bytes_of_set(width)
                    add_values(rows, width, c, positions, values + TILE * c)
