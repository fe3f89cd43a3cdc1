"""Guessing tokens ahead and checking the guesses, inside the decode loop.

A cycle of the loop makes *drafts* of the next tokens, takes them in one batch with the token that
is next for certain, chooses a token for each row of that batch as plain decoding would, and goes on
after the first draft that is another token than the one chosen. Since a row's logits depend neither
on the batch nor on the rows after it, and a random number on the position alone, the answer is that
of plain decoding, byte for byte, at any temperature.

Drafts are made by the multi-token-prediction block (layers/mtp.py), or else are what followed the
last tokens when they were there before (Saxena, 2023, "Prompt Lookup Decoding").

The block has a cache and positions of its own, from the trunk's position START on, and is up to
date before END. It reads the trunk's vectors after the final norm: the ring keeps those of the last
RING_ROWS positions, position p in row p % RING_ROWS; as many as a batch has, and some for drafts.

The record (int64 words): depth wanted; drafts of this cycle; drafts made so far; whether there are
more to make; the trunk's position and cache while the block runs; the block's cache, start and end;
the ring; the tokens to check, int32, the certain one first; for tests, the true tokens by position,
how many, and the chance (f64) that a draft is true; cycles; per place, how often a draft was
compared with the token chosen, and how often it was that token; drafts in all; cycles that this run
of the loop may still make; rows of the ring.
"""

import numpy as np

from ondevice.kernels.activation import quantize_row
from ondevice.kernels.atomics import atomic_load
from ondevice.kernels.delta import MOST_TENTATIVE
from ondevice.kernels.expand import call_expand
from ondevice.kernels.layout import (
    ARGUMENTS,
    CACHE,
    CANCEL,
    COUNT,
    FIRST,
    HISTORY,
    HISTORY_LENGTH,
    NOT_FINITE,
    OUTCOME,
    PENDING,
    POSITION,
    REPEAT,
    SAMPLER,
    STEPS_LEFT,
    TENTATIVE,
    TOKENS,
    WORD,
    argument,
    word,
)
from ondevice.kernels.norm import normalize
from ondevice.kernels.operation import operation
from ondevice.kernels.peaks import greatest_logit
from ondevice.kernels.sample import ENDS, LOGITS, choose, uniform
from ondevice.kernels.simd import (
    f32x16,
    load,
    load_f32,
    load_f64,
    load_i32,
    load_some,
    load_u8,
    store,
    store_i32,
    store_i64,
    store_some,
)
from quant.jit import inner

MOST_DRAFTS = MOST_TENTATIVE
DEPTH, DRAFTED, MADE, MORE, AT, TRUNK_CACHE, HEAD_CACHE, START, END = range(9)
RING, CHECKED, TRUTH, TRUTH_LENGTH, CHANCE, CYCLES = range(9, 15)
COMPARED, RIGHT = 15, 15 + MOST_DRAFTS
TOTAL = RIGHT + MOST_DRAFTS
CYCLES_LEFT = TOTAL + 1
RING_ROWS = CYCLES_LEFT + 1
RECORD_WORDS = RING_ROWS + 1
LONGEST_MATCH = 4
SHORTEST_MATCH = 2


@operation
def remember(op, step, t, scratch):
    """Keep the vector of a row in the ring, if there is one: (record, x, bytes, columns)."""
    record, x, x_bytes = argument(op, 0), argument(op, 1), argument(op, 2)
    columns, ring = argument(op, 3), word(record, RING)
    if ring != 0:
        position = word(step, POSITION) + word(step, FIRST) + t
        target = ring + 4 * columns * (position % word(record, RING_ROWS))
        for c in range(0, columns, 16):
            left = columns - c
            store_some(target + 4 * c, load_some(x + t * x_bytes + 4 * c, left), left)


