"""The tokens that a draft is chosen from, where the vocabulary is large.

The whole output matrix would be most of what a draft costs, so a draft takes some of its rows:
those of the COMMON first tokens, byte-pair vocabularies being in the order of how common tokens
are, and those of the RECENT other tokens that the text had last, whatever its subject and language.
A token that is not among them is merely never guessed.

    common    (common, columns)   the first rows of the output matrix, where they are
    recent    (RECENT, columns)   copies; row i is that of token `tokens[i]`

What the text leaves free has the rows that follow the common ones.
"""

from dataclasses import replace

import numpy as np

from ondevice.program import Program
from ondevice.weights import Matrix
from quant.format import Array

COMMON, RECENT = 16384, 4096


class Candidates:
    """Rows of an output matrix, some of which change with the text."""

    def __init__(self, program: Program, output: Matrix) -> None:
        """Copies are memory of `program`."""
        self.matrices: tuple[Matrix, ...] = (output,)
        """What a draft's vector is multiplied by, one under the other."""
        self.common = output.rows
        """Tokens that are rows of the first matrix."""
        self.tokens = np.zeros(RECENT, np.int32)
        """Those that are rows of the second."""
        if output.rows <= COMMON + RECENT:
            return
        piece = program.rows_per_task(COMMON + RECENT, 1)
        self.common = COMMON // piece * piece
        memory = program.buffer("recent rows", RECENT * output.row_bytes).memory
        recent = replace(
            output, address=int(memory.ctypes.data), rows=RECENT, owner=memory, stride=0
        )
        self.matrices = (replace(output, rows=self.common, stride=0), recent)
        self._copies = memory[: RECENT * output.row_bytes].reshape(RECENT, -1)
        every = np.asarray(output.owner).reshape(-1)[: output.rows * output.row_bytes]
        self._rows = every.reshape(output.rows, -1)
        self._place = np.full(output.rows, -1, np.int32)  # in `tokens`
        self._had = np.zeros(RECENT, np.int64)  # when the text had it last
        self._time = 0

    def note(self, tokens: Array) -> None:
        """The text has these tokens, int32, the latest last."""
        if len(self.matrices) == 1:
            return
        if self._time == 0:
            self._hold(np.arange(self.common, self.common + RECENT))
        latest = tokens[::-1]
        latest = latest[latest >= self.common]
        _, first = np.unique(latest, return_index=True)
        self._hold(latest[np.sort(first)[:RECENT]])

    def _hold(self, tokens: Array) -> None:
        """Have the rows of these different tokens, in the place of those not had for longest."""
        self._time += 1
        places = self._place[tokens]
        self._had[places[places >= 0]] = self._time
        new = tokens[places < 0]
        if len(new):
            oldest = np.argsort(self._had, kind="stable")[: len(new)]  # mostly in order
            self._place[self.tokens[oldest]] = -1
            self.tokens[oldest], self._place[new] = new, oldest
            self._had[oldest] = self._time
            self._copies[oldest] = self._rows[new]
