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

Where that is faster, products are made of sums (`rows.pair_rows`), the same integers; codes leave
room for the sum of two.

Rounding moves a key by about 1e-4 of its length, as rounding to half floats does; but products of
16-bit integers are twice as many per instruction as those of floats.
"""

import math

import numpy as np

from ondevice.kernels.arithmetic import lane_sum, maximum
from ondevice.kernels.cache import (
    ADD_VALUES,
    GROUP,
    KEEP_TOKEN,
    KEY_PRODUCTS,
    NEAR,
    SCORE,
    SHARE_SCALE,
    STORE_SHARES,
    TAKE_QUERIES,
    TILE,
    TILE_BYTES,
    VALUE_PRODUCTS,
    VALUE_SCALES,
    code_of,
    codes_of,
    greatest_magnitude,
    inverse_of,
    is_shared,
    numbers_of,
)
from ondevice.kernels.dot.tile import Layout
from ondevice.kernels.norm import squared_length
from ondevice.kernels.rows import (
    ROWS,
    SUMS_FIRST,
    add_word_products,
    begin_pairs,
    fma_dots,
    fma_scaled_dots,
    load_rows,
    neighbour_products,
    pair_rows,
    scale_rows,
    store_rows,
    subtract_lanes,
    word_rows,
    zero_dots,
    zero_rows,
)
from ondevice.kernels.simd import (
    f32x16,
    i16x32,
    i32x16,
    load,
    load_f32,
    prefetch,
    prefetch_near,
    store_f32,
    store_i16,
    store_i32,
    store_words,
    zero,
)
from quant.jit import inner

I16 = Layout("i16 cache")
MOST = 16383
"""Of a code of a query or a key: the sum of two is an int16, see `rows.pair_rows`."""
LENGTH = 46000
"""Of the codes of a query or a key: its square, and what rounding adds, is below 2 ** 31."""
VALUES, MOST_SHARE = 8191, 24575
"""Of a value's code and a share; their sum is an int16."""
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
    """Per row: codes i16 x width | scale f32 | what `begin_pairs` takes i32."""
    for r in range(ROWS):
        source, target = x + 8 * r * size, rows + 4 * r * width
        have = size if r < used else 0
        scale = vector_scale(source, have)
        inverse = inverse_of(scale)
        for c in range(0, width, 16):
            store_words(target + 2 * c, codes_of(source, c, have, inverse))
        store_f32(target + 2 * width, scale)
        if SUMS_FIRST:
            store_i32(target + 2 * width + 4, own_products(target, width))


@inner
def own_products(words, count):
    """The products of the even dwords of `count` int16, n * 32, with the odd ones after them."""
    total = zero(i32x16)
    for i in range(0, count, 32):
        total = total + neighbour_products(load(i16x32, words + 2 * i))
    return lane_sum(total)


@inner
def products_of_two(x, y, steps):
    """The products of neighbouring vectors of int16 from two addresses on, n * 2 of them."""
    low, high = zero(i32x16), zero(i32x16)
    for at in range(0, 64 * steps, 128):
        low = add_word_products(low, load(i16x32, x + at), load(i16x32, x + at + 64))
        high = add_word_products(high, load(i16x32, y + at), load(i16x32, y + at + 64))
    return low, high


