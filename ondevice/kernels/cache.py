"""Keys and values of an attention layer, and how a token's heads go over a tile of them.

The cache of a layer holds, per KV head, tiles of TILE positions, which begin at multiples of TILE.
What a tile looks like is its kind's business (cache_i12, cache_i16, cache_q8_0); all have a
position in each lane for scores and a dimension for outputs, so that nothing is folded. `width` is
the size of a head rounded up to a multiple of 64.

Numbers are kept as integers with scales, and multiplied as integers. Queries are quantized like
keys; so are a tile's shares, each times its value's scale, by one scale for the tile. Sums of
products of integers are exact; only the sums over blocks of dimensions and over tiles are floats,
and have an order.

Products are made for a *set*: ROWS heads of one token that read the same KV head. It is, in f32,

    queries (ROWS, width) | outputs (ROWS, width) | merged outputs (ROWS, width) |
    shares (ROWS, TILE) | maxima | sums | factors | worth | merged maxima | merged sums: 16 each |
    parts (3, ROWS, 16)

Scores are kept in units of ln 2: shares are powers of two.
"""

import numpy as np

from ondevice.kernels.activation import exponential_2
from ondevice.kernels.arithmetic import (
    absolute,
    first_lanes,
    fma,
    lane_maximum,
    lane_sum,
    maximum,
    nearest_integers,
)
from ondevice.kernels.dot.tile import ByLayout
from ondevice.kernels.rows import ROWS, greatest_of_rows, load_rows, sum_rows
from ondevice.kernels.simd import (
    f32x16,
    i32x16,
    load,
    load_f32,
    load_some,
    prefetch,
    splat,
    store,
    zero,
)
from quant.jit import inner

TILE = 128
GROUP = 16  # positions whose keys lie side by side
BLOCK = 2 * ROWS  # most tokens that go over a tile together: more do not fit the caches
SHARED = 4  # sets from which on a tile's own products are worth their making
PARTS = 16  # most chunks of a token
SHORTEST = 256  # positions of a chunk
NEAR = 1024  # bytes ahead, in the first-level cache, of what one token reads
LOWEST = np.float32(-1e30)
LEAST = np.float32(1e-38)


