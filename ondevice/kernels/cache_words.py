"""Keys and values as 16-bit words: what the kinds of cache have in common that multiply words.

A tile is its keys | scales of keys (128 positions) f32 | its values | scales of values f32. Two
dimensions of 16 positions' keys are a vector (16 positions, 2 dimensions) i16; two positions of 16
dimensions of the values are one, (16 dimensions, 2 positions). A *run* is the vectors of a group of
keys, width / 2, or of 16 dimensions of the values, 64. Where its vectors lie is the run's layout's
business; this file knows PLAIN, one after the other.

Sums are int32 and never overflow. By the inequality of Cauchy and Schwarz, every sum of some
products of a query's and a key's words is at most the product of their lengths, so their scales are
at least their lengths / QUERY_LENGTH and KEY_LENGTH. A sum of shares times values is at most the
sum of the shares' words times the greatest value's: shares add up to SHARES.

Where that is faster, products are made of sums (`rows.pair_rows`), the same integers; words leave
room for the sum of two.
"""

import math

import numpy as np

from ondevice.kernels.arithmetic import lane_sum, maximum
from ondevice.kernels.cache import (
    GROUP,
    NEAR,
    TILE,
    codes_of,
    greatest_magnitude,
    inverse_of,
    is_shared,
    numbers_of,
)
from ondevice.kernels.dot.tile import ByLayout, Layout
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
    prefetch,
    prefetch_near,
    store_f32,
    store_i32,
    store_words,
    zero,
)
from quant.jit import inner

PLAIN = Layout("words one after the other")
MOST, QUERY_MOST = 24568, 8191
"""Of a key's or a value's word, but for up to 8 that rounding adds, and of a query's or a share's:
their sum is an int16, see `rows.pair_rows`.
"""
KEY_LENGTH, QUERY_LENGTH = 92000, 23000
"""Of the words of a key and a query: their product, and what rounding adds, is below 2 ** 31."""
SHARES = 87000
"""Of the words of a tile's shares; times MOST, and what rounding adds, it is below 2 ** 31."""


# ---- what each layout of a run defines; a run is an address, and that of its spare words ----


def two_words(layout, run, step, half):
    """The vectors of steps step + 2 * half and the next, of a run; `step` is a multiple of 4."""
    raise NotImplementedError("only inside compiled kernels")


def near_words(layout, run, step):
    """Ask for what `two_words` will read NEAR bytes after four steps; the lines that it reads."""
    raise NotImplementedError("only inside compiled kernels")


TWO_WORDS, NEAR_WORDS = ByLayout(two_words), ByLayout(near_words)


@TWO_WORDS.register(PLAIN)
def two_plain_words(layout, run, step, half):
    at = run[0] + 64 * step + 128 * half
    return load(i16x32, at), load(i16x32, at + 64)


@NEAR_WORDS.register(PLAIN)
def near_plain_words(layout, run, step):
    for line in range(4):
        prefetch_near(run[0] + 64 * (step + line) + NEAR)
    return 4


# ---- what is multiplied ----


@inner
def key_scale(key, size):
    """The scale of a key; NaN where a number is not finite."""
    return vector_scale(key, size, KEY_LENGTH, MOST)


@inner
def vector_scale(x, size, length, most):
    longest = np.float32(math.sqrt(squared_length(x, size))) / np.float32(length)
    greatest = greatest_magnitude(x, 0, size, size) / np.float32(most)
    return greatest if greatest > longest else longest


@inner
def value_scale(value, size):
    """The scale of a value; NaN where a number is not finite."""
    return greatest_magnitude(value, 0, size, size) / np.float32(MOST)


def take_queries(kind, rows, width, x, size, used):
    """Per row: words i16 x width | scale f32 | what `begin_pairs` takes i32."""
    for r in range(ROWS):
        source, target = x + 8 * r * size, rows + 4 * r * width
        have = size if r < used else 0
        scale = vector_scale(source, have, QUERY_LENGTH, QUERY_MOST)
        inverse = inverse_of(scale)
        for c in range(0, width, 16):
            store_words(target + 2 * c, codes_of(source, c, have, inverse))
        store_f32(target + 2 * width, scale)
        if SUMS_FIRST:
            store_i32(target + 2 * width + 4, own_products(target, width))


def share_scale(kind, greatest, total):
    return maximum(greatest * np.float32(1 / QUERY_MOST), total * np.float32(1 / SHARES))


def store_shares(kind, row, inverse):
    """Words i16 x TILE | what `begin_pairs` takes i32."""
    for p in range(0, TILE, 16):
        store_words(row + 2 * p, codes_of(row, p, TILE, inverse))
    if SUMS_FIRST:
        store_i32(row + 2 * TILE, own_products(row, TILE))


@inner
def own_products(words, count):
    """The products of the even dwords of `count` int16, n * 32, with the odd ones after them."""
    total = zero(i32x16)
    for i in range(0, count, 32):
        total = total + neighbour_products(load(i16x32, words + 2 * i))
    return lane_sum(total)


# ---- sums of products of two runs ----


@inner
def run_products(layouts, runs, steps):
    """The products of neighbouring vectors of two runs, each run's."""
    low, high = zero(i32x16), zero(i32x16)
    for step in range(0, steps, 4):
        for half in range(2):
            x, y = two_words(layouts[0], runs[0], step, half)
            low = add_word_products(low, x, y)
            x, y = two_words(layouts[1], runs[1], step, half)
            high = add_word_products(high, x, y)
    return low, high


