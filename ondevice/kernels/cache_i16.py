"""Keys and values in 16 bits a number, no less accurate than half floats.

    keys     (8 groups, width / 2, 16 positions, 2 dimensions) i16
    scales   (128 positions) f32                                  of a key
    values   (width / 16, 64, 16 dimensions, 2 positions) i16, zero beyond the head's size
    scales   (128 positions) f32                                  of a value

Words and their products are as cache_words.py says. Rounding moves a key of normal numbers by 5e-5
of its length, a query by 2e-4, as rounding to half floats does; but products of 16-bit integers are
twice as many per instruction as those of floats.
"""

from ondevice.kernels.cache import (
    ADD_VALUES,
    GROUP,
    KEEP_TOKEN,
    KEY_PRODUCTS,
    SCORE,
    SHARE_SCALE,
    STORE_SHARES,
    TAKE_QUERIES,
    TILE,
    TILE_BYTES,
    VALUE_PRODUCTS,
    VALUE_SCALES,
    code_of,
    inverse_of,
)
from ondevice.kernels.cache_words import (
    MOST,
    PLAIN,
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
from ondevice.kernels.simd import f32x16, load, load_f32, store_f32, store_i16
from quant.jit import inner

I16 = Layout("i16 cache")
TAKE_QUERIES.register(I16)(take_queries)
SHARE_SCALE.register(I16)(share_scale)
STORE_SHARES.register(I16)(store_shares)


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


@KEEP_TOKEN.register(I16)
def keep_token(kind, tile, place, width, size, key, value):
    scale = key_scale(key, size)
    inverse = inverse_of(scale)
    store_f32(key_scales_of(tile, width) + 4 * place, scale)
    keys = tile + 2 * GROUP * width * (place // GROUP) + 4 * (place % GROUP)
    for d in range(width):
        code = code_of(load_f32(key + 4 * d), inverse, MOST) if d < size else 0
        store_i16(keys + 64 * (d // 2) + 2 * (d % 2), code)
    scale = value_scale(value, size)
    inverse = inverse_of(scale)
    store_f32(value_scales_of(tile, width) + 4 * place, scale)
    values = values_of(tile, width) + 64 * (place // 2) + 2 * (place % 2)
    for d in range(width):
        code = code_of(load_f32(value + 4 * d), inverse, MOST) if d < size else 0
        store_i16(values + 32 * TILE * (d // 16) + 4 * (d % 16), code)


@inner
def key_runs(tile, width, group):
    keys, bytes_of_group = tile + 2 * GROUP * width * group, 2 * GROUP * width
    return (keys, 0), (keys + bytes_of_group, 0)


@inner
def value_runs(tile, width, c):
    values = values_of(tile, width) + 2 * TILE * c
    return (values, 0), (values + 32 * TILE, 0)


def key_products(kind, width, tile, group, spare):
    return run_products((PLAIN, PLAIN), key_runs(tile, width, group), width // 2)


def value_products(kind, width, tile, c, spare):
    return run_products((PLAIN, PLAIN), value_runs(tile, width, c), TILE // 2)


if SUMS_FIRST:
    KEY_PRODUCTS.register(I16)(key_products)
    VALUE_PRODUCTS.register(I16)(value_products)


@SCORE.register(I16)
def score(kind, rows, width, tile, group, both, spare, products, later, mask):
    runs = key_runs(tile, width, group)
    scales = key_scales_of(tile, width) + 4 * GROUP * group
    return score_runs(PLAIN, PLAIN, runs, rows, width, scales, group, both, products, later, mask)


@VALUE_SCALES.register(I16)
def value_scales(kind, tile, width, place):
    return load(f32x16, value_scales_of(tile, width) + 4 * place)


@ADD_VALUES.register(I16)
def add_values(kind, rows, width, c, count, tile, spare, products, later, mask):
    runs = value_runs(tile, width, c)
    return add_value_runs((PLAIN, PLAIN), runs, rows, width, c, count, products, later, mask)
