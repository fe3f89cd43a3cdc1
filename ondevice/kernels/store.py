"""The bounded pool of experts, natively: who has a slab, who is wanted, and who reads.

An expert's *slices* are the tensors it has rows in (gate, up, down; or gate and up as one, down).
They lie in one *slab* of the pool, each in an area of its own, as the file has them: an area begins
with the block of BLOCK bytes that the slice begins in, since direct reads know only whole blocks.
Slabs of one size make a *shelf*, a list from the least to the most recently used.

Each slab has a *word*: bits 0-7 say which slices are there, bits 8-15 which a reader has taken, the
rest counts the experts that the slab was given to. A wanted slice is a *unit* in one of two rings,
demand and guesses; a reader waits for a byte in a pipe, takes units, demand first, until there are
no more, and marks each as taken in the slab's word, unless the slab is another expert's by now or
another reader was first. Where few experts are missing no more than GUESS_READERS of the readers
are at guesses, so that what is demanded does not wait behind them.

`claim` runs between the router and the experts' products. It orders the touched experts: those that
are there, those on their way, those to be read, and gives the last of them slabs. Where not all of
them fit they go in waves: while half of those that have a slab are worked on the other half is
read, and `claim_more` frees the first half for others. Products wait for their slices
(`await_slices`), `down` for the last one of them, which is read last.

`guess` asks for the experts of the next layer, and of the one after it, before their routers have
spoken, as those judge the stream that enters this layer's experts. What was guessed is the first to
go if it was not wanted then. Without misses for a while nothing is guessed, and only one layer
ahead where the disk is busy anyway.

A slab's *claim* says who wants it: 2 turn for an expert that a layer's *turn* is expected to want,
2 turn + 1 for one that it does want, which is not taken away while it runs.

A prompt's batch touches most experts once. Of those, each layer keeps its QUOTA most used ones; the
others pass through slabs that all layers share, so that a batch does not push out what the layers
after it still have.
"""

import functools
import sys

from numba.core import types

from ondevice.kernels.atomics import atomic_add, atomic_exchange, atomic_load, atomic_store, pause
from ondevice.kernels.calls import function_call
from ondevice.kernels.layout import (
    ABORT,
    COUNT,
    OUTCOME,
    READ_FAILED,
    WORD,
    argument,
    word,
)
from ondevice.kernels.operation import operation
from ondevice.kernels.routing import (
    AGAIN,
    ALL,
    ASSIGNED,
    FIRST,
    NUMBERS,
    ORDER,
    PLACE_DOWN,
    PLACE_GATE,
    PLACE_KEEP,
    PLACE_UP,
    PLACE_WORD,
    PLACE_WORDS,
    PLACES,
    TOUCHED,
    slots_of,
)
from ondevice.kernels.simd import load_i32, load_i64, store_i32, store_i64
from quant.jit import Compiled, inner

BLOCK = 4096
MOST_SLICES = 3
MOST_READERS = 8
LINE = 16  # words, on lines of their own

# a ring of units
TAKEN, PUSHED, UNITS, MASK = 0, LINE, 2 * LINE, 2 * LINE + 1
RING_WORDS = 3 * LINE
UNIT_WORDS = 4  # layer, expert, slice | slab << 8, what counts the slab's experts

# the store
FAILED, FAULT = 0, 1  # 1 once a read failed; layer, expert and slice then
STOPPING = 4
DEMAND, GUESSES, LAYERS, TURN = range(5, 9)
PIPE_INPUT, PIPE_OUTPUT, READ, WRITE, NAP, CLOCK, READ_AT = range(9, 16)
HITS, LATE, MISSES, WAITED, BYTES, READING, GUESSED = (LINE * n for n in range(1, 8))  # counters
SPACES = 8 * LINE  # a line for each reader
GUESSING, QUIET, HIT_SHARE, FEW_GUESSES, MANY_GUESSES = range(16 * LINE, 16 * LINE + 5)
INTERVALS, OPEN_INTERVALS, DISK = range(16 * LINE + 5, 16 * LINE + 8)  # counts, ondevice/usage.py
DECODING = 16 * LINE + 8  # whether the last batch was not a prompt's
GUESSING_FAR = 16 * LINE + 9  # whether the experts of the layer after the next one are guessed
BYTES_TO_READERS = 17 * LINE
GUESS_READS = 18 * LINE  # readers that are at guesses
STORE_WORDS = GUESS_READS + LINE

