"""The sparse layer: route each token to its experts, then run every touched expert once.

    probabilities = softmax(router logits) over all experts
    weights       = the k greatest, divided by their sum
    y             = sum over the k of weight * down(silu(gate(x)) * up(x))
                    + sigmoid(s) * shared(x)

A *slot* is a (token, choice) pair, number token * k + choice. `group` sorts the slots by expert;
a task of the products is one touched expert and some of its rows, or all of them, with all of its
slots, so a batch reads each touched expert once. Results are kept per slot and added up per
token in the order of choice, so a token's result does not depend on the batch.

Experts are read where the file maps them, or from a pool (kernels/store.py).
"""

import numpy as np

from ondevice.kernels.activation import (
    exponential,
    odd_lines,
    quantize_row,
    sigmoid_of,
    silu_times,
)
from ondevice.kernels.arithmetic import fma, lane_maximum, lane_sum, maximum
from ondevice.kernels.layout import COUNT, WORD, argument, word
from ondevice.kernels.linear import call_rows
from ondevice.kernels.operation import operation
from ondevice.kernels.routing import (
    AGAIN,
    ALL,
    DOWN_MASK,
    GATE_UP_MASK,
    NUMBERS,
    PLACE_DOWN,
    PLACE_GATE,
    PLACE_UP,
    SLOT_TOKENS,
    SLOTS,
    STARTS,
    STORE,
    TOUCHED,
    place_of,
    task_rows,
    task_slots,
)
from ondevice.kernels.simd import (
    f32x16,
    load,
    load_f32,
    load_i32,
    load_i64,
    load_some,
    splat,
    store_f32,
    store_i32,
    store_i64,
    store_some,
    zero,
)
from ondevice.kernels.store import await_slices
from quant.jit import inner

ROOM = 576 << 10
"""Bytes of gate and up products that a task keeps: of 128 slots where experts have 512 rows."""


