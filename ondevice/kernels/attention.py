"""Gated grouped-query attention with partial rotary embedding, over cached keys and values.

    q, k = rope(norm(q)), rope(norm(k))       rope turns the first `rope` of `size` dimensions,
                                              pairing i with i + rope / 2 (Su et al., 2021)
    o = softmax(q k' / sqrt(size)) v * sigmoid(gate)

The cache is laid out as kernels/cache.py says, in 12, 16 or 8 bits a number. The heads of a token
that share a KV head are multiplied together, ROWS at a time; a prompt's tokens go over a tile in
blocks of BLOCK.

A token with n positions to look at cuts them into at most PARTS chunks of the same length, a power
of two that n alone determines. Each chunk has a running maximum and sum (Milakov and Gimelshein,
2018); chunks are merged in order. A few tokens give one task per KV head and chunk, more of them
one per KV head and block, in the same expressions: the order of every sum depends on positions
alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ondevice.kernels import cache_i12, cache_i16, cache_q8_0
from ondevice.kernels.activation import exponential_2, quantize_columns, sigmoid
from ondevice.kernels.arithmetic import fma, lane_maximum
from ondevice.kernels.cache import (
    BLOCK,
    GROUP,
    PARTS,
    TILE,
    attend_tile,
    begin_chunk,
    bytes_of_set,
    chunk_length,
    head_width,
    keep_token,
    numbers_of,
    set_bytes,
    spare_bytes,
    take_queries,
    tile_bytes,
    width_of,
)
from ondevice.kernels.cache_i12 import I12
from ondevice.kernels.cache_i16 import I16
from ondevice.kernels.cache_q8_0 import Q8_0
from ondevice.kernels.layout import (
    ARGUMENTS,
    CACHE,
    CONTEXT,
    COUNT,
    POSITION,
    WORD,
    argument,
    heads_of_task,
    word,
)
from ondevice.kernels.norm import normalize
from ondevice.kernels.operation import CompiledFunction, operation
from ondevice.kernels.rows import ROWS
from ondevice.kernels.simd import (
    f32x16,
    load,
    load_f32,
    load_some,
    splat,
    store,
    store_f32,
    store_i64,
    store_some,
)
from quant.jit import inner


def partial_bytes(heads: int, size: int) -> int:
    """Bytes of the results of chunks: (BLOCK, heads, PARTS) of maximum, sum and output."""
    return 4 * BLOCK * heads * PARTS * (16 + head_width(size))


def scratch_bytes(heads: int, kv_heads: int, size: int) -> int:
    """Scratch that `attend` needs: the sets of a block, and what a tile is spread out to."""
    return BLOCK * -(-(heads // kv_heads) // ROWS) * set_bytes(size) + spare_bytes(size)


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
def tile_at(kind, step, layer, kv_heads, head, position, width):
    """Address of the tile of a layer and KV head that holds a position."""
    tiles = word(step, CONTEXT) // TILE
    number = (layer * kv_heads + head) * tiles + position // TILE
    return word(step, CACHE) + number * tile_bytes(kind, width)


@inner
def keep_inputs(kind, op, step, task):
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
    width = width_of(size)
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
        tile = tile_at(kind, step, argument(op, 14), kv_heads, head, position, width)
        value = v + other * v_bytes + 4 * size * head
        keep_token(kind, tile, position % TILE, width, size, x, value)
        position += 1


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
    kept = lane_maximum(exponential_2(splat(f32x16, before - now)))
    added = lane_maximum(exponential_2(splat(f32x16, top - now)))
    store_f32(merged_top, now)
    store_f32(merged_total, fma(load_f32(merged_total), kept, total * added))
    for c in range(0, width, 16):
        old = load(f32x16, merged + 4 * c) * kept
        store(merged + 4 * c, fma(load(f32x16, output + 4 * c), added, old))


@inner
def attend_block(kind, op, step, task, scratch):
    """Attention of a block of tokens and the heads of a KV head, or of one chunk of a few tokens.

    (q, bytes, heads, kv heads, size, out, bytes, index of the layer among the attention layers,
     partial results)
    Without more tokens than BLOCK, `out` is left to `attention_output`.
    """
    q, q_bytes, heads, kv_heads = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    size, out, out_bytes = argument(op, 4), argument(op, 5), argument(op, 6)
    partials = argument(op, 8)
    layer, width = argument(op, 7), width_of(size)
    scale = np.float32(1 / (math.log(2) * math.sqrt(size)))
    ratio, parts = heads // kv_heads, attend_parts(step)
    per_token = (ratio + ROWS - 1) // ROWS
    item = bytes_of_set(width)
    sets, spare = scratch, scratch + BLOCK * per_token * item
    few = word(step, COUNT) <= BLOCK
    # threads that take neighbouring blocks of a KV head read the same tiles at about the same time
    own = task % kv_heads if few else task // parts
    index = task // kv_heads if few else task % parts
    block = 0 if few else index * BLOCK
    count = min(BLOCK, word(step, COUNT) - block)
    first = word(step, POSITION) + block
    for t in range(count):
        for i in range(per_token):
            x = q + (block + t) * q_bytes + 8 * size * (own * ratio + i * ROWS)
            rows = sets + (t * per_token + i) * item
            take_queries(kind, rows, width, x, size, min(ROWS, ratio - i * ROWS))
    for chunk in range(index if few else 0, index + 1 if few else PARTS):
        start, end = chunk * chunk_length(first + 1), 0
        for t in range(count):
            length, positions = chunk_length(first + t + 1), first + t + 1
            if chunk * length < positions:
                end = max(end, min(chunk * length + length, positions))
        if start >= end:
            continue
        for i in range(count * per_token):
            begin_chunk(sets + i * item, width)
        for at in range(start, end, TILE):
            tile = tile_at(kind, step, layer, kv_heads, own, at, width)
            attend_tile(kind, sets, spare, per_token, first, count, at, chunk, size, tile, scale)
        for t in range(count):
            positions = first + t + 1
            if chunk * chunk_length(positions) >= positions:
                continue
            for h in range(ratio):
                rows, r = sets + (t * per_token + h // ROWS) * item, h % ROWS
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
                rows, r = sets + (t * per_token + h // ROWS) * item, h % ROWS
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
def attention_output(op, step, task, scratch):
    """Outputs of a token's heads times sigmoid(gate), as floats and as int8 records.

    (q, bytes, heads, size, out, bytes, partial results, per_256, bytes, per_32, bytes,
     heads of a task where tokens are few)
    """
    q, q_bytes, heads, size = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    out, out_bytes, partials = argument(op, 4), argument(op, 5), argument(op, 6)
    per_256, per_256_bytes = argument(op, 7), argument(op, 8)
    per_32, per_32_bytes = argument(op, 9), argument(op, 10)
    t, begin, end = heads_of_task(step, task, heads, argument(op, 11))
    width, row = width_of(size), out + t * out_bytes
    positions = word(step, POSITION) + t + 1
    length = chunk_length(positions)
    for head in range(begin, end):
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
    quantize_columns(row, heads * size, begin * size, end * size, at_256, at_32)


@operation
def attention_inputs_i12(op, step, task, scratch):
    keep_inputs(I12, op, step, task)


@operation
def attention_inputs_i16(op, step, task, scratch):
    keep_inputs(I16, op, step, task)


@operation
def attention_inputs_q8_0(op, step, task, scratch):
    keep_inputs(Q8_0, op, step, task)


@operation
def attend_i12(op, step, task, scratch):
    attend_block(I12, op, step, task, scratch)


@operation
def attend_i16(op, step, task, scratch):
    attend_block(I16, op, step, task, scratch)


@operation
def attend_q8_0(op, step, task, scratch):
    attend_block(Q8_0, op, step, task, scratch)


@dataclass(frozen=True)
class Cache:
    """A kind of cache: its kernels, arguments as in `keep_inputs` and `attend_block`."""

    inputs: CompiledFunction
    attend: CompiledFunction
    tile_bytes: Callable[[Any, int], int]

    def bytes(self, kv_heads: int, size: int, context: int) -> int:
        """Bytes of one layer's keys and values."""
        return -(-kv_heads * context * self.tile_bytes(None, head_width(size)) // TILE)


CACHES = {
    "i12": Cache(attention_inputs_i12, attend_i12, cache_i12.tile_bytes),
    "i16": Cache(attention_inputs_i16, attend_i16, cache_i16.tile_bytes),
    "q8_0": Cache(attention_inputs_q8_0, attend_q8_0, cache_q8_0.tile_bytes),
}
"""Kinds of cache by name."""
