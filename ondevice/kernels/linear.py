"""Dense products: every token of the batch times one weight matrix."""

from ondevice.kernels.layout import COUNT, argument, word
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import function_call

call_rows = function_call(12)


@operation
def linear(op, step, task, scratch):
    """out = W x for every token; a task is a chunk of rows.

    (W, row_bytes, rows, columns, row kernel, x, x_bytes, out, out_bytes, rows of a chunk)
    """
    weights, row_bytes, rows = argument(op, 0), argument(op, 1), argument(op, 2)
    columns, kernel = argument(op, 3), argument(op, 4)
    x, x_bytes, out, out_bytes = argument(op, 5), argument(op, 6), argument(op, 7), argument(op, 8)
    chunk = argument(op, 9)
    start = task * chunk
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
            word(step, COUNT),
            scratch,
        ),
    )