@operation
def route(op, step, t, scratch):
    """A token's experts and their weights.

    (logits, bytes, experts, k, chosen int32 (tokens, k), weights f32 (tokens, k))
    """
    logits, logits_bytes = argument(op, 0), argument(op, 1)
    experts, k = argument(op, 2), argument(op, 3)
    chosen, weights = argument(op, 4), argument(op, 5)
    lowest = np.float32(-np.inf)
    row = logits + t * logits_bytes
    numbers, shares = chosen + 4 * k * t, weights + 4 * k * t
    spoilt = zero(f32x16)  # not 0 where a logit is not finite
    for expert in range(0, experts, 16):
        spoilt = fma(load_some(row + 4 * expert, experts - expert), np.float32(0), spoilt)
    total, top = lane_sum(spoilt), np.float32(0)
    for choice in range(k):
        greatest = splat(f32x16, lowest)
        for expert in range(0, experts - 15, 16):
            greatest = maximum(load(f32x16, row + 4 * expert), greatest)
        best_logit = lane_maximum(greatest)
        for expert in range(experts // 16 * 16, experts):
            best_logit = max(best_logit, load_f32(row + 4 * expert))
        best = 0
        while best < experts - 1 and load_f32(row + 4 * best) != best_logit:
            best += 1
        store_i32(numbers + 4 * choice, best)
        store_f32(row + 4 * best, lowest)
        if choice == 0:
            top = best_logit
        share = lane_maximum(exponential(splat(f32x16, best_logit - top)))
        store_f32(shares + 4 * choice, share)
        total += share
    for choice in range(k):
        store_f32(shares + 4 * choice, load_f32(shares + 4 * choice) / total)


@operation
def group(op, step, task, scratch):
    """Sort the slots by expert: (chosen, experts, k, routing record)."""
    chosen, experts = argument(op, 0), argument(op, 1)
    k, routing = argument(op, 2), argument(op, 3)
    numbers, starts = load_i64(routing + WORD * NUMBERS), load_i64(routing + WORD * STARTS)
    slots, tokens = load_i64(routing + WORD * SLOTS), load_i64(routing + WORD * SLOT_TOKENS)
    slot_count = word(step, COUNT) * k
    # numbers holds each expert's count, then its next place, and at last the touched experts
    for expert in range(experts):
        store_i32(numbers + 4 * expert, 0)
    for slot in range(slot_count):
        at = numbers + 4 * load_i32(chosen + 4 * slot)
        store_i32(at, load_i32(at) + 1)
    place = 0
    for expert in range(experts):
        size = load_i32(numbers + 4 * expert)
        store_i32(numbers + 4 * expert, place)
        place += size
    for slot in range(slot_count):
        at = numbers + 4 * load_i32(chosen + 4 * slot)
        place = load_i32(at)
        store_i32(slots + 4 * place, slot)
        store_i32(tokens + 4 * place, slot // k)
        store_i32(at, place + 1)
    touched, begin = 0, 0
    for expert in range(experts):
        end = load_i32(numbers + 4 * expert)
        if end > begin:
            store_i32(numbers + 4 * touched, expert)
            store_i32(starts + 4 * touched, begin)
            touched += 1
        begin = end
    store_i32(starts + 4 * touched, begin)
    store_i64(routing + WORD * TOUCHED, touched)
    store_i64(routing + WORD * ALL, touched)
    store_i64(routing + WORD * AGAIN, 0)


row_stride = inner(odd_lines)


def gate_up_scratch(rows: int) -> int:
    """Scratch that `gate_up` needs for matrices of so many rows, besides that of the products."""
    return max(ROOM, 2 * odd_lines(4 * rows))


@operation
def gate_up(op, step, task, scratch):
    """out := silu(gate x) * (up x) for each slot.

    (gate, expert bytes, row bytes, kernel, x, bytes, up, expert bytes, row bytes, kernel, x, bytes,
     rows, columns, out, bytes, routing record or 0, rows of a chunk, runs or 0, scratch of the
     products)
    Both products stay in scratch, and in the caches: of as many slots at a time as have ROOM.
    """
    gate, gate_bytes, gate_row = argument(op, 0), argument(op, 1), argument(op, 2)
    gate_kernel, gate_x, gate_x_bytes = argument(op, 3), argument(op, 4), argument(op, 5)
    up, up_bytes, up_row = argument(op, 6), argument(op, 7), argument(op, 8)
    up_kernel, up_x, up_x_bytes = argument(op, 9), argument(op, 10), argument(op, 11)
    rows, columns = argument(op, 12), argument(op, 13)
    out, out_bytes = argument(op, 14), argument(op, 15)
    routing, chunk, runs = argument(op, 16), argument(op, 17), argument(op, 18)
    index, start, used = task_rows(routing, step, task, rows, chunk, runs)
    if used == 0:
        return
    expert, slots, tokens, size = task_slots(routing, index, word(step, COUNT))
    gate, up = gate + expert * gate_bytes, up + expert * up_bytes
    place = place_of(routing, index)
    if place != 0:
        store = word(routing, STORE)
        if not await_slices(store, step, place, word(routing, GATE_UP_MASK), scratch):
            return
        gate, up = word(place, PLACE_GATE), word(place, PLACE_UP)
    gate, up, out = gate + start * gate_row, up + start * up_row, out + 4 * start
    stride = row_stride(4 * used)
    most = max(1, ROOM // (2 * stride))
    g = scratch + argument(op, 19)
    u = g + most * stride
    for first in range(0, size, most):
        count = min(most, size - first)
        listed, skipped = (tokens + 4 * first, 0) if tokens != 0 else (0, first)
        x = (gate_x + skipped * gate_x_bytes, gate_x_bytes, listed)
        call_rows(gate_kernel, (gate, gate_row, used, columns, *x, g, stride, 0, count, scratch))
        x = (up_x + skipped * up_x_bytes, up_x_bytes, listed)
        call_rows(up_kernel, (up, up_row, used, columns, *x, u, stride, 0, count, scratch))
        for i in range(count):
            slot = load_i32(slots + 4 * (first + i)) if slots != 0 else first + i
            silu_times(g + i * stride, u + i * stride, used, out + slot * out_bytes)


@operation
def down(op, step, task, scratch):
    """out = down x for each slot.

    (weights, expert bytes, row bytes, kernel, x, bytes, rows, columns, out, bytes,
     routing record or 0, rows of a chunk, runs or 0)
    """
    weights, expert_bytes, row_bytes = argument(op, 0), argument(op, 1), argument(op, 2)
    kernel, x, x_bytes = argument(op, 3), argument(op, 4), argument(op, 5)
    rows, columns = argument(op, 6), argument(op, 7)
    out, out_bytes = argument(op, 8), argument(op, 9)
    routing, chunk, runs = argument(op, 10), argument(op, 11), argument(op, 12)
    index, start, used = task_rows(routing, step, task, rows, chunk, runs)
    if used == 0:
        return
    expert, slots, _, size = task_slots(routing, index, word(step, COUNT))
    weights += expert * expert_bytes
    place = place_of(routing, index)
    if place != 0:
        store = word(routing, STORE)
        if not await_slices(store, step, place, word(routing, DOWN_MASK), scratch):
            return
        weights = word(place, PLACE_DOWN)
    w = weights + start * row_bytes
    source = (x, x_bytes, slots)
    to = (out + 4 * start, out_bytes, slots)
    call_rows(kernel, (w, row_bytes, used, columns, *source, *to, size, scratch))


@operation
def quantize(op, step, index, scratch):
    """The int8 records of the slots of one expert of a wave.

    (floats, bytes, columns, per_256, bytes, per_32, bytes, routing record)
    """
    x, x_bytes, columns = argument(op, 0), argument(op, 1), argument(op, 2)
    per_256, per_256_bytes = argument(op, 3), argument(op, 4)
    per_32, per_32_bytes = argument(op, 5), argument(op, 6)
    _, slots, _, size = task_slots(argument(op, 7), index, 0)
    for i in range(size):
        slot = load_i32(slots + 4 * i)
        at_256 = per_256 + slot * per_256_bytes if per_256 != 0 else 0
        at_32 = per_32 + slot * per_32_bytes if per_32 != 0 else 0
        quantize_row(x + slot * x_bytes, columns, at_256, at_32)


@operation
def combine(op, step, t, scratch):
    """x += the experts' weighted outputs + sigmoid(gate) * the shared expert's.

    (x, bytes, columns, experts' out, bytes, k, weights, shared out, bytes, gate logits, bytes)
    """
    x, x_bytes, columns = argument(op, 0), argument(op, 1), argument(op, 2)
    outputs, out_bytes = argument(op, 3), argument(op, 4)
    k, weights = argument(op, 5), argument(op, 6)
    shared, shared_bytes = argument(op, 7), argument(op, 8)
    gate, gate_bytes = argument(op, 9), argument(op, 10)
    row, shared_row = x + t * x_bytes, shared + t * shared_bytes
    openness = sigmoid_of(load_f32(gate + t * gate_bytes))
    for c in range(0, columns, 16):
        left = columns - c
        total = load_some(shared_row + 4 * c, left) * openness
        for choice in range(k):
            slot = t * k + choice
            value = load_some(outputs + slot * out_bytes + 4 * c, left)
            total = fma(value, load_f32(weights + 4 * slot), total)
        store_some(row + 4 * c, load_some(row + 4 * c, left) + total, left)
