"""The end of a forward pass: logits for every row, and their peaks (kernels/peaks.py)."""

from dataclasses import dataclass

from ondevice.kernels import peaks
from ondevice.kernels.layout import CHAIN
from ondevice.program import Activation, Buffer, Program
from ondevice.weights import Matrix


@dataclass(frozen=True)
class Logits:
    """Where a program writes logits and peaks, a row for each token."""

    rows: Buffer
    peaks: Buffer
    piece: int
    """Logits that a peak stands for."""


def logits(program: Program, matrix: Matrix, h: Activation, name: str) -> Logits:
    """The output matrix times every row of h."""
    piece = program.rows_per_task(matrix.rows, 1)
    split = program.split(matrix, unit=piece)
    rows = program.linear(matrix, h, name, then=CHAIN, rows=split)
    noted = program.buffer(f"{name} peaks", 4 * -(-matrix.rows // piece))
    program.add(
        peaks.note_peaks,
        *(rows.address, rows.row_bytes, matrix.rows, split.chunk, split.runs),
        *(noted.address, noted.row_bytes, piece),
        tasks=split.tasks,
        few=split.few,
    )
    return Logits(rows, noted, piece)