# a layer's experts
SHELF, SLICES, SLABS_OF, USES, EXPERTS = range(5)
GATE_SLICE, UP_SLICE, UP_OFFSET, DOWN_SLICE = range(5, 9)
LAST_USED, NOW = 9, 10  # int32 array: by which token, from 1 on; tokens so far
SLICE = 11  # first word of the first slice
FILE, OFFSET, STRIDE, SIZE, AREA = range(5)
SLICE_WORDS = 5
LAYER_WORDS = SLICE + SLICE_WORDS * MOST_SLICES

# a shelf
SLABS, SLAB_BYTES, MEMORY, NEXT, PREVIOUS, HOLDERS, WORDS, CLAIMS, QUOTA = range(9)
SHELF_WORDS = 9
NOBODY = -1

SPINS, NAP_LENGTH = 200, 20
BATCH = 32
"""Tokens from which on a batch is a prompt's: it touches most experts once and for all."""
AHEAD = 4
"""One in so many of the next layer's experts are read ahead for a prompt's batch: enough for the
disk to have work while nothing is being asked for."""
CALM = 200
"""Layers without a miss after which there is nothing to guess."""
DISK_BOUND = int(0.75 * (1 << 16))
"""Share of hits (in 1/65536) up to which the disk has no time for wrong guesses."""
GUESS_READERS = 2
"""They get what the disk gives, or nearly: docs/log.md."""

call_pipe = function_call(3, types.int32)
call_read_at = function_call(4, types.int64)
call_nap = function_call(1, types.int32)
call_clock = function_call(2, types.int32)
MONOTONIC = 6 if sys.platform == "darwin" else 1
reader_life = functools.partial(Compiled, signature=types.void(types.int64, types.int64))


@inner
def count_up(store, counter, more):
    atomic_add(store + WORD * counter, more)


# ---- the list of a shelf: the sentinel's next is the least recently used ----


@inner
def unlink(shelf, slab):
    following, before = word(shelf, NEXT), word(shelf, PREVIOUS)
    n, p = load_i32(following + 4 * slab), load_i32(before + 4 * slab)
    store_i32(following + 4 * p, n)
    store_i32(before + 4 * n, p)


@inner
def link(shelf, slab, recent):
    """Put a slab at the recently used end of the list, or at the other."""
    following, before = word(shelf, NEXT), word(shelf, PREVIOUS)
    sentinel = word(shelf, SLABS)
    if recent:
        n, p = sentinel, load_i32(before + 4 * sentinel)
    else:
        n, p = load_i32(following + 4 * sentinel), sentinel
    store_i32(following + 4 * slab, n)
    store_i32(before + 4 * slab, p)
    store_i32(following + 4 * p, slab)
    store_i32(before + 4 * n, slab)


@inner
def layer_at(store, index):
    return word(store, LAYERS) + WORD * LAYER_WORDS * index


@inner
def free_slab(store, shelf, turn, expected):
    """The least recently used slab that no reader is at and nobody wants, from this turn on; or -1.

    With `expected`, also those that are only expected to be wanted. Whoever had it has none any
    more.
    """
    following, words = word(shelf, NEXT), word(shelf, WORDS)
    sentinel = word(shelf, SLABS)
    slab = load_i32(following + 4 * sentinel)
    while slab != sentinel:
        claim = load_i64(word(shelf, CLAIMS) + WORD * slab)
        if claim < 2 * turn or (expected and claim != 2 * turn + 1):
            state = atomic_load(words + WORD * slab)
            if state >> 8 & 255 == state & 255 and atomic_exchange(
                words + WORD * slab, state, ((state >> 16) + 1) << 16
            ):
                holder = load_i64(word(shelf, HOLDERS) + WORD * slab)
                if holder != NOBODY:
                    layer = layer_at(store, holder >> 32)
                    store_i32(word(layer, SLABS_OF) + 4 * (holder & 0xFFFFFFFF), NOBODY)
                return slab
        slab = load_i32(following + 4 * slab)
    return NOBODY


