"""Gated DeltaNet: the causal convolution and the delta rule (Yang et al., 2024, "Gated Delta
Networks", equation 10).

    x_t = silu(sum over j of w_j * input_(t - j))                     per channel, window of 4
    q = q / |q| / sqrt(size),  k = k / |k|                            per key head
    g = exp(a * softplus(alpha + dt)),  beta = sigmoid(b)             per value head
    d = beta * (v - g S'k),  o = g S'q + d (k.q),  S = g S + k d'     S: (size, size) per value head

The memory of a head lies in column blocks of 16, each (size, 16) f32 and contiguous: a block stays
in the first-level cache. Reading S gives both S'k and S'q, and each later token of a batch takes
both from the rows as the token before it has moved them on. Tokens are taken one after the other
in the same expressions whatever the batch, so prefill and decoding agree bit for bit. Value head
h reads key head h // (value heads / key heads).

The last TENTATIVE tokens of a batch leave no trace in the window and the memory, which cannot be
cut back: a task goes on from them in copies of its own. What they brought, the rows of qkv and ba,
goes to the journal instead. Those that the next step finds PENDING there have been accepted, and
are run before its own tokens: the same expressions on the same numbers, so the memory is, bit for
bit, as if nobody had ever guessed. A layer's part of the journal is MOST_TENTATIVE rows of qkv
(channels,) f32 and as many of ba (2 * value heads,) f32.
"""

import math

import numpy as np

from ondevice.kernels.activation import sigmoid_of, silu
from ondevice.kernels.arithmetic import fma, lane_sum
from ondevice.kernels.layout import (
    COUNT,
    JOURNAL,
    PENDING,
    STATE,
    TENTATIVE,
    are_few,
    argument,
    heads_of_task,
    word,
)
from ondevice.kernels.norm import squared_length
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import (
    FEATURES,
    f32x16,
    load,
    load_f32,
    load_some,
    prefetch,
    store,
    store_f32,
    store_some,
    zero,
)
from quant.jit import inner

L2_EPSILON = np.float32(1e-6)
MOST_TENTATIVE = 4
BOTH = "avx512f" in FEATURES
"""Whether registers hold what is summed up of two column blocks: only 32 of 64 bytes do."""


@inner
def input_row(window, journal, x, x_bytes, row, size, pending, source):
    """Address of the inputs of a token: of the window, the journal or the batch."""
    if source < 0:
        return window + (source + size - 1) * row
    if source < pending:
        return journal + source * row
    return x + (source - pending) * x_bytes


@operation
def convolve(op, step, task, scratch):
    """Causal convolution and SiLU of some channels; their window moves on by the batch.

    (input, bytes, out, bytes, channels, kernel, weights (kernel, channels) f32, window's place in
     the state: (kernel - 1, channels) f32, place in the journal, channels of a task: n * 16,
     as many where tokens are few)
    Rows of `out` are the pending tokens and then the batch's.
    """
    x, x_bytes, out, out_bytes = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    channels, size, weights = argument(op, 4), argument(op, 5), argument(op, 6)
    window, journal = word(step, STATE) + argument(op, 7), word(step, JOURNAL) + argument(op, 8)
    pending, tentative, row = word(step, PENDING), word(step, TENTATIVE), 4 * channels
    count = pending + word(step, COUNT)
    used = argument(op, 10) if are_few(step) else argument(op, 9)
    for c in range(task * used, min((task + 1) * used, channels), 16):
        left = channels - c
        for t in range(count):
            total = zero(f32x16)
            for j in range(size):
                source = t + j - (size - 1)
                at = input_row(window, journal, x, x_bytes, row, size, pending, source)
                value = load_some(at + 4 * c, left)
                total = fma(value, load_some(weights + j * row + 4 * c, left), total)
            store_some(out + t * out_bytes + 4 * c, silu(total), left)
        for j in range(size - 1):
            source = count - tentative + j - (size - 1)
            at = input_row(window, journal, x, x_bytes, row, size, pending, source)
            store_some(window + j * row + 4 * c, load_some(at + 4 * c, left), left)
        # not before the pending rows have been read
        for i in range(tentative):
            value = load_some(x + (count - pending - tentative + i) * x_bytes + 4 * c, left)
            store_some(journal + i * row + 4 * c, value, left)


