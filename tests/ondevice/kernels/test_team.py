"""The thread team: every thread takes part, none runs ahead, and every way out leaves it usable."""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ondevice.kernels import team as team_module
from ondevice.kernels.atomics import atomic_add, atomic_load, atomic_store, pause
from ondevice.kernels.layout import (
    ABORT,
    BARRIER,
    BESIDE,
    CANCEL,
    CHAIN,
    REPEAT,
    STEPS_LEFT,
    WORD,
    argument,
    word,
)
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import load_i64, store_i64
from ondevice.kernels.team import MOST_THREADS, Team
from quant.errors import Error, ResourceError
from quant.format import Array
from tests.ondevice.kernels.harness import record, step_record

THREADS = 3  # more than the cores of a small machine: some wait while others do not run


@operation
def take(op: int, step: int, task: int, scratch: int) -> None:
    """(a word per task): count every task that is done."""
    atomic_add(argument(op, 0) + WORD * task, 1)


@operation
def follow(op: int, step: int, task: int, scratch: int) -> None:
    """(tasks before, a word for each, value, errors): count those that are not done."""
    for other in range(argument(op, 0)):
        if load_i64(argument(op, 1) + WORD * other) != argument(op, 2):
            atomic_add(argument(op, 3), 1)


@operation
def count_down(op: int, step: int, task: int, scratch: int) -> None:
    """() Run again until STEPS_LEFT is 0 or CANCEL is set, as `sample` does."""
    left = word(step, STEPS_LEFT) - 1
    store_i64(step + WORD * STEPS_LEFT, left)
    store_i64(step + WORD * REPEAT, 0)
    if left > 0 and atomic_load(step + WORD * CANCEL) == 0:
        store_i64(step + WORD * REPEAT, 1)


@operation
def idle(op: int, step: int, task: int, scratch: int) -> None:
    """()"""


@operation
def abort(op: int, step: int, task: int, scratch: int) -> None:
    """() Set ABORT, as another thread of the application would."""
    atomic_store(step + WORD * ABORT, 1)


@operation
def own(op: int, step: int, task: int, scratch: int) -> None:
    """(errors): nobody else uses this scratch meanwhile."""
    for turn in range(100):
        store_i64(scratch, 1000 * task + turn)
        for _ in range(50):
            pause()
        if load_i64(scratch) != 1000 * task + turn:
            atomic_add(argument(op, 0), 1)


@pytest.fixture
def team() -> Iterator[Team]:
    team = Team(THREADS)
    yield team
    team.close()


def program(*records: Array) -> Array:
    return np.stack(records)


def endless() -> Array:
    """Goes on until CANCEL is set."""
    return program(record(idle), record(count_down))


class Work:
    """A program of one queue of tasks, and a check that each was done once."""

    def __init__(self, tasks: int = 100, then: int = BARRIER) -> None:
        self.done = np.zeros(tasks, np.int64)
        self.program = program(record(take, self.done, tasks=tasks, then=then))

    def check(self, team: Team) -> None:
        self.done[:] = 0
        team.run(self.program, step_record())
        assert (self.done == 1).all()


@pytest.mark.parametrize("threads", [1, 2, THREADS])
def test_every_task_is_done_once(threads: int) -> None:
    team = Team(threads)
    for tasks in (1, 2, 100):
        Work(tasks).check(team)
    team.close()


def test_tasks_are_counted_by_tokens_and_by_a_number_in_memory(team: Team) -> None:
    done, number = np.zeros(80, np.int64), np.array([4], np.int64)
    team.run(
        program(record(take, done, tasks=3, per_token=True, times=number)), step_record(count=5)
    )
    assert done.tolist() == [1] * 60 + [0] * 20


@pytest.mark.parametrize("count", [1, 2, 23, 24, 25, 1000])
def test_small_tasks_taken_by_the_handful_are_done_once(team: Team, count: int) -> None:
    """Those of single tokens; beside others every task is taken alone."""
    done, beside, other = np.zeros(3 * count, np.int64), np.zeros(count, np.int64), np.zeros(1)
    records = program(
        record(take, done, tasks=3, per_token=True),
        record(take, beside, per_token=True, then=BESIDE),
        record(take, other.view(np.int64)),
    )
    for times in range(1, 21):
        team.run(records, step_record(count=count))
        assert (done == times).all() and (beside == times).all()
    assert other.view(np.int64)[0] == 20


