"""What the machine can do: reading memory and multiplying bytes as fast as they go."""

from typing import Any

from numba.extending import intrinsic

from ondevice.kernels.arithmetic import lane_sum
from ondevice.kernels.layout import WORD, argument
from ondevice.kernels.operation import operation
from ondevice.kernels.products import plain_dot
from ondevice.kernels.simd import (
    FEATURES,
    call,
    i16x16,
    i32x4,
    i32x8,
    i32x16,
    load,
    prefetch,
    splat,
    store_i64,
    u8x16,
    u8x32,
    u8x64,
    zero,
)
from ondevice.kernels.tiles import HAS_AVX2, HAS_SDOT, HAS_VNNI_256, HAS_VNNI_512

_HAS_SMMLA = "i8mm" in FEATURES
if HAS_VNNI_512:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x64, i32x16, 64
elif HAS_VNNI_256:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x32, i32x8, 32
elif HAS_AVX2:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x32, i16x16, 32
else:
    PEAK_BYTES, PEAK_TOTAL, PEAK_MACS = u8x16, i32x4, 32 if _HAS_SMMLA else 16

CHUNK = 1 << 20
STREAMS = 4
AHEAD = 1024  # bytes that a stream is prefetched ahead

CHAINS = 12
"""Sums that grow side by side, so that no product waits for the one before."""
VECTORS = 2 + 4 * CHAINS // 2
"""Of 64 bytes: two of activations, then four turns' of weights."""
TURNS = 1 << 16
PRODUCTS = TURNS * CHAINS * PEAK_MACS
"""Multiply-adds of a task of `multiply_bytes`."""


@intrinsic
def peak_dot(typing: Any, total: Any, w: Any, a: Any) -> Any:
    """total + w * a by the target's best int8 instruction: PEAK_MACS products of PEAK_BYTES.

    AVX2 adds pairs in int16, without which no sum can do; a kernel also has to widen them.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        acc, weights, acts = args
        if HAS_VNNI_512 or HAS_VNNI_256:
            name = f"llvm.x86.avx512.vpdpbusd.{PEAK_BYTES.lanes * 8}"
            return call(builder, name, acc.type, [acc, weights, acts])
        if HAS_AVX2:
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", acc.type, [weights, acts])
            return builder.add(acc, pairs)
        if _HAS_SMMLA or HAS_SDOT:
            name = "smmla" if _HAS_SMMLA else "sdot"
            name = f"llvm.aarch64.neon.{name}.v4i32.v16i8"
            return call(builder, name, acc.type, [acc, weights, acts])
        return plain_dot(builder, acc, weights, acts, full=False)

    return total(total, w, a), lower


@operation
def read_memory(op, step, task, scratch):
    """Read a chunk, four streams side by side: (address, a word per chunk for the sum)."""
    part = CHUNK // STREAMS
    address = argument(op, 0) + task * CHUNK
    a, b, c, d = zero(i32x16), zero(i32x16), zero(i32x16), zero(i32x16)
    for at in range(address, address + part, 64):
        prefetch(at + AHEAD)
        prefetch(at + part + AHEAD)
        prefetch(at + 2 * part + AHEAD)
        prefetch(at + 3 * part + AHEAD)
        a = a + load(i32x16, at)
        b = b + load(i32x16, at + part)
        c = c + load(i32x16, at + 2 * part)
        d = d + load(i32x16, at + 3 * part)
    store_i64(argument(op, 1) + WORD * task, lane_sum(a + b + c + d))


@operation
def multiply_bytes(op, step, task, scratch):
    """PRODUCTS multiply-adds: (VECTORS vectors of bytes, a word per task for the sum).

    Weights change from turn to turn: else a compiler would see that products repeat, and leave
    them out where they are an instruction of their own.
    """
    vectors = argument(op, 0)
    a, b = load(PEAK_BYTES, vectors), load(PEAK_BYTES, vectors + 64)
    s0, s1, s2 = splat(PEAK_TOTAL, 0), splat(PEAK_TOTAL, 1), splat(PEAK_TOTAL, 2)
    s3, s4, s5 = splat(PEAK_TOTAL, 3), splat(PEAK_TOTAL, 4), splat(PEAK_TOTAL, 5)
    s6, s7, s8 = splat(PEAK_TOTAL, 6), splat(PEAK_TOTAL, 7), splat(PEAK_TOTAL, 8)
    s9, s10, s11 = splat(PEAK_TOTAL, 9), splat(PEAK_TOTAL, 10), splat(PEAK_TOTAL, 11)
    for turn in range(TURNS):
        at = vectors + 128 + (turn & 3) * (64 * CHAINS // 2)
        w = load(PEAK_BYTES, at)
        s0, s1 = peak_dot(s0, w, a), peak_dot(s1, w, b)
        w = load(PEAK_BYTES, at + 64)
        s2, s3 = peak_dot(s2, w, a), peak_dot(s3, w, b)
        w = load(PEAK_BYTES, at + 128)
        s4, s5 = peak_dot(s4, w, a), peak_dot(s5, w, b)
        w = load(PEAK_BYTES, at + 192)
        s6, s7 = peak_dot(s6, w, a), peak_dot(s7, w, b)
        w = load(PEAK_BYTES, at + 256)
        s8, s9 = peak_dot(s8, w, a), peak_dot(s9, w, b)
        w = load(PEAK_BYTES, at + 320)
        s10, s11 = peak_dot(s10, w, a), peak_dot(s11, w, b)
    total = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11
    store_i64(argument(op, 1) + WORD * task, lane_sum(total))
