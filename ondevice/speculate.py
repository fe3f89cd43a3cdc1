"""Guessing tokens ahead: the programs for it, what a state needs for it, and how far to guess.

A *cycle* takes the certain token and up to four drafts in one batch, and keeps those that plain
decoding would have chosen (kernels/ahead.py). Drafts come from the file's multi-token-prediction
block (layers/mtp.py), or from the context where there is none. The tokens are the same either way;
only time is at stake, and that is depth.py's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ondevice.config import Config
from ondevice.depth import Depth
from ondevice.experts import Pool
from ondevice.kernels import ahead, delta, layout
from ondevice.kernels.ahead import MOST_DRAFTS, ring_rows
from ondevice.kernels.attention import CACHES
from ondevice.layers.mtp import Head, head
from ondevice.layers.output import Logits
from ondevice.program import Buffer, Operations, Program, zeros
from ondevice.state import State, journal_bytes
from ondevice.weights import Weights
from quant.errors import ResourceError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.model import Model

MODES = ("auto", "on", "off")
RECURRENT = (delta.convolve, delta.delta_inputs, delta.delta_rule)


class Prediction:
    """What the multi-token-prediction block remembers of a sequence.

    Its cache has the trunk's positions `start` to `end` - 1, the ring the trunk's vectors of
    `kept` to `upto` - 1, at most a batch of them. A cache that cannot follow the trunk any more
    begins anew: rotary positions are relative, and a guess may know less of the past.
    """

    def __init__(self, config: Config, capacity: int, kv: str, batch: int) -> None:
        self.cache = zeros(head_cache_bytes(config, capacity, kv))
        self.ring = zeros(ring_bytes(config, batch))
        self.batch = batch
        self.start = self.end = 0
        self.kept = self.upto = 0

    def cut(self, position: int) -> None:
        """Forget what lies at this position and after it."""
        self.upto = min(self.upto, position)
        self.kept = min(self.kept, self.upto)
        self.end = min(self.end, position)
        self.start = min(self.start, self.end)

    def note(self, begin: int, end: int) -> None:
        """The ring has got the vectors of these positions."""
        if begin != self.upto:
            self.kept = begin
        self.upto = end
        self.kept = max(self.kept, end - self.batch)

    def ready(self, position: int) -> bool:
        """Whether the ring has what the cache lacks before this position, at least its last."""
        if self.upto != position or self.kept >= position:
            return False
        if self.end < self.kept:
            self.start = self.end = self.kept
        return self.end < position


def head_cache_bytes(config: Config, context: int, kv: str) -> int:
    """Bytes of the block's keys and values."""
    return CACHES[kv].bytes(config.kv_heads, config.head_dim, context)


def ring_bytes(config: Config, batch: int) -> int:
    """Bytes of the trunk's last vectors."""
    return 4 * config.hidden * ring_rows(batch)


def state_bytes(config: Config, context: int, kv: str, batch: int) -> int:
    """Bytes that guessing ahead adds to a state, with prompts read in such batches."""
    nbytes = journal_bytes(config)
    if config.mtp_layers:
        nbytes += head_cache_bytes(config, context, kv) + ring_bytes(config, batch)
    return nbytes