@inner
def scale_row(x, size, factor):
    for c in range(0, size, 16):
        store_some(x + 4 * c, load_some(x + 4 * c, size - c) * factor, size - c)


@inner
def normalize_pair(q, k, size):
    """Normalise a head's q and k in place; returns k.q."""
    length = np.float32(math.sqrt(squared_length(q, size) + L2_EPSILON))
    scale_row(q, size, np.float32(1.0) / (length * np.float32(math.sqrt(np.float32(size)))))
    length = np.float32(math.sqrt(squared_length(k, size) + L2_EPSILON))
    scale_row(k, size, np.float32(1.0) / length)
    total = zero(f32x16)
    for c in range(0, size, 16):
        total = fma(load_some(q + 4 * c, size - c), load_some(k + 4 * c, size - c), total)
    return lane_sum(total)


@inner
def open_gates(pair, ratio, a, dt, decay, beta):
    """Decay and beta of a key head's value heads, from its part of a row of ba: b, then alpha."""
    for i in range(ratio):
        store_f32(beta + 4 * i, sigmoid_of(load_f32(pair + 4 * i)))
        alpha = np.float64(load_f32(pair + 4 * (ratio + i))) + load_f32(dt + 4 * i)
        softplus = max(alpha, 0.0) + math.log1p(math.exp(-abs(alpha)))
        store_f32(decay + 4 * i, np.float32(math.exp(load_f32(a + 4 * i) * softplus)))


@operation
def delta_inputs(op, step, task, scratch):
    """Normalise the q and k of a token's key heads in place; their k.q, decay and beta.

    (qkv, bytes, ba, bytes, key heads, value heads, size, a, dt, kq (tokens, key heads),
     decay (tokens, value heads), beta (tokens, value heads), place in the journal,
     key heads of a task where tokens are few)
    The tasks of the first token do the pending ones as well, and write the journal. All rows but
    those of ba begin with the pending tokens.
    """
    qkv, qkv_bytes = argument(op, 0), argument(op, 1)
    ba, ba_bytes = argument(op, 2), argument(op, 3)
    key_heads, value_heads, size = argument(op, 4), argument(op, 5), argument(op, 6)
    a, dt = argument(op, 7), argument(op, 8)
    kq, decay, beta = argument(op, 9), argument(op, 10), argument(op, 11)
    ratio = value_heads // key_heads
    pending, tentative = word(step, PENDING), word(step, TENTATIVE)
    count = word(step, COUNT)
    journal_bytes = 8 * value_heads
    journal = word(step, JOURNAL) + argument(op, 12)
    journal += 4 * MOST_TENTATIVE * size * (2 * key_heads + value_heads)
    token, first, last = heads_of_task(step, task, key_heads, argument(op, 13))
    begin, end = pending + token, pending + token + 1
    if token == 0:
        begin, end = 0, pending + min(1, count)
    for head in range(first, last):
        place = 8 * ratio * head
        for t in range(begin, end):
            q = qkv + t * qkv_bytes + 4 * size * head
            overlap = normalize_pair(q, q + 4 * size * key_heads, size)
            store_f32(kq + 4 * (t * key_heads + head), overlap)
            if t < pending:
                pair = journal + t * journal_bytes + place
            else:
                pair = ba + (t - pending) * ba_bytes + place
            at, first_value = 4 * (t * value_heads + head * ratio), 4 * head * ratio
            open_gates(pair, ratio, a + first_value, dt + first_value, decay + at, beta + at)
        if token == 0:
            for i in range(tentative):
                source = ba + (count - tentative + i) * ba_bytes + place
                target = journal + i * journal_bytes + place
                for j in range(2 * ratio):
                    store_f32(target + 4 * j, load_f32(source + 4 * j))


