"""What the machine can do: reading memory as fast as it goes."""

from ondevice.kernels.layout import CURSOR, WORD, argument
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import (
    atomic_add,
    i32x16,
    lane_sum,
    load,
    store_i64,
    zero,
)

CHUNK = 1 << 20


@operation
def read_memory(op, step, thread):
    """Read memory once: (address, bytes, a multiple of CHUNK; a word per thread for the sum)."""
    address, nbytes, sums = argument(op, 0), argument(op, 1), argument(op, 2)
    a, b, c, d = zero(i32x16), zero(i32x16), zero(i32x16), zero(i32x16)
    while True:
        start = atomic_add(op + WORD * CURSOR, 1) * CHUNK
        if start >= nbytes:
            break
        for at in range(address + start, address + start + CHUNK, 256):
            a = a + load(i32x16, at)
            b = b + load(i32x16, at + 64)
            c = c + load(i32x16, at + 128)
            d = d + load(i32x16, at + 192)
    store_i64(sums + WORD * thread, lane_sum(a + b + c + d))
