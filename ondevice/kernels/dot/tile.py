"""What the products of the block formats share: the loop nest over rows and tokens.

A few tokens meet four rows at a time, straight from their blocks (`quad`). More tokens meet
sixteen at a time: the blocks of STEP columns are unpacked to a *panel* that stays in the
first-level cache,

       0  codes    64 x (16 rows x 4 columns) u8
    4096  scales   16 x 16 i32, in the form of tiles.dots_scale
    5120  pairs     8 x 16 x 2 i16
    5632  d, 6144 m  8 x 16 f32 each

(how much of it is used is the format's business; codes of four bits may share their bytes, see
tiles.NIBBLES), and every token's sums of the sixteen rows wait in scratch for the next step. The
value of an output is the same by either way: integer sums are exact, and the float sums take the
steps in order, by the same expressions.

Four rows that are taken together lie far apart, the first of each quarter of what is to be done:
processors ask memory ahead by themselves for a few streams, each in pages of its own. Sixteen lie
side by side, and their product with the first tokens asks for the next sixteen, a few lines at a
time: as many requests at once as a panel has lines wait for one another, and what is behind them
too.

A loop nest is written once and takes a `Layout`: a Numba type, so `unpack(layout, ...)` is resolved
while compiling, and, unlike a function passed as an argument, leaves machine code that can be kept
on disk.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from ondevice.kernels.shuffles import byte_table, load_quad, pair_shuffle
from ondevice.kernels.simd import (
    bitcast,
    f32x16,
    load,
    load_i32,
    prefetch,
    store,
    stream,
    streams_end,
    u8x64,
    u32x16,
    zero,
)
from ondevice.kernels.tiles import (
    BIASED,
    BY_FOURS,
    HAS_AVX2,
    MOST_TOKENS,
    SIXTEEN,
    WOVEN,
    store_apart,
    store_first,
    tile1,
    tile2,
    tile3,
    tile4,
    tile8,
)
from quant.jit import INNER, inner

STEP = 256
ROWS = 16
"""Weight rows of a panel."""
CHUNK = 128
"""Tokens whose sums wait in scratch; their activations of a step stay in the first-level cache."""
SCALES, PAIRS, D, M = 4096, 5120, 5632, 6144
PANEL = 6656
LARGE = 4 << 20
"""Bytes of results from which on they are streamed: they would not stay in the caches."""
SCATTERED = 6
"""Tokens of an expert from which on its results are streamed: a batch then has many."""
AHEAD = 1024
"""Bytes between what four rows read and what they ask of memory."""
PREPARED_PER_COLUMN = 2
"""Bytes that a token's record takes at most when it is prepared for `quad`."""
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
EIGHT, FOUR = MOST_TOKENS >= 8, MOST_TOKENS >= 4


def scratch_bytes(columns: int) -> int:
    """Scratch that `multiply` needs for rows of any length."""
    return max(PANEL + 64 * CHUNK, 3 * PREPARED_PER_COLUMN * columns)


class Layout(types.Type):
    """A block format as a compile-time constant."""

    def __init__(self, name: str) -> None:
        super().__init__(name=f"layout<{name}>")


