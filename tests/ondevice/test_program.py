"""The memory of a program: cache lines of its own, shared where a name is asked for again."""

import ctypes
import itertools
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from ondevice.kernels import layout
from ondevice.kernels.dot.tile import ROWS
from ondevice.kernels.operation import CompiledFunction
from ondevice.program import (
    FEWEST_PANELS,
    HUGE_PAGE,
    HUGE_PAGES,
    LINE,
    LONGEST_RUN,
    MOST_PANELS,
    OWN_PAGES,
    PARTS_PER_THREAD,
    SHARES_PER_THREAD,
    WIDE_SHARES_PER_THREAD,
    Program,
    float_bits,
    zeros,
)
from ondevice.weights import Matrix
from quant.registry import FORMATS


@pytest.mark.parametrize("nbytes", [0, 1, 64, 1000, OWN_PAGES, HUGE_PAGES])
def test_memory_begins_on_a_cache_line(nbytes: int) -> None:
    memory = zeros(nbytes)
    assert memory.ctypes.data % LINE == 0
    assert memory.nbytes >= nbytes + LINE
    assert not memory.any()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have none of these")
def test_much_memory_begins_on_a_huge_page() -> None:
    assert zeros(HUGE_PAGES).ctypes.data % HUGE_PAGE == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_memory_is_taken_when_filled_and_given_back() -> None:
    """Also after the C library has seen arrays of that size freed, and keeps such in its heap."""

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    nbytes = 3 << 20
    for _ in range(3):
        np.ones(nbytes + (1 << 20), np.uint8)
    before = held()
    taken = [zeros(nbytes) for _ in range(16)]
    assert held() - before < nbytes
    for memory in taken:
        memory[:] = 1
    assert held() - before > 15 * nbytes
    del memory, taken[:-1]  # the last one must not hold the others
    assert held() - before < 2 * nbytes


def test_a_name_is_one_buffer() -> None:
    program = Program(capacity=3, threads=1)
    buffer = program.buffer("x", 100)
    assert buffer.row_bytes == 3 * LINE
    assert buffer.memory.nbytes >= 3 * 3 * LINE
    assert buffer.address % LINE == 0
    assert program.buffer("x", 100) is buffer
    held = program.nbytes
    other = program.buffer("y", 100, rows_per_token=2)
    assert other.memory.nbytes >= 6 * 3 * LINE
    assert program.nbytes == held + other.memory.nbytes


def test_a_name_cannot_mean_two_sizes() -> None:
    program = Program(capacity=3, threads=1)
    program.buffer("x", 100)
    with pytest.raises(AssertionError, match="x"):
        program.buffer("x", 200)
    with pytest.raises(AssertionError, match="x"):
        program.buffer("x", 100, rows_per_token=2)


def test_stages_share_memory() -> None:
    def fill(program: Program) -> list[tuple[int, int]]:
        """Begin and end of what each buffer's rows take."""
        own = [program.buffer("x", 100)]
        with program.stage("first"):
            own += [program.buffer("a", 100), program.buffer("b", 4, rows_per_token=5)]
        with program.stage("second"):
            other = [program.buffer("c", 1000)]
            chosen = program.numbers("chosen", 10)
        with program.stage("first"):
            own += [program.buffer("d", 60)]
            assert program.buffer("a", 100) is own[1]
        places = [
            (buffer.address, buffer.address + program.capacity * rows * buffer.row_bytes)
            for buffer, rows in zip([*own, *other], (1, 1, 5, 1, 1), strict=True)
        ]
        return [*places, (chosen, chosen + 40 * program.capacity)]

    def apart(places: list[tuple[int, int]]) -> bool:
        ordered = sorted(places)
        return all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))

    sizing = Program(1, 1)
    assert apart(fill(sizing))
    assert sizing.stage_bytes == max(3 * LINE + 5 * LINE + LINE, 17 * LINE)
    program = Program(7, 1, sizing.stage_bytes)
    x, a, b, d, c, chosen = fill(program)
    assert apart([x, a, b, d, chosen]) and apart([x, c, chosen])
    assert not apart([a, c])
    assert program.nbytes <= 7 * sizing.nbytes
    assert 7 * sizing.stage_bytes < program.nbytes < sum(q - p for p, q in (x, a, b, c, d, chosen))


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize(("rows", "matrices"), [(1, 1), (64, 1), (2048, 1), (512, 10), (10**6, 1)])
def test_tasks_are_whole_groups_of_rows(rows: int, matrices: int, threads: int) -> None:
    task = Program(1, threads).rows_per_task(rows, matrices)
    panels = task // ROWS
    assert task == ROWS * panels and panels % 2 == 1
    assert FEWEST_PANELS <= panels <= MOST_PANELS