def test_nothing_begins_before_a_barrier() -> None:
    """Many threads and short tasks: whoever comes late must find the group that is open now."""
    team = Team(8)
    errors = np.zeros(1, np.int64)
    done = np.zeros((60, 7), np.int64)
    operations = []
    for i in range(60):
        tasks = i % 7 + 1
        operations.append(record(take, done[i], tasks=tasks))
        operations.append(record(follow, tasks, done[i], 1, errors, tasks=7 - i % 7))
    for _ in range(50):
        done[:] = 0
        team.run(program(*operations), step_record())
        assert errors[0] == 0
    team.close()


def test_operations_side_by_side(team: Team) -> None:
    first, second, third = Work(50, BESIDE), Work(70), Work(9)
    together = np.concatenate([first.program, second.program, third.program])
    for turn in range(1, 4):
        team.run(together, step_record())
        for work in (first, second, third):
            assert (work.done == turn).all()


def test_a_chain_follows_its_own_task(team: Team) -> None:
    before, after, errors = np.zeros(40, np.int64), np.zeros(40, np.int64), np.zeros(1, np.int64)

    operations = program(
        record(take, before, tasks=40, then=CHAIN),
        record(follow_own, before, errors, tasks=40, then=CHAIN),
        record(take, after, tasks=40, then=BESIDE),
        record(idle, tasks=5),
    )
    team.run(operations, step_record())
    assert (before == 1).all()
    assert (after == 1).all()
    assert errors[0] == 0


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_chain_leaves_out_what_is_not_wanted(team: Team, wanted: int) -> None:
    number = np.array([wanted], np.int64)
    first, middle, last = (np.zeros(40, np.int64) for _ in range(3))
    operations = program(
        record(take, first, tasks=40, then=CHAIN),
        record(take, middle, tasks=40, times=number, then=CHAIN),
        record(take, last, tasks=40),
    )
    team.run(operations, step_record())
    assert (first == 1).all()
    assert (middle == wanted).all()
    assert (last == 1).all()


@operation
def follow_own(op: int, step: int, task: int, scratch: int) -> None:
    """(a word per task, errors): the same task of the operation before is done."""
    if load_i64(argument(op, 0) + WORD * task) != 1:
        atomic_add(argument(op, 1), 1)


def test_scratch_is_private(team: Team) -> None:
    errors, scratch = np.zeros(1, np.int64), np.zeros(THREADS * 8, np.int64)
    step = step_record(scratch=scratch, scratch_bytes=64)
    team.run(program(record(own, errors, tasks=30)), step)
    assert errors[0] == 0


def test_repeats_while_the_step_says_so(team: Team) -> None:
    work = Work()
    loop = np.concatenate([work.program, program(record(count_down))])
    step = step_record(steps_left=50)
    team.run(loop, step)
    assert (work.done == 50).all()
    assert step[STEPS_LEFT] == 0


def test_abort_ends_a_batch_after_the_group(team: Team) -> None:
    done = np.zeros((4, 9), np.int64)
    aborted = program(
        record(abort, then=BESIDE),
        record(take, done[0], tasks=9, then=BESIDE),
        record(take, done[1], tasks=9),
        record(take, done[2], tasks=9, then=BESIDE),
        record(take, done[3], tasks=9),
    )
    step = step_record(count=2)
    team.run(aborted, step)
    assert done.tolist() == [[1] * 9, [1] * 9, [0] * 9, [0] * 9]
    assert step[ABORT] == 1, "the caller must see that the result is not complete"
    Work().check(team)


def test_a_single_token_is_never_aborted(team: Team) -> None:
    """The decode loop cannot put its state back."""
    work = Work()
    step = step_record(count=1)
    team.run(program(record(abort), *work.program), step)
    assert (work.done == 1).all()


@pytest.mark.parametrize("threads", [1, 2, THREADS])
def test_a_part_of_the_team(team: Team, threads: int) -> None:
    work = Work()
    for _ in range(20):
        work.done[:] = 0
        team.run(work.program, step_record(), threads=threads)
        assert (work.done == 1).all()


