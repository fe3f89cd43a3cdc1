"""Dense products: every token of the batch times one weight matrix."""

from ondevice.kernels.layout import COUNT, CURSOR, SCRATCH, SCRATCH_BYTES, WORD, argument, word
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import atomic_add, function_call
from quant.jit import inner

call_rows = function_call(12)


@inner
def thread_scratch(step, thread):
    """Address of this thread's private scratch."""
    return word(step, SCRATCH) + thread * word(step, SCRATCH_BYTES)


@operation
def linear(op, step, thread):
    """out = W x for every token; tasks are chunks of rows.

    (W, row_bytes, rows, columns, row kernel, x, x_bytes, out, out_bytes, rows of a chunk)
    """
    weights, row_bytes, rows = argument(op, 0), argument(op, 1), argument(op, 2)
    columns, kernel = argument(op, 3), argument(op, 4)
    x, x_bytes, out, out_bytes = argument(op, 5), argument(op, 6), argument(op, 7), argument(op, 8)
    chunk = argument(op, 9)
    count, scratch = word(step, COUNT), thread_scratch(step, thread)
    while True:
        start = atomic_add(op + WORD * CURSOR, 1) * chunk
        if start >= rows:
            break
        call_rows(
            kernel,
            (
                weights + start * row_bytes,
                row_bytes,
                min(chunk, rows - start),
                columns,
                x,
                x_bytes,
                0,
                out + 4 * start,
                out_bytes,
                0,
                count,
                scratch,
            ),
        )
