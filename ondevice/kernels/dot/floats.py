"""Products for F32, F16 and BF16 weights with float32 activations.

Sixteen columns at a time into one vector of partial sums per row and token, folded once; then the
columns beyond a multiple of sixteen. Four rows meet four tokens at a time, or two; where
registers do not suffice for that, with AVX2, two rows meet two tokens.
"""

from ondevice.kernels.arithmetic import fma
from ondevice.kernels.dot.tile import EIGHT, FOUR, ByLayout, Layout, row_at, rows_at
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.simd import (
    f32x16,
    load,
    load_bf16,
    load_bfloats,
    load_f16,
    load_f32,
    load_halves,
    prefetch,
    store_f32,
)
from ondevice.kernels.sums import add_products
from ondevice.kernels.tiles import HAS_AVX2, store_folded, tile1, tile2, tile4, zero_floats
from quant.jit import inner

AHEAD = 2048
"""Bytes between what rows read and what they ask of memory: little is computed with them."""
F32, F16, BF16 = Layout("F32"), Layout("F16"), Layout("BF16")


def sixteen(layout, address):
    """16 weights of `layout` as an f32x16."""
    raise NotImplementedError("only inside compiled kernels")


def single(layout, address):
    """One weight of `layout` as a float32."""
    raise NotImplementedError("only inside compiled kernels")


sixteens = ByLayout(sixteen)
singles = ByLayout(single)


@sixteens.register(F32)
def sixteen_f32(layout, address):
    return load(f32x16, address)


@sixteens.register(F16)
def sixteen_f16(layout, address):
    return load_halves(address)


@sixteens.register(BF16)
def sixteen_bf16(layout, address):
    return load_bfloats(address)


@singles.register(F32)
def single_f32(layout, address):
    return load_f32(address)


@singles.register(F16)
def single_f16(layout, address):
    return load_f16(address)


@singles.register(BF16)
def single_bf16(layout, address):
    return load_bf16(address)


def rows_together(tile, layout, size, w, row_bytes, columns, records, results, fetch):
    """Four rows times the tile's tokens; size is the bytes of a weight.

    With `fetch`, memory is asked for what is AHEAD, at the end of the rows for the next four.
    """
    raise NotImplementedError("only inside compiled kernels")


def four_rows(tile, layout, size, w, row_bytes, columns, records, results, fetch):
    totals0, totals1 = zero_floats(tile), zero_floats(tile)
    totals2, totals3 = zero_floats(tile), zero_floats(tile)
    w1, w2, w3 = w + row_bytes, w + 2 * row_bytes, w + 3 * row_bytes
    for c in range(0, columns // 16 * 16, 16):
        if fetch:
            later = size * c + AHEAD
            if later >= row_bytes:
                later += 3 * row_bytes
            prefetch(w + later)
            prefetch(w1 + later)
            prefetch(w2 + later)
            prefetch(w3 + later)
        totals0 = add_products(totals0, sixteen(layout, w + size * c), records, 4 * c)
        totals1 = add_products(totals1, sixteen(layout, w1 + size * c), records, 4 * c)
        totals2 = add_products(totals2, sixteen(layout, w2 + size * c), records, 4 * c)
        totals3 = add_products(totals3, sixteen(layout, w3 + size * c), records, 4 * c)
    store_folded(totals0, results, 0)
    store_folded(totals1, results, 4)
    store_folded(totals2, results, 8)
    store_folded(totals3, results, 12)


def twice_two_rows(tile, layout, size, w, row_bytes, columns, records, results, fetch):
    for r in range(0, 4, 2):
        w0, w1 = w + r * row_bytes, w + (r + 1) * row_bytes
        totals0, totals1 = zero_floats(tile), zero_floats(tile)
        for c in range(0, columns // 16 * 16, 16):
            if fetch:
                later = size * c + AHEAD
                if later >= row_bytes:
                    later += row_bytes
                prefetch(w0 + later)
                prefetch(w1 + later)
            totals0 = add_products(totals0, sixteen(layout, w0 + size * c), records, 4 * c)
            totals1 = add_products(totals1, sixteen(layout, w1 + size * c), records, 4 * c)
        store_folded(totals0, results, 4 * r)
        store_folded(totals1, results, 4 * r + 4)


TWO = HAS_AVX2 and not EIGHT
together = ByLayout(rows_together, four_rows)
if TWO:
    together.register(tile2)(twice_two_rows)


@inner
def one_row(layout, size, tile, w, columns, records, results):
    """One row times the tile's tokens, in the same order."""
    totals = zero_floats(tile)
    for c in range(0, columns // 16 * 16, 16):
        totals = add_products(totals, sixteen(layout, w + size * c), records, 4 * c)
    store_folded(totals, results, 0)


@inner
def add_rest(layout, size, w, columns, record, result):
    """Columns beyond a multiple of sixteen, one after the other."""
    total = load_f32(result)
    for c in range(columns // 16 * 16, columns):
        total = fma(single(layout, w + size * c), load_f32(record + 4 * c), total)
    store_f32(result, total)


@inner
def all_rows(
    layout, size, tile, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, t, fetch
):
    """All rows times the tile's tokens, from token t on."""
    records = rows_at(tile, a, a_bytes, i, t)
    r = 0
    while r + 4 <= rows:
        results = rows_at(tile, out + 4 * r, o_bytes, o, t)
        row = w + r * row_bytes
        rows_together(tile, layout, size, row, row_bytes, columns, records, results, fetch)
        r += 4
    while r < rows:
        results = rows_at(tile, out + 4 * r, o_bytes, o, t)
        one_row(layout, size, tile, w + r * row_bytes, columns, records, results)
        r += 1


@inner
def multiply(layout, size, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens):
    """The loop nest of all three formats; arguments as in `dot`."""
    t = 0
    if FOUR:
        while t + 4 <= tokens:
            all_rows(
                layout, size, tile4, w, row_bytes, rows, columns, a, a_bytes, i,
                out, o_bytes, o, t, False,
            )  # fmt: skip
            t += 4
    if EIGHT or TWO:
        while t + 2 <= tokens:
            all_rows(
                layout, size, tile2, w, row_bytes, rows, columns, a, a_bytes, i,
                out, o_bytes, o, t, t == 0,
            )  # fmt: skip
            t += 2
    while t < tokens:
        all_rows(
            layout, size, tile1, w, row_bytes, rows, columns, a, a_bytes, i,
            out, o_bytes, o, t, t == 0,
        )  # fmt: skip
        t += 1
    if columns % 16 != 0:
        for t in range(tokens):
            record, result = row_at(a, a_bytes, i, t), row_at(out, o_bytes, o, t)
            for r in range(rows):
                add_rest(layout, size, w + r * row_bytes, columns, record, result + 4 * r)


@row_kernel
def multiply_f32(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(F32, 4, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens)


@row_kernel
def multiply_f16(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(F16, 2, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens)


@row_kernel
def multiply_bf16(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(BF16, 2, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens)
