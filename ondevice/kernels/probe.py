"""What the machine can do: reading memory as fast as it goes."""

from ondevice.kernels.layout import WORD, argument
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import (
    i32x16,
    lane_sum,
    load,
    store_i64,
    zero,
)

CHUNK = 1 << 20


@operation
def read_memory(op, step, task, scratch):
    """Read a chunk: (address, a word per chunk for the sum)."""
    address = argument(op, 0) + task * CHUNK
    a, b, c, d = zero(i32x16), zero(i32x16), zero(i32x16), zero(i32x16)
    for at in range(address, address + CHUNK, 256):
        a = a + load(i32x16, at)
        b = b + load(i32x16, at + 64)
        c = c + load(i32x16, at + 128)
        d = d + load(i32x16, at + 192)
    store_i64(argument(op, 1) + WORD * task, lane_sum(a + b + c + d))
