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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice import usage
from ondevice.budget import Needs, Plan, available, plan
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
LEAST_CONTEXT = 4096
CONTEXT_SHARE = 0.1
"""Of a budget that the file does not fit into, what the default context's keys and values may take;
down to LEAST_CONTEXT tokens."""
MISSED = 2000
"""Places of experts that a plan names."""
RESERVE = 256 << 20
"""Bytes of free memory below which the pool of experts gives some back."""
LOOK_SECONDS = 0.25
"""Time between two looks at what is free."""


@dataclass(frozen=True)
class Planned:
    """What opening a model would take."""

    plan: Plan
    context: int
    usage: usage.Usage
    """What earlier runs noted of its experts."""
    likely_router_bytes: int
    missed: tuple[int, ...]
    """Where in the file those experts' parts are that were used and that the pool cannot hold."""


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
            threads = _threads(threads)
            self._prepare(context, threads, memory)
            building = time.perf_counter()
            functions = [begin, serve]
            if self.plan.cached:
                self._pool = Pool(Weights(self._file, self.config), self.config)
                self._pool.open()
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
                self._usage_name = usage.identity(self._file, self.config)
                self._usage = usage.load(self._usage_name, self.config)
                self._pool.allocate(self.plan.pool)
            self._team = Team(threads)
            # how long a token waits for the disk says nothing about threads
            self._pace = Pace(threads, fixed=self._pool is not None)
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
        self._asked = False  # whether there was a request already
        self._looked = 0.0  # when the system was last asked for free memory
        if self._pool is not None:
            warming = (self._usage, self._unless_asked)
            self._warming = threading.Thread(target=self._pool.warm, args=warming, daemon=True)
            self._warming.start()
        self.load_seconds = time.perf_counter() - started

    @classmethod
    def planned(
        cls,
        path: Path,
        threads: int | None = None,
        context: int | None = None,
        memory: int | None = None,
        kv: str = "f16",
    ) -> "Planned":
        """Where the bytes would go if the model were opened so, and what is known of its use."""
        model = cls.__new__(cls)
        model.path, model.kv, model._pool = path, _cache_type(kv), None
        model._file = GGUFFile.open(path)
        try:
            model._prepare(context, _threads(threads), memory)
            known = usage.load(usage.identity(model._file, model.config), model.config)
            weights = Weights(model._file, model.config)
            held = model.plan.pool // model.plan.needs.expert
            used = known.by_use()[held // 2 :]
            missed = tuple(
                offset
                for layer, expert in used[:: max(1, len(used) // MISSED)]
                for offset in weights.expert_offsets(layer, expert)
            )
            return Planned(model.plan, model.context, known, weights.likely_router_bytes, missed)
        finally:
            model._programs = ()
            model._file.close()

    def _prepare(self, context: int | None, threads: int, memory: int | None) -> None:
        """Configuration, programs on the mapped file, and the plan.

        A context that nobody asked for is made smaller where it would take much of a budget.
        """
        self.config = Config.from_gguf(self._file)
        self.context = _context(context, self.config)
        weights = Weights(self._file, self.config)
        weights.check()
        self._build(weights, threads)
        budget = memory if isinstance(memory, int) else available()
        needs = self._needs(weights)
        if context is None and budget is not None and needs.mapped > budget:
            while needs.keys_and_values > CONTEXT_SHARE * budget or needs.least > budget:
                if self.context // 2 < LEAST_CONTEXT:
                    break
                self.context //= 2
                needs = self._needs(weights)
        self.plan = plan(needs, memory, self.path)

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

    def _needs(self, weights: Weights) -> Needs:
        config = self.config
        pool = Pool(weights, config)
        return Needs(
            file=self._file.nbytes,
            dense=weights.dense_bytes + weights.likely_router_bytes,
            keys_and_values=cache_bytes(config, self.context, self.kv),
            delta_memory=state_bytes(config),
            buffers=sum(program.nbytes for program in self._programs) + self._scratch.nbytes,
            least_pool=pool.least_bytes,
            most_pool=pool.most_bytes,
            expert=pool.expert_bytes,
            slice=pool.slice_bytes,
        )

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
        words[layout.SCRATCH_BYTES] = self.scratch_bytes
        return words

    @property
    def programs(self) -> dict[str, Operations]:
        """What `prefill`, `decode` and the output head run, by these names."""
        return {"prefill": self._prefill, "decode": self._decode, "head": self._head}

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
        with self._lock:
            if self._closed:
                raise Error(f"{self.path}: the model is closed")
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
                    usage.save(self._usage_name, self._usage, self._pool.usage)
                    self._pool.close()
                self._programs = ()  # they hold on to the file's memory
                self._file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def default_threads() -> int:
    """As many as there are cores for this process."""
    return min(cores(), MOST_THREADS)


def _threads(wanted: int | None) -> int:
    if wanted is None:
        return default_threads()
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