# ---- asking and reading ----


@inner
def at_leisure(store):
    """Whether the disk has time: the batch is not a prompt's, and few experts are missing."""
    return word(store, DECODING) != 0 and word(store, HIT_SHARE) > DISK_BOUND


@inner
def push(store, ring, index, expert, piece, slab, count):
    """Put a unit into a ring; false if that is full."""
    at = word(ring, PUSHED)
    if at - atomic_load(ring + WORD * TAKEN) > word(ring, MASK):
        return False
    unit = word(ring, UNITS) + WORD * UNIT_WORDS * (at & word(ring, MASK))
    store_i64(unit, index)
    store_i64(unit + WORD, expert)
    store_i64(unit + 2 * WORD, piece | slab << 8)
    store_i64(unit + 3 * WORD, count)
    atomic_store(ring + WORD * PUSHED, at + 1)
    return True


@inner
def wake_readers(store, units):
    """A byte for every unit."""
    zeros = store + WORD * BYTES_TO_READERS
    while units > 0:
        some = min(units, 8 * LINE)
        written = call_pipe(word(store, WRITE), (word(store, PIPE_INPUT), zeros, some))
        if written > 0:
            units -= written


@inner
def ask(store, ring, layer, index, expert, slab, first, last):
    """Units for those of an expert's slices that no reader has taken; returns how many."""
    shelf, pushed = word(layer, SHELF), 0
    state = atomic_load(word(shelf, WORDS) + WORD * slab)
    for piece in range(first, last):
        if state & (256 << piece) == 0:
            pushed += push(store, ring, index, expert, piece, slab, state >> 16)
    return pushed


@inner
def give_slab(layer, index, expert, slab, claim, recent):
    """Make a free slab an expert's."""
    shelf = word(layer, SHELF)
    unlink(shelf, slab)
    link(shelf, slab, recent)
    store_i64(word(shelf, CLAIMS) + WORD * slab, claim)
    store_i64(word(shelf, HOLDERS) + WORD * slab, index << 32 | expert)
    store_i32(word(layer, SLABS_OF) + 4 * expert, slab)


@inner
def nanoseconds(store, space):
    call_clock(word(store, CLOCK), (MONOTONIC, space))
    return word(space, 0) * 1_000_000_000 + word(space, 1)


@inner
def take(ring, unit):
    """Copy the next unit of a ring to `unit`; false if there is none."""
    while True:
        at = atomic_load(ring + WORD * TAKEN)
        if at >= atomic_load(ring + WORD * PUSHED):
            return False
        source = word(ring, UNITS) + WORD * UNIT_WORDS * (at & word(ring, MASK))
        for i in range(UNIT_WORDS):
            store_i64(unit + WORD * i, word(source, i))
        # overwritten only when it has been taken, and then the exchange fails
        if atomic_exchange(ring + WORD * TAKEN, at, at + 1):
            return True


@inner
def mark_taken(state_at, count, piece):
    """Whether the slice is this reader's to read."""
    while True:
        state = atomic_load(state_at)
        if state >> 16 != count or state & (256 << piece) != 0:
            return False
        if atomic_exchange(state_at, state, state | (256 << piece)):
            return True


@inner
def read_slice(store, piece, expert, area):
    """Read a slice into its area; bytes read, or -1."""
    begin = word(piece, OFFSET) + expert * word(piece, STRIDE)
    end = begin + word(piece, SIZE)
    at = begin // BLOCK * BLOCK
    until = (end + BLOCK - 1) // BLOCK * BLOCK
    file, total = word(piece, FILE), until - at
    while at < end:
        got = call_read_at(word(store, READ_AT), (file, area, until - at, at))
        if got <= 0:
            return -1
        at += got
        area += got
    return total


