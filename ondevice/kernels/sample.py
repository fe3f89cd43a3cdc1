"""Choosing the next token, inside the decode loop.

    logits of tokens among the last 64:  l / penalty where l > 0, l * penalty elsewhere
    temperature 0: the greatest logit, the lowest id among equals
    otherwise, in this order, as transformers does:
        p = softmax(l / temperature) over the top_k greatest (0: all)
        top_p: the fewest greatest whose sum reaches top_p;  min_p: those with p >= min_p max(p)
    and one draw. The random number is a hash of (seed, position), so a token does not depend on
    how many were asked for at once.

The sampler record (int64 words; f = a float64's bits): logits, vocabulary, temperature f, top_k,
top_p f, min_p f, penalty f, seed, address of one uint8 per token (1 ends the answer), scratch of
8 bytes per token. Logits come with their peaks (kernels/peaks.py).
"""

import math

import numpy as np

from ondevice.kernels.atomics import atomic_load
from ondevice.kernels.layout import (
    CANCEL,
    COUNT,
    HISTORY,
    HISTORY_LENGTH,
    NOT_FINITE,
    OUTCOME,
    PENDING,
    POSITION,
    REPEAT,
    SAMPLER,
    STEPS_LEFT,
    TOKENS,
    WORD,
    argument,
    word,
)
from ondevice.kernels.operation import operation
from ondevice.kernels.peaks import greatest_logit, note_peak
from ondevice.kernels.simd import (
    load_f32,
    load_f64,
    load_i32,
    load_u8,
    store_f32,
    store_i32,
    store_i64,
)
from quant.jit import inner

SAMPLER_WORDS = 16
LOGITS, VOCABULARY, TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, SEED, ENDS, SPACE = range(10)
PENALTY_WINDOW = 64


@inner
def penalize(logits, vocabulary, peaks, piece, penalty, history, length):
    """Once per distinct token among the last PENALTY_WINDOW; peaks follow."""
    start = max(0, length - PENALTY_WINDOW)
    for i in range(start, length):
        token = load_i32(history + 4 * i)
        seen = False
        for j in range(start, i):
            seen |= load_i32(history + 4 * j) == token
        if not seen:
            logit = load_f32(logits + 4 * token)
            value = logit / penalty if logit > 0 else logit * penalty
            store_f32(logits + 4 * token, np.float32(value))
            note_peak(logits, vocabulary, piece, token // piece, peaks)


@inner
def uniform(seed, position):
    """A number in [0, 1) from a seed and a position: two rounds of splitmix64 (Steele, 2014)."""
    z = np.uint64(seed) + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) / np.float64(1 << 53)


@inner
def before(values, a, b):
    """Whether item a is better than b: a greater value, then a lower index."""
    x, y = load_f32(values + 4 * a), load_f32(values + 4 * b)
    return x > y or (x == y and a < b)


@inner
def sift_down(values, heap, place, size):
    """Restore a heap whose root is the worst item."""
    item = load_i32(heap + 4 * place)
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        left = load_i32(heap + 4 * child)
        if other < size and before(values, left, load_i32(heap + 4 * other)):
            child, left = other, load_i32(heap + 4 * other)
        if not before(values, item, left):
            break
        store_i32(heap + 4 * place, left)
        place = child
    store_i32(heap + 4 * place, item)