def key_products(kind, width, tile, group):
    keys = tile + 2 * GROUP * width * group
    return products_of_two(keys, keys + 2 * GROUP * width, width // 2)


def value_products(kind, width, tile, c):
    values = values_of(tile, width) + 2 * TILE * c
    return products_of_two(values, values + 32 * TILE, TILE // 2)


if SUMS_FIRST:
    KEY_PRODUCTS.register(I16)(key_products)
    VALUE_PRODUCTS.register(I16)(value_products)


@inner
def ask(later, low, high, step, mask):
    """Ask for memory at a step of `low` and `high`, as for `score`; where to go on."""
    if mask == 0:
        prefetch(later)
        prefetch(later + 64)
        prefetch_near(low + 64 * step + NEAR)
        prefetch_near(high + 64 * step + NEAR)
        return later + 128
    if step & (mask // 2) == 0:
        prefetch(later)
        return later + 64
    return later


@inner
def add_pairs(begun, products, low, high, steps, rows, stride, later, mask):
    """`pair_rows` of two runs of vectors, whose own products are given; `begun`: of the rows' own.

    Memory is asked for as for `score`.
    """
    dots = begin_pairs(begun, stride, products[0]), begin_pairs(begun, stride, products[1])
    for step in range(0, steps, 2):
        x, y = low + 64 * step, high + 64 * step
        later = ask(later, low, high, step, mask)  # at odd steps many sets ask for nothing
        lanes = load(i16x32, x), load(i16x32, x + 64)
        others = load(i16x32, y), load(i16x32, y + 64)
        dots = pair_rows(dots, lanes, others, rows + 4 * step, stride)
    return dots, later


@inner
def add_few_pairs(begun, low, high, steps, rows, stride, later, mask):
    """`add_pairs` where few sets meet the vectors: own products are made anew for each of them."""
    nothing = zero(i32x16)
    dots = begin_pairs(begun, stride, nothing), begin_pairs(begun, stride, nothing)
    own_low, own_high = nothing, nothing
    for step in range(0, steps, 2):
        x, y = low + 64 * step, high + 64 * step
        later = ask(later, low, high, step, mask)
        later = ask(later, low, high, step + 1, mask)
        lanes = load(i16x32, x), load(i16x32, x + 64)
        others = load(i16x32, y), load(i16x32, y + 64)
        own_low = add_word_products(own_low, lanes[0], lanes[1])
        own_high = add_word_products(own_high, others[0], others[1])
        dots = pair_rows(dots, lanes, others, rows + 4 * step, stride)
    return (subtract_lanes(dots[0], own_low), subtract_lanes(dots[1], own_high)), later


@inner
def add_sums(begun, products, low, high, steps, rows, stride, later, mask):
    """`pair_rows` of two runs of vectors; `products` are their own, if they are shared."""
    if is_shared(mask):
        return add_pairs(begun, products, low, high, steps, rows, stride, later, mask)
    return add_few_pairs(begun, low, high, steps, rows, stride, later, mask)


@inner
def add_words(low_dots, high_dots, low, high, steps, rows, stride, later, mask):
    """`word_rows` of two runs of vectors; memory is asked for as for `score`."""
    for step in range(steps):
        at, pair = 64 * step, rows + 4 * step
        later = ask(later, low, high, step, mask)
        low_dots = word_rows(low_dots, load(i16x32, low + at), pair, stride)
        high_dots = word_rows(high_dots, load(i16x32, high + at), pair, stride)
    # not as a pair: with AVX2 LLVM would then keep them in memory, and take three times as long
    return low_dots, high_dots, later


@SCORE.register(I16)
def score(kind, rows, width, tile, group, both, products, later, mask):
    keys, scales = tile + 2 * GROUP * width * group, key_scales_of(tile, width) + 4 * GROUP * group
    other = keys + 2 * GROUP * width
    target = rows + 4 * (3 * ROWS * width + GROUP * group)
    query_scales, stride, steps = rows + 2 * width, 4 * width, width // 2
    if both:
        if SUMS_FIRST:
            (low, high), later = add_sums(
                query_scales + 4, products, keys, other, steps, rows, stride, later, mask
            )
        else:
            low, high = zero_dots(), zero_dots()
            low, high, later = add_words(low, high, keys, other, steps, rows, stride, later, mask)
        scale = load(f32x16, scales + 4 * GROUP)
        store_rows(
            target + 4 * GROUP,
            4 * TILE,
            fma_scaled_dots(zero_rows(), high, scale, query_scales, stride),
        )
    else:
        low = zero_dots()
        for step in range(steps):
            low = word_rows(low, load(i16x32, keys + 64 * step), rows + 4 * step, stride)
    scale = load(f32x16, scales)
    store_rows(target, 4 * TILE, fma_scaled_dots(zero_rows(), low, scale, query_scales, stride))
    return later


@VALUE_SCALES.register(I16)
def value_scales(kind, tile, width, place):
    return load(f32x16, value_scales_of(tile, width) + 4 * place)


@SHARE_SCALE.register(I16)
def share_scale(kind, greatest, total):
    return maximum(greatest * np.float32(1 / MOST_SHARE), total * np.float32(1 / SHARES))


@STORE_SHARES.register(I16)
def store_shares(kind, row, inverse):
    """Codes i16 x TILE | what `begin_pairs` takes i32."""
    for p in range(0, TILE, 16):
        store_words(row + 2 * p, codes_of(row, p, TILE, inverse))
    if SUMS_FIRST:
        store_i32(row + 2 * TILE, own_products(row, TILE))


@ADD_VALUES.register(I16)
def add_values(kind, rows, width, c, count, tile, products, later, mask):
    outputs, codes = rows + 4 * (ROWS * width + c), rows + 12 * ROWS * width
    numbers = numbers_of(rows, width)
    factors, worth = numbers + 128, numbers + 192
    values = values_of(tile, width) + 2 * TILE * c
    other, stride = values + 32 * TILE, 4 * TILE
    if SUMS_FIRST and count == TILE:
        begun, steps = codes + 2 * TILE, TILE // 2
        (low, high), later = add_sums(
            begun, products, values, other, steps, codes, stride, later, mask
        )
    else:
        low, high, steps = zero_dots(), zero_dots(), (count + 1) // 2
        low, high, later = add_words(low, high, values, other, steps, codes, stride, later, mask)
    before = scale_rows(load_rows(outputs, 4 * width), factors, 4)
    store_rows(outputs, 4 * width, fma_dots(before, low, worth, 4))
    before = scale_rows(load_rows(outputs + 64, 4 * width), factors, 4)
    store_rows(outputs + 64, 4 * width, fma_dots(before, high, worth, 4))
    return later
