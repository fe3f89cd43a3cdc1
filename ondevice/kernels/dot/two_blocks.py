"""Products of two blocks of a row at a time, for few tokens, with AVX2.

What is multiplied is in blocks.py. A register holds 16 codes of a block of 32 weights and 16 of the
next. So the dots of four rows fold without a move from one half to the other, to eight sums, a half
being a block and its lanes rows, and eight sums take their scales by one operation. For it the
tokens' records are rearranged in scratch, of each two blocks

      0  codes    32 i8: columns 0 .. 15 of either block
     32  codes    32 i8: columns 16 .. 31
     64  surplus   8 i32: that of a block in all lanes of its half
     96  scales    8 f32: in the same way

Floats are added block by block, as where blocks are taken one at a time.
"""

from typing import Any

import numpy as np

from ondevice.kernels.dot.block import BLOCK, scale_at, sums_at
from ondevice.kernels.dot.tile import ByLayout, ask_quad, rows_at, wide_from_four, wide_from_two
from ondevice.kernels.products import two_dots, two_dots_bytes
from ondevice.kernels.shuffles import lane_shuffle, pair_shuffle
from ondevice.kernels.simd import i32x2, load, store, u8x32
from ondevice.kernels.sums import (
    add_two_in_turn,
    by_quarter,
    fold_two_fours,
    fold_two_pairs,
    fold_two_sums,
)
from ondevice.kernels.tiles import SIXTEEN, zero_fours
from quant.jit import inner

TWO = 2 * BLOCK
PREPARED = 128
"""Bytes of two blocks of a token in scratch."""

first_sixteens = pair_shuffle([*range(16), *range(32, 48)])
last_sixteens = pair_shuffle([*range(16, 32), *range(48, 64)])
by_half = lane_shuffle([0] * 4 + [1] * 4)


def codes_of_two(layout, block):
    """Codes of a row's two blocks, u8x32 each: columns 0 .. 15 of both, then the others."""
    raise NotImplementedError("only inside compiled kernels")


def scales_of_two(layout, block, row_bytes):
    """The scales of four rows' blocks, then of their next blocks: f32x8."""
    raise NotImplementedError("only inside compiled kernels")


def sums_of_two(layout, tile, block, row_bytes, rows, at):
    """Sums of four rows' two blocks, and the tokens' surplus: a tile of i32x8."""
    raise NotImplementedError("only inside compiled kernels")


two_codes, two_scales = ByLayout(codes_of_two), ByLayout(scales_of_two)
two_sums = ByLayout(sums_of_two)
wide_by_twos = wide_from_four if SIXTEEN else wide_from_two
"""For formats whose few tokens are taken two blocks at a time where there is AVX2 alone."""


@inner
def prepare_two_blocks(tile, rows, columns, s, factor):
    """Copies of the records in scratch; a surplus is `factor` times what the records hold."""
    if not SIXTEEN or columns % TWO != 0:
        return rows
    result = rows_at(tile, s, columns // TWO * PREPARED, 0, 0)
    for token in range(len(rows)):
        record, to = rows[token], result[token]
        for b in range(0, columns // BLOCK, 2):
            x, y = load(u8x32, record + BLOCK * b), load(u8x32, record + BLOCK * (b + 1))
            store(to, first_sixteens(x, y))
            store(to + 32, last_sixteens(x, y))
            surplus = load(i32x2, record + sums_at(columns, b)) * np.int32(factor)
            store(to + 64, by_half(surplus))
            store(to + 96, by_half(load(i32x2, record + scale_at(columns, b))))
            to += PREPARED
    return result


def _sums(dots: Any, fold: Any) -> Any:
    def sums(layout, tile, block, row_bytes, rows, at):
        low, high = codes_of_two(layout, block)
        a = dots(tile, low, high, rows, at)
        block += row_bytes
        low, high = codes_of_two(layout, block)
        b = dots(tile, low, high, rows, at)
        block += row_bytes
        low, high = codes_of_two(layout, block)
        c = dots(tile, low, high, rows, at)
        block += row_bytes
        low, high = codes_of_two(layout, block)
        d = dots(tile, low, high, rows, at)
        return fold(a, b, c, d, rows, at + 64)

    return sums


four_bit_sums = _sums(two_dots, fold_two_fours)
"""For `two_sums`: of codes up to 15."""
five_bit_sums = _sums(two_dots, fold_two_pairs)
"""The same of codes up to 31."""
full_sums = _sums(two_dots_bytes, fold_two_sums)
"""The same of full bytes."""


@inner
def two_blocks_of_quads(layout, block_bytes, tile, w, row_bytes, columns, rows):
    """Four rows times the tokens, as `quad` in tile.py."""
    totals = zero_fours(tile)
    for two in range(columns // TWO):
        block, at = w + 2 * block_bytes * two, PREPARED * two
        ask_quad(block, row_bytes, 2 * block_bytes)
        sums = sums_of_two(layout, tile, block, row_bytes, rows, at)
        scales = scales_of_two(layout, block, row_bytes)
        totals = add_two_in_turn(totals, sums, scales, rows, at + 96)
    return by_quarter(totals)
