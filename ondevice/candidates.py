"""The tokens that a draft is chosen from, where the vocabulary is large.

The whole output matrix would be most of what a draft costs, so a draft takes some of its rows:
those of the COMMON first tokens, byte-pair vocabularies being in the order of how common tokens
are, and those of the RECENT other tokens that the text had last, whatever its subject and language.
A token that is not among them is merely never guessed.

    common    (common, columns)   the first rows of the output matrix, where they are
    recent    (RECENT, columns)   copies; row i is that of token `tokens[i]`

What the text leaves free has the rows that follow the common ones.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

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
        self._places: OrderedDict[int, int] = OrderedDict()
        """In `tokens`, by token; that of the token not had for longest comes first."""

    def note(self, tokens: Array) -> None:
        """The text has these tokens, int32, the latest last."""
        if len(self.matrices) == 1:
            return
        if not self._places:
            self._places.update((-place, place) for place in range(RECENT))  # of no token
            self._hold(range(self.common, self.common + RECENT))
        latest = dict.fromkeys(t for t in reversed(tokens.tolist()) if t >= self.common)
        self._hold(reversed(list(islice(latest, RECENT))))

    def _hold(self, tokens: Iterable[int]) -> None:
        """Have the rows of these tokens, in the places of those not had for longest."""
        for token in tokens:
            if token in self._places:
                self._places.move_to_end(token)
            else:
                _, place = self._places.popitem(last=False)
                self._places[token] = place
                self.tokens[place] = token
                self._copies[place] = self._rows[token]