def head_width(size: int) -> int:
    """Dimensions of a cached head of `size`."""
    return -(-size // 64) * 64


def set_bytes(size: int) -> int:
    """Bytes of a set."""
    return 4 * (ROWS * (3 * head_width(size) + TILE + 3 * 16) + 6 * 16)


def spare_bytes(size: int) -> int:
    """Bytes of what `spread` makes of a tile."""
    return TILE * head_width(size)


@inner
def width_of(size):
    """`head_width` inside compiled kernels."""
    return (size + 63) // 64 * 64


@inner
def bytes_of_set(width):
    return 4 * (ROWS * (3 * width + TILE + 48) + 96)


@inner
def numbers_of(rows, width):
    """Address of a set's numbers, from the maxima on."""
    return rows + 4 * ROWS * (3 * width + TILE)


@inner
def is_shared(mask):
    """Whether SHARED sets or more meet a tile; `mask` as for `score`."""
    return mask + 1 >= SHARED


@inner
def begin_chunk(rows, width):
    """No outputs yet."""
    for i in range(0, ROWS * width, 16):
        store(rows + 4 * (ROWS * width + i), zero(f32x16))
    numbers = numbers_of(rows, width)
    store(numbers, splat(f32x16, LOWEST))
    store(numbers + 64, zero(f32x16))


@inner
def chunk_length(positions):
    """Positions of a chunk of a token that looks at so many."""
    length = SHORTEST
    while length * PARTS < positions:
        length *= 2
    return length


@inner
def tile_positions(position, chunk, start):
    """How many positions from `start` on, a tile's, the token at `position` has in a chunk."""
    length = chunk_length(position + 1)
    if start // length != chunk:
        return 0
    return max(0, min(TILE, position + 1 - start))


# ---- whole numbers ----


@inner
def greatest_magnitude(x, start, end, size):
    """Of dimensions start .. end of x, which has `size`; NaN where one is not finite."""
    greatest, spoilt = zero(f32x16), zero(f32x16)
    for c in range(start, end, 16):
        value = load_some(x + 4 * c, size - c)
        greatest = maximum(greatest, absolute(value))
        spoilt = fma(value, np.float32(0), spoilt)
    return lane_maximum(greatest) + lane_sum(spoilt)


@inner
def inverse_of(scale):
    """1 / scale; 0 where that is none, or more than a float holds."""
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    return inverse if inverse < np.float32(3e38) else np.float32(0)


@inner
def codes_of(x, c, size, inverse):
    """The codes of 16 dimensions as i32x16."""
    return nearest_integers(load_some(x + 4 * c, size - c) * inverse)


@inner
def code_of(x, inverse, most):
    """x / scale, rounded; a scale may have been rounded down, so at most +-most."""
    scaled = x * inverse
    if not abs(scaled) < np.float32(most):
        return most if scaled > np.float32(0) else -most
    return np.int64(np.rint(scaled))


# ---- what each kind of cache defines ----


def tile_bytes(kind, width):
    """Bytes of a tile, from the width of a head."""
    raise NotImplementedError("only inside compiled kernels")


def keep_token(kind, tile, place, width, size, key, value):
    """Put a key and a value (f32) at a place of a tile."""
    raise NotImplementedError("only inside compiled kernels")


def take_queries(kind, rows, width, x, size, used):
    """The queries of a set's first `used` heads, 8 * size bytes apart; zeros for the others."""
    raise NotImplementedError("only inside compiled kernels")


def spread(kind, tile, width, spare):
    """Make of a shared tile what is not to be made for every set, at `spare`."""
    raise NotImplementedError("only inside compiled kernels")


def key_products(kind, width, tile, group, spare):
    """What `score` takes of two groups of keys if they are shared: two i32x16."""
    raise NotImplementedError("only inside compiled kernels")


def score(kind, rows, width, tile, group, both, spare, products, later, mask):
    """Products of ROWS queries with a group of 16 keys, or with two of them, to `shares`.

    Memory is asked for from `later` on. A set alone (mask 0) asks for as much as two groups take,
    and also for what it reads itself; several ask for a line or two at those steps whose number
    has none of the bits of `mask`. Returns where to go on.
    """
    raise NotImplementedError("only inside compiled kernels")


def value_scales(kind, tile, width, place):
    """The scales of 16 values from `place` on, as f32x16."""
    raise NotImplementedError("only inside compiled kernels")


def share_scale(kind, greatest, total):
    """The scales of all rows' shares (f32x16), from their greatest and their sums."""
    raise NotImplementedError("only inside compiled kernels")


def store_shares(kind, row, inverse):
    """Shares of a row to whole numbers, by the inverse of their scale."""
    raise NotImplementedError("only inside compiled kernels")


def value_products(kind, width, tile, c, spare):
    """What `add_values` takes of a whole tile if it is shared: two i32x16."""
    raise NotImplementedError("only inside compiled kernels")


def add_values(kind, rows, width, c, count, tile, spare, products, later, mask):
    """Outputs of dimensions c .. c + 31: times the factors, plus shares times values.

    `later`, `mask` and what is returned are as for `score`.
    """
    raise NotImplementedError("only inside compiled kernels")


def nothing_spread(kind, tile, width, spare):
    return


def no_products(kind, width, tile, place, spare):
    return zero(i32x16), zero(i32x16)


TILE_BYTES, KEEP_TOKEN, TAKE_QUERIES = (
    ByLayout(function) for function in (tile_bytes, keep_token, take_queries)
)
VALUE_SCALES, SHARE_SCALE = ByLayout(value_scales), ByLayout(share_scale)
STORE_SHARES, ADD_VALUES = ByLayout(store_shares), ByLayout(add_values)
KEY_PRODUCTS, VALUE_PRODUCTS = (
    ByLayout(function, no_products) for function in (key_products, value_products)
)
SCORE, SPREAD = ByLayout(score), ByLayout(spread, nothing_spread)


# ---- a tile ----


@inner
def share_out(kind, rows, width, count, tile, scale, later, mask):
    """Scores of a tile to whole numbers; `worth` becomes what one of them is worth.

    scale: of the scores, to units of ln 2. `later`, `mask` and what is returned are as for `score`.
    """
    numbers = numbers_of(rows, width)
    maxima, sums, factors, worth = numbers, numbers + 64, numbers + 128, numbers + 192
    shares, parts = rows + 12 * ROWS * width, numbers + 384
    totals, weights = parts + 64 * ROWS, parts + 128 * ROWS
    for r in range(ROWS):
        row, greatest = shares + 4 * TILE * r, splat(f32x16, LOWEST)
        for p in range(0, TILE, 16):
            score = load(f32x16, row + 4 * p)
            if p + 16 > count:
                score = first_lanes(score, count - p, LOWEST)
                store(row + 4 * p, score)
            greatest = maximum(greatest, score)
        store(parts + 64 * r, greatest)
    before = load(f32x16, maxima)
    now = maximum(greatest_of_rows(load_rows(parts, 64)) * scale, before)
    store(maxima, now)
    factor = exponential_2(before - now)
    store(factors, factor)
    for r in range(ROWS):
        row, top = shares + 4 * TILE * r, zero(f32x16) - splat(f32x16, load_f32(maxima + 4 * r))
        greatest, total, weight = zero(f32x16), zero(f32x16), zero(f32x16)
        for p in range(0, TILE, 16):
            share = exponential_2(fma(load(f32x16, row + 4 * p), scale, top))
            worthy = share * value_scales(kind, tile, width, p)
            if p + 16 > count:
                share = first_lanes(share, count - p, np.float32(0))
                worthy = first_lanes(worthy, count - p, np.float32(0))
            store(row + 4 * p, worthy)
            if (p // 16) & mask == 0:
                prefetch(later)
                later += 64
            total, weight = total + share, weight + worthy
            greatest = maximum(greatest, worthy)
        store(parts + 64 * r, greatest)
        store(totals + 64 * r, total)
        store(weights + 64 * r, weight)
    total, weight = sum_rows(load_rows(totals, 64)), sum_rows(load_rows(weights, 64))
    store(sums, fma(load(f32x16, sums), factor, total))
    one = share_scale(kind, greatest_of_rows(load_rows(parts, 64)), weight)
    # not a number where one of them is none
    store(worth, one + (total + weight) * np.float32(0))
    store(parts, splat(f32x16, np.float32(1)) / maximum(one, splat(f32x16, LEAST)))
    for r in range(ROWS):
        store_shares(kind, shares + 4 * TILE * r, load_f32(parts + 4 * r))
    return later


@inner
def attend_tile(kind, sets, spare, per_token, first, count, start, chunk, size, tile, scale):
    """Go over one tile with the sets of `count` tokens, from position `first` on.

    The tile begins at `start`; tokens for which it lies in another chunk do nothing. `spare` is
    for what `spread` makes.
    """
    width = width_of(size)
    item = bytes_of_set(width)
    used = per_token * count
    later, mask = tile + tile_bytes(kind, width), 1
    while 2 * mask <= used:
        mask *= 2
    mask -= 1
    # a few sets wait for memory, not for products
    nothing = (zero(i32x16), zero(i32x16))
    if is_shared(mask):
        spread(kind, tile, width, spare)
    for group in range(0, TILE // GROUP, 2):
        products = key_products(kind, width, tile, group, spare) if is_shared(mask) else nothing
        for t in range(count):
            left = tile_positions(first + t, chunk, start) - GROUP * group
            if left > 0:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * item
                    both = left > GROUP
                    later = score(
                        kind, rows, width, tile, group, both, spare, products, later, mask
                    )
    for t in range(count):
        positions = tile_positions(first + t, chunk, start)
        if positions > 0:
            for i in range(per_token):
                rows = sets + (t * per_token + i) * item
                later = share_out(kind, rows, width, positions, tile, scale, later, mask)
    for c in range(0, width, 32):
        products = value_products(kind, width, tile, c, spare) if is_shared(mask) else nothing
        for t in range(count):
            positions = tile_positions(first + t, chunk, start)
            if positions > 0:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * item
                    later = add_values(
                        kind, rows, width, c, positions, tile, spare, products, later, mask
                    )