@inner
def ask(later, layouts, runs, step, mask):
    """Ask for memory at four steps of two runs, as for `score`; where to go on."""
    if mask == 0:
        lines = near_words(layouts[0], runs[0], step) + near_words(layouts[1], runs[1], step)
        for line in range(lines):
            prefetch(later + 64 * line)
        return later + 64 * lines
    for i in range(4):
        if (step + i) & (mask // 2) == 0:
            prefetch(later)
            later += 64
    return later


@inner
def add_pairs(begun, products, layouts, runs, steps, rows, stride, later, mask):
    """`pair_rows` of two runs, whose own products are given; `begun`: of the rows' own.

    Memory is asked for as for `score`.
    """
    dots = begin_pairs(begun, stride, products[0]), begin_pairs(begun, stride, products[1])
    for step in range(0, steps, 4):
        later = ask(later, layouts, runs, step, mask)
        for half in range(2):
            lanes = two_words(layouts[0], runs[0], step, half)
            others = two_words(layouts[1], runs[1], step, half)
            dots = pair_rows(dots, lanes, others, rows + 4 * step + 8 * half, stride)
    return dots, later


@inner
def add_few_pairs(begun, layouts, runs, steps, rows, stride, later, mask):
    """`add_pairs` where few sets meet the vectors: own products are made anew for each of them."""
    nothing = zero(i32x16)
    dots = begin_pairs(begun, stride, nothing), begin_pairs(begun, stride, nothing)
    own_low, own_high = nothing, nothing
    for step in range(0, steps, 4):
        later = ask(later, layouts, runs, step, mask)
        for half in range(2):
            lanes = two_words(layouts[0], runs[0], step, half)
            others = two_words(layouts[1], runs[1], step, half)
            own_low = add_word_products(own_low, lanes[0], lanes[1])
            own_high = add_word_products(own_high, others[0], others[1])
            dots = pair_rows(dots, lanes, others, rows + 4 * step + 8 * half, stride)
    return (subtract_lanes(dots[0], own_low), subtract_lanes(dots[1], own_high)), later


@inner
def add_words(layouts, runs, steps, rows, stride, later, mask):
    """`word_rows` of two runs; memory is asked for as for `score`."""
    low_dots, high_dots = zero_dots(), zero_dots()
    for step in range(0, steps, 4):
        later = ask(later, layouts, runs, step, mask)
        for half in range(2):
            pair = rows + 4 * step + 8 * half
            lanes = two_words(layouts[0], runs[0], step, half)
            others = two_words(layouts[1], runs[1], step, half)
            low_dots = word_rows(low_dots, lanes[0], pair, stride)
            high_dots = word_rows(high_dots, others[0], pair, stride)
            low_dots = word_rows(low_dots, lanes[1], pair + 4, stride)
            high_dots = word_rows(high_dots, others[1], pair + 4, stride)
    return low_dots, high_dots, later


@inner
def add_products(begun, products, layouts, runs, steps, rows, stride, later, mask):
    """The sums of two runs in whatever way is fastest; `products` are their own, if shared."""
    # not as a pair: with AVX2 LLVM would then keep them in memory, and take three times as long
    if not SUMS_FIRST:
        return add_words(layouts, runs, steps, rows, stride, later, mask)
    if is_shared(mask):
        sums, later = add_pairs(begun, products, layouts, runs, steps, rows, stride, later, mask)
    else:
        sums, later = add_few_pairs(begun, layouts, runs, steps, rows, stride, later, mask)
    return sums[0], sums[1], later


# ---- scores and outputs ----


@inner
def score_runs(few, many, runs, rows, width, scales, group, both, products, later, mask):
    """As `score`, of two runs of keys, whose layouts are `few` or, of a shared tile, `many`."""
    target = rows + 4 * (3 * ROWS * width + GROUP * group)
    query_scales, stride, steps = rows + 2 * width, 4 * width, width // 2
    if both:
        begun = query_scales + 4
        if is_shared(mask):
            low, high, later = add_products(
                begun, products, (many, many), runs, steps, rows, stride, later, mask
            )
        else:
            low, high, later = add_products(
                begun, products, (few, few), runs, steps, rows, stride, later, mask
            )
        store_scores(target + 4 * GROUP, high, scales + 4 * GROUP, query_scales, stride)
    else:
        low = zero_dots()
        for step in range(0, steps, 4):
            for half in range(2):
                x, y = two_words(few, runs[0], step, half)
                low = word_rows(low, x, rows + 4 * step + 8 * half, stride)
                low = word_rows(low, y, rows + 4 * step + 8 * half + 4, stride)
    store_scores(target, low, scales, query_scales, stride)
    return later


@inner
def store_scores(target, dots, scales, query_scales, stride):
    scale = load(f32x16, scales)
    scores = fma_scaled_dots(zero_rows(), dots, scale, query_scales, stride)
    store_rows(target, 4 * TILE, scores)


@inner
def add_value_runs(layouts, runs, rows, width, c, count, products, later, mask):
    """As `add_values`, of two runs of values."""
    outputs, codes = rows + 4 * (ROWS * width + c), rows + 12 * ROWS * width
    numbers = numbers_of(rows, width)
    factors, worth = numbers + 128, numbers + 192
    stride = 4 * TILE
    if count == TILE:
        begun, steps = codes + 2 * TILE, TILE // 2
        low, high, later = add_products(
            begun, products, layouts, runs, steps, codes, stride, later, mask
        )
    else:
        # shares behind `count` are zeros
        steps = (count + 7) // 8 * 4
        low, high, later = add_words(layouts, runs, steps, codes, stride, later, mask)
    before = scale_rows(load_rows(outputs, 4 * width), factors, 4)
    store_rows(outputs, 4 * width, fma_dots(before, low, worth, 4))
    before = scale_rows(load_rows(outputs + 64, 4 * width), factors, 4)
    store_rows(outputs + 64, 4 * width, fma_dots(before, high, worth, 4))
    return later