def test_a_dropped_team_ends_its_threads() -> None:
    threads, files = threading.active_count(), open_files()
    for _ in range(20):
        Team(2)
    gc.collect()
    assert (threading.active_count(), open_files()) == (threads, files)


def test_cancel_from_another_thread(team: Team) -> None:
    step = step_record(steps_left=2**62)
    timer = threading.Timer(0.05, step.__setitem__, (CANCEL, 1))
    timer.start()
    team.run(endless(), step)
    timer.join()
    assert step[STEPS_LEFT] > 0
    Work().check(team)


def interrupt_soon() -> threading.Timer:
    """Ctrl-C in 0.05 seconds."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize("count", [1, 2], ids=["decode", "batch"])
def test_an_interrupt_stops_the_job_and_leaves_the_team_usable(team: Team, count: int) -> None:
    work = Work()
    step = step_record(steps_left=2**62, count=count)
    operations = program(*work.program, record(count_down))
    timer = interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        team.run(operations, step)
    timer.join()
    assert step[CANCEL] == step[ABORT] == 1
    rounds = set(work.done.tolist())
    assert len(rounds) == 1, "it stopped in the middle of a stretch"
    time.sleep(0.01)
    assert set(work.done.tolist()) == rounds, "the job goes on"
    work.check(team)


@pytest.mark.parametrize("place", ["before the job", "after it began", "after a read"])
def test_an_interrupt_between_two_calls(
    team: Team, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python handles a signal between calls, also just before or after the one that matters."""
    step = step_record(steps_left=2**62)
    real_begin, real_read = team_module.begin, os.read

    def begin(control: int) -> None:
        if place == "before the job":
            raise KeyboardInterrupt
        real_begin(control)
        if place == "after it began":
            raise KeyboardInterrupt

    def read(pipe: int, length: int) -> bytes:
        if place == "after a read":
            step[CANCEL] = 1
        data = real_read(pipe, length)
        if place == "after a read":
            monkeypatch.undo()
            raise KeyboardInterrupt
        return data

    monkeypatch.setattr(team_module, "begin", begin)
    monkeypatch.setattr(os, "read", read)
    with pytest.raises(KeyboardInterrupt):
        team.run(endless(), step)
    monkeypatch.undo()
    left = int(step[STEPS_LEFT])
    time.sleep(0.01)
    assert step[STEPS_LEFT] == left, "the job goes on"
    Work().check(team)


def test_jobs_of_many_callers_in_turn(team: Team) -> None:
    lock = threading.Lock()

    def call() -> None:
        for _ in range(20):
            with lock:
                Work().check(team)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def test_python_runs_meanwhile(team: Team) -> None:
    """Workers hold no lock of the interpreter."""
    step = step_record(steps_left=2**62)
    job = threading.Thread(target=team.run, args=(endless(), step))
    job.start()
    turns = 0
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        turns += 1
    step[CANCEL] = 1
    job.join()
    assert turns > 1000


def open_files() -> int:
    """How many files this process holds open; 0 where that cannot be seen."""
    folder = Path("/dev/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_close_ends_the_threads_and_may_come_twice() -> None:
    threads, files = threading.active_count(), open_files()
    team = Team(THREADS)
    assert threading.active_count() == threads + THREADS
    Work().check(team)
    team.close()
    team.close()
    assert threading.active_count() == threads
    assert open_files() == files


def test_a_team_that_never_worked_closes() -> None:
    Team(2).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_no_workers(team: Team) -> None:
    Work().check(team)
    child = os.fork()
    if child == 0:
        answer = 1
        try:
            team.close()  # must not stop the parent's
            team.run(endless(), step_record())
        except Error as error:
            answer = 0 if "forked" in str(error) else 2
        finally:
            os._exit(answer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    Work().check(team)


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1])
def test_too_few_or_too_many_threads(threads: int) -> None:
    with pytest.raises(ResourceError, match=f"{threads} threads: 1 to {MOST_THREADS} can"):
        Team(threads)


def test_the_most_threads_work() -> None:
    team = Team(MOST_THREADS)
    Work(1000).check(team)
    team.close()