@inner
def read_out(s, size, k, q):
    """S'k and S'q of a column block."""
    key0, key1, query0, query1 = zero(f32x16), zero(f32x16), zero(f32x16), zero(f32x16)
    for i in range(0, size - 1, 2):
        even, odd = load(f32x16, s + 64 * i), load(f32x16, s + 64 * i + 64)
        key0 = fma(even, load_f32(k + 4 * i), key0)
        query0 = fma(even, load_f32(q + 4 * i), query0)
        key1 = fma(odd, load_f32(k + 4 * i + 4), key1)
        query1 = fma(odd, load_f32(q + 4 * i + 4), query1)
    if size % 2 == 1:
        last = load(f32x16, s + 64 * (size - 1))
        key0 = fma(last, load_f32(k + 4 * (size - 1)), key0)
        query0 = fma(last, load_f32(q + 4 * (size - 1)), query0)
    return key0 + key1, query0 + query1


@inner
def moved(s, to, i, k, d, g):
    """Row i of S, moved on and stored at `to`."""
    row = fma(d, load_f32(k + 4 * i), load(f32x16, s + 64 * i) * g)
    store(to + 64 * i, row)
    return row


@inner
def move_and_read_out(s, to, size, k, d, g, next_k, next_q, after):
    """A column block moved on by d, and `read_out` of it for the next token.

    The row of the token after that lies `after` bytes later.
    """
    key0, key1, query0, query1 = zero(f32x16), zero(f32x16), zero(f32x16), zero(f32x16)
    for i in range(0, size - 1, 2):
        prefetch(next_k + 4 * i + after)
        prefetch(next_q + 4 * i + after)
        even = moved(s, to, i, k, d, g)
        key0 = fma(even, load_f32(next_k + 4 * i), key0)
        query0 = fma(even, load_f32(next_q + 4 * i), query0)
        odd = moved(s, to, i + 1, k, d, g)
        key1 = fma(odd, load_f32(next_k + 4 * i + 4), key1)
        query1 = fma(odd, load_f32(next_q + 4 * i + 4), query1)
    if size % 2 == 1:
        i = size - 1
        last = moved(s, to, i, k, d, g)
        key0 = fma(last, load_f32(next_k + 4 * i), key0)
        query0 = fma(last, load_f32(next_q + 4 * i), query0)
    return key0 + key1, query0 + query1


@inner
def move_and_read_out_both(s, other, to, other_to, size, k, d, e, g, next_k, next_q, after):
    """The same of two column blocks, by d and e, at once: rows of k and q are read once."""
    key0, key1, query0, query1 = zero(f32x16), zero(f32x16), zero(f32x16), zero(f32x16)
    key2, key3, query2, query3 = zero(f32x16), zero(f32x16), zero(f32x16), zero(f32x16)
    for i in range(0, size - 1, 2):
        prefetch(next_k + 4 * i + after)
        prefetch(next_q + 4 * i + after)
        even, even_other = moved(s, to, i, k, d, g), moved(other, other_to, i, k, e, g)
        x, y = load_f32(next_k + 4 * i), load_f32(next_q + 4 * i)
        key0, key2 = fma(even, x, key0), fma(even_other, x, key2)
        query0, query2 = fma(even, y, query0), fma(even_other, y, query2)
        odd, odd_other = moved(s, to, i + 1, k, d, g), moved(other, other_to, i + 1, k, e, g)
        x, y = load_f32(next_k + 4 * i + 4), load_f32(next_q + 4 * i + 4)
        key1, key3 = fma(odd, x, key1), fma(odd_other, x, key3)
        query1, query3 = fma(odd, y, query1), fma(odd_other, y, query3)
    if size % 2 == 1:
        i = size - 1
        last, last_other = moved(s, to, i, k, d, g), moved(other, other_to, i, k, e, g)
        x, y = load_f32(next_k + 4 * i), load_f32(next_q + 4 * i)
        key0, key2 = fma(last, x, key0), fma(last_other, x, key2)
        query0, query2 = fma(last, y, query0), fma(last_other, y, query2)
    return key0 + key1, query0 + query1, key2 + key3, query2 + query3


