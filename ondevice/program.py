"""Writing down a forward pass as a list of kernel calls.

A `Program` is filled once, when a model is opened: each method here adds one operation record and
returns the buffer that it will write. Running it (kernels.team) costs no Python. Buffers hold one
row for each token of a batch; a name asked for again, by the next layer, is the same memory.

What is wanted within a *stage* only, as the inside of a token mixer, may lie where other stages
have theirs. How much memory they share is known when everything is written down: so a program is
written for batches of one token first, and then, with that one's `stage_bytes`, for good.
"""

import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ondevice.kernels import activation, experts, linear, norm
from ondevice.kernels.dot.tile import ROWS
from ondevice.kernels.formats import READERS
from ondevice.kernels.layout import (
    ARGUMENTS,
    BACK,
    BARRIER,
    FEW_TASKS,
    KERNEL,
    LOOP,
    OPERATION_WORDS,
    PER_TOKEN,
    TASKS,
    THEN,
    TIMES,
)
from ondevice.kernels.operation import CompiledFunction
from ondevice.weights import Matrix
from quant.format import Array

LINE = 64
BLOCKS = {activation.PER_256: 256, activation.PER_32: 32}
"""Numbers of a block of each kind of record."""
OWN_PAGES = 128 << 10
HUGE_PAGES, HUGE_PAGE = 4 << 20, 2 << 20
"""Bytes from which on memory is asked for in pages of its own; in huge ones; and of one such."""
FEWEST_PANELS, MOST_PANELS = 3, 15
"""Panels of weight rows in a task: long enough streams of memory, and small enough for caches."""
TASKS_PER_THREAD = 24
"""Tasks wanted of each thread: the last ones, which not all threads have, should be short."""
SHARES_PER_THREAD = 8
"""As many of an operation on many small things, which no task should have only a few of."""
WIDE_SHARES_PER_THREAD = 2
"""As many where a task reads many short streams, or what other threads have made: what lies at the
edge of another thread's share takes long to come."""
PARTS_PER_THREAD = 4
"""A run of rows is one of so many parts for each thread of what is left: some may be slow. Of two
threads neither should be, and each new run costs them a microsecond."""
SHORTEST_RUN, LONGEST_RUN = 128 << 10, 16 << 20
"""Bytes below which a run is hardly begun when it ends, if the threads have enough of them; and
above which a thread that is one percent slower than another keeps it waiting for long."""


def zeros(nbytes: int) -> Array:
    """Zeroed bytes that begin on a cache line, with one line to spare.

    Large ones are pages of their own, which take memory as they are filled and give it back when
    the array goes. The C library's heap does neither once it has seen an array of that size freed.
    """
    storage, alignment = _pages(nbytes + 2 * LINE)
    skip = -storage.ctypes.data % alignment
    return storage[skip : skip + nbytes + LINE]


def _pages(nbytes: int) -> tuple[Array, int]:
    """Zeroed bytes, from the system itself where they are many and it has a call for that.

    And what they have to be aligned to, for which they have room.
    """
    if nbytes < OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(nbytes, np.uint8), LINE
    huge = nbytes >= HUGE_PAGES and hasattr(mmap, "MADV_HUGEPAGE")
    if huge:  # whole ones, wherever the first begins
        nbytes = -(-nbytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(nbytes) from error
    if huge:
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8), HUGE_PAGE if huge else LINE


@dataclass(frozen=True)
class Buffer:
    """Rows of memory, one for each token of a batch."""

    memory: Array
    row_bytes: int

    @property
    def address(self) -> int:
        return self.memory.ctypes.data

    def from_column(self, column: int) -> "Buffer":
        """The same rows of numbers of 4 bytes without the first ones."""
        return Buffer(self.memory[4 * column :], self.row_bytes)


@dataclass(frozen=True)
class Activation:
    """A vector per token: as floats, and as the int8 records that its readers need."""

    floats: Buffer
    columns: int
    rows_per_token: int = 1
    records: dict[int, Buffer] = field(default_factory=dict)

    def as_read_by(self, matrix: Matrix) -> Buffer:
        kind = READERS[matrix.format.name].activation
        return self.floats if kind == activation.NONE else self.records[kind]


@dataclass(frozen=True)
class Split:
    """How rows fall into tasks: kernels/linear.py."""

    chunk: int
    tasks: int
    runs: int
    """Address of the table."""
    few: int
    """Tasks for few tokens."""