@inner
def begin_heap(values, size, heap):
    """The first `size` items."""
    for item in range(size):
        store_i32(heap + 4 * item, item)
    for place in range(size // 2 - 1, -1, -1):
        sift_down(values, heap, place, size)


@inner
def keep_best(values, start, end, heap, size):
    """Take items start .. end into a heap of the `size` best ones so far, all before `start`."""
    for item in range(start, end):
        if before(values, item, load_i32(heap)):
            store_i32(heap, item)
            sift_down(values, heap, 0, size)


@inner
def worst(values, heap):
    """The value of the worst item of a heap."""
    return load_f32(values + 4 * load_i32(heap))


@inner
def best_candidates(logits, vocabulary, peaks, piece, size, heap):
    """The `size` best tokens, best first, at `heap`."""
    pieces = (vocabulary + piece - 1) // piece
    least = np.float32(-np.inf)
    if size < pieces:
        # so many peaks are logits of so many tokens: those below the last of them are none of it
        begin_heap(peaks, size, heap)
        keep_best(peaks, size, pieces, heap, size)
        least = worst(peaks, heap)
    begin_heap(logits, size, heap)
    for index in range(size // piece, pieces):
        peak = load_f32(peaks + 4 * index)
        # later tokens are better by a greater logit only
        if peak >= least and peak > worst(logits, heap):
            start = index * piece
            keep_best(logits, max(start, size), min(start + piece, vocabulary), heap, size)
    for last in range(size - 1, 0, -1):
        root, final = load_i32(heap), load_i32(heap + 4 * last)
        store_i32(heap, final)
        store_i32(heap + 4 * last, root)
        sift_down(logits, heap, 0, last)


@inner
def draw(sampler, logits, peaks, piece, position):
    """One token from the candidates that the options leave."""
    vocabulary = word(sampler, VOCABULARY)
    temperature = load_f64(sampler + WORD * TEMPERATURE)
    top_k = word(sampler, TOP_K)
    candidates = vocabulary if top_k <= 0 or top_k > vocabulary else top_k
    heap = word(sampler, SPACE)
    shares = heap + 4 * vocabulary
    best_candidates(logits, vocabulary, peaks, piece, candidates, heap)
    top = np.float64(load_f32(logits + 4 * load_i32(heap)))
    total = 0.0
    for i in range(candidates):
        logit = np.float64(load_f32(logits + 4 * load_i32(heap + 4 * i)))
        share = math.exp((logit - top) / temperature)
        store_f32(shares + 4 * i, np.float32(share))
        total += share
    top_p = load_f64(sampler + WORD * TOP_P)
    min_p = load_f64(sampler + WORD * MIN_P)
    kept, mass = 0, 0.0
    while kept < candidates:
        share = np.float64(load_f32(shares + 4 * kept))
        if kept > 0 and (mass >= top_p * total or share < min_p):
            break
        mass += share
        kept += 1
    target = uniform(word(sampler, SEED), position) * mass
    for i in range(kept):
        target -= np.float64(load_f32(shares + 4 * i))
        if target < 0:
            return load_i32(heap + 4 * i)
    return load_i32(heap + 4 * (kept - 1))


@inner
def choose(sampler, logits, peaks, piece, history, length, position):
    """The token at `position`, after a history of `length` tokens; -1 if a logit is not finite.

    It depends on nothing else: not on how many tokens are chosen in a step. `logits` and `peaks`
    are those of one row.
    """
    vocabulary = word(sampler, VOCABULARY)
    penalty = load_f64(sampler + WORD * PENALTY)
    if penalty != 1.0:
        penalize(logits, vocabulary, peaks, piece, penalty, history, length)
    chosen = greatest_logit(logits, vocabulary, piece, peaks)
    if chosen >= 0 and load_f64(sampler + WORD * TEMPERATURE) > 0.0:
        chosen = draw(sampler, logits, peaks, piece, position)
    return chosen


@operation
def sample(op, step, task, scratch):
    """Choose a token, append it to the history, and say whether the program runs again.

    (peaks, piece)
    """
    peaks, piece = argument(op, 0), argument(op, 1)
    store_i64(step + WORD * REPEAT, 0)
    store_i64(step + WORD * PENDING, 0)  # this step has taken them into the memory
    position = word(step, POSITION) + word(step, COUNT)
    store_i64(step + WORD * POSITION, position)
    sampler = word(step, SAMPLER)
    history, length = word(step, HISTORY), word(step, HISTORY_LENGTH)
    chosen = choose(sampler, word(sampler, LOGITS), peaks, piece, history, length, position)
    if chosen < 0:
        store_i64(step + WORD * OUTCOME, NOT_FINITE)
        return
    store_i32(history + 4 * length, chosen)
    store_i64(step + WORD * HISTORY_LENGTH, length + 1)
    store_i32(word(step, TOKENS), chosen)
    left = word(step, STEPS_LEFT) - 1
    store_i64(step + WORD * STEPS_LEFT, left)
    ended = load_u8(word(sampler, ENDS) + chosen) != 0
    if left > 0 and not ended and atomic_load(step + WORD * CANCEL) == 0:
        store_i64(step + WORD * REPEAT, 1)