@inner
def next_unit(store, unit):
    """Take what is wanted most: 1 for a demanded unit, 2 for a guess, 0 if there is nothing."""
    ring, reading = word(store, GUESSES), store + WORD * GUESS_READS
    while not take(word(store, DEMAND), unit):
        if atomic_load(ring + WORD * TAKEN) >= atomic_load(ring + WORD * PUSHED):
            return 0
        # those who are at guesses come back for more
        if at_leisure(store) and atomic_load(reading) >= GUESS_READERS:
            return 0
        atomic_add(reading, 1)
        if take(ring, unit):
            return 2
        atomic_add(reading, -1)
    return 1


@inner
def read_unit(store, unit, space):
    """Read a slice into its slab, if that is still wanted."""
    index, expert = word(unit, 0), word(unit, 1)
    number, slab = word(unit, 2) & 255, word(unit, 2) >> 8
    layer = layer_at(store, index)
    shelf = word(layer, SHELF)
    state_at = word(shelf, WORDS) + WORD * slab
    if not mark_taken(state_at, word(unit, 3), number):
        return
    piece = layer + WORD * (SLICE + SLICE_WORDS * number)
    area = word(shelf, MEMORY) + slab * word(shelf, SLAB_BYTES) + word(piece, AREA)
    begun = nanoseconds(store, space)
    total = read_slice(store, piece, expert, area)
    if total < 0:
        atomic_add(state_at, -(256 << number))
        if atomic_exchange(store + WORD * FAILED, 0, 1):
            for i in range(3):
                value = index if i == 0 else expert if i == 1 else number
                store_i64(store + WORD * (FAULT + i), value)
        return
    taken = nanoseconds(store, space) - begun
    count_up(store, READING, taken)
    count_up(store, BYTES, total)
    if word(store, DECODING) != 0:
        count_up(word(store, DISK), 0, total)
        count_up(word(store, DISK), 1, taken)
    atomic_add(state_at, 1 << number)


@reader_life
def read(store, reader):
    """A reader's life: wait for a byte, read what is wanted until there is nothing more."""
    space = store + WORD * (SPACES + LINE * reader)
    unit = space + 4 * WORD
    while True:
        while call_pipe(word(store, READ), (word(store, PIPE_OUTPUT), space, 1)) <= 0:
            pass  # interrupted by a signal
        kind = 1
        while kind != 0:
            if word(store, STOPPING) != 0:
                return
            kind = next_unit(store, unit)
            if kind != 0:
                read_unit(store, unit, space)
            if kind == 2:
                atomic_add(store + WORD * GUESS_READS, -1)


# ---- what the program calls ----


@inner
def slice_address(layer, shelf, slab, expert, number):
    piece = layer + WORD * (SLICE + SLICE_WORDS * number)
    begin = word(piece, OFFSET) + expert * word(piece, STRIDE)
    slab_at = word(shelf, MEMORY) + slab * word(shelf, SLAB_BYTES)
    return slab_at + word(piece, AREA) + begin % BLOCK


@inner
def note_place(layer, places, i, expert, slab):
    """Write down where a touched expert's matrices are, or will be."""
    shelf, place = word(layer, SHELF), places + WORD * PLACE_WORDS * i
    gate = slice_address(layer, shelf, slab, expert, word(layer, GATE_SLICE))
    up = slice_address(layer, shelf, slab, expert, word(layer, UP_SLICE)) + word(layer, UP_OFFSET)
    store_i64(place + WORD * PLACE_GATE, gate)
    store_i64(place + WORD * PLACE_UP, up)
    down = slice_address(layer, shelf, slab, expert, word(layer, DOWN_SLICE))
    store_i64(place + WORD * PLACE_DOWN, down)
    store_i64(place + WORD * PLACE_WORD, word(shelf, WORDS) + WORD * slab)


