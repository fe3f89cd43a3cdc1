"""A prompt's continuation: prefill in batches, then the decode loop in bursts.

The decode loop runs natively for several tokens at a time, as many as fit into about 80 ms, so
that text still streams smoothly, an answer can be stopped at once, and the interpreter's lock is
wanted only a few times a second. The last prompt token is taken by the decode loop itself, whose
first result is the first token of the answer.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.experts import Counts
from ondevice.forecast import what_limits
from ondevice.kernels import layout
from ondevice.sampling import Sampling
from ondevice.speculate import Acceptance
from ondevice.state import State
from ondevice.tokenizer import TextStream
from quant.errors import UsageError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.model import Model

BURST_SECONDS = 0.08
LONGEST_BURST = 256


def with_options(sampling: Sampling, options: dict[str, Any]) -> Sampling:
    """Sampling with those options changed that are not None; UsageError for an unknown one."""
    known = {field.name for field in dataclasses.fields(Sampling)}
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name}; there are {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(sampling, **given)


def batch_of(tokens: int, most: int) -> int:
    """How many to take of so many tokens, so that all batches are of about the same length."""
    batches = -(-tokens // most)
    return -(-tokens // batches)


def _rate(count: int, seconds: float) -> float:
    """Per second; 0 where nothing was timed."""
    return count / seconds if seconds > 0 else 0.0


class Completion:
    """An iterator over pieces of text; what it came to is known once it is exhausted.

    The state takes in `tokens` beyond its position, and then the answer but for its last token.
    """

    def __init__(
        self,
        model: "Model",
        state: State,
        tokens: Sequence[int],
        sampling: Sampling,
        max_tokens: int | None = None,
        when_reached: Callable[[], None] | None = None,
        stops: Sequence[int] = (),
        when_taken: Callable[[list[int]], None] | None = None,
        when_ended: Callable[[], None] | None = None,
        history: Array | None = None,
    ) -> None:
        """when_reached is called when the prompt is taken in, all but its last token, and before
        that at the positions in `stops`; when_taken with the tokens of each burst before anybody
        sees them; when_ended when an answer has ended by itself or was cancelled. history: where
        the decode loop writes prompt and answer, int32, with room for the context and 2 more."""
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise UsageError(f"max_tokens is {max_tokens!r}; it must be a whole number from 1")
        prompt = model.checked(tokens)
        if not len(prompt):
            raise UsageError("the prompt is empty; at least one token is needed")
        model.check_room(len(prompt))
        self._model = model
        self._state = state
        room = model.context - len(prompt) + 1
        self.max_tokens = room if max_tokens is None else min(max_tokens, room)
        length = len(prompt) + self.max_tokens + 1
        self._history = np.zeros(length, np.int32) if history is None else history
        assert len(self._history) >= length
        self._history[: len(prompt)] = prompt
        self._pending = np.zeros(1, np.int32)
        self._noted = 0  # tokens that guesses know of
        self._sampler = sampling.record(
            model.logits_address, model.config.vocabulary, model.ends, model.sampling_space
        )
        self._step = model.step(state)
        self._step[layout.SAMPLER] = self._sampler.ctypes.data
        self._step[layout.HISTORY] = self._history.ctypes.data
        if model.ahead is not None:
            model.ahead.prepare(model, state)
        self.acceptance = Acceptance()
        """How guessing tokens ahead went."""
        self._cancelled = False
        self._when_reached = when_reached
        self._when_taken = when_taken
        self._when_ended = when_ended
        self._stops = sorted({*stops, len(prompt) - 1})
        self.prompt_tokens = len(prompt)
        self.prefilled_tokens = len(prompt) - state.position
        """Prompt tokens that the state did not hold already."""
        self._batch = 0  # tokens that are being taken in
        self.tokens: list[int] = []
        """The answer, without the end token."""
        self.text = ""
        self.finish_reason: str | None = None
        """"stop" (end token), "length", or "cancel"; None while running."""
        self.ended_with: int | None = None
        self.prompt_seconds = 0.0
        self.decode_seconds = 0.0
        self._experts_before = model.expert_counts
        self._runs = self._bursts()
        self._pieces: Generator[str] | None = None  # made when wanted: it refers to this object

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._pieces is None:
            self._pieces = self._stream()
        return next(self._pieces)

    def cancel(self) -> None:
        """Stop at the next token, from any thread."""
        self._cancelled = True
        self._step[layout.CANCEL] = 1
        self._step[layout.ABORT] = 1

    def close(self) -> None:
        """End here, as if cancelled; the tokens so far stand."""
        if self._pieces is not None:
            self._pieces.close()
        self._runs.close()
        self._state.settle()
        if self.finish_reason is None:
            self.finish_reason = "cancel"

    def ids(self) -> Iterator[int]:
        """The tokens of the answer as they come, instead of its text."""
        for burst in self._runs:
            yield from burst

    @property
    def read_tokens(self) -> float:
        """Prompt tokens taken in so far, of `prefilled_tokens`; from any thread."""
        known = self.prompt_tokens - self.prefilled_tokens
        done = self._state.position - known + self._batch * self._model.share_done
        return min(done, self.prefilled_tokens)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds, and tokens per second, of the prompt and of the answer; what the disk gave and
        how guessing went.

        `acceptance_1` is the share of right first guesses, `acceptance_2` that of second guesses
        after a right first one, and so on, as far as there were any.
        """
        rates = enumerate(self.acceptance.rates, start=1)
        decoded = len(self.tokens) + (self.ended_with is not None)
        experts = self.experts
        return {
            "load_seconds": self._model.load_seconds,
            "prompt_seconds": self.prompt_seconds,
            "prompt_tokens_per_second": _rate(self.prefilled_tokens, self.prompt_seconds),
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": _rate(decoded - 1, self.decode_seconds),
            "expert_hit_rate": experts.hit_rate,
            "disk_bytes": experts.bytes_read,
            "disk_wait_seconds": experts.waiting / self._model.threads,
            "drafted": self.acceptance.drafted,
            "accepted": sum(self.acceptance.right),
            **{f"acceptance_{place}": rate for place, rate in rates},
        }

    @property
    def experts(self) -> Counts:
        """What came of the experts that this answer wanted, and other answers meanwhile."""
        return self._model.expert_counts - self._experts_before

    @property
    def limit(self) -> str:
        """One sentence on what bounded the speed."""
        seconds = self.prompt_seconds + self.decode_seconds
        waiting = self.experts.waiting / self._model.threads / seconds if seconds else 0.0
        return what_limits(self._model.plan, self.experts.hit_rate, waiting)

    def _stream(self) -> Generator[str]:
        stream = TextStream(self._model.tokenizer)
        for burst in self._runs:
            piece = "".join(stream.feed(token) for token in burst)
            if piece:
                self.text += piece
                yield piece
        if rest := stream.flush():
            self.text += rest
            yield rest

    def _bursts(self) -> Generator[list[int]]:
        """Runs the model; yields the tokens of each burst."""
        started = time.perf_counter()
        if not self._prefill():
            self.finish_reason = "cancel"
            return
        burst, first = 1, True
        while self.finish_reason is None:
            burst_started = time.perf_counter()
            tokens = self._decode(min(burst, self.max_tokens - len(self.tokens)))
            now = time.perf_counter()
            if first:
                self.prompt_seconds = now - started
                first = False
            else:
                self.decode_seconds += now - burst_started
                per_token = (now - burst_started) / max(1, len(tokens))
                burst = min(16 * burst, LONGEST_BURST, max(1, int(BURST_SECONDS / per_token)))
            if self._when_taken is not None:
                self._when_taken(tokens)
            yield tokens
        if self._when_ended is not None:
            self._when_ended()

    def _prefill(self) -> bool:
        for stop in self._stops:
            while self._state.position < stop:
                if self._cancelled:
                    return False
                start = self._state.position
                batch = self._history[start : start + batch_of(stop - start, self._model.batch)]
                self._batch = len(batch)
                if not self._model.prefill(self._state, self._step, batch):
                    return False
                self._batch = 0
            if self._when_reached is not None and self._state.position == stop:
                self._when_reached()
        return not self._cancelled

    def _decode(self, limit: int) -> list[int]:
        """At most `limit` further tokens; sets finish_reason when there will be no more."""
        step = self._step
        begin = self._state.position + 1
        self._pending[0] = self._history[begin - 1]
        step[layout.TOKENS] = self._pending.ctypes.data
        step[layout.HISTORY_LENGTH] = begin
        step[layout.STEPS_LEFT] = limit
        try:
            self._take_steps()
        except BaseException:
            self._state.settle()
            raise
        finally:
            tokens: list[int] = self._history[begin : int(step[layout.HISTORY_LENGTH])].tolist()
            if tokens and self._model.ends[tokens[-1]]:
                self.ended_with = tokens.pop()
                self.finish_reason = "stop"
            self.tokens += tokens
        if self.finish_reason is None:
            if len(self.tokens) >= self.max_tokens:
                self.finish_reason = "length"
            elif self._cancelled:
                self.finish_reason = "cancel"
        if self.finish_reason is not None:
            self._state.settle()
        return tokens

    def _take_steps(self) -> None:
        """One burst of the decode loop, plain or with tokens guessed ahead."""
        model, state, step = self._model, self._state, self._step
        ahead, remaining = model.ahead, self.max_tokens - len(self.tokens)
        burst, begin = int(step[layout.STEPS_LEFT]), int(step[layout.HISTORY_LENGTH])
        if ahead is None or remaining < 2 or not ahead.ready(state):
            model.decode(state, step)
            return
        depth = ahead.depth.choose()
        disturbed = model.trying_threads(depth)
        if depth:
            started = time.perf_counter()
            model.catch_up(state, step)
            ahead.note(self._history[self._noted : begin])
            self._noted = begin
            ahead.depth.charge(time.perf_counter() - started)
            # a short burst has room for all guesses of its cycle
            step[layout.STEPS_LEFT] = min(remaining, burst + depth + 1)
            cycles = ahead.depth.cycles(burst)
            seconds, figures = model.decode_ahead(state, step, depth, cycles)
            self.acceptance.add(figures)
        else:
            step[layout.STEPS_LEFT] = ahead.depth.cycles(burst)
            seconds, figures = model.decode(state, step), None
        if not disturbed:
            made = int(step[layout.HISTORY_LENGTH]) - begin
            ahead.depth.note(depth, made, seconds, figures)