class ByLayout:
    """Functions with one implementation for each type that is passed first."""

    def __init__(
        self, generic: Callable[..., Any], otherwise: Callable[..., Any] | None = None
    ) -> None:
        self._implementations: dict[Any, Callable[..., Any]] = {}

        def choose(layout: Any, *arguments: Any) -> Callable[..., Any] | None:
            return self._implementations.get(getattr(layout, "instance_type", None), otherwise)

        overload(generic, strict=False, jit_options=INNER)(choose)

    def register(self, layout: types.Type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate the implementation for `layout`."""

        def keep(function: Callable[..., Any]) -> Callable[..., Any]:
            self._implementations[layout] = function
            return function

        return keep


# ---- reading blocks ----


@inner
def ask(address, size):
    """Ask memory for `size` bytes."""
    for line in range(0, size, 64):
        prefetch(address + line)


@inner
def ask_eighths(later, part, count=1):
    """Ask memory for some eighths of the next panel; `later`: its address, bytes of an eighth."""
    address, size = later
    if size > 0:
        start, end = (size * part + 63) & -64, (size * (part + count) + 63) & -64
        ask(address + start, end - start)


@inner
def ask_quad(block, row_bytes, size):
    """Ask memory for `size` bytes AHEAD of the blocks of four rows."""
    for quarter in range(4):
        ask(block + quarter * row_bytes + AHEAD, size)


@inner
def lowered(x, count):
    """Every byte of a u8x64 moved right by `count` bits, with bits of the next byte above."""
    return bitcast(u8x64, bitcast(u32x16, x) >> np.uint32(count))


@inner
def raised(x, count):
    """Every byte of a u8x64 moved left by `count` bits, none of which may be lost."""
    return bitcast(u8x64, bitcast(u32x16, x) << np.uint32(count))


@inner
def low_four(x):
    return x & np.uint8(15)


@inner
def high_four(x):
    return x >> np.uint8(4)


full_codes = byte_table([value + (128 if BIASED else 0) for value in IQ4_NL_VALUES])
"""Numbers 0 .. 15 -> the values of IQ4_NL and IQ4_XS, as full bytes."""


def _in_quarters(*lanes: int) -> Any:
    """Words of a pair of vectors by their places in a quarter, 4 .. 7 being the second's."""
    return pair_shuffle(
        [4 * quarter + lane % 4 + 16 * (lane // 4) for quarter in range(4) for lane in lanes]
    )


low_words, high_words = _in_quarters(0, 4, 1, 5), _in_quarters(2, 6, 3, 7)
low_halves, high_halves = _in_quarters(0, 1, 4, 5), _in_quarters(2, 3, 6, 7)


@inner
def columns_of_sixteen(w, row_bytes):
    """16 bytes of each of sixteen rows -> four u32x16, each with 4 bytes of every row in order."""
    a = bitcast(u32x16, load_quad(w, 4 * row_bytes))
    b = bitcast(u32x16, load_quad(w + row_bytes, 4 * row_bytes))
    c = bitcast(u32x16, load_quad(w + 2 * row_bytes, 4 * row_bytes))
    d = bitcast(u32x16, load_quad(w + 3 * row_bytes, 4 * row_bytes))
    ab, cd = low_words(a, b), low_words(c, d)
    ab_high, cd_high = high_words(a, b), high_words(c, d)
    return (
        low_halves(ab, cd),
        high_halves(ab, cd),
        low_halves(ab_high, cd_high),
        high_halves(ab_high, cd_high),
    )


def _words_in_turn(first: int) -> Any:
    """Eight words of each of two vectors from `first` on, one of each in turn."""
    return pair_shuffle([lane + 16 * other for lane in range(first, first + 8) for other in (0, 1)])


woven_low, woven_high = _words_in_turn(0), _words_in_turn(8)


@inner
def codes_of_sixteen(w, row_bytes):
    """As `columns_of_sixteen`, in the order in which wide pieces are kept."""
    if WOVEN:
        a, b = load_quad(w, 2 * row_bytes), load_quad(w + row_bytes, 2 * row_bytes)
        below = w + 8 * row_bytes
        c, d = load_quad(below, 2 * row_bytes), load_quad(below + row_bytes, 2 * row_bytes)
        a, b = bitcast(u32x16, a), bitcast(u32x16, b)
        c, d = bitcast(u32x16, c), bitcast(u32x16, d)
        return low_halves(a, b), low_halves(c, d), high_halves(a, b), high_halves(c, d)
    return columns_of_sixteen(w, row_bytes)


# ---- rows and tokens ----


@inner
def row_at(base: int, row_bytes: int, index: int, token: int) -> int:
    """Address of token's row, looked up in `index` unless that is 0."""
    if index != 0:
        return base + load_i32(index + 4 * token) * row_bytes
    return base + token * row_bytes


def rows_at(tile, base, row_bytes, index, token):
    """Addresses of as many tokens' rows as the tile has, from `token` on."""
    raise NotImplementedError("only inside compiled kernels")


tokens_of = ByLayout(rows_at)


@tokens_of.register(tile1)
def rows_of_one(tile, base, row_bytes, index, token):
    return (row_at(base, row_bytes, index, token),)


@tokens_of.register(tile2)
def rows_of_two(tile, base, row_bytes, index, token):
    return (
        row_at(base, row_bytes, index, token),
        row_at(base, row_bytes, index, token + 1),
    )


@tokens_of.register(tile3)
def rows_of_three(tile, base, row_bytes, index, token):
    return (
        row_at(base, row_bytes, index, token),
        row_at(base, row_bytes, index, token + 1),
        row_at(base, row_bytes, index, token + 2),
    )


@tokens_of.register(tile4)
def rows_of_four(tile, base, row_bytes, index, token):
    return (
        row_at(base, row_bytes, index, token),
        row_at(base, row_bytes, index, token + 1),
        row_at(base, row_bytes, index, token + 2),
        row_at(base, row_bytes, index, token + 3),
    )


@tokens_of.register(tile8)
def rows_of_eight(tile, base, row_bytes, index, token):
    return (
        row_at(base, row_bytes, index, token),
        row_at(base, row_bytes, index, token + 1),
        row_at(base, row_bytes, index, token + 2),
        row_at(base, row_bytes, index, token + 3),
        row_at(base, row_bytes, index, token + 4),
        row_at(base, row_bytes, index, token + 5),
        row_at(base, row_bytes, index, token + 6),
        row_at(base, row_bytes, index, token + 7),
    )


def prepare(layout, tile, rows, columns, s):
    """Where the records are in the form that `quad` takes: copies in scratch, or at `rows`."""
    raise NotImplementedError("only inside compiled kernels")


def as_they_are(layout, tile, rows, columns, s):
    return rows


def quad(layout, tile, w, row_bytes, columns, rows):
    """Four rows, `row_bytes` apart, times the tokens at the addresses `rows`: a tile of f32x16.

    The tokens' records are as `prepare` left them. A quarter of each vector is a row.
    """
    raise NotImplementedError("only inside compiled kernels")


def unpack(layout, w, row_bytes, columns, panel):
    """Sixteen rows, `row_bytes` apart, of up to STEP columns -> the panel."""
    raise NotImplementedError("only inside compiled kernels")


def multiply_panel(layout, tile, panel, rows, columns, start, size, totals, later):
    """Add a panel times `size` columns from `start` on to the tokens' sums at `totals`.

    The tokens' records, of `columns` columns, are at the addresses `rows`. Beside each 32 columns
    goes one of the `ask_eighths` of `later`.
    """
    raise NotImplementedError("only inside compiled kernels")


def fewest(layout):
    """Tokens from which on panels are worth their making."""
    raise NotImplementedError("only inside compiled kernels")


def two(layout):
    return 2


def three(layout):
    return 3


def four(layout):
    return 4


preparers, fewests = ByLayout(prepare, as_they_are), ByLayout(fewest, three)
quads, unpackers, panels = ByLayout(quad), ByLayout(unpack), ByLayout(multiply_panel)


def wide_from_two(*layouts: Layout) -> None:
    """Formats that are slow straight from their blocks, on x86, where that was measured."""
    for layout in layouts if HAS_AVX2 else ():
        fewests.register(layout)(two)


@inner
def few(layout, tile, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, token, s):
    """All rows times the tile's tokens."""
    records = prepare(layout, tile, rows_at(tile, a, a_bytes, i, token), columns, s)
    results = rows_at(tile, out, o_bytes, o, token)
    part = rows // 4
    # the last rows go through the same call, so that there is one to compile
    for r in range(part + rows % 4):
        whole = r < part
        first = r if whole else r + 3 * part
        row, stride = w + first * row_bytes, part * row_bytes if whole else 0
        totals = quad(layout, tile, row, stride, columns, records)
        if whole:
            store_apart(totals, results, 4 * first, 4 * part)
        else:
            store_first(totals, results, 4 * first)


def a_few(layout, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    """All rows, straight from their blocks, times all tokens."""
    raise NotImplementedError("only inside compiled kernels")


def by_twos(layout, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    t = 0
    while t + 2 <= tokens:
        few(layout, tile2, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, t, s)
        t += 2
    if t < tokens:
        few(layout, tile1, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, t, s)


def by_threes(layout, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    t = 0
    while t + 3 <= tokens:
        few(layout, tile3, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, t, s)
        t += 3
    if t + 2 == tokens:
        few(layout, tile2, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, t, s)
    elif t < tokens:
        few(layout, tile1, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, t, s)


fews = ByLayout(a_few, by_twos)


def wide_from_four(*layouts: Layout) -> None:
    """Formats that meet three tokens sooner straight from their blocks than through panels."""
    for layout in layouts if BY_FOURS or SIXTEEN else ():
        fewests.register(layout)(four)
        fews.register(layout)(by_threes)


@inner
def some(layout, tile, panel, columns, start, size, a, a_bytes, i, first, token, more, later):
    """A panel times the tile's tokens from `token` on; `first` is that of the sums.

    Memory is asked for the next `more` bytes of the tokens' records, and for the next panel. All
    tiles take about as long for a token, so none is filled up.
    """
    records = rows_at(tile, a, a_bytes, i, token)
    for record in records:
        ask(record + start + size, more)
    totals = panel + PANEL + 64 * (token - first)
    multiply_panel(layout, tile, panel, records, columns, start, size, totals, later)


@inner
def many(
    layout,
    step_bytes,
    w,
    row_bytes,
    columns,
    a,
    a_bytes,
    i,
    out,
    o_bytes,
    o,
    first,
    last,
    s,
    fetch,
    new,
    streamed,
):
    """Sixteen rows times the tokens first .. last, at most CHUNK of them.

    With `fetch`, memory is asked for the next sixteen rows; with `new`, for the tokens' records;
    `streamed` results go past the caches.
    """
    totals = s + PANEL
    for t in range(last - first):
        store(totals + 64 * t, zero(f32x16))
    for start in range(0, columns, STEP):
        size = min(STEP, columns - start)
        step = start // STEP
        unpack(layout, w + step * step_bytes, row_bytes, size, s)
        following = w + ROWS * (row_bytes + step * step_bytes)
        later, nothing = (following, ROWS * step_bytes // 8 if fetch else 0), (following, 0)
        more = min(STEP, columns - start - size) if new else 0
        t = first
        if EIGHT:
            while t + 8 <= last:
                some(layout, tile8, s, columns, start, size, a, a_bytes, i, first, t, more, later)
                t, later = t + 8, nothing
        if FOUR:
            while t + 4 <= last:
                some(layout, tile4, s, columns, start, size, a, a_bytes, i, first, t, more, later)
                t, later = t + 4, nothing
        while t + 2 <= last:
            some(layout, tile2, s, columns, start, size, a, a_bytes, i, first, t, more, later)
            t, later = t + 2, nothing
        if t < last:
            some(layout, tile1, s, columns, start, size, a, a_bytes, i, first, t, more, later)
    for t in range(last - first):
        result, total = row_at(out, o_bytes, o, first + t), load(f32x16, totals + 64 * t)
        if streamed and result % 64 == 0:
            stream(result, total)
        else:
            store(result, total)


@inner
def multiply(
    layout, step_bytes, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s
):
    """The loop nest of all block formats; arguments as in `dot`, `s` the scratch.

    step_bytes: bytes of STEP columns of a row.
    """
    panels = rows // ROWS if tokens >= fewest(layout) else 0
    large = tokens * o_bytes >= LARGE or (o != 0 and tokens >= SCATTERED)
    streamed = panels > 0 and large
    for first in range(0, tokens, CHUNK):
        last = min(tokens, first + CHUNK)
        for r in range(panels):
            row, to = w + ROWS * r * row_bytes, out + 4 * ROWS * r
            many(
                layout, step_bytes, row, row_bytes, columns, a, a_bytes, i,
                to, o_bytes, o, first, last, s, first == 0, r == 0, streamed,
            )  # fmt: skip
    if streamed:
        streams_end()
    done = ROWS * panels
    rest, to, left = w + done * row_bytes, out + 4 * done, rows - done
    if left > 0:
        a_few(layout, rest, row_bytes, left, columns, a, a_bytes, i, to, o_bytes, o, tokens, s)