@inner
def choose_kept(shelf, routing, tokens):
    """Which touched experts go to the recently used end: of a prompt's, the QUOTA most used."""
    low, high = 0, 1
    total, quota = word(routing, ALL), word(shelf, QUOTA)
    if tokens <= BATCH:
        quota = total
    for i in range(total):
        high = max(high, slots_of(routing, i) + 1)
    # as many as fit have `low` slots or more; with one less there would be too many
    while low < high:
        middle, many = (low + high) // 2, 0
        for i in range(total):
            many += slots_of(routing, i) >= middle
        if many > quota:
            low = middle + 1
        else:
            high = middle
    for i in range(total):
        quota -= slots_of(routing, i) >= low
    places = word(routing, PLACES)
    for i in range(total):
        keep = slots_of(routing, i) >= low
        if not keep and quota > 0 and slots_of(routing, i) == low - 1:
            keep = True
            quota -= 1
        store_i64(places + WORD * (PLACE_WORDS * i + PLACE_KEEP), keep)


@inner
def is_kept(routing, i):
    return word(word(routing, PLACES) + WORD * PLACE_WORDS * i, PLACE_KEEP) != 0


@inner
def bucket(interval):
    """Two buckets for each power of 2: 1, 2, 3, 4-5, 6-7, 8-11 ..."""
    power = 0
    while interval >> (power + 1) != 0:
        power += 1
    half = interval >> (power - 1) & 1 if power > 0 else 0
    return 2 * power + half


@inner
def note_uses(store, layer, chosen, k, tokens):
    """Count the tokens' uses of experts, and how many tokens ago each was last used."""
    before = word(layer, NOW)
    store_i64(layer + WORD * NOW, before + tokens)
    for t in range(tokens):
        now = before + t + 1
        for rank in range(k):
            expert = load_i32(chosen + 4 * (k * t + rank))
            uses = word(layer, USES) + WORD * expert
            store_i64(uses, load_i64(uses) + 1)
            last_used = word(layer, LAST_USED) + 4 * expert
            last = load_i32(last_used)
            counts = word(store, INTERVALS) if last > 0 else word(store, OPEN_INTERVALS)
            at = counts + WORD * bucket(now - last)
            store_i64(at, load_i64(at) + 1)
            store_i32(last_used, now)