@inner
def move_pair(op, step, pair, scratch):
    """o of two column blocks of one head for every token of the batch, and S moved on."""
    qkv, qkv_bytes, kq = argument(op, 0), argument(op, 1), argument(op, 2)
    decay, beta = argument(op, 3), argument(op, 4)
    out, out_bytes = argument(op, 5), argument(op, 6)
    key_heads, value_heads, size = argument(op, 7), argument(op, 8), argument(op, 9)
    memory = word(step, STATE) + argument(op, 10)
    pending = word(step, PENDING)
    count = pending + word(step, COUNT)
    kept = count - word(step, TENTATIVE)
    blocks, ratio = (size + 15) // 16, value_heads // key_heads
    pairs = (blocks + 1) // 2
    head, block = pair // pairs, pair % pairs * 2
    s = memory + 64 * size * (head * blocks + block)
    other = s + 64 * size if block + 1 < blocks else scratch
    copy, other_copy = scratch + 64 * size, scratch + 128 * size
    left = size - 16 * block
    q = qkv + 4 * size * (head // ratio)
    k = q + 4 * size * key_heads
    v = qkv + 4 * size * (2 * key_heads + head) + 64 * block
    target = out + 4 * size * head + 64 * block
    if block + 1 == blocks:
        for i in range(size):
            store(other + 64 * i, zero(f32x16))
    key, query = read_out(s, size, k, q)
    other_key, other_query = read_out(other, size, k, q)
    for t in range(count):
        g = load_f32(decay + 4 * (t * value_heads + head))
        b = load_f32(beta + 4 * (t * value_heads + head))
        d = (load_some(v, left) - key * g) * b
        e = (load_some(v + 64, left - 16) - other_key * g) * b
        if t >= pending:
            overlap = load_f32(kq + 4 * (t * key_heads + head // ratio))
            store_some(target, fma(d, overlap, query * g), left)
            store_some(target + 64, fma(e, overlap, other_query * g), left - 16)
            target += out_bytes
        if t + 1 < count:
            to = s if t < kept else copy
            other_to = other if t < kept else other_copy
            next_k, next_q = k + qkv_bytes, q + qkv_bytes
            if BOTH:
                key, query, other_key, other_query = move_and_read_out_both(
                    s, other, to, other_to, size, k, d, e, g, next_k, next_q, qkv_bytes
                )
            else:
                key, query = move_and_read_out(s, to, size, k, d, g, next_k, next_q, qkv_bytes)
                other_key, other_query = move_and_read_out(
                    other, other_to, size, k, e, g, next_k, next_q, qkv_bytes
                )
            s, other = to, other_to
            k, q, v = next_k, next_q, v + qkv_bytes
            prefetch(v + qkv_bytes)
        elif t < kept:
            for i in range(size):
                moved(s, s, i, k, d, g)
                moved(other, other, i, k, e, g)


@operation
def delta_rule(op, step, task, scratch):
    """o for every token of the batch, and S moved on; a task is some pairs of column blocks.

    (qkv, bytes, kq, decay, beta, out, bytes, key heads, value heads, size, place in the state,
     pairs of a task)
    All inputs begin with the pending tokens.
    """
    used, every = argument(op, 11), argument(op, 8) * ((argument(op, 9) + 31) // 32)
    for pair in range(task * used, min((task + 1) * used, every)):
        move_pair(op, step, pair, scratch)


def column_pairs(value_heads: int, size: int) -> int:
    """Pairs of column blocks, of all heads; a head's last may be one alone."""
    return value_heads * -(-size // 32)


def scratch_bytes(size: int) -> int:
    """Scratch that `delta_rule` needs: the block that an odd number lacks, copies of two."""
    return 3 * 64 * size


def journal_bytes(key_heads: int, value_heads: int, size: int) -> int:
    """Bytes of a layer's part of the journal, rounded up to cache lines."""
    row = 4 * size * (2 * key_heads + value_heads) + 8 * value_heads
    return -(-MOST_TENTATIVE * row // 64) * 64


def memory_bytes(value_heads: int, size: int) -> int:
    """Bytes of one layer's delta memory: (heads, column blocks, size, 16) f32."""
    return value_heads * -(-size // 16) * size * 64