@operation
def head_inputs(op, step, t, scratch):
    """norm(embedding of the next token), then norm(hidden), as floats and as int8 records.

    (record, table, row bytes, columns, expand kernel, embedding norm, hidden norm, epsilon, the
     block's own last hidden, out, bytes, per_256, bytes, per_32, bytes)
    Rows are positions of the block. Before a cycle's first draft is made, hidden vectors are the
    ring's and tokens the history's, afterwards the block's own.
    """
    record, table, row_bytes = argument(op, 0), argument(op, 1), argument(op, 2)
    columns, expand = argument(op, 3), argument(op, 4)
    embedding_norm, hidden_norm = argument(op, 5), argument(op, 6)
    epsilon = load_f32(op + WORD * (ARGUMENTS + 7))
    hidden, out = argument(op, 8), argument(op, 9) + t * argument(op, 10)
    per_256, per_32 = argument(op, 11), argument(op, 13)
    made = word(record, MADE)
    if made == 0:
        position = word(record, START) + word(step, POSITION) + t
        row = position % word(record, RING_ROWS)
        hidden = word(record, RING) + 4 * columns * row
        token = load_i32(word(step, HISTORY) + 4 * (position + 1))
    else:
        token = load_i32(word(record, CHECKED) + 4 * made)
    call_expand(expand, (table + token * row_bytes, columns, out))
    normalize(out, columns, embedding_norm, epsilon, out)
    normalize(hidden, columns, hidden_norm, epsilon, out + 4 * columns)
    at_256 = per_256 + t * argument(op, 12) if per_256 != 0 else 0
    at_32 = per_32 + t * argument(op, 14) if per_32 != 0 else 0
    quantize_row(out, 2 * columns, at_256, at_32)


@operation
def begin_cycle(op, step, task, scratch):
    """Give the step to the block, the positions that it lacks being the batch: (record)."""
    record = argument(op, 0)
    position = word(step, POSITION)
    store_i64(record + WORD * AT, position)
    store_i64(record + WORD * TRUNK_CACHE, word(step, CACHE))
    store_i64(record + WORD * DRAFTED, min(word(record, DEPTH), word(step, STEPS_LEFT) - 1))
    store_i64(record + WORD * MADE, 0)
    store_i64(step + WORD * CACHE, word(record, HEAD_CACHE))
    store_i64(step + WORD * POSITION, word(record, END) - word(record, START))
    store_i64(step + WORD * COUNT, position - word(record, END))
    store_i64(step + WORD * FIRST, 0)


@operation
def take_last(op, step, task, scratch):
    """Make the last row of the batch the batch: (x, bytes) of all that is computed already, up to
    four buffers; 0 for none.
    """
    last = word(step, COUNT) - 1
    if last > 0:
        for i in range(4):
            x, x_bytes = argument(op, 2 * i), argument(op, 2 * i + 1)
            for at in range(0, x_bytes, 64):
                store(x + at, load(f32x16, x + last * x_bytes + at))
    store_i64(step + WORD * POSITION, word(step, POSITION) + last)
    store_i64(step + WORD * COUNT, 1)


@inner
def add_draft(record, step, token, vocabulary):
    """Put a draft behind those of this cycle, or for tests the truth or what is not the truth."""
    made = word(record, MADE) + 1
    position = word(record, AT) + made
    truth = word(record, TRUTH)
    if truth != 0 and position < word(record, TRUTH_LENGTH):
        token = load_i32(truth + 4 * position)
        if uniform(made, position) >= load_f64(record + WORD * CHANCE):
            token = (token + 1) % vocabulary
    store_i32(word(record, CHECKED) + 4 * made, token)
    store_i64(record + WORD * MADE, made)


@operation
def draft(op, step, task, scratch):
    """The token of the greatest logit is the next draft; where it was not the last, the batch is
    the next position.

    (record, logits, how many, logits of a piece, peaks, vocabulary, common, others)
    Logits from `common` on are those of the tokens that `others` lists, int32.
    """
    record, logits, count = argument(op, 0), argument(op, 1), argument(op, 2)
    token = max(0, greatest_logit(logits, count, argument(op, 3), argument(op, 4)))
    common, others = argument(op, 6), argument(op, 7)
    if token >= common:
        token = load_i32(others + 4 * (token - common))
    add_draft(record, step, token, argument(op, 5))
    more = word(record, MADE) < word(record, DRAFTED)
    store_i64(record + WORD * MORE, 1 if more else 0)
    store_i64(step + WORD * POSITION, word(step, POSITION) + 1)


@inner
def take_drafts(record, step):
    """Make the certain token and the drafts the batch."""
    made, position = word(record, MADE), word(record, AT)
    checked = word(record, CHECKED)
    store_i32(checked, load_i32(word(step, HISTORY) + 4 * position))
    store_i64(step + WORD * POSITION, position)
    store_i64(step + WORD * COUNT, 1 + made)
    store_i64(step + WORD * TENTATIVE, made)
    store_i64(step + WORD * TOKENS, checked)
    store_i64(step + WORD * FIRST, 0)


@operation
def begin_check(op, step, task, scratch):
    """Give the step back to the trunk, with the drafts: (record)."""
    record = argument(op, 0)
    store_i64(step + WORD * CACHE, word(record, TRUNK_CACHE))
    store_i64(record + WORD * END, word(record, AT))
    take_drafts(record, step)