@inner
def begin_layer(store, layer, index, routing, turn):
    """Order the touched experts; returns the number of units asked for."""
    shelf, total = word(layer, SHELF), word(routing, ALL)
    numbers, order = word(routing, NUMBERS), word(routing, ORDER)
    places, slices = word(routing, PLACES), word(layer, SLICES)
    whole = (1 << slices) - 1
    hits, late, units = 0, 0, 0
    for i in range(total):
        expert = load_i32(numbers + 4 * i)
        slab = load_i32(word(layer, SLABS_OF) + 4 * expert)
        rank = 2
        if slab != NOBODY:
            unlink(shelf, slab)
            link(shelf, slab, is_kept(routing, i))
            store_i64(word(shelf, CLAIMS) + WORD * slab, 2 * turn + 1)
            state = atomic_load(word(shelf, WORDS) + WORD * slab)
            rank = 0 if state & 255 == whole else 1
            hits += rank == 0
            late += rank == 1
            if rank == 1:
                units += ask(store, word(store, DEMAND), layer, index, expert, slab, 0, slices)
            note_place(layer, places, i, expert, slab)
        else:
            store_i64(places + WORD * (PLACE_WORDS * i + PLACE_WORD), 0)
        store_i32(order + 4 * i, rank)
    # a rank becomes the touched expert's place, kept in the upper half until all are known
    place = 0
    for rank in range(3):
        for i in range(total):
            if load_i32(order + 4 * i) & 3 == rank:
                at = order + 4 * place
                store_i32(at, load_i32(at) & 3 | i << 2)
                place += 1
    for i in range(total):
        store_i32(order + 4 * i, load_i32(order + 4 * i) >> 2)
    share = word(store, HIT_SHARE)
    share += ((hits << 16) // total - share) // 16
    store_i64(store + WORD * HIT_SHARE, share)
    quiet = 0 if hits < total else word(store, QUIET) + 1
    store_i64(store + WORD * QUIET, quiet)
    store_i64(store + WORD * GUESSING, quiet < CALM)
    store_i64(store + WORD * GUESSING_FAR, quiet < CALM and at_leisure(store))
    count_up(store, HITS, hits)
    count_up(store, LATE, late)
    count_up(store, MISSES, total - hits - late)
    store_i64(routing + WORD * ASSIGNED, hits + late)
    return units


@inner
def give_slabs(store, layer, index, routing, done, turn):
    """Slabs for as many touched experts as there are; returns the units asked for.

    Those from the `done`-th on are for the next wave: all that have a slab or, where not all do,
    half of them.
    """
    shelf, total = word(layer, SHELF), word(routing, ALL)
    numbers, order, places = word(routing, NUMBERS), word(routing, ORDER), word(routing, PLACES)
    begin, spins, units = word(routing, ASSIGNED), 0, 0
    assigned, slices, demand = begin, word(layer, SLICES), word(store, DEMAND)
    while assigned < total:
        i = load_i32(order + 4 * assigned)
        slab = free_slab(store, shelf, turn, False)
        if slab == NOBODY and assigned == done:
            slab = free_slab(store, shelf, turn, True)
        if slab == NOBODY:
            if assigned > done:
                break
            if atomic_load(store + WORD * FAILED) != 0:
                assigned += 1  # nobody will look for it
                break
            # every slab is being read into: some will be free soon
            spins += 1
            if spins > SPINS:
                call_nap(word(store, NAP), (NAP_LENGTH,))
            pause()
            continue
        expert = load_i32(numbers + 4 * i)
        give_slab(layer, index, expert, slab, 2 * turn + 1, is_kept(routing, i))
        units += ask(store, demand, layer, index, expert, slab, 0, slices - 1)
        note_place(layer, places, i, expert, slab)
        assigned += 1
    if atomic_load(store + WORD * FAILED) == 0:
        for j in range(begin, assigned):
            expert = load_i32(numbers + 4 * load_i32(order + 4 * j))
            slab = load_i32(word(layer, SLABS_OF) + 4 * expert)
            units += ask(store, demand, layer, index, expert, slab, slices - 1, slices)
    wave = assigned - done
    if assigned < total:
        wave = (wave + 1) // 2
    store_i64(routing + WORD * ASSIGNED, assigned)
    store_i64(routing + WORD * FIRST, done)
    store_i64(routing + WORD * TOUCHED, wave)
    return units


@operation
def claim(op, step, task, scratch):
    """Begin a layer: order its touched experts and give them slabs.

    (store, index of the layer, routing record, chosen int32 (tokens, k), k)
    """
    store, index, routing = argument(op, 0), argument(op, 1), argument(op, 2)
    layer = layer_at(store, index)
    turn = word(store, TURN) + 1
    store_i64(store + WORD * TURN, turn)
    choose_kept(word(layer, SHELF), routing, word(step, COUNT))
    store_i64(store + WORD * DECODING, word(step, COUNT) <= BATCH)
    note_uses(store, layer, argument(op, 3), argument(op, 4), word(step, COUNT))
    units = begin_layer(store, layer, index, routing, turn)
    units += give_slabs(store, layer, index, routing, 0, turn)
    wake_readers(store, units)


@operation
def claim_more(op, step, task, scratch):
    """After a wave: whether another one follows; then its slabs are other experts'.

    (store, index of the layer, routing record)
    """
    store, index, routing = argument(op, 0), argument(op, 1), argument(op, 2)
    first = word(routing, FIRST)
    done = first + word(routing, TOUCHED)
    again = done < word(routing, ALL) and atomic_load(store + WORD * FAILED) == 0
    store_i64(routing + WORD * AGAIN, again)
    if not again:
        return
    layer, numbers, order = layer_at(store, index), word(routing, NUMBERS), word(routing, ORDER)
    for i in range(first, done):
        expert = load_i32(numbers + 4 * load_i32(order + 4 * i))
        slab = load_i32(word(layer, SLABS_OF) + 4 * expert)
        store_i64(word(word(layer, SHELF), CLAIMS) + WORD * slab, 0)
    wake_readers(store, give_slabs(store, layer, index, routing, done, word(store, TURN)))


@inner
def guess_layer(store, index, ahead, chosen, k, tokens, seen):
    """Ask for the experts that a layer, so many ahead, is likely to want; units asked for.

    `chosen` is int32 (tokens, k), `seen` space for int32 (2, experts).
    """
    layer, ring, turn, units = layer_at(store, index), word(store, GUESSES), word(store, TURN), 0
    shelf, wanted = word(layer, SHELF), k
    if tokens <= BATCH:
        many = ahead == 1 and at_leisure(store)
        wanted = word(store, MANY_GUESSES) if many else word(store, FEW_GUESSES)
    experts, absent = word(layer, EXPERTS), 0
    wishes = seen + 4 * experts
    for expert in range(experts):
        store_i32(seen + 4 * expert, 0)
    # by rank and then by token: the likeliest of every token come first
    for rank in range(min(wanted, k)):
        for t in range(tokens):
            expert = load_i32(chosen + 4 * (k * t + rank))
            if load_i32(seen + 4 * expert) != 0:
                continue
            store_i32(seen + 4 * expert, 1)
            slab = load_i32(word(layer, SLABS_OF) + 4 * expert)
            if slab != NOBODY:  # not to be taken for another one
                store_i64(word(shelf, CLAIMS) + WORD * slab, 2 * (turn + ahead))
            else:
                store_i32(wishes + 4 * absent, expert)
                absent += 1
    if tokens > BATCH:
        absent = min(absent, experts // AHEAD)
    for i in range(absent):
        slab = free_slab(store, shelf, turn, False)
        if slab == NOBODY:
            break
        expert = load_i32(wishes + 4 * i)
        give_slab(layer, index, expert, slab, 2 * (turn + ahead), False)
        units += ask(store, ring, layer, index, expert, slab, 0, word(layer, SLICES))
        count_up(store, GUESSED, 1)
    return units


@operation
def guess(op, step, task, scratch):
    """Ask for the experts that the layers to come are likely to want.

    (store, index of the layer, routing record, k, space for int32 (2, experts), chosen int32
    (tokens, k) for the next layer, for the one after it or 0)
    """
    store, index, routing, k = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    if word(routing, ASSIGNED) < word(routing, ALL):
        return  # this layer has not enough slabs itself
    tokens, seen = word(step, COUNT), argument(op, 4)
    units = guess_layer(store, index + 1, 1, argument(op, 5), k, tokens, seen)
    if argument(op, 6) != 0 and word(store, GUESSING_FAR) != 0:
        units += guess_layer(store, index + 2, 2, argument(op, 6), k, tokens, seen)
    wake_readers(store, units)


@inner
def await_slices(store, step, place, mask, scratch):
    """Wait until slices of a slab are there; false if they will not come."""
    if atomic_load(store + WORD * FAILED) != 0:
        store_i64(step + WORD * OUTCOME, READ_FAILED)
        return False
    state_at = word(place, PLACE_WORD)
    if atomic_load(state_at) & mask == mask:
        return True
    begun, spins, come = nanoseconds(store, scratch), 0, True
    while come and atomic_load(state_at) & mask != mask:
        spins += 1
        if spins > SPINS:
            call_nap(word(store, NAP), (NAP_LENGTH,))
        pause()
        if atomic_load(store + WORD * FAILED) != 0:
            store_i64(step + WORD * OUTCOME, READ_FAILED)
            come = False
        if atomic_load(step + WORD * ABORT) != 0 and word(step, COUNT) > 1:
            come = False
    count_up(store, WAITED, nanoseconds(store, scratch) - begun)
    return come