def lengths_of_runs(
    rows: int, row_bytes: int, threads: int, touched: int = 1, unit: int = 0
) -> list[int]:
    matrix = Matrix("w", 0, rows, 256, row_bytes, FORMATS["F32"])
    program = Program(1, threads)
    split = program.split(matrix, touched, unit)
    table = np.ctypeslib.as_array((ctypes.c_int32 * (split.few + 2)).from_address(split.runs))
    assert table[0] == split.few and table[1] == 0 and table[-1] == rows
    assert split.tasks == -(-rows // split.chunk)
    assert not unit or split.chunk == unit
    lengths = np.diff(table[1:])
    assert (lengths > 0).all() and (lengths[:-1] % (unit or ROWS) == 0).all()
    return lengths.tolist()


@pytest.mark.parametrize("threads", [1, 2, 3, 12, 64])
@pytest.mark.parametrize(("rows", "row_bytes"), [(1, 64), (512, 8192), (2048, 420), (151936, 1680)])
@pytest.mark.parametrize("unit", [0, 240])
def test_runs_become_shorter(rows: int, row_bytes: int, threads: int, unit: int) -> None:
    lengths = lengths_of_runs(rows, row_bytes, threads, 1, unit)
    assert lengths == sorted(lengths, reverse=True)
    least = unit or FEWEST_PANELS * ROWS
    parts = threads * (PARTS_PER_THREAD if threads > 2 else 1)
    assert lengths[0] <= max(rows / parts + least, least)
    assert (
        lengths[0] * row_bytes <= max(LONGEST_RUN, least * row_bytes) + max(unit, ROWS) * row_bytes
    )


def test_short_rows_have_longer_runs() -> None:
    assert lengths_of_runs(2048, 420, 2)[-2] > lengths_of_runs(2048, 2304, 2)[-2]
    assert lengths_of_runs(2048, 420, 16)[0] == FEWEST_PANELS * ROWS  # every thread has some


def test_experts_are_whole_where_they_are_enough_for_all_threads() -> None:
    assert lengths_of_runs(512, 1152, 2, touched=10) == [512]
    assert lengths_of_runs(512, 1152, 4, touched=10) == [256, 256]
    assert lengths_of_runs(512, 1152, 8, touched=10) == 4 * [128]


@pytest.mark.parametrize("threads", [1, 2, 12])
@pytest.mark.parametrize("count", [1, 31, 128, 8192])
@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("tasks", [SHARES_PER_THREAD, WIDE_SHARES_PER_THREAD])
def test_shares(count: int, unit: int, threads: int, tasks: int) -> None:
    share = Program(1, threads).share(count, unit, tasks)
    assert share >= unit and share % unit == 0
    assert share == unit or -(-count // share) >= tasks * threads


@pytest.mark.parametrize("threads", [1, 2, 12])
@pytest.mark.parametrize(
    ("heads", "size", "kinds"),
    [
        (16, 256, ["Q4_K"]),
        (32, 128, ["Q4_K", "Q4_0"]),
        (12, 64, ["Q4_0"]),
        (6, 16, ["Q8_0"]),
        (4, 64, ["Q4_K"]),
        (5, 24, ["F32"]),
        (1, 256, ["Q4_K"]),
    ],
)
def test_heads_of_a_task_are_whole_blocks(
    heads: int, size: int, kinds: list[str], threads: int
) -> None:
    program = Program(1, threads)
    readers = [Matrix("w", 0, 16, heads * size, 0, FORMATS[kind]) for kind in kinds]
    taken = program.heads_of_task(heads, program.activation("x", heads * size, readers))
    block = {"Q4_K": 256, "Q4_0": 32, "Q8_0": 32, "F32": 1}
    assert heads % taken == 0
    assert taken * size % max(block[kind] for kind in kinds) == 0
    assert heads // taken <= WIDE_SHARES_PER_THREAD * threads or taken == heads
    if heads == 16:
        assert taken == {1: 8, 2: 4, 12: 1}[threads]


def test_floats_travel_as_bits() -> None:
    for value in (1e-6, 0.0, -1.5):
        assert np.int32(float_bits(value)).view(np.float32) == np.float32(value)


class FakeKernel(CompiledFunction):
    """A kernel that is not compiled."""

    address = 4096  # type: ignore[assignment]

    def __init__(self) -> None:
        self.__name__ = "fake"


def test_operations_are_taken_once() -> None:
    program, kernel, other = Program(1, 1), FakeKernel(), FakeKernel()
    program.add(kernel, 7, 8, label="first")
    program.add(
        kernel, 9, other, tasks=3, per_token=True, times=64, then=layout.CHAIN, few=2,
        label="second",
    )  # fmt: skip
    operations = program.take()
    assert operations.kernels == [kernel, other]
    assert operations.records[:, :9].tolist() == [
        [4096, 1, 0, 0, layout.BARRIER, 0, 7, 8, 0],
        [4096, 3, 1, 64, layout.CHAIN, 2, 9, 4096, 0],
    ]
    assert operations.labels == ("first", "second")
    assert len(program.take().records) == 0
    with pytest.raises(AssertionError):
        program.add(kernel, *range(30))


def test_memory_lives_as_long_as_the_program() -> None:
    array = np.arange(5)
    held = weakref.ref(array)
    program = Program(1, 1)
    assert program.keep(array) == array.ctypes.data
    del array
    assert held() is not None
    del program
    assert held() is None
