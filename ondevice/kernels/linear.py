"""Dense products: every token of the batch times one weight matrix.

A task is some rows. With many tokens, of which each row takes long, all tasks have a chunk of the
same size. With few it is the reading of the weights that takes long, and memory gives most where
each thread reads on and on: tasks are *runs* of rows, long ones first, short ones in the end. A
table of runs, int32, is their number, where each begins, and the number of all rows.
"""

from ondevice.kernels.calls import function_call
from ondevice.kernels.layout import COUNT, are_few, argument, word
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import load_i32
from quant.jit import inner

call_rows = function_call(12)


@inner
def rows_of_task(step, task, rows, chunk, runs):
    """(first row, number of rows) of a task."""
    if runs != 0 and are_few(step):
        start = load_i32(runs + 4 * (1 + task))
        return start, load_i32(runs + 4 * (2 + task)) - start
    return task * chunk, min(chunk, rows - task * chunk)


@operation
def linear(op, step, task, scratch):
    """out = W x for every token; a task is some rows.

    (W, row_bytes, rows, columns, row kernel, x, x_bytes, out, out_bytes, rows of a chunk,
     runs or 0)
    """
    weights, row_bytes, rows = argument(op, 0), argument(op, 1), argument(op, 2)
    columns, kernel = argument(op, 3), argument(op, 4)
    x, x_bytes, out, out_bytes = argument(op, 5), argument(op, 6), argument(op, 7), argument(op, 8)
    start, used = rows_of_task(step, task, rows, argument(op, 9), argument(op, 10))
    call_rows(
        kernel,
        (
            weights + start * row_bytes,
            row_bytes,
            used,
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
