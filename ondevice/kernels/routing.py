"""The routing record: which experts a batch's tokens go to, and where those are.

int64 words: number of tasks' experts (TOUCHED, those of a wave); addresses of int32 arrays: the
touched experts' numbers, where each one's slots begin (one more than experts), the slots, and the
slots' tokens. Where experts come from a pool (kernels/store.py), furthermore: how many are touched
in all, the first of this wave, how many have a slab, whether another wave follows; addresses of
their order (int32) and of their places (PLACE_WORDS int64 each, 0 without a pool), and of the
store; which slices of an expert the two products need, a bit for each.
"""

from ondevice.kernels.layout import WORD, are_few, word
from ondevice.kernels.linear import rows_of_task
from ondevice.kernels.simd import load_i32, load_i64
from quant.jit import inner

ROUTING_WORDS = 16
TOUCHED, NUMBERS, STARTS, SLOTS, SLOT_TOKENS = range(5)  # tasks are counted by the first
ALL, FIRST, ASSIGNED, AGAIN, ORDER, PLACES, STORE, GATE_UP_MASK, DOWN_MASK = range(5, 14)
PLACE_GATE, PLACE_UP, PLACE_DOWN, PLACE_WORD = range(4)  # addresses of matrices, of a slab's word
PLACE_KEEP = 4  # whether the expert is worth keeping
PLACE_WORDS = 5
WHOLE = 128
"""Experts from which on a task is one of them: several for each thread."""


@inner
def slots_of(routing, i):
    """How many slots the i-th touched expert has."""
    starts = word(routing, STARTS)
    return load_i32(starts + 4 * (i + 1)) - load_i32(starts + 4 * i)


@inner
def touched_expert(routing, index):
    """Which of the touched experts the index-th of this wave is."""
    order = word(routing, ORDER)
    if order == 0:
        return index
    return load_i32(order + 4 * (word(routing, FIRST) + index))


@inner
def task_slots(routing, index, count):
    """(expert, address of its slots, of their tokens, how many) of the index-th expert of a wave.

    Without a routing record: expert 0 with every token, and 0 for the identity.
    """
    if routing == 0:
        return 0, 0, 0, count
    i = touched_expert(routing, index)
    expert = load_i32(load_i64(routing + WORD * NUMBERS) + 4 * i)
    begin = load_i32(word(routing, STARTS) + 4 * i)
    slots = word(routing, SLOTS) + 4 * begin
    tokens = word(routing, SLOT_TOKENS) + 4 * begin
    return expert, slots, tokens, slots_of(routing, i)


@inner
def task_rows(routing, step, task, rows, chunk, runs):
    """(index of the expert in this wave, first row, number of rows) of a task.

    Of a chunk or a run of rows, as in kernels/linear.py; but where there are many experts one task
    does all rows of one, so that the records of its tokens stay in the caches, and the tasks of its
    other chunks have none.
    """
    pieces = (rows + chunk - 1) // chunk
    if runs != 0 and are_few(step):
        pieces = load_i32(runs)
    index, piece = task // pieces, task % pieces
    if routing != 0 and word(routing, TOUCHED) >= WHOLE:
        return index, 0, rows if piece == 0 else 0
    start, used = rows_of_task(step, piece, rows, chunk, runs)
    return index, start, used


@inner
def place_of(routing, index):
    """Address of the place of the index-th expert of a wave; 0 where experts are mapped."""
    if routing == 0 or word(routing, PLACES) == 0:
        return 0
    return word(routing, PLACES) + WORD * PLACE_WORDS * touched_expert(routing, index)
