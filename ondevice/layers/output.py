"""The end of a forward pass: logits for every row, and their peaks (kernels/peaks.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

from ondevice.kernels import peaks
from ondevice.kernels.layout import BARRIER, BESIDE, CHAIN
from ondevice.program import Activation, Buffer, Program
from ondevice.weights import Matrix


@dataclass(frozen=True)
class Logits:
    """Where a program writes logits and peaks, a row for each token."""

    rows: Buffer
    peaks: Buffer
    piece: int
    """Logits that a peak stands for."""


def logits(program: Program, matrices: Sequence[Matrix], h: Activation, name: str) -> Logits:
    """The output matrix, one under the other where it is several, times every row of h.

    All but the last must be whole pieces of `program.rows_per_task` of all rows.
    """
    count = sum(matrix.rows for matrix in matrices)
    piece = program.rows_per_task(count, 1)
    rows = program.buffer(name, 4 * count)
    noted = program.buffer(f"{name} peaks", 4 * -(-count // piece))
    start = 0
    for matrix in matrices:
        assert start % piece == 0, name
        split = program.split(matrix, unit=piece)
        out = rows.from_column(start)
        program.linear(matrix, h, name, then=CHAIN, rows=split, out=out)
        program.add(
            peaks.note_peaks,
            *(out.address, out.row_bytes, matrix.rows, split.chunk, split.runs),
            *(noted.from_column(start // piece).address, noted.row_bytes, piece),
            tasks=split.tasks,
            few=split.few,
            then=BARRIER if matrix is matrices[-1] else BESIDE,
        )
        start += matrix.rows
    return Logits(rows, noted, piece)
