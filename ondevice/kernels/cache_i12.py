"""Keys and values in 12 bits a number, about as accurate as bfloat16.

Of four vectors of words, three are kept. Their lowest four bits are the fourth, whose words have
four bits of zeros; the words of the three are rounded to the nearest that end so, and are used as
they are, so that only the fourth has to be put together.

    keys     (8 groups, width / 8, 3, 16 positions, 2 dimensions) i16
    scales   (128 positions) f32                                         of a key
    values   (width / 64, 3, 64, 16 dimensions, 2 positions) i16
    scales   (128 positions) f32                                         of a value

Of keys, four vectors are those of eight dimensions, of values those of the same two positions in 64
dimensions. A word of the fourth is, from its uppermost bits, the lowest four of the third, second
and first. Words and their products are otherwise as cache_words.py says.

Rounding moves a key of normal numbers by 8e-4 of its length, and by 3e-3 where one of them is far
greater than the others; rounding to bfloat16 moves it by 1.7e-3.
"""

import numpy as np

from ondevice.kernels.cache import (
    ADD_VALUES,
    GROUP,
    KEEP_TOKEN,
    KEY_PRODUCTS,
    NEAR,
    SCORE,
    SHARE_SCALE,
    SPREAD,
    STORE_SHARES,
    TAKE_QUERIES,
    TILE,
    TILE_BYTES,
    VALUE_PRODUCTS,
    VALUE_SCALES,
    inverse_of,
    is_shared,
)
from ondevice.kernels.cache_words import (
    NEAR_WORDS,
    PLAIN,
    TWO_WORDS,
    add_value_runs,
    key_scale,
    run_products,
    score_runs,
    share_scale,
    store_shares,
    take_queries,
    value_scale,
)
from ondevice.kernels.dot.tile import Layout
from ondevice.kernels.rows import SUMS_FIRST
from ondevice.kernels.simd import (
    f32x16,
    funnel,
    i16x32,
    load,
    load_f32,
    prefetch_near,
    store,
    store_f32,
    store_i16,
)
from quant.jit import inner

I12 = Layout("i12 cache")
PACKED = Layout("keys of which every fourth vector lies in the three before")
SPREAD_OUT = Layout("keys of which every fourth vector lies elsewhere")
FOURTHS = Layout("values that lie in three runs")
RUN = 32 * TILE  # bytes of 16 dimensions' values
TAKE_QUERIES.register(I12)(take_queries)
SHARE_SCALE.register(I12)(share_scale)
STORE_SHARES.register(I12)(store_shares)


@TILE_BYTES.register(I12)
def tile_bytes(kind, width):
    return TILE * (3 * width + 8)


@inner
def keys_of(tile, width, group):
    return tile + 24 * width * group


@inner
def key_scales_of(tile, width):
    return tile + 192 * width


@inner
def values_of(tile, width):
    return tile + 192 * width + 4 * TILE


@inner
def value_scales_of(tile, width):
    return tile + 384 * width + 4 * TILE


# ---- packing ----


@inner
def word_of(x, inverse, low):
    """The word nearest to x / scale that ends in the four bits `low`."""
    part = (x * inverse - np.float32(low)) * np.float32(1 / 16)
    if not part < np.float32(1535):
        return 1535 * 16 + low
    if part < np.float32(-1536):
        return -1536 * 16 + low
    return np.int64(np.rint(part)) * 16 + low


@inner
def number(x, d, size):
    return load_f32(x + 4 * d) if d < size else np.float32(0)


@inner
def keep_four(x, d, apart, size, inverse, at, stride):
    """Put dimensions d, d + apart, ... of x into three words `stride` bytes apart."""
    last = word_of(number(x, d + 3 * apart, size), inverse, 0)
    for i in range(3):
        low = (last >> (4 * i + 4)) & 15
        store_i16(at + stride * i, word_of(number(x, d + i * apart, size), inverse, low))