@dataclass(frozen=True)
class Operations:
    """A finished program."""

    lines: tuple[Sequence[int | CompiledFunction], ...]
    """The words of each operation; a kernel stands for its address."""
    labels: tuple[str, ...]
    """What each is about, for a profile."""

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.lines + other.lines, self.labels + other.labels)

    @property
    def kernels(self) -> list[CompiledFunction]:
        """The kernels that it needs, each once."""
        words = (word for line in self.lines for word in line)
        return list(dict.fromkeys(word for word in words if isinstance(word, CompiledFunction)))

    @cached_property
    def records(self) -> Array:
        """(operations, OPERATION_WORDS) int64, as the thread team runs them; compiles kernels."""
        lines = [
            [word.address if isinstance(word, CompiledFunction) else word for word in line]
            for line in self.lines
        ]
        return np.array(lines, np.int64).reshape(-1, OPERATION_WORDS)


class Program:
    """Operations for batches of up to `capacity` tokens on `threads` threads."""

    def __init__(self, capacity: int, threads: int, stage_bytes: int = 0) -> None:
        """stage_bytes: as an earlier program with the same operations has it; with 0 nothing is
        shared."""
        self.capacity = capacity
        self.threads = threads
        self.scratch_bytes = 0
        self._shared = zeros(capacity * stage_bytes) if stage_bytes else None
        self._stage: str | None = None
        self._staged: dict[str, int] = {}  # bytes for a token, by stage
        self._buffers: dict[str, Buffer] = {}
        self._operations: list[list[int | CompiledFunction]] = []
        self._labels: list[str] = []
        self._kept: list[object] = []

    # ---- memory ----

    def buffer(self, name: str, row_bytes: int, rows_per_token: int = 1) -> Buffer:
        """The buffer of that name; made when first asked for."""
        row_bytes = activation.odd_lines(row_bytes)
        known = self._buffers.get(name)
        if known is None:
            known = Buffer(self._memory(rows_per_token * row_bytes), row_bytes)
            self._buffers[name] = known
        nbytes = self.capacity * rows_per_token * row_bytes
        assert known.row_bytes == row_bytes and known.memory.nbytes >= nbytes, name
        return known

    def numbers(self, name: str, count: int) -> int:
        """Address of `count` numbers of 4 bytes for each token, with nothing between tokens.

        They are few, and share no memory with other stages, whatever the stage.
        """
        known = self._buffers.get(name)
        if known is None:
            known = Buffer(zeros(4 * count * self.capacity), 4 * count)
            self._buffers[name] = known
        assert known.row_bytes == 4 * count, name
        return known.address

    def _memory(self, token_bytes: int) -> Array:
        """So many bytes, whole cache lines, for each token."""
        nbytes = self.capacity * token_bytes
        if self._stage is None:
            return zeros(nbytes)
        start = self._staged.get(self._stage, 0)
        self._staged[self._stage] = start + token_bytes
        if self._shared is None:
            return zeros(nbytes)
        memory = self._shared[self.capacity * start :][:nbytes]
        assert memory.nbytes == nbytes, self._stage
        return memory

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """New buffers are wanted within this stage only, which begins and ends at barriers."""
        assert self._stage is None, name
        self._stage = name
        yield
        self._stage = None

    @property
    def stage_bytes(self) -> int:
        """Bytes for a token that the largest stage takes."""
        return max(self._staged.values(), default=0)

    def keep(self, array: Array) -> int:
        """Hold on to an array that operations point to; returns its address."""
        self._kept.append(array)
        return int(array.ctypes.data)

    def keep_matrix(self, matrix: Matrix) -> int:
        """Hold on to the memory of a matrix; returns its address."""
        self._kept.append(matrix)
        return matrix.address

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, if stages share."""
        own = sum(buffer.memory.nbytes for buffer in self._buffers.values())
        return own - self.capacity * (sum(self._staged.values()) - self.stage_bytes)

    # ---- operations ----

    def add(
        self,
        kernel: CompiledFunction,
        *arguments: int | CompiledFunction,
        tasks: int = 1,
        per_token: bool = False,
        times: int = 0,
        then: int = BARRIER,
        label: str = "",
        loop: int = 0,
        back: int = 0,
        few: int = 0,
    ) -> None:
        """One operation and what may follow it; kernels.layout says what the options mean."""
        assert len(arguments) <= LOOP - ARGUMENTS
        words: list[int | CompiledFunction] = [0] * OPERATION_WORDS
        words[KERNEL], words[TASKS], words[PER_TOKEN] = kernel, tasks, int(per_token)
        words[TIMES], words[THEN], words[FEW_TASKS] = times, then, few
        words[LOOP], words[BACK] = loop, back
        words[ARGUMENTS : ARGUMENTS + len(arguments)] = [
            value if isinstance(value, CompiledFunction) else int(value) for value in arguments
        ]
        self._operations.append(words)
        self._labels.append(label or kernel.__name__)

    @property
    def length(self) -> int:
        """How many operations were added since the last `take`."""
        return len(self._operations)

    def take(self) -> "Operations":
        """The operations added since the last call."""
        operations = Operations(tuple(self._operations), tuple(self._labels))
        self._operations, self._labels = [], []
        return operations

    def activation(
        self, name: str, columns: int, readers: Iterable[Matrix], rows_per_token: int = 1
    ) -> Activation:
        """Room for a vector of `columns` floats and for the records that `readers` need."""
        kinds = {READERS[matrix.format.name].activation for matrix in readers}
        records = {
            kind: self.buffer(
                f"{name} per {256 if kind == activation.PER_256 else 32}",
                activation.record_bytes(kind, columns),
                rows_per_token,
            )
            for kind in sorted(kinds - {activation.NONE})
        }
        floats = self.buffer(name, 4 * columns, rows_per_token)
        return Activation(floats, columns, rows_per_token, records)

    def norm(
        self,
        x: Buffer,
        weight: Array,
        epsilon: float,
        name: str,
        readers: Sequence[Matrix],
        addend: Buffer | None = None,
        then: int = BARRIER,
        times: int = 0,
    ) -> Activation:
        """x += addend, if given; then the root-mean-square norm of x."""
        result = self.activation(name, len(weight), readers)
        self.add(
            norm.rms_norm,
            x.address,
            x.row_bytes,
            len(weight),
            self.keep(weight),
            float_bits(epsilon),
            addend.address if addend else 0,
            addend.row_bytes if addend else 0,
            result.floats.address,
            result.floats.row_bytes,
            *record_arguments(result),
            per_token=True,
            times=times,
            then=then,
        )
        return result

    def quantize(self, x: Activation, then: int = BARRIER) -> None:
        """Fill the records of x from its floats, where it has any."""
        if x.records:
            self.add(
                activation.quantize,
                x.floats.address,
                x.floats.row_bytes,
                x.columns,
                *record_arguments(x),
                tasks=x.rows_per_token,
                per_token=True,
                then=then,
            )

    def quantize_slots(self, x: Activation, routing: int) -> None:
        """Fill the records of the slots of a wave of experts, where x has any."""
        if x.records:
            self.add(
                experts.quantize,
                x.floats.address,
                x.floats.row_bytes,
                x.columns,
                *record_arguments(x),
                routing,
                times=routing,
                label="quantize slots",
            )

    def linear(
        self,
        matrix: Matrix,
        x: Activation,
        name: str,
        then: int = BARRIER,
        times: int = 0,
        rows: Split | None = None,
        out: Buffer | None = None,
    ) -> Buffer:
        """The matrix times every token; `rows` says how it falls into tasks."""
        out = out or self.buffer(name, 4 * matrix.rows)
        source = x.as_read_by(matrix)
        rows = rows or self.split(matrix)
        self.add(
            linear.linear,
            self.keep_matrix(matrix),
            matrix.row_bytes,
            matrix.rows,
            matrix.columns,
            self.reader(matrix),
            source.address,
            source.row_bytes,
            out.address,
            out.row_bytes,
            *(rows.chunk, rows.runs),
            tasks=rows.tasks,
            few=rows.few,
            times=times,
            then=then,
            label=f"linear: {name}",
        )
        return out

    def gate_up(
        self,
        gate: Matrix,
        up: Matrix,
        x: Activation,
        hidden: Activation,
        name: str,
        routing: int = 0,
        touched: int = 1,
        then: int = BARRIER,
    ) -> None:
        """hidden := silu(gate x) * (up x), for every token or for every slot of a routing."""
        gate_source, up_source = x.as_read_by(gate), x.as_read_by(up)
        rows = self.split(gate, touched)
        products = (READERS[m.format.name].scratch_bytes(m.columns) for m in (gate, up))
        own = -(-max(products) // LINE) * LINE
        self.scratch_bytes = max(self.scratch_bytes, own + experts.gate_up_scratch(gate.rows))
        self.add(
            experts.gate_up,
            self.keep_matrix(gate),
            gate.stride,
            gate.row_bytes,
            self.reader(gate),
            gate_source.address,
            gate_source.row_bytes,
            self.keep_matrix(up),
            up.stride,
            up.row_bytes,
            self.reader(up),
            up_source.address,
            up_source.row_bytes,
            gate.rows,
            gate.columns,
            hidden.floats.address,
            hidden.floats.row_bytes,
            *(routing, rows.chunk, rows.runs),
            own,
            tasks=rows.tasks,
            few=rows.few,
            times=routing,
            then=then,
            label=f"{name} gate_up",
        )

    def down(
        self,
        matrix: Matrix,
        hidden: Activation,
        out: Buffer,
        routing: int = 0,
        touched: int = 1,
        then: int = BARRIER,
        loop: int = 0,
        back: int = 0,
    ) -> None:
        """out := the matrix times hidden, for every token or for every slot of a routing."""
        source = hidden.as_read_by(matrix)
        rows = self.split(matrix, touched)
        self.add(
            experts.down,
            self.keep_matrix(matrix),
            matrix.stride,
            matrix.row_bytes,
            self.reader(matrix),
            source.address,
            source.row_bytes,
            matrix.rows,
            matrix.columns,
            out.address,
            out.row_bytes,
            *(routing, rows.chunk, rows.runs),
            tasks=rows.tasks,
            few=rows.few,
            times=routing,
            then=then,
            label="expert down" if routing else "shared down",
            loop=loop,
            back=back,
        )

    def reader(self, matrix: Matrix) -> CompiledFunction:
        """The kernel that multiplies this matrix; notes the scratch it needs."""
        reader = READERS[matrix.format.name]
        self.scratch_bytes = max(self.scratch_bytes, reader.scratch_bytes(matrix.columns))
        return reader.multiply

    def split(self, matrix: Matrix, touched: int = 1, unit: int = 0) -> Split:
        """How a matrix, or each of so many, falls into tasks; all but the last of whole units."""
        rows = matrix.rows
        parts = self.threads * (PARTS_PER_THREAD if self.threads > 2 else 1)
        chunk = unit or self.rows_per_task(rows, touched)
        unit = unit or ROWS
        least = max(FEWEST_PANELS * ROWS, min(SHORTEST_RUN // matrix.row_bytes, rows // parts))
        most = LONGEST_RUN // matrix.row_bytes
        starts = [0]
        while starts[-1] < rows:
            # of several matrices all tasks are alike
            wanted = rows // -(-parts // touched) if touched > 1 else (rows - starts[-1]) // parts
            run = -(-max(least, min(most, wanted)) // unit) * unit
            starts.append(min(rows, starts[-1] + run))
        runs = self.keep(np.array([len(starts) - 1, *starts], np.int32))
        return Split(chunk, -(-rows // chunk), runs, len(starts) - 1)

    def rows_per_task(self, rows: int, matrices: int) -> int:
        """Rows of a task: enough tasks to keep the threads evenly busy.

        An odd number of panels: rows that are taken together then lie in different sets of the
        first-level cache.
        """
        wanted = rows * matrices // (TASKS_PER_THREAD * self.threads) // ROWS
        return ROWS * ((max(FEWEST_PANELS, min(MOST_PANELS, wanted)) - 1) | 1)

    def share(self, count: int, unit: int = 1, tasks: int = SHARES_PER_THREAD) -> int:
        """How many of `count` small things a task takes, in whole units; `tasks` of each thread."""
        return max(unit, count // (tasks * self.threads) // unit * unit)

    def heads_of_task(self, heads: int, x: Activation | None = None) -> int:
        """How many of a token's heads a task takes when tokens are few, a divisor of all.

        With x, which holds them side by side, they are whole blocks of its records.
        """
        unit = 1
        if x and x.records:
            block = max(BLOCKS[kind] for kind in x.records)
            unit = block // math.gcd(block, x.columns // heads)
        most = WIDE_SHARES_PER_THREAD * self.threads
        divisors = (n for n in range(unit, heads + 1, unit) if heads % n == 0)
        return next((n for n in divisors if heads // n <= most), heads)


def record_arguments(x: Activation) -> tuple[int, int, int, int]:
    """Address and row bytes of the per-256 and of the per-32 records, 0 where there are none."""
    values: list[int] = []
    for kind in (activation.PER_256, activation.PER_32):
        record = x.records.get(kind)
        values += [record.address, record.row_bytes] if record else [0, 0]
    return values[0], values[1], values[2], values[3]


def float_bits(value: float) -> int:
    """The bits of a float32, for an argument of an operation."""
    return int(np.float32(value).view(np.int32))
