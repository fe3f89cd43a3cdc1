"""Keys and values in half floats, multiplied in float32.

    keys     (4 groups, width, 16 positions) f16
    values   (width / 16, 64 positions, 16 dimensions) f16, zero beyond the head's size

The tokens of a block share each piece that is converted to floats; a single token converts as it
multiplies.
"""

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
from ondevice.kernels.dot.floats import F16, F32, sixteen
from ondevice.kernels.dot.tile import ByLayout
from ondevice.kernels.rows import ROWS, fma_rows, load_rows, scale_rows, store_rows, zero_rows
from ondevice.kernels.simd import (
    f32x16,
    first_lanes,
    fma,
    lane_maximum,
    lane_sum,
    load,
    load_f32,
    load_halves,
    load_some,
    maximum,
    prefetch,
    splat,
    store,
    store_f16,
    store_f32,
    store_halves,
    zero,
)
from quant.jit import inner


@TILE_BYTES.register(F16)
def tile_bytes(kind, width):
    return 4 * TILE * width


@KEEP_TOKEN.register(F16)
def keep_token(kind, tile, place, width, size, key, value):
    keys = tile + 2 * GROUP * width * (place // GROUP) + 2 * (place % GROUP)
    for i in range(size):
        store_f16(keys + 2 * GROUP * i, load_f32(key + 4 * i))
    values = tile + 2 * TILE * width + 32 * place
    for c in range(0, width, 16):
        store_halves(values + 2 * TILE * c, load_some(value + 4 * c, size - c))


@TAKE_QUERIES.register(F16)
def take_queries(kind, rows, width, x, size, used):
    for r in range(ROWS):
        target = rows + 4 * r * width
        for c in range(0, width, 16):
            left = size - c if r < used else 0
            store(target + 4 * c, load_some(x + 8 * r * size + 4 * c, left))


def fetch(layout, address, ahead):
    """Ask for the memory `ahead` bytes later, where numbers are read as they are cached."""
    raise NotImplementedError("only inside compiled kernels")


def bytes_of(layout):
    """Bytes of a number."""
    raise NotImplementedError("only inside compiled kernels")


fetches, item_bytes = ByLayout(fetch), ByLayout(bytes_of)


@item_bytes.register(F16)
def bytes_of_half(layout):
    return 2


@item_bytes.register(F32)
def bytes_of_float(layout):
    return 4


@fetches.register(F16)
def fetch_halves(layout, address, ahead):
    prefetch(address + ahead)


@fetches.register(F32)
def fetch_nothing(layout, address, ahead):
    pass


@inner
def score_groups(layout, rows, width, size, keys, group, both):
    """Products of ROWS queries with a group of 16 keys, or with two of them."""
    item = bytes_of(layout)
    other, ahead = keys + item * GROUP * width, 4 * TILE * width
    target = rows + 4 * (3 * ROWS * width + GROUP * group)
    low = zero_rows()
    if both:
        high = zero_rows()
        for d in range(size):
            at = item * GROUP * d
            fetch(layout, keys + at, ahead)
            fetch(layout, other + at, ahead)
            low = fma_rows(low, sixteen(layout, keys + at), rows + 4 * d, 4 * width)
            high = fma_rows(high, sixteen(layout, other + at), rows + 4 * d, 4 * width)
        store_rows(target + 4 * GROUP, 4 * TILE, high)
    else:
        for d in range(size):
            at = item * GROUP * d
            low = fma_rows(low, sixteen(layout, keys + at), rows + 4 * d, 4 * width)
    store_rows(target, 4 * TILE, low)


@inner
def share_out(rows, width, count, scale):
    """Scores of a tile to shares: exponentials relative to the greatest score so far."""
    numbers = numbers_of(rows, width)
    maxima, sums, factors, greater = numbers, numbers + 64, numbers + 128, numbers + 192
    shares = rows + 12 * ROWS * width
    for r in range(ROWS):
        greatest = splat(f32x16, LOWEST)
        for p in range(0, count, 16):
            at = shares + 4 * (TILE * r + p)
            score = first_lanes(load(f32x16, at) * scale, count - p, LOWEST)
            store(at, score)
            greatest = maximum(greatest, score)
        store_f32(greater + 4 * r, lane_maximum(greatest))
    before = load(f32x16, maxima)
    now = maximum(load(f32x16, greater), before)
    store(maxima, now)
    store(factors, exponential(before - now))
    for r in range(ROWS):
        top, total = load_f32(maxima + 4 * r), zero(f32x16)
        for p in range(0, count, 16):
            at = shares + 4 * (TILE * r + p)
            share = exponential(load(f32x16, at) - splat(f32x16, top))
            store(at, share)
            total = total + share
        factor = load_f32(factors + 4 * r)
        store_f32(sums + 4 * r, fma(load_f32(sums + 4 * r), factor, lane_sum(total)))


@inner
def add_values(layout, rows, width, c, count, values):
    """Outputs of dimensions c .. c + 31: times the factors, plus shares times values."""
    item = bytes_of(layout)
    other, ahead = values + item * 16 * TILE, 4 * TILE * width
    outputs = rows + 4 * (ROWS * width + c)
    shares, factors = rows + 12 * ROWS * width, numbers_of(rows, width) + 128
    low = scale_rows(load_rows(outputs, 4 * width), factors, 4)
    high = scale_rows(load_rows(outputs + 64, 4 * width), factors, 4)
    for p in range(count):
        at = item * 16 * p
        fetch(layout, values + at, ahead)
        fetch(layout, other + at, ahead)
        low = fma_rows(low, sixteen(layout, values + at), shares + 4 * p, 4 * TILE)
        high = fma_rows(high, sixteen(layout, other + at), shares + 4 * p, 4 * TILE)
    store_rows(outputs, 4 * width, low)
    store_rows(outputs + 64, 4 * width, high)


@inner
def expand(source, count, target):
    """`count` halves, a multiple of 16, to floats."""
    for i in range(0, count, 16):
        store(target + 4 * i, load_halves(source + 2 * i))


@ATTEND_TILE.register(F16)
def attend_tile(kind, panel, sets, per_token, first, count, start, chunk, size, tile, scale):
    width = (size + 31) // 32 * 32
    set_bytes, row_bytes = bytes_of_set(width), 2 * width
    many = count > 1
    longest = 0
    for t in range(count):
        longest = max(longest, tile_positions(first + t, chunk, start))
    for group in range(0, (longest + GROUP - 1) // GROUP, 2):
        keys = tile + group * GROUP * row_bytes
        if many:
            expand(keys, 2 * GROUP * width, panel)
        for t in range(count):
            left = tile_positions(first + t, chunk, start) - GROUP * group
            if left > 0:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * set_bytes
                    if many:
                        score_groups(F32, rows, width, size, panel, group, left > GROUP)
                    else:
                        score_groups(F16, rows, width, size, keys, group, left > GROUP)
    for t in range(count):
        positions = tile_positions(first + t, chunk, start)
        if positions > 0:
            for i in range(per_token):
                share_out(sets + (t * per_token + i) * set_bytes, width, positions, scale)
    for c in range(0, width, 32):
        values = tile + TILE * row_bytes + 2 * TILE * c
        if many:
            expand(values, 32 * TILE, panel)
        for t in range(count):
            positions = tile_positions(first + t, chunk, start)
            if positions > 0:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * set_bytes
                    if many:
                        add_values(F32, rows, width, c, positions, panel)
                    else:
                        add_values(F16, rows, width, c, positions, values)
