"""Where the records of the formats of 32 weights have what (kernels/activation.py).

After its int8 codes a record has the scales of its blocks, f32, then -8 times their sums, int32.
"""

from quant.jit import inner

BLOCK = 32


@inner
def scale_at(columns, b):
    """Where in a record the scale of block b is."""
    return columns + 4 * b


@inner
def sums_at(columns, b):
    """Where -8 times the sum of block b is."""
    return columns + columns // BLOCK * 4 + 4 * b
