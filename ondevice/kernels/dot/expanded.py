"""Products for formats that are only read, at any speed: rows are expanded, then multiplied as F32.

A group of rows is expanded to float32 in scratch once for all tokens; activations are float32.
"""

from ondevice.kernels.dot import floats
from ondevice.kernels.dot.tile import ROWS
from ondevice.kernels.expand import Q2_K, Q3_K, expand
from ondevice.kernels.operation import row_kernel
from quant.jit import inner


@inner
def multiply(layout, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    """The loop nest of all these formats; arguments as in `dot`, `s` the scratch."""
    group = 1 if tokens == 1 else ROWS
    for start in range(0, rows, group):
        count = min(group, rows - start)
        for r in range(count):
            expand(layout, w + (start + r) * row_bytes, columns, s + 4 * columns * r)
        at = out + 4 * start
        floats.multiply(
            floats.F32, 4, s, 4 * columns, count, columns, a, a_bytes, i, at, o_bytes, o, tokens
        )


def scratch_bytes(columns: int) -> int:
    """Scratch that `multiply` needs for rows of so many columns."""
    return ROWS * 4 * columns


@row_kernel
def multiply_q2_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q2_K, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)


@row_kernel
def multiply_q3_k(w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s):
    multiply(Q3_K, w, row_bytes, rows, columns, a, a_bytes, i, out, o_bytes, o, tokens, s)