class Ahead:
    """The programs that guess ahead, on the buffers of the model's own."""

    def __init__(
        self, config: Config, record: Array, trunk: Operations, logits: Operations,
        result: Logits, threads: int, mode: str,
    ) -> None:  # fmt: skip
        self.config = config
        self.record = record
        self.depth = Depth(mode)
        self.predicts = config.mtp_layers > 0
        self._threads = threads
        self.check = trunk + logits
        self._result = result
        self.programs: tuple[Program, ...] = ()
        self.head: Head | None = None
        self.hidden: Operations | None = None
        program = Program(1, threads)
        program.add(ahead.settled)
        self.settle = _settling(trunk) + program.take()
        program.add(ahead.look_up, self._address, config.vocabulary)
        self.cycle = program.take() + self._checking()

    @property
    def _address(self) -> int:
        return int(self.record.ctypes.data)

    def _checking(self) -> Operations:
        program = Program(1, self._threads)
        rows, peaks, piece = self._result.rows, self._result.peaks, self._result.piece
        program.add(
            ahead.accept,
            *(self._address, rows.row_bytes, peaks.address, peaks.row_bytes, piece),
        )
        return self.check + program.take()

    def add_head(
        self, program: Program, weights: Weights, x: Buffer, norm: Array, kv: str,
        pool: Pool | None,
    ) -> None:  # fmt: skip
        """Guess with the file's block, whose programs share the buffers of `program`."""
        config, epsilon = self.config, self.config.norm_epsilon
        with program.stage("hidden"):
            h = program.norm(x, norm, epsilon, "hidden", (), then=layout.CHAIN)
        remember(program, self.record, h.floats, config.hidden)
        self.hidden = program.take()
        self.head = head(program, config, weights, x, kv, pool, self._address)
        self.programs = self.head.programs
        control = Program(1, self._threads)
        control.add(ahead.begin_cycle, self._address)
        begin = control.take()
        control.add(ahead.begin_check, self._address)
        self.cycle = begin + self.head.drafts + control.take() + self._checking()

    @property
    def kernels(self) -> Operations:
        """All programs, one after the other, for the compiler."""
        programs = self.cycle + self.settle
        return programs + self.hidden if self.hidden is not None else programs

    def note(self, tokens: Array) -> None:
        """The text that is to be guessed has these tokens, int32."""
        if self.head is not None:
            self.head.candidates.note(tokens)

    # ---- a state ----

    def prepare(self, model: "Model", state: State) -> None:
        """Give a state what guessing ahead needs."""
        if state.journal is not None:
            return
        try:
            state.journal = zeros(journal_bytes(self.config))
            if self.predicts:
                state.prediction = Prediction(self.config, state.capacity, model.kv, model.batch)
        except MemoryError:
            needed = state_bytes(self.config, state.capacity, model.kv, model.batch)
            raise ResourceError(
                f"no memory for guessing tokens ahead, which takes {needed:,} bytes; "
                "turn it off, or choose a smaller context"
            ) from None
        state.settler = partial(_settle, model)

    def ready(self, state: State) -> bool:
        """Whether a cycle can start from here."""
        if state.journal is None:
            return False
        return not self.predicts or (
            state.prediction is not None and state.prediction.ready(state.position)
        )

    def aim(self, state: State, depth: int = 0, cycles: int = 0) -> None:
        """Point the record at a state, for so many cycles."""
        prediction = state.prediction
        record = self.record
        record[ahead.RING] = prediction.ring.ctypes.data if prediction else 0
        record[ahead.HEAD_CACHE] = prediction.cache.ctypes.data if prediction else 0
        record[ahead.START] = prediction.start if prediction else 0
        record[ahead.END] = prediction.end if prediction else 0
        record[[ahead.DEPTH, ahead.MADE, ahead.CYCLES_LEFT]] = depth, 0, cycles

    def figures(self) -> Array:
        """Cycles so far; drafts compared, by place; those that were right; drafts in all."""
        return self.record[ahead.CYCLES : ahead.TOTAL + 1].copy()


def remember(program: Program, record: Array, h: Buffer, columns: int) -> None:
    """After a norm per token: keep its result in the ring."""
    address = int(record.ctypes.data)
    program.add(ahead.remember, address, h.address, h.row_bytes, columns, per_token=True)


def _settling(trunk: Operations) -> Operations:
    """The recurrences of all layers alone, for a batch without tokens."""
    lines, labels = [], []
    for line, label in zip(trunk.lines, trunk.labels, strict=True):
        if line[layout.KERNEL] in RECURRENT:
            words = list(line)
            words[layout.PER_TOKEN], words[layout.THEN] = 0, layout.BARRIER
            lines.append(words)
            labels.append(label)
    return Operations(tuple(lines), tuple(labels))


def _settle(model: "Model", state: State) -> None:
    model.settle(state)


@dataclass
class Acceptance:
    """How guessing went."""

    cycles: int = 0
    drafted: int = 0
    compared: tuple[int, ...] = (0,) * MOST_DRAFTS
    """Drafts that were compared with the token chosen, by place."""
    right: tuple[int, ...] = (0,) * MOST_DRAFTS
    """Those that were that token."""

    def add(self, figures: Array) -> None:
        """Count in what changed in `Ahead.figures`."""
        places = range(MOST_DRAFTS)
        self.cycles += int(figures[0])
        self.drafted += int(figures[-1])
        self.compared = tuple(self.compared[i] + int(figures[1 + i]) for i in places)
        self.right = tuple(self.right[i] + int(figures[1 + MOST_DRAFTS + i]) for i in places)

    @property
    def rates(self) -> list[float]:
        """Share of right drafts, by place, up to the last that was ever compared."""
        return [r / c for r, c in zip(self.right, self.compared, strict=True) if c]


def random_hook(model: "Model", truth: Sequence[int], chance: float) -> Array:
    """For tests: drafts are the tokens of `truth`, by position, with this chance; else wrong.

    The array must outlive what is run with it.
    """
    assert model.ahead is not None
    tokens = np.ascontiguousarray(truth, np.int32)
    record = model.ahead.record
    record[ahead.TRUTH], record[ahead.TRUTH_LENGTH] = tokens.ctypes.data, len(tokens)
    record.view(np.float64)[ahead.CHANCE] = chance
    return tokens
