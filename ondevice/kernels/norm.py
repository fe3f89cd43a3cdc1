"""Root-mean-square norms (Zhang and Sennrich, 2019), each followed by what reads its result.

    y = x / sqrt(mean(x^2) + epsilon) * weight

GGUF norm weights already carry the +1 of Qwen3-Next's zero-centred norms.
"""

import math

import numpy as np

from ondevice.kernels.activation import quantize_columns, quantize_row, silu
from ondevice.kernels.arithmetic import fma, lane_sum
from ondevice.kernels.layout import ARGUMENTS, FIRST, WORD, argument, heads_of_task, word
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import f32x16, load_f32, load_some, store_some, zero
from quant.jit import inner


@inner
def squared_length(x, size):
    """The sum of x^2 of `size` floats."""
    total = zero(f32x16)
    for c in range(0, size, 16):
        value = load_some(x + 4 * c, size - c)
        total = fma(value, value, total)
    return lane_sum(total)


@inner
def inverse_root_mean_square(x, columns, epsilon):
    """1 / sqrt(mean(x^2) + epsilon) of `columns` floats."""
    mean = squared_length(x, columns) / np.float32(columns)
    return np.float32(1.0) / np.float32(math.sqrt(mean + epsilon))


@inner
def normalize(x, columns, weight, epsilon, out):
    """out := x / rms(x) * weight; out may be x."""
    factor = inverse_root_mean_square(x, columns, epsilon)
    for c in range(0, columns, 16):
        left = columns - c
        value = load_some(x + 4 * c, left) * factor * load_some(weight + 4 * c, left)
        store_some(out + 4 * c, value, left)


@operation
def rms_norm(op, step, t, scratch):
    """x += addend where there is one; then the norm of x, as floats and as int8 records.

    (x, x_bytes, columns, weight, epsilon, addend, bytes, out, bytes, per_256, bytes, per_32, bytes)
    """
    x, x_bytes, columns = argument(op, 0), argument(op, 1), argument(op, 2)
    weight, epsilon = argument(op, 3), load_f32(op + WORD * (ARGUMENTS + 4))
    addend, addend_bytes = argument(op, 5), argument(op, 6)
    out, out_bytes = argument(op, 7), argument(op, 8)
    per_256, per_256_bytes = argument(op, 9), argument(op, 10)
    per_32, per_32_bytes = argument(op, 11), argument(op, 12)
    first = word(step, FIRST)
    row = x + (first + t) * x_bytes
    if addend != 0:
        add_row(row, addend + (first + t) * addend_bytes, columns)
    target = out + t * out_bytes
    normalize(row, columns, weight, epsilon, target)
    at_256 = per_256 + t * per_256_bytes if per_256 != 0 else 0
    at_32 = per_32 + t * per_32_bytes if per_32 != 0 else 0
    quantize_row(target, columns, at_256, at_32)


@inner
def add_row(x, addend, columns):
    """x += addend, over `columns` floats."""
    for c in range(0, columns, 16):
        left = columns - c
        store_some(x + 4 * c, load_some(x + 4 * c, left) + load_some(addend + 4 * c, left), left)


@operation
def gated_norm(op, step, task, scratch):
    """Per head: norm(x) * weight * silu(z), in place, and the int8 records of that.

    (x, bytes, z, bytes, heads, size, weight, epsilon, per_256, bytes, per_32, bytes,
     heads of a task where tokens are few)
    """
    x, x_bytes, z, z_bytes = argument(op, 0), argument(op, 1), argument(op, 2), argument(op, 3)
    heads, size, weight = argument(op, 4), argument(op, 5), argument(op, 6)
    epsilon = load_f32(op + WORD * (ARGUMENTS + 7))
    per_256, per_256_bytes = argument(op, 8), argument(op, 9)
    per_32, per_32_bytes = argument(op, 10), argument(op, 11)
    t, begin, end = heads_of_task(step, task, heads, argument(op, 12))
    row = x + t * x_bytes
    gate = z + t * z_bytes
    for h in range(begin, end):
        head = row + 4 * size * h
        normalize(head, size, weight, epsilon, head)
        for c in range(0, size, 16):
            left = size - c
            at = 4 * (size * h + c)
            value = load_some(row + at, left) * silu(load_some(gate + at, left))
            store_some(row + at, value, left)
    at_256 = per_256 + t * per_256_bytes if per_256 != 0 else 0
    at_32 = per_32 + t * per_32_bytes if per_32 != 0 else 0
    quantize_columns(row, heads * size, begin * size, end * size, at_256, at_32)
