"""Products for F32, F16 and BF16 weights with float32 activations.

Sixteen columns at a time into one vector of partial sums, folded once per row; columns beyond a
multiple of sixteen go through a masked load, so any length will do.
"""

from ondevice.kernels.dot.tile import ByLayout, Layout, row_at
from ondevice.kernels.operation import row_kernel
from ondevice.kernels.simd import (
    f32x16,
    fma,
    lane_sum,
    load,
    load_bf16,
    load_bfloats,
    load_f16,
    load_f32,
    load_halves,
    store_f32,
    zero,
)
from quant.jit import inner

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


@inner
def one_token(layout, size, w, columns, a, out):
    """One row times one token; size is the bytes of a weight."""
    whole = columns // 16 * 16
    total = zero(f32x16)
    for c in range(0, whole, 16):
        total = fma(sixteen(layout, w + size * c), load(f32x16, a + 4 * c), total)
    rest = lane_sum(total)
    for c in range(whole, columns):
        rest = fma(single(layout, w + size * c), load_f32(a + 4 * c), rest)
    store_f32(out, rest)


@inner
def four_tokens(layout, size, w, columns, a0, a1, a2, a3, out0, out1, out2, out3):
    """One row times four tokens: `one_token` four times over, each weight loaded once."""
    whole = columns // 16 * 16
    total0, total1, total2, total3 = zero(f32x16), zero(f32x16), zero(f32x16), zero(f32x16)
    for c in range(0, whole, 16):
        x = sixteen(layout, w + size * c)
        total0 = fma(x, load(f32x16, a0 + 4 * c), total0)
        total1 = fma(x, load(f32x16, a1 + 4 * c), total1)
        total2 = fma(x, load(f32x16, a2 + 4 * c), total2)
        total3 = fma(x, load(f32x16, a3 + 4 * c), total3)
    rest0, rest1 = lane_sum(total0), lane_sum(total1)
    rest2, rest3 = lane_sum(total2), lane_sum(total3)
    for c in range(whole, columns):
        y = single(layout, w + size * c)
        rest0 = fma(y, load_f32(a0 + 4 * c), rest0)
        rest1 = fma(y, load_f32(a1 + 4 * c), rest1)
        rest2 = fma(y, load_f32(a2 + 4 * c), rest2)
        rest3 = fma(y, load_f32(a3 + 4 * c), rest3)
    store_f32(out0, rest0)
    store_f32(out1, rest1)
    store_f32(out2, rest2)
    store_f32(out3, rest3)


@inner
def multiply(layout, size, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens):
    """The loop nest of all three formats; arguments as in `dot`."""
    t = 0
    while t + 4 <= tokens:
        a0, a1 = row_at(a, a_bytes, i, t), row_at(a, a_bytes, i, t + 1)
        a2, a3 = row_at(a, a_bytes, i, t + 2), row_at(a, a_bytes, i, t + 3)
        o0, o1 = row_at(out, o_bytes, o, t), row_at(out, o_bytes, o, t + 1)
        o2, o3 = row_at(out, o_bytes, o, t + 2), row_at(out, o_bytes, o, t + 3)
        for r in range(rows):
            row = w + r * row_bytes
            b0, b1, b2, b3 = o0 + 4 * r, o1 + 4 * r, o2 + 4 * r, o3 + 4 * r
            four_tokens(layout, size, row, columns, a0, a1, a2, a3, b0, b1, b2, b3)
        t += 4
    while t < tokens:
        a0, o0 = row_at(a, a_bytes, i, t), row_at(out, o_bytes, o, t)
        for r in range(rows):
            one_token(layout, size, w + r * row_bytes, columns, a0, o0 + 4 * r)
        t += 1


@row_kernel
def multiply_f32(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(F32, 4, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens)


@row_kernel
def multiply_f16(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(F16, 2, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens)


@row_kernel
def multiply_bf16(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(BF16, 2, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens)