@operation
def look_up(op, step, task, scratch):
    """Drafts: what followed the longest match of the last tokens, the latest of equal ones.

    (record, vocabulary)
    """
    record, history = argument(op, 0), word(step, HISTORY)
    position = word(step, POSITION)
    store_i64(record + WORD * AT, position)
    store_i64(record + WORD * MADE, 0)
    wanted = min(word(record, DEPTH), word(step, STEPS_LEFT) - 1)
    place, longest = 0, SHORTEST_MATCH - 1
    last = load_i32(history + 4 * position)
    for other in range(position - 1, -1, -1):
        if load_i32(history + 4 * other) == last:
            length = 1
            while (
                length < LONGEST_MATCH
                and other >= length
                and load_i32(history + 4 * (other - length))
                == load_i32(history + 4 * (position - length))
            ):
                length += 1
            if length > longest:
                place, longest = other + 1, length
                if length == LONGEST_MATCH:
                    break
    if longest >= SHORTEST_MATCH:
        # what follows may run into the drafts themselves
        checked = word(record, CHECKED)
        for i in range(wanted):
            at = place + i
            if at <= position:
                token = load_i32(history + 4 * at)
            else:
                token = load_i32(checked + 4 * (at - position))
            add_draft(record, step, token, argument(op, 1))
    take_drafts(record, step)


@operation
def accept(op, step, task, scratch):
    """Choose the tokens after the rows up to the first wrong draft.

    (record, bytes of logits, peaks, bytes, piece)
    """
    record, row_bytes = argument(op, 0), argument(op, 1)
    peaks, peaks_bytes, piece = argument(op, 2), argument(op, 3), argument(op, 4)
    sampler, history = word(step, SAMPLER), word(step, HISTORY)
    logits, checked = word(sampler, LOGITS), word(record, CHECKED)
    position, count = word(step, POSITION), word(step, COUNT)
    length, left = word(step, HISTORY_LENGTH), word(step, STEPS_LEFT)
    store_i64(step + WORD * REPEAT, 0)
    store_i64(step + WORD * TENTATIVE, 0)
    store_i64(record + WORD * CYCLES, word(record, CYCLES) + 1)
    store_i64(record + WORD * TOTAL, word(record, TOTAL) + count - 1)
    accepted, row, ended = 0, 0, False
    while True:
        at = (logits + row * row_bytes, peaks + row * peaks_bytes)
        chosen = choose(sampler, *at, piece, history, length, position + row + 1)
        if chosen < 0:
            store_i64(step + WORD * OUTCOME, NOT_FINITE)
            ended = True
            break
        store_i32(history + 4 * length, chosen)
        length += 1
        left -= 1
        ended = load_u8(word(sampler, ENDS) + chosen) != 0
        row += 1
        if row == count:
            break
        right = load_i32(checked + 4 * row) == chosen
        compared = record + WORD * (COMPARED + row - 1)
        store_i64(compared, word(compared, 0) + 1)
        if not right:
            break
        store_i64(compared + WORD * MOST_DRAFTS, word(compared, MOST_DRAFTS) + 1)
        if ended or left == 0:
            break
        accepted = row
    store_i64(step + WORD * HISTORY_LENGTH, length)
    store_i64(step + WORD * STEPS_LEFT, left)
    store_i64(step + WORD * POSITION, position + 1 + accepted)
    store_i64(step + WORD * PENDING, accepted)
    cycles = word(record, CYCLES_LEFT) - 1
    store_i64(record + WORD * CYCLES_LEFT, cycles)
    if cycles > 0 and left > 1 and not ended and atomic_load(step + WORD * CANCEL) == 0:
        store_i64(step + WORD * REPEAT, 1)


@operation
def settled(op, step, task, scratch):
    """Pending tokens are in the memory now: the last of a program, so that none is run twice."""
    store_i64(step + WORD * PENDING, 0)


def ring_rows(batch: int) -> int:
    """Rows of the ring of a block that can be a batch behind."""
    return batch + -(-MOST_DRAFTS // 16) * 16


def new_record(batch: int) -> np.ndarray:
    """A record with room for the tokens to check behind its words."""
    record = np.zeros(RECORD_WORDS + (2 + MOST_DRAFTS) // 2 + 1, np.int64)
    record[CHECKED] = record[RECORD_WORDS:].ctypes.data
    record[RING_ROWS] = ring_rows(batch)
    return record
