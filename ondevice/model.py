"""A model that is open: its forward pass, written down once as programs, and the threads to run it.

    x = embedding(tokens)
    for each layer:   x = x + mix(norm(x));  x = x + experts(norm(x))
    logits = output(norm(x))

Three programs share the same buffers: `prefill` takes a batch of tokens into a state, `head` gives
logits for rows of that batch, and `decode` takes one token, chooses the next, and goes on with it
until a limit, an end token or a request to stop, all in one native call.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.budget import Needs, Plan, plan
from ondevice.chat import Template
from ondevice.config import Config
from ondevice.experts import Counts, Pool
from ondevice.gguf_file import GGUFFile
from ondevice.kernels import expand, layout, sample
from ondevice.kernels.attention import CACHES
from ondevice.kernels.formats import READERS
from ondevice.kernels.store import read
from ondevice.kernels.team import MOST_THREADS, Team, begin, serve
from ondevice.layers.attention import attention, positions
from ondevice.layers.deltanet import deltanet, memory_bytes
from ondevice.layers.moe import moe
from ondevice.pace import Pace
from ondevice.program import Operations, Program, zeros
from ondevice.prompt_cache import PromptCache, reading
from ondevice.sampling import Sampling
from ondevice.snapshots import LEAST_MEMORY, Snapshots
from ondevice.state import State, cache_bytes
from ondevice.state import memory_bytes as state_bytes
from ondevice.tokenizer import Tokenizer
from ondevice.weights import Weights
from quant.compiling import Compilation, Report
from quant.cores import cores
from quant.errors import Error, UsageError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.generate import Completion
    from ondevice.session import Session

BATCH = 512
"""Tokens of a prefill batch."""
HEAD_ROWS = 16
"""Rows that the output head computes at a time."""
DEFAULT_CONTEXT = 32768


class Model:
    """An open model; usable from any thread, calls queue. Made by `ondevice.load`."""

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        context: int | None = None,
        memory: int | None = None,
        kv: str = "f16",
        progress: Report | None = None,
        prompt_cache: bool = False,
    ) -> None:
        started = time.perf_counter()
        self.path = path
        self._closed = False
        self.kv = _cache_type(kv)
        self._pool: Pool | None = None
        self._file = GGUFFile.open(path)
        try:
            self.config = Config.from_gguf(self._file)
            self.context = _context(context, self.config)
            weights = Weights(self._file, self.config)
            weights.check()
            threads = _threads(threads)
            building = time.perf_counter()
            self._build(weights, threads)
            self.plan = self._plan(weights, memory)
            functions = [begin, serve]
            if self.plan.cached:
                self._pool = Pool(weights, self.config)
                weights = Weights(self._file, self.config, self._pool.read_tensor)
                self._build(weights, threads)
                functions.append(read)
            compilation = Compilation([*functions, *self._decode.kernels], progress)
            self.compile_seconds = time.perf_counter() - building
            with compilation:
                self.tokenizer = Tokenizer.from_metadata(self._file.metadata, path)
                source = self._file.metadata.get("tokenizer.chat_template")
                self.template = Template(source, self.tokenizer, path)
                self.sampling = _recommended(path, self._file.metadata)
                waiting = time.perf_counter()
            self.compile_seconds += time.perf_counter() - waiting
            if self._pool is not None:
                self._pool.allocate(self.plan.pool)
            self._team = Team(threads)
            self._pace = Pace(threads)
            self.snapshots = Snapshots(max(LEAST_MEMORY, self.plan.needs.delta_memory))
        except BaseException:
            if self._pool is not None:
                self._pool.close()
            self._file.close()
            raise
        self.ends = np.zeros(self.config.vocabulary, np.uint8)
        self.ends[list(self.tokenizer.eos_ids)] = 1
        self.sampling_space = np.zeros(2 * self.config.vocabulary, np.float32)
        self._lock = threading.Lock()
        self.prompt_cache = PromptCache(self) if prompt_cache else None
        """Beginnings of prompts that were read before; None where none are kept."""
        self.load_seconds = time.perf_counter() - started

    def _build(self, weights: Weights, threads: int) -> None:
        config = self.config
        program = Program(BATCH, threads)
        embedding, output = weights.embedding(), weights.output()
        x = program.buffer("x", 4 * config.hidden)
        program.add(
            expand.embed,
            *(program.keep_matrix(embedding), embedding.row_bytes, embedding.columns),
            READERS[embedding.format.name].expand,
            *(x.address, x.row_bytes),
            per_token=True,
            then=layout.CHAIN,
        )
        batch = positions(program, config)
        place, index = 0, 0
        for layer, recurrent in enumerate(config.recurrent):
            if recurrent:
                mixed = deltanet(program, config, weights, layer, x, place)
                place += memory_bytes(config)
            else:
                mixed = attention(program, config, weights, layer, x, batch, index, self.kv)
                index += 1
            moe(program, config, weights, layer, x, mixed, self._pool)
        self._prefill = program.take()
        head = Program(HEAD_ROWS, threads)
        output_norm = weights.vector("output_norm.weight", config.hidden)
        h = head.norm(x, output_norm, config.norm_epsilon, "head input", (output,))
        self._logits = head.linear(output, h, "logits")
        self._head = head.take()
        head.add(sample.sample)
        self._decode = self._prefill + self._head + head.take()
        self._programs: tuple[Program, ...] = (program, head)
        self.scratch_bytes = -(-max(program.scratch_bytes, head.scratch_bytes) // 64) * 64
        self._scratch = zeros(threads * self.scratch_bytes)

    def _plan(self, weights: Weights, memory: int | None) -> Plan:
        config = self.config
        with Pool(weights, config) as pool:
            needs = Needs(
                file=self._file.nbytes,
                dense=weights.dense_bytes,
                keys_and_values=cache_bytes(config, self.context, self.kv),
                delta_memory=state_bytes(config),
                buffers=sum(program.nbytes for program in self._programs) + self._scratch.nbytes,
                least_pool=pool.least_bytes,
                most_pool=pool.most_bytes,
            )
        return plan(needs, memory, self.path)

    @property
    def expert_counts(self) -> Counts:
        """What the pool of experts has done since the start; nothing where the file is mapped."""
        return self._pool.counts if self._pool is not None else Counts()

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
        words[layout.SCRATCH_BYTES] = self.scratch_bytes
        return words

    @property
    def programs(self) -> dict[str, Operations]:
        """What `prefill`, `decode` and the output head run, by these names."""
        return {"prefill": self._prefill, "decode": self._decode, "head": self._head}

    @contextmanager
    def _alone(self) -> Iterator[Team]:
        """The team, when the calls before this one are done."""
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
        step[layout.OUTCOME] = 0
        team.run(program.records, step, profile, threads)
        if self._pool is not None and step[layout.OUTCOME] == layout.READ_FAILED:
            fault = self._pool.fault()
            self._file.check()
            raise fault

    def prefill(
        self, state: State, step: Array, tokens: Array, profile: Array | None = None
    ) -> bool:
        """Take at most BATCH tokens (int32) into the state.

        False if that was aborted; the state is then unchanged. `profile` as in `Team.run`.
        """
        before = state.snapshot()
        step[[layout.COUNT, layout.POSITION, layout.FIRST]] = len(tokens), state.position, 0
        step[[layout.TOKENS, layout.REPEAT]] = tokens.ctypes.data, 0
        try:
            self.run(self._prefill, step, profile)
        except BaseException:
            state.restore(before)
            raise
        if step[layout.ABORT] and len(tokens) > 1:
            state.restore(before)
            return False
        state.position += len(tokens)
        return True

    def decode(
        self,
        state: State,
        step: Array,
        threads: int | None = None,
        profile: Array | None = None,
    ) -> None:
        """Run the decode loop for at most STEPS_LEFT tokens, and move the state on.

        On as many threads as is best at the moment, unless told. `profile` as in `Team.run`.
        """
        step[[layout.COUNT, layout.POSITION, layout.FIRST]] = 1, state.position, 0
        with self._alone() as team:
            if threads is None and self._pace.trying:
                step[layout.STEPS_LEFT] = max(1, step[layout.STEPS_LEFT] // 2)
            started = time.perf_counter()
            try:
                chosen = threads or self._pace.choose()
                self._run(team, self._decode, step, profile, chosen)
            except Error:
                state.reset()  # some layers have taken a token in that others have not
                step[layout.POSITION] = 0
                raise
            finally:
                tokens = int(step[layout.POSITION]) - state.position
                state.position += tokens
                if threads is None:
                    self._pace.note(tokens, time.perf_counter() - started)
        if step[layout.OUTCOME] == layout.NOT_FINITE:
            raise Error(
                f"{self.path}: the logits at position {state.position} are not finite; "
                "the file's weights are damaged"
            )

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

    def logits(self, tokens: Sequence[int], batch: int = BATCH) -> Array:
        """(len(tokens), vocabulary) f32: row i predicts token i + 1, given tokens 0 .. i.

        The result does not depend on `batch`, the tokens of a prefill batch (1 to 512).
        """
        if not isinstance(batch, int) or not 1 <= batch <= BATCH:
            raise UsageError(f"batch is {batch}; it must be from 1 to {BATCH}")
        ids = self.checked(tokens)
        self.check_room(len(ids))
        vocabulary = self.config.vocabulary
        result = np.empty((len(ids), vocabulary), np.float32)
        state = State(self.config, max(1, len(ids)), self.kv)
        step = self.step(state)
        row = self._logits.row_bytes // 4
        for start in range(0, len(ids), batch):
            tokens_of_batch = np.ascontiguousarray(ids[start : start + batch])
            with self._alone() as team:
                count = len(tokens_of_batch)
                step[[layout.COUNT, layout.POSITION, layout.FIRST]] = count, start, 0
                step[layout.TOKENS] = tokens_of_batch.ctypes.data
                self._run(team, self._prefill, step)
                for first in range(0, count, HEAD_ROWS):
                    rows = min(HEAD_ROWS, count - first)
                    step[[layout.COUNT, layout.FIRST]] = rows, first
                    self._run(team, self._head, step)
                    values = self._logits.memory[: HEAD_ROWS * self._logits.row_bytes]
                    values = values.view(np.float32).reshape(HEAD_ROWS, row)
                    result[start + first : start + first + rows] = values[:rows, :vocabulary]
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
        with self._alone():
            self._file.check()
            return self._file.fingerprint()

    @property
    def logits_address(self) -> int:
        """Where the head writes the logits of its first row."""
        return self._logits.address

    def close(self) -> None:
        """Stop the threads and let go of the file; the model is of no further use."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.snapshots.close()
                self._team.close()
                if self._pool is not None:
                    self._pool.close()
                self._programs = ()  # they hold on to the file's memory
                self._file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _threads(wanted: int | None) -> int:
    """As asked for; by default as many as there are cores for this process."""
    if wanted is None:
        return min(cores(), MOST_THREADS)
    if not isinstance(wanted, int) or not 1 <= wanted <= MOST_THREADS:
        raise UsageError(
            f"threads is {wanted!r}; it must be a whole number from 1 to {MOST_THREADS}"
        )
    return wanted


def _cache_type(name: str) -> str:
    """How keys and values are kept."""
    if name not in CACHES:
        raise UsageError(f"kv is {name!r}; it must be one of {', '.join(CACHES)}")
    return name


def _recommended(path: Path, metadata: dict[str, Any]) -> Sampling:
    """The file's sampling defaults; Error if they are out of range."""
    try:
        return Sampling.from_metadata(metadata)
    except UsageError as error:
        raise Error(f"{path}: general.sampling: {error}") from None


def _context(wanted: int | None, config: Config) -> int:
    if wanted is None:
        return min(config.context_length, DEFAULT_CONTEXT)
    if not isinstance(wanted, int) or not 1 <= wanted <= config.context_length:
        raise UsageError(
            f"the context is {wanted}; this model takes 1 to {config.context_length} tokens"
        )
    return wanted
