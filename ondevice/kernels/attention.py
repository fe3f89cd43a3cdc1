"""Gated grouped-query attention with partial rotary embedding, over keys and values in half floats.

    q, k = rope(norm(q)), rope(norm(k))       rope turns the first `rope` of `size` dimensions,
                                              pairing i with i + rope / 2 (Su et al., 2021)
    o = softmax(q k' / sqrt(size)) v * sigmoid(gate)

The cache of a layer holds, per KV head, tiles of 64 positions that start at multiples of 64. With
stride = `size` rounded up to 16 a tile is

    keys     (4 groups of 16 positions, stride, 16 positions) f16
    values   (stride / 16, 64 positions, 16 dimensions) f16, zero beyond `size`

so that scores have a position in each lane and outputs a dimension, and nothing is folded. The
heads of a token that share a KV head are multiplied together, ROWS at a time; a prompt's tokens in
blocks of BLOCK, for which each tile is converted to floats once.

A token with n positions to look at cuts them into at most PARTS chunks of the same length, a power
of two that n alone determines. Each chunk has a running maximum and sum (Milakov and Gimelshein,
2018); chunks are merged in order. A few tokens give one task per KV head and chunk, more of them
one per KV head and block, in the same expressions: the order of every sum depends on positions
alone.
"""

import math

import numpy as np

from ondevice.kernels.activation import exponential, quantize_row, sigmoid
from ondevice.kernels.dot.floats import F16, F32, sixteen
from ondevice.kernels.layout import (
    ARGUMENTS,
    CACHE,
    CONTEXT,
    COUNT,
    POSITION,
    WORD,
    argument,
    word,
)
from ondevice.kernels.norm import normalize
from ondevice.kernels.operation import operation
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
    store_i64,
    store_some,
    zero,
)
from quant.jit import inner

TILE = 64
GROUP = 16  # positions whose keys lie side by side
BLOCK = 8  # tokens that share a converted tile
PARTS = 16  # most chunks of a token
SHORTEST = 256  # positions of a chunk
LOWEST = np.float32(-1e30)


