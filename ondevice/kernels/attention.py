"""Gated grouped-query attention with partial rotary embedding, over keys and values in half floats.

    q, k = rope(norm(q)), rope(norm(k))       rope turns the first `rope` of `size` dimensions,
                                              pairing i with i + rope / 2 (Su et al., 2021)
    o = softmax(q k' / sqrt(size)) v * sigmoid(gate)

The cache of a layer is K then V, each (kv heads, context, stride) f16 where stride is `size`
rounded up to 16 and the surplus is zero. A token and head walk over tiles of 64 positions that
start at multiples of 64, with a running maximum and sum (Milakov and Gimelshein, 2018): the order
of every sum depends on positions alone.
"""

import math

import numpy as np

from ondevice.kernels.activation import exponential, sigmoid
from ondevice.kernels.layout import (
    ARGUMENTS,
    CACHE,
    CONTEXT,
    POSITION,
    WORD,
    argument,
    word,
)
from ondevice.kernels.norm import normalize
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import (
    f32x16,
    fma,
    lane_maximum,
    lane_sum,
    load,
    load_f32,
    load_halves,
    load_some,
    maximum,
    splat,
    store,
    store_f32,
    store_halves,
    store_some,
    zero,
)
from quant.jit import inner

TILE = 64
LOWEST = np.float32(-1e30)


def stride(size: int) -> int:
    """Halves of one cached row of `size` values."""
    return -(-size // 16) * 16


def cache_bytes(kv_heads: int, size: int, context: int) -> int:
    """Bytes of one layer's keys and values."""
    return 2 * kv_heads * context * stride(size) * 2


def scratch_bytes(size: int) -> int:
    """Scratch that `attend` needs: a tile of scores and one output."""
    return 4 * (TILE + stride(size))


@operation
def rotations(op, step, t, scratch):
    """Cosine and sine of a token's angles: (frequencies f32, pairs, out (tokens, 2, pairs))."""
    frequencies, pairs, out = argument(op, 0), argument(op, 1), argument(op, 2)
    position = np.float32(word(step, POSITION) + t)
    row = out + 8 * pairs * t
    for i in range(pairs):
        angle = np.float64(position * load_f32(frequencies + 4 * i))
        store_f32(row + 4 * i, np.float32(math.cos(angle)))
        store_f32(row + 4 * (pairs + i), np.float32(math.sin(angle)))


@inner
def rotate(x, pairs, row):
    """Turn the first 2 * pairs values of x by the angles whose cosines and sines are at `row`."""
    for i in range(pairs):
        cosine, sine = load_f32(row + 4 * i), load_f32(row + 4 * (pairs + i))
        a, b = load_f32(x + 4 * i), load_f32(x + 4 * (pairs + i))
        store_f32(x + 4 * i, a * cosine - b * sine)
        store_f32(x + 4 * (pairs + i), b * cosine + a * sine)


@inner
def store_row(x, size, target):
    """`size` floats as halves, the last sixteen filled up with zeros."""
    for c in range(0, size, 16):
        store_halves(target + 2 * c, load_some(x + 4 * c, size - c))


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
    half = kv_heads * context * row_bytes
    keys = word(step, CACHE) + argument(op, 14) * 2 * half
    t, head = task // (heads + kv_heads), task % (heads + kv_heads)
    row = angles + 8 * pairs * t
    if head < heads:
        x = q + t * q_bytes + 8 * size * head
        normalize(x, size, q_norm, epsilon, x)
        rotate(x, pairs, row)
    else:
        head -= heads
        x = k + t * k_bytes + 4 * size * head
        normalize(x, size, k_norm, epsilon, x)
        rotate(x, pairs, row)
        place = keys + (head * context + word(step, POSITION) + t) * row_bytes
        store_row(x, size, place)
        store_row(v + t * v_bytes + 4 * size * head, size, place + half)


@inner
def score_tile(q, size, keys, row_bytes, count, scale, scores):
    """scores[p] = scale * q . keys[p] for p < count, the lowest number up to a whole tile."""
    for p in range(0, count, 4):
        k0 = keys + p * row_bytes
        k1, k2, k3 = k0 + row_bytes, k0 + 2 * row_bytes, k0 + 3 * row_bytes
        s0, s1, s2, s3 = zero(f32x16), zero(f32x16), zero(f32x16), zero(f32x16)
        for c in range(0, size, 16):
            x = load_some(q + 4 * c, size - c)
            s0 = fma(x, load_halves(k0 + 2 * c), s0)
            s1 = fma(x, load_halves(k1 + 2 * c), s1)
            s2 = fma(x, load_halves(k2 + 2 * c), s2)
            s3 = fma(x, load_halves(k3 + 2 * c), s3)
        store_f32(scores + 4 * p, lane_sum(s0) * scale)
        store_f32(scores + 4 * p + 4, lane_sum(s1) * scale)
        store_f32(scores + 4 * p + 8, lane_sum(s2) * scale)
        store_f32(scores + 4 * p + 12, lane_sum(s3) * scale)
    for p in range(count, TILE):
        store_f32(scores + 4 * p, LOWEST)


@operation
def attend(op, step, task, scratch):
    """Attention of a token and head, times sigmoid(gate).

    (q, bytes, heads, kv heads, size, out, bytes, index of the layer among the attention layers)
    """
    q, q_bytes, heads, kv_heads = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    size, out, out_bytes = argument(op, 4), argument(op, 5), argument(op, 6)
    context, row_bytes = word(step, CONTEXT), 2 * ((size + 15) // 16 * 16)
    half = kv_heads * context * row_bytes
    cache = word(step, CACHE) + argument(op, 7) * 2 * half
    scale = np.float32(1.0) / np.float32(math.sqrt(np.float32(size)))
    scores, total = scratch, scratch + 4 * TILE
    t, head = task // heads, task % heads
    x = q + t * q_bytes + 8 * size * head
    keys = cache + head // (heads // kv_heads) * context * row_bytes
    for c in range(0, size, 16):
        store(total + 4 * c, zero(f32x16))
    top, weight = LOWEST, np.float32(0)
    length = word(step, POSITION) + t + 1
    for start in range(0, length, TILE):
        count = min(TILE, length - start)
        tile = keys + start * row_bytes
        score_tile(x, size, tile, row_bytes, count, scale, scores)
        greatest = load(f32x16, scores)
        for p in range(16, TILE, 16):
            greatest = maximum(greatest, load(f32x16, scores + 4 * p))
        new_top = max(top, lane_maximum(greatest))
        shrink = lane_maximum(exponential(splat(f32x16, top - new_top)))
        top = new_top
        shares = zero(f32x16)
        for p in range(0, TILE, 16):
            share = exponential(load(f32x16, scores + 4 * p) - splat(f32x16, top))
            store(scores + 4 * p, share)
            shares = shares + share
        weight = fma(weight, shrink, lane_sum(shares))
        for c in range(0, size, 16):
            value = load(f32x16, total + 4 * c) * shrink
            column = tile + half + 2 * c
            for p in range(count):
                halves = load_halves(column + p * row_bytes)
                value = fma(halves, load_f32(scores + 4 * p), value)
            store(total + 4 * c, value)
    gate, target = x + 4 * size, out + t * out_bytes + 4 * size * head
    for c in range(0, size, 16):
        left = size - c
        openness = sigmoid(load_some(gate + 4 * c, left))
        value = load(f32x16, total + 4 * c) / splat(f32x16, weight) * openness
        store_some(target + 4 * c, value, left)