@KEEP_TOKEN.register(I12)
def keep_token(kind, tile, place, width, size, key, value):
    scale = key_scale(key, size)
    inverse = inverse_of(scale)
    store_f32(key_scales_of(tile, width) + 4 * place, scale)
    keys = keys_of(tile, width, place // GROUP) + 4 * (place % GROUP)
    for d in range(0, width, 8):
        keep_four(key, d, 2, size, inverse, keys + 24 * d, 64)
        keep_four(key, d + 1, 2, size, inverse, keys + 24 * d + 2, 64)
    scale = value_scale(value, size)
    inverse = inverse_of(scale)
    store_f32(value_scales_of(tile, width) + 4 * place, scale)
    values = values_of(tile, width) + 64 * (place // 2) + 2 * (place % 2)
    for c in range(0, width, 64):
        for d in range(16):
            keep_four(value, c + d, 16, size, inverse, values + 3 * RUN * (c // 64) + 4 * d, RUN)


# ---- putting together ----


@inner
def fourth(first, second, third):
    return funnel(third, funnel(second, first << np.int16(12), 4), 4)


@TWO_WORDS.register(PACKED)
def two_packed_words(layout, run, step, half):
    at = run[0] + 48 * step
    first, second = load(i16x32, at), load(i16x32, at + 64)
    if half == 0:
        return first, second
    third = load(i16x32, at + 128)
    return third, fourth(first, second, third)


@TWO_WORDS.register(SPREAD_OUT)
def two_spread_words(layout, run, step, half):
    at = run[0] + 48 * step
    if half == 0:
        return load(i16x32, at), load(i16x32, at + 64)
    return load(i16x32, at + 128), load(i16x32, run[1] + 16 * step)


@NEAR_WORDS.register(PACKED)
def near_packed_words(layout, run, step):
    for line in range(3):
        prefetch_near(run[0] + 48 * step + 64 * line + NEAR)
    return 3


@NEAR_WORDS.register(SPREAD_OUT)
def near_spread_words(layout, run, step):
    return 3


@inner
def fourth_value(at):
    return fourth(load(i16x32, at), load(i16x32, at + RUN), load(i16x32, at + 2 * RUN))


@TWO_WORDS.register(FOURTHS)
def two_fourth_words(layout, run, step, half):
    at = run[0] + 64 * step + 128 * half
    return fourth_value(at), fourth_value(at + 64)


@NEAR_WORDS.register(FOURTHS)
def near_fourth_words(layout, run, step):
    return 0


@SPREAD.register(I12)
def spread(kind, tile, width, spare):
    for i in range(width):
        at = tile + 192 * i
        store(
            spare + 64 * i,
            fourth(load(i16x32, at), load(i16x32, at + 64), load(i16x32, at + 128)),
        )
    spare += 64 * width
    for c in range(0, width, 64):
        values = values_of(tile, width) + 3 * RUN * (c // 64)
        for step in range(TILE // 2):
            store(spare + 64 * c + 64 * step, fourth_value(values + 64 * step))


@inner
def key_runs(tile, width, group, spare):
    keys, apart = keys_of(tile, width, group), 24 * width
    other = spare + 8 * width * group
    return (keys, other), (keys + apart, other + 8 * width)


def key_products(kind, width, tile, group, spare):
    runs = key_runs(tile, width, group, spare)
    return run_products((SPREAD_OUT, SPREAD_OUT), runs, width // 2)


def value_products(kind, width, tile, c, spare):
    values = values_of(tile, width) + 3 * RUN * (c // 64)
    if c % 64 == 0:
        return run_products((PLAIN, PLAIN), ((values, 0), (values + RUN, 0)), TILE // 2)
    fourths = spare + 64 * width + 64 * (c - 32)
    return run_products((PLAIN, PLAIN), ((values + 2 * RUN, 0), (fourths, 0)), TILE // 2)


if SUMS_FIRST:
    KEY_PRODUCTS.register(I12)(key_products)
    VALUE_PRODUCTS.register(I12)(value_products)


@SCORE.register(I12)
def score(kind, rows, width, tile, group, both, spare, products, later, mask):
    runs = key_runs(tile, width, group, spare)
    scales = key_scales_of(tile, width) + 4 * GROUP * group
    return score_runs(
        PACKED, SPREAD_OUT, runs, rows, width, scales, group, both, products, later, mask
    )


@VALUE_SCALES.register(I12)
def value_scales(kind, tile, width, place):
    return load(f32x16, value_scales_of(tile, width) + 4 * place)


@ADD_VALUES.register(I12)
def add_values(kind, rows, width, c, count, tile, spare, products, later, mask):
    values = values_of(tile, width) + 3 * RUN * (c // 64)
    if c % 64 == 0:
        runs = (values, 0), (values + RUN, 0)
        return add_value_runs((PLAIN, PLAIN), runs, rows, width, c, count, products, later, mask)
    if is_shared(mask):
        runs = (values + 2 * RUN, 0), (spare + 64 * width + 64 * (c - 32), 0)
        return add_value_runs((PLAIN, PLAIN), runs, rows, width, c, count, products, later, mask)
    runs = (values + 2 * RUN, 0), (values, 0)
    return add_value_runs((PLAIN, FOURTHS), runs, rows, width, c, count, products, later, mask)