def stride(size: int) -> int:
    """Dimensions of a head, rounded up to whole vectors."""
    return -(-size // 16) * 16


def cache_bytes(kv_heads: int, size: int, context: int) -> int:
    """Bytes of one layer's keys and values; context is a multiple of TILE."""
    return 2 * kv_heads * context * stride(size) * 2


def partial_bytes(heads: int, size: int) -> int:
    """Bytes of the results of chunks: (BLOCK, heads, PARTS) of maximum, sum and output."""
    return 4 * BLOCK * heads * PARTS * (16 + stride(size))


def scratch_bytes(heads: int, kv_heads: int, size: int) -> int:
    """Scratch that `attend` needs: a converted piece of a tile, and what each row of a block has."""
    sets = BLOCK * -(-(heads // kv_heads) // ROWS)
    return 4 * (PANEL_DIMENSIONS * TILE + GROUP * stride(size) + sets * set_floats(size))


def set_floats(size: int) -> int:
    """Floats of ROWS rows: queries, outputs, merged outputs; shares; six numbers of each."""
    return ROWS * (3 * stride(size) + TILE) + 6 * 16


PANEL_DIMENSIONS = 32  # of values, converted at a time


@operation
def rotations(op, step, t, scratch):
    """Cosine and sine of a token's angles, and the number of tasks that `attend` has.

    (frequencies f32, pairs, out (tokens, 2, pairs), kv heads, the number int64)
    """
    frequencies, pairs, out = argument(op, 0), argument(op, 1), argument(op, 2)
    if t == 0:
        store_i64(argument(op, 4), argument(op, 3) * attend_parts(step))
    position = np.float32(word(step, POSITION) + t)
    row = out + 8 * pairs * t
    for i in range(pairs):
        angle = np.float64(position * load_f32(frequencies + 4 * i))
        store_f32(row + 4 * i, np.float32(math.cos(angle)))
        store_f32(row + 4 * (pairs + i), np.float32(math.sin(angle)))


@inner
def chunk_length(positions):
    """Positions of a chunk of a token that looks at so many."""
    length = SHORTEST
    while length * PARTS < positions:
        length *= 2
    return length


@inner
def attend_parts(step):
    """Tasks of `attend` for each KV head: chunks of a few tokens, or blocks of more."""
    count = word(step, COUNT)
    if count > BLOCK:
        return (count + BLOCK - 1) // BLOCK
    first, last = word(step, POSITION) + 1, word(step, POSITION) + count
    length = chunk_length(last)
    return (last + length - 1) // length if chunk_length(first) == length else PARTS


@inner
def rotate(x, pairs, row):
    """Turn the first 2 * pairs values of x by the angles whose cosines and sines are at `row`."""
    for i in range(0, pairs, 16):
        left = pairs - i
        low, high = x + 4 * i, x + 4 * (pairs + i)
        cosine, sine = load_some(row + 4 * i, left), load_some(row + 4 * (pairs + i), left)
        a, b = load_some(low, left), load_some(high, left)
        store_some(low, a * cosine - b * sine, left)
        store_some(high, b * cosine + a * sine, left)


@inner
def tile_at(cache, context, head, position, row_bytes):
    """Address of the tile that holds a position; its values follow TILE * row_bytes later."""
    return cache + 2 * row_bytes * (head * context + position // TILE * TILE)


@operation
def attention_inputs(op, step, task, scratch):
    """Norm and rotate a head of q (in place) or k; keep k and v in the cache.

    (q, bytes, k, bytes, v, bytes, heads, kv heads, size, pairs, rotations, q norm, k norm, epsilon,
     index of the layer among the attention layers)
    A row of q holds, per head, the query and then its gate.
    """
    q, q_bytes, k, k_bytes = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    v, v_bytes, heads, kv_heads = argument(op, 4), argument(op, 5), argument(op, 6), argument(op, 7)
    size, pairs, angles = argument(op, 8), argument(op, 9), argument(op, 10)
    q_norm, k_norm = argument(op, 11), argument(op, 12)
    epsilon = load_f32(op + WORD * (ARGUMENTS + 13))
    context, row_bytes = word(step, CONTEXT), 2 * ((size + 15) // 16 * 16)
    cache = word(step, CACHE) + argument(op, 14) * 2 * kv_heads * context * row_bytes
    t, head = task // (heads + kv_heads), task % (heads + kv_heads)
    if head < heads:
        x = q + t * q_bytes + 8 * size * head
        normalize(x, size, q_norm, epsilon, x)
        rotate(x, pairs, angles + 8 * pairs * t)
        return
    # the keys of a group lie side by side, so one task writes those of all its tokens
    head -= heads
    position = word(step, POSITION) + t
    if t > 0 and position % GROUP != 0:
        return
    for other in range(t, min(t + GROUP - position % GROUP, word(step, COUNT))):
        x = k + other * k_bytes + 4 * size * head
        normalize(x, size, k_norm, epsilon, x)
        rotate(x, pairs, angles + 8 * pairs * other)
        tile = tile_at(cache, context, head, position, row_bytes)
        place = position % TILE
        keys = tile + place // GROUP * GROUP * row_bytes + 2 * (place % GROUP)
        for i in range(size):
            store_f16(keys + 2 * GROUP * i, load_f32(x + 4 * i))
        values = tile + TILE * row_bytes + 32 * place
        x = v + other * v_bytes + 4 * size * head
        for c in range(0, size, 16):
            store_halves(values + 2 * TILE * c, load_some(x + 4 * c, size - c))
        position += 1


# ---- a set: ROWS heads of one token that read the same KV head ----
#
# queries (ROWS, stride) | outputs (ROWS, stride) | merged outputs (ROWS, stride) |
# shares (ROWS, TILE) | maxima, sums, factors, new maxima, merged maxima, merged sums: 16 each


@inner
def numbers_of(rows, width):
    """Address of a set's sixes of numbers."""
    return rows + 4 * ROWS * (3 * width + TILE)


@inner
def take_queries(rows, width, x, size, used):
    """The queries of a set's heads, 8 * size bytes apart, and zeros for heads it has not."""
    for r in range(ROWS):
        target = rows + 4 * r * width
        for c in range(0, width, 16):
            left = size - c if r < used else 0
            store(target + 4 * c, load_some(x + 8 * r * size + 4 * c, left))


@inner
def begin_chunk(rows, width):
    """No outputs yet."""
    for i in range(0, ROWS * width, 16):
        store(rows + 4 * (ROWS * width + i), zero(f32x16))
    numbers = numbers_of(rows, width)
    store(numbers, splat(f32x16, LOWEST))
    store(numbers + 64, zero(f32x16))


@inner
def score_group(layout, rows, width, size, keys, step, group, ahead):
    """Products of ROWS queries with 16 keys, which lie `step` bytes apart per dimension."""
    sums = zero_rows()
    for d in range(size):
        prefetch(keys + step * d + ahead)
        sums = fma_rows(sums, sixteen(layout, keys + step * d), rows + 4 * d, 4 * width)
    store_rows(rows + 4 * (3 * ROWS * width + GROUP * group), 4 * TILE, sums)


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
def add_values(layout, rows, width, c, count, values, other, step, ahead):
    """Outputs of dimensions c .. c + 31: times the factors, plus shares times values.

    Values of the first 16 dimensions and of the `other` ones lie `step` bytes apart per position.
    """
    outputs = rows + 4 * (ROWS * width + c)
    shares, factors = rows + 12 * ROWS * width, numbers_of(rows, width) + 128
    low = scale_rows(load_rows(outputs, 4 * width), factors, 4)
    if c + 16 < width:
        high = scale_rows(load_rows(outputs + 64, 4 * width), factors, 4)
        for p in range(count):
            prefetch(values + step * p + ahead)
            prefetch(other + step * p + ahead)
            low = fma_rows(low, sixteen(layout, values + step * p), shares + 4 * p, 4 * TILE)
            high = fma_rows(high, sixteen(layout, other + step * p), shares + 4 * p, 4 * TILE)
        store_rows(outputs + 64, 4 * width, high)
    else:
        for p in range(count):
            low = fma_rows(low, sixteen(layout, values + step * p), shares + 4 * p, 4 * TILE)
    store_rows(outputs, 4 * width, low)


@inner
def expand(source, count, target):
    """`count` halves, a multiple of 16, to floats."""
    for i in range(0, count, 16):
        store(target + 4 * i, load_halves(source + 2 * i))


@inner
def merge_row(first, width, top, total, output, merged_top, merged_total, merged):
    """Merge a chunk's maximum, sum and output (an address) into those at three addresses."""
    if first:
        store_f32(merged_top, top)
        store_f32(merged_total, total)
        for c in range(0, width, 16):
            store(merged + 4 * c, load(f32x16, output + 4 * c))
        return
    before = load_f32(merged_top)
    now = max(before, top)
    kept = lane_maximum(exponential(splat(f32x16, before - now)))
    added = lane_maximum(exponential(splat(f32x16, top - now)))
    store_f32(merged_top, now)
    store_f32(merged_total, fma(load_f32(merged_total), kept, total * added))
    for c in range(0, width, 16):
        old = load(f32x16, merged + 4 * c) * kept
        store(merged + 4 * c, fma(load(f32x16, output + 4 * c), added, old))


@inner
def attend_tile(panel, sets, per_token, first, count, start, chunk, size, tile, scale):
    """One tile for the tokens whose chunk it is in; first + 1 positions concern the first token."""
    width = (size + 15) // 16 * 16
    set_bytes, row_bytes = 4 * (ROWS * (3 * width + TILE) + 96), 2 * width
    many = count > 1
    longest = 0
    for t in range(count):
        longest = max(longest, tile_positions(first + t, chunk, start))
    for group in range((longest + GROUP - 1) // GROUP):
        keys = tile + group * GROUP * row_bytes
        if many:
            expand(keys, GROUP * size, panel)
        for t in range(count):
            if tile_positions(first + t, chunk, start) > GROUP * group:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * set_bytes
                    if many:
                        score_group(F32, rows, width, size, panel, 4 * GROUP, group, 0)
                    else:
                        ahead = 2 * TILE * row_bytes
                        score_group(F16, rows, width, size, keys, 2 * GROUP, group, ahead)
    for t in range(count):
        positions = tile_positions(first + t, chunk, start)
        if positions > 0:
            for i in range(per_token):
                share_out(sets + (t * per_token + i) * set_bytes, width, positions, scale)
    for c in range(0, width, 32):
        values = tile + TILE * row_bytes + 2 * TILE * c
        if many:
            expand(values, TILE * min(32, width - c), panel)
        for t in range(count):
            positions = tile_positions(first + t, chunk, start)
            if positions > 0:
                for i in range(per_token):
                    rows = sets + (t * per_token + i) * set_bytes
                    if many:
                        other = panel + 64 * TILE
                        add_values(F32, rows, width, c, positions, panel, other, 64, 0)
                    else:
                        other, ahead = values + 32 * TILE, 2 * TILE * row_bytes
                        add_values(F16, rows, width, c, positions, values, other, 32, ahead)


@inner
def tile_positions(position, chunk, start):
    """How many positions from `start` on, a tile's, the token at `position` has in a chunk."""
    length = chunk_length(position + 1)
    if start // length != chunk:
        return 0
    return max(0, min(TILE, position + 1 - start))


@operation
def attend(op, step, task, scratch):
    """Attention of a block of tokens and the heads of a KV head, or of one chunk of a few tokens.

    (q, bytes, heads, kv heads, size, out, bytes, index of the layer among the attention layers,
     partial results)
    Without more tokens than BLOCK, `out` is left to `attention_output`.
    """
    q, q_bytes, heads, kv_heads = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    size, out, out_bytes = argument(op, 4), argument(op, 5), argument(op, 6)
    partials = argument(op, 8)
    width = (size + 15) // 16 * 16
    context, row_bytes = word(step, CONTEXT), 2 * width
    cache = word(step, CACHE) + argument(op, 7) * 2 * kv_heads * context * row_bytes
    scale = np.float32(1.0) / np.float32(math.sqrt(np.float32(size)))
    ratio, own, index = heads // kv_heads, task % kv_heads, task // kv_heads
    per_token = (ratio + ROWS - 1) // ROWS
    set_bytes = 4 * (ROWS * (3 * width + TILE) + 96)
    panel, sets = scratch, scratch + 4 * (PANEL_DIMENSIONS * TILE + GROUP * width)
    few = word(step, COUNT) <= BLOCK
    block = 0 if few else index * BLOCK
    count = min(BLOCK, word(step, COUNT) - block)
    first = word(step, POSITION) + block
    for t in range(count):
        for i in range(per_token):
            x = q + (block + t) * q_bytes + 8 * size * (own * ratio + i * ROWS)
            rows = sets + (t * per_token + i) * set_bytes
            take_queries(rows, width, x, size, min(ROWS, ratio - i * ROWS))
    for chunk in range(index if few else 0, index + 1 if few else PARTS):
        start, end = chunk * chunk_length(first + 1), 0
        for t in range(count):
            length, positions = chunk_length(first + t + 1), first + t + 1
            if chunk * length < positions:
                end = max(end, min(chunk * length + length, positions))
        if start >= end:
            continue
        for i in range(count * per_token):
            begin_chunk(sets + i * set_bytes, width)
        for at in range(start, end, TILE):
            tile = tile_at(cache, context, own, at, row_bytes)
            attend_tile(panel, sets, per_token, first, count, at, chunk, size, tile, scale)
        for t in range(count):
            positions = first + t + 1
            if chunk * chunk_length(positions) >= positions:
                continue
            for h in range(ratio):
                rows, r = sets + (t * per_token + h // ROWS) * set_bytes, h % ROWS
                numbers = numbers_of(rows, width) + 4 * r
                top, total = load_f32(numbers), load_f32(numbers + 64)
                output = rows + 4 * width * (ROWS + r)
                if few:
                    place = (t * heads + own * ratio + h) * PARTS + chunk
                    part = partials + 4 * place * (16 + width)
                    merge_row(True, width, top, total, output, part, part + 4, part + 64)
                else:
                    into, merged = numbers + 256, output + 4 * width * ROWS
                    merge_row(chunk == 0, width, top, total, output, into, into + 64, merged)
    if not few:
        for t in range(count):
            for h in range(ratio):
                rows, r = sets + (t * per_token + h // ROWS) * set_bytes, h % ROWS
                total = load_f32(numbers_of(rows, width) + 320 + 4 * r)
                merged = rows + 4 * width * (2 * ROWS + r)
                target = out + (block + t) * out_bytes + 4 * size * (own * ratio + h)
                divide_row(merged, total, size, target)


@inner
def divide_row(x, total, size, target):
    for c in range(0, size, 16):
        value = load(f32x16, x + 4 * c) / splat(f32x16, total)
        store_some(target + 4 * c, value, size - c)


@operation
def attention_output(op, step, t, scratch):
    """A token's outputs times sigmoid(gate), as floats and as int8 records.

    (q, bytes, heads, size, out, bytes, partial results, per_256, bytes, per_32, bytes)
    """
    q, q_bytes, heads, size = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    out, out_bytes, partials = argument(op, 4), argument(op, 5), argument(op, 6)
    per_256, per_256_bytes = argument(op, 7), argument(op, 8)
    per_32, per_32_bytes = argument(op, 9), argument(op, 10)
    width, row = (size + 15) // 16 * 16, out + t * out_bytes
    positions = word(step, POSITION) + t + 1
    length = chunk_length(positions)
    for head in range(heads):
        target = row + 4 * size * head
        if word(step, COUNT) <= BLOCK:
            # merged into the first part
            whole = partials + 4 * (t * heads + head) * PARTS * (16 + width)
            for chunk in range(1, (positions + length - 1) // length):
                part = whole + 4 * chunk * (16 + width)
                top, total = load_f32(part), load_f32(part + 4)
                merge_row(False, width, top, total, part + 64, whole, whole + 4, whole + 64)
            divide_row(whole + 64, load_f32(whole + 4), size, target)
        gate = q + t * q_bytes + 4 * size * (2 * head + 1)
        for c in range(0, size, 16):
            left = size - c
            openness = sigmoid(load_some(gate + 4 * c, left))
            store_some(target + 4 * c, load_some(target + 4 * c, left) * openness, left)
    at_256 = per_256 + t * per_256_bytes if per_256 != 0 else 0
    at_32 = per_32 + t * per_32_bytes if per_32 != 0 else 0
    quantize_row(row, heads * size, at_256, at_32)
