"""A model that is open: its programs (forward.py), the threads to run them, and what it knows.

Calls queue: one runs at a time, natively, on all threads. A call that fails leaves a state as it
was, or, where some layers have taken a token in that others have not, empty.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice import usage
from ondevice.budget import available
from ondevice.chat import Template
from ondevice.disk import ReadAhead
from ondevice.experts import Counts, Pool
from ondevice.forward import HEAD_ROWS, Forward
from ondevice.gguf_file import GGUFFile
from ondevice.kernels import ahead, layout
from ondevice.kernels.ahead import MOST_DRAFTS
from ondevice.kernels.store import read
from ondevice.kernels.team import Team, begin, serve
from ondevice.pace import Pace
from ondevice.planning import Options, earlier_use, planned
from ondevice.program import HUGE_PAGES, Operations, zeros
from ondevice.prompt_cache import PromptCache, reading
from ondevice.sampling import Sampling
from ondevice.snapshots import LEAST_MEMORY, Snapshots
from ondevice.state import Snapshot, State
from ondevice.tokenizer import Tokenizer
from ondevice.weights import Weights
from quant.compiling import Compilation, Report
from quant.errors import Error, UsageError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.generate import Completion
    from ondevice.session import Session

RESERVE = 256 << 20
"""Bytes of free memory below which the pool of experts gives some back."""
LOOK_SECONDS = 0.25
"""Time between two looks at what is free."""


class Model:
    """An open model; usable from any thread, calls queue. Made by `ondevice.load`."""

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        context: int | None = None,
        memory: int | None = None,
        kv: str = "i12",
        progress: Report | None = None,
        prompt_cache: bool = False,
        mtp: str = "auto",
    ) -> None:
        started = time.perf_counter()
        self.path = path
        self._closed = False
        self.kv, self.mtp = kv, mtp
        self._pool: Pool | None = None
        self._reading: ReadAhead | None = None
        self._file = GGUFFile.open(path)
        try:
            options = Options(path, threads, context, memory, kv, mtp)
            found = planned(self._file, options)
            self.config, self.plan, self.context = found.config, found.plan, found.context
            self.batch = found.batch
            """Tokens of a prefill batch, at most."""
            building = time.perf_counter()
            functions = [begin, serve]
            weights = Weights(self._file, self.config)
            if self.plan.cached:
                self._pool = Pool(weights, found.pool_config)
                self._pool.open()
                weights = Weights(self._file, self.config, self._pool.read_tensor)
                functions.append(read)
            else:
                self._file.want_large_pages()
                free = available()
                if free is None or self._file.nbytes <= free:
                    self._reading = ReadAhead(weights.mapped(prediction=mtp != "off"))
            forward = Forward(
                self.config, weights, found.threads, kv, mtp, self._pool, self.batch,
                found.stage_bytes,
            )  # fmt: skip
            self.ahead, self._forward = forward.ahead, forward
            # in a large page, of which only what is used takes memory
            self._scratch = zeros(max(HUGE_PAGES, found.threads * forward.scratch_bytes))
            compilation = Compilation([*functions, *forward.kernels], progress)
            self.compile_seconds = time.perf_counter() - building
            with compilation:
                self.tokenizer = Tokenizer.from_metadata(self._file.metadata, path)
                source = self._file.metadata.get("tokenizer.chat_template")
                self.template = Template(source, self.tokenizer, path)
                self.sampling = _recommended(path, self._file.metadata)
                waiting = time.perf_counter()
            self.compile_seconds += time.perf_counter() - waiting
            if self._pool is not None:
                self._usage_name, self._usage = earlier_use(self._file, found)
                self._pool.allocate(self.plan.pool)
            self._team = Team(found.threads)
            # how long a token waits for the disk says nothing about threads
            self._pace = Pace(found.threads, fixed=self._pool is not None)
            self.snapshots = Snapshots(max(LEAST_MEMORY, self.plan.needs.delta_memory))
        except BaseException:
            if self._pool is not None:
                self._pool.close()
            if self._reading is not None:
                self._reading.close()
            self._file.close()
            raise
        self.ends = np.zeros(self.config.vocabulary, np.uint8)
        self.ends[list(self.tokenizer.eos_ids)] = 1
        self.sampling_space = np.zeros(2 * self.config.vocabulary, np.float32)
        self._lock = threading.Lock()
        self.prompt_cache = PromptCache(self) if prompt_cache else None
        """Beginnings of prompts that were read before; None where none are kept."""
        self._copy: Array | None = None
        self._asked = False  # whether there was a request already
        self._looked = 0.0  # when the system was last asked for free memory
        if self._pool is not None:
            warming = (self._usage, self._unless_asked)
            self._warming = threading.Thread(target=self._pool.warm, args=warming, daemon=True)
            self._warming.start()
        self.load_seconds = time.perf_counter() - started

    @property
    def expert_counts(self) -> Counts:
        """What the pool of experts has done since the start; nothing where the file is mapped."""
        return self._pool.counts if self._pool is not None else Counts()

    def pool_memory(self) -> Array | None:
        """Memory of the pool that is in use, for probes of the machine to read."""
        return self._pool.filled() if self._pool is not None else None

    # ---- the native calls ----

    @property
    def threads(self) -> int:
        return self._team.threads

    def step(self, state: State) -> Array:
        """A step record for running programs on `state`; the caller keeps both alive."""
        words = np.zeros(layout.STEP_WORDS, np.int64)
        words[layout.STATE] = state.memory.ctypes.data
        words[layout.CACHE] = state.cache.ctypes.data
        words[layout.CONTEXT] = state.capacity
        words[layout.SCRATCH] = self._scratch.ctypes.data
        words[layout.SCRATCH_BYTES] = self._forward.scratch_bytes
        return words

    @property
    def share_done(self) -> float:
        """How far the call that is running has come; for progress lines."""
        return self._team.share_done

    @property
    def programs(self) -> dict[str, Operations]:
        """What `prefill`, `decode` and the output head run, by these names."""
        forward = self._forward
        return {"prefill": forward.prefill, "decode": forward.decode, "head": forward.head}

    def _begin(
        self, state: State, step: Array, count: int, depth: int = 0, cycles: int = 0
    ) -> None:
        """Make the step one of this state, with no tentative tokens."""
        step[[layout.COUNT, layout.POSITION, layout.FIRST]] = count, state.position, 0
        step[[layout.PENDING, layout.TENTATIVE, layout.STEADY]] = state.pending, 0, 0
        step[layout.JOURNAL] = 0 if state.journal is None else state.journal.ctypes.data
        if self.ahead is not None:
            self.ahead.aim(state, depth, cycles)

    @contextmanager
    def _unless_asked(self) -> Iterator[bool]:
        """Keeps requests waiting; false if there has been one."""
        with self._lock:
            yield not (self._closed or self._asked)

    def _watch_memory(self, pool: Pool) -> None:
        """Give slabs back where the system is short of memory, take them again where it is not."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        free = available()
        if free is not None and free < RESERVE:
            pool.shrink(RESERVE - free)
        elif pool.given_bytes and (free is None or free > 2 * RESERVE):
            pool.grow(min(pool.given_bytes, (free or pool.given_bytes) - RESERVE))

    @contextmanager
    def _alone(self) -> Iterator[Team]:
        """The team, when the calls before this one are done."""
        self._asked = True
        with self._lock:
            if self._closed:
                raise Error(f"{self.path}: the model is closed")
            yield self._team

    def run(self, program: Operations, step: Array, profile: Array | None = None) -> None:
        """Run a program on all threads."""
        with self._alone() as team:
            self._run(team, program, step, profile)

    def _run(
        self,
        team: Team,
        program: Operations,
        step: Array,
        profile: Array | None = None,
        threads: int | None = None,
    ) -> None:
        """Run a program; Error if an expert could not be read, or the file has changed."""
        self._file.check()
        if self._pool is not None:
            self._watch_memory(self._pool)
        step[layout.OUTCOME] = 0
        team.run(program.records, step, profile, threads)
        if self._pool is not None and step[layout.OUTCOME] == layout.READ_FAILED:
            fault = self._pool.fault()
            self._file.check()
            raise fault

    def prefill(
        self, state: State, step: Array, tokens: Array, profile: Array | None = None
    ) -> bool:
        """Take at most `batch` tokens (int32) into the state.

        False if that was aborted; the state is then unchanged. `profile` as in `Team.run`.
        """
        state.settle()
        start, count = state.position, len(tokens)
        with self._alone() as team:
            before = self._copied(state)
            try:
                self._follow_trunk(team, state, step)
                self._begin(state, step, count)
                step[[layout.TOKENS, layout.REPEAT]] = tokens.ctypes.data, 0
                self._run(team, self._forward.prefill, step, profile)
                aborted = bool(step[layout.ABORT]) and count > 1
                if not aborted:
                    state.position += count
                    self._keep_hidden(team, state, step, start)
            except BaseException:
                state.restore(before)
                raise
            if aborted:
                state.restore(before)
            return not aborted

    def _copied(self, state: State) -> Snapshot:
        """A copy of a state's memory until the next one is made: new memory costs more than it."""
        if self._copy is None:
            self._copy = np.empty_like(state.memory)
        self._copy[:] = state.memory
        return Snapshot(self._copy, state.position)

    def _keep_hidden(self, team: Team, state: State, step: Array, start: int) -> None:
        """Let the multi-token-prediction block have the batch that began at `start`."""
        prediction = state.prediction
        if self.ahead is None or self.ahead.hidden is None or prediction is None:
            return
        self._run(team, self.ahead.hidden, step)
        prediction.note(start, state.position)
        self._follow_trunk(team, state, step)

    def _follow_trunk(self, team: Team, state: State, step: Array, less: int = 0) -> None:
        """The block's keys and values of what it lacks, but for so many, where the next tokens are
        known."""
        prediction = state.prediction
        if self.ahead is None or self.ahead.head is None or prediction is None:
            return
        if not step[layout.HISTORY] or not prediction.ready(state.position):
            return
        until = state.position - less
        self._begin(state, step, until - prediction.end)
        step[layout.POSITION] = prediction.end - prediction.start
        step[[layout.CACHE, layout.STEADY]] = prediction.cache.ctypes.data, 1
        try:
            self._run(team, self.ahead.head.follow, step)
            prediction.end = until
        finally:
            step[[layout.CACHE, layout.STEADY]] = state.cache.ctypes.data, 0

    def decode(
        self,
        state: State,
        step: Array,
        threads: int | None = None,
        profile: Array | None = None,
    ) -> float:
        """Run the decode loop for at most STEPS_LEFT tokens, and move the state on.

        On as many threads as is best at the moment, unless told. `profile` as in `Team.run`.
        Returns the seconds that it took, without those that it waited for other calls.
        """
        with self._alone() as team:
            self._begin(state, step, 1)
            if threads is None and self._pace.trying():
                step[layout.STEPS_LEFT] = max(1, step[layout.STEPS_LEFT] // 2)
            waited, started = self.expert_counts.waiting, time.perf_counter()
            chosen = threads or self._pace.choose()
            try:
                self._run(team, self._forward.decode, step, profile, chosen)
            except Error:
                state.reset()  # some layers have taken a token in that others have not
                step[[layout.POSITION, layout.PENDING]] = 0
                raise
            finally:
                seconds = time.perf_counter() - started
                tokens = int(step[layout.POSITION]) - state.position
                self._move(state, step)
                if threads is None:
                    self._pace.note(tokens, seconds)
            if self._pool is not None:
                waited = (self.expert_counts.waiting - waited) / chosen
                self._pool.usage.note_computing(chosen, tokens, seconds - waited)
        self._check_finite(state, step)
        return seconds

    def _move(self, state: State, step: Array) -> None:
        """Move a state on to where the decode loop has come."""
        before = state.position
        state.position, state.pending = int(step[layout.POSITION]), int(step[layout.PENDING])
        if state.prediction is not None and state.position > before:
            state.prediction.note(before, state.position)

    def _check_finite(self, state: State, step: Array) -> None:
        if step[layout.OUTCOME] == layout.NOT_FINITE:
            raise Error(
                f"{self.path}: the logits at position {state.position} are not finite; "
                "the file's weights are damaged"
            )

    def decode_ahead(
        self, state: State, step: Array, depth: int, cycles: int = 1 << 30
    ) -> tuple[float, Array]:
        """As `decode`, with up to `depth` tokens guessed at each of at most so many turns.

        STEPS_LEFT is at least 2; it stops before the last of them, which plain decoding makes as
        well. Returns the seconds, and what was added to `Ahead.figures`.
        """
        assert self.ahead is not None and self.ahead.ready(state) and step[layout.STEPS_LEFT] > 1
        with self._alone() as team:
            if self._pace.trying(depth):
                cycles = max(1, cycles // 2)
            self._begin(state, step, 1, depth, cycles)
            step[layout.STEADY] = 1
            before, started = self.ahead.figures(), time.perf_counter()
            try:
                self._run(team, self.ahead.cycle, step, None, self._pace.choose(depth))
            except Error:
                state.reset()
                step[[layout.POSITION, layout.PENDING]] = 0
                raise
            finally:
                seconds = time.perf_counter() - started
                step[[layout.STEADY, layout.CACHE]] = 0, state.cache.ctypes.data
                self._move(state, step)
                if state.prediction is not None:
                    state.prediction.start = int(self.ahead.record[ahead.START])
                    state.prediction.end = int(self.ahead.record[ahead.END])
                    state.prediction.cut(state.position)
            figures = self.ahead.figures() - before
            self._pace.note(int(figures[0]), seconds, depth)
        self._check_finite(state, step)
        return seconds, figures

    def trying_threads(self, depth: int) -> bool:
        """Whether the next burst, if it guesses so many, tries another number of threads."""
        return self._pace.trying(depth)

    def catch_up(self, state: State, step: Array) -> None:
        """Let the multi-token-prediction block see what plain decoding has made since."""
        prediction = state.prediction
        if prediction is None or state.position - prediction.end <= 1 + MOST_DRAFTS:
            return
        with self._alone() as team:
            self._follow_trunk(team, state, step, 1)

    def settle(self, state: State) -> None:
        """Make a state's pending tokens a part of its memory."""
        assert self.ahead is not None
        step = self.step(state)
        with self._alone() as team:
            self._begin(state, step, 0)
            try:
                self._run(team, self.ahead.settle, step)
            finally:
                state.pending = int(step[layout.PENDING])

    def look_ahead(self, state: State, tokens: Sequence[int]) -> Array:
        """Take 1 to 5 tokens into a state, all but the first so that `take_back` can forget them.

        (len(tokens), vocabulary) f32: row i predicts what follows tokens 0 .. i.
        """
        assert self.ahead is not None and 1 <= len(tokens) <= 1 + MOST_DRAFTS
        self.ahead.prepare(self, state)
        ids, step = self.checked(tokens), self.step(state)
        with self._alone() as team:
            self._begin(state, step, len(ids))
            step[[layout.TENTATIVE, layout.STEADY]] = len(ids) - 1, 1
            step[layout.TOKENS] = ids.ctypes.data
            try:
                self._run(team, self.ahead.check, step)
            except BaseException:
                state.reset()  # an interrupt does not tell whether the tokens were taken in
                raise
            start = state.position
            state.position += len(ids)
            state.pending = len(ids) - 1
            if state.prediction is not None:
                state.prediction.note(start, state.position)
            return self._logit_rows(len(ids)).copy()

    def _logit_rows(self, rows: int) -> Array:
        """(rows, vocabulary) f32: what the head has computed."""
        logits = self._forward.logits
        values = logits.memory[: HEAD_ROWS * logits.row_bytes].view(np.float32)
        return values.reshape(HEAD_ROWS, -1)[:rows, : self.config.vocabulary]

    # ---- what an application calls ----

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, control tokens written in it are recognised."""
        return self.tokenizer.encode(text, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without control tokens."""
        return self.tokenizer.decode(self.checked(tokens).tolist())

    def checked(self, tokens: Any) -> Array:
        """(n,) int32; UsageError for an id that the vocabulary does not have."""
        vocabulary = self.config.vocabulary
        sequence = isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes)
        ids = np.array([], int) if sequence and not len(tokens) else np.asarray(tokens)
        if not (sequence or isinstance(tokens, np.ndarray)) or ids.ndim != 1:
            raise UsageError(f"tokens are {str(tokens)[:40]!r}; a list of token ids is needed")
        if ids.dtype.kind in "iu" and ((ids >= 0) & (ids < vocabulary)).all():
            return ids.astype(np.int32)
        wrong = [
            token
            for token in tokens
            if not isinstance(token, int | np.integer)
            or isinstance(token, bool)
            or not 0 <= token < vocabulary
        ]
        raise UsageError(
            f"token {wrong[0]!r} does not exist; {self.path} has 0 to {vocabulary - 1}"
        )

    def logits(self, tokens: Sequence[int], batch: int | None = None) -> Array:
        """(len(tokens), vocabulary) f32: row i predicts token i + 1, given tokens 0 .. i.

        The result does not depend on `batch`, the tokens of a prefill batch (1 to the model's).
        """
        if batch is None:
            batch = self.batch
        if not isinstance(batch, int) or not 1 <= batch <= self.batch:
            raise UsageError(f"batch is {batch}; it must be from 1 to {self.batch}")
        ids = self.checked(tokens)
        self.check_room(len(ids))
        vocabulary = self.config.vocabulary
        result = np.empty((len(ids), vocabulary), np.float32)
        state = State(self.config, max(1, len(ids)), self.kv)
        step = self.step(state)
        for start in range(0, len(ids), batch):
            tokens_of_batch = np.ascontiguousarray(ids[start : start + batch])
            with self._alone() as team:
                count = len(tokens_of_batch)
                state.position = start
                self._begin(state, step, count)
                step[layout.TOKENS] = tokens_of_batch.ctypes.data
                self._run(team, self._forward.prefill, step)
                for first in range(0, count, HEAD_ROWS):
                    rows = min(HEAD_ROWS, count - first)
                    step[[layout.COUNT, layout.FIRST]] = rows, first
                    self._run(team, self._forward.head, step)
                    result[start + first : start + first + rows] = self._logit_rows(rows)
        return result

    def check_room(self, tokens: int) -> None:
        """UsageError if a prompt of so many tokens does not fit the context."""
        if tokens > self.context:
            raise UsageError(
                f"the prompt has {tokens} tokens and the context only {self.context}; "
                "shorten it or open the model with a larger context"
            )

    def generate(
        self, tokens: Sequence[int], max_tokens: int | None = None, **options: Any
    ) -> Iterator[int]:
        """Continue a prompt: yields token ids, up to the model's end token, which it leaves out.

        Options are those of `Sampling` (temperature, top_k, top_p, min_p, repeat_penalty, seed);
        one that is not given is as the file recommends.
        """
        from ondevice.generate import Completion, with_options

        sampling = with_options(self.sampling, options)
        return Completion(
            self, State(self.config, self.context, self.kv), tokens, sampling, max_tokens
        ).ids()

    def complete(
        self, tokens: Sequence[int], sampling: Sampling | None = None, max_tokens: int | None = None
    ) -> "Completion":
        """Continue a prompt: an iterator over pieces of text that knows its tokens and timings."""
        from ondevice.generate import Completion

        state = State(self.config, self.context, self.kv)
        ids = self.checked(tokens).tolist()
        self.check_room(len(ids))
        stops, reached = reading(self.prompt_cache, ids, state)
        return Completion(self, state, ids, sampling or self.sampling, max_tokens, reached, stops)

    def session(self, system: str | None = None, sampling: Sampling | None = None) -> "Session":
        """A conversation that keeps its state between turns."""
        from ondevice.session import Session

        return Session(self, system, sampling)

    def restore(self, path: str | Path) -> "Session":
        """The conversation that `Session.save` wrote to a file, ready to go on.

        Error, with the reason in one line, if the file is damaged, is no such file, or was made
        with another model, another `kv`, or more tokens than this model's context holds.
        """
        from ondevice.session_file import restore

        return restore(self, Path(path))

    @cached_property
    def fingerprint(self) -> str:
        """Tells this model from others: states can only be exchanged where it is the same."""
        with self._lock:
            if self._closed:
                raise Error(f"{self.path}: the model is closed")
            self._file.check()
            return self._file.fingerprint()

    @property
    def logits_address(self) -> int:
        """Where the head writes the logits of its first row."""
        return self._forward.logits.address

    def close(self) -> None:
        """Stop the threads and let go of the file; the model is of no further use."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.snapshots.close()
                self._team.close()
                if self._pool is not None:
                    usage.save(self._usage_name, self._usage, self._pool.usage)
                    self._pool.close()
                self._forward.close()
                if self._reading is not None:
                    self._reading.close()
                self._file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _recommended(path: Path, metadata: dict[str, Any]) -> Sampling:
    """The file's sampling defaults; Error if they are out of range."""
    try:
        return Sampling.from_metadata(metadata)
    except UsageError as error:
        raise Error(f"{path}: general.sampling: {error}") from None
