"""The thread team: runs a program of kernels on all threads, without Python in between.

Every worker thread sits in one compiled function, `serve`, for its whole life and never holds the
interpreter's lock: it waits for a byte in a pipe, runs the job, and waits again. So an
application's busy Python thread cannot stall a step, parked workers cost nothing, and the caller
waits in Python, where Ctrl-C reaches it. Pipes are what every platform has; their C functions are
called by address.

A program is a list of operations in groups, and a group is a queue of tasks. The *ticket* holds the
number of the current group's turn and its next task; a thread takes a task by raising it, or of
small ones, those of single tokens, a handful that becomes less as fewer are left. The thread that
finishes a group's last task opens the next group. So nobody waits for a thread, only for work that
a thread has begun: one that the operating system keeps from running is simply not there, and on
fast and slow cores each does what it can. Who finds no task spins a while and then sleeps in short
naps, which leaves its core to a worker that has one where yielding would only run whatever else is
there.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref

import numpy as np
from numba.core import types

from ondevice.kernels.atomics import atomic_add, atomic_exchange, atomic_load, atomic_store, pause
from ondevice.kernels.calls import function_call
from ondevice.kernels.layout import (
    ABORT,
    BACK,
    BARRIER,
    CANCEL,
    CHAIN,
    COUNT,
    FEW_TASKS,
    KERNEL,
    LOOP,
    OPERATION_WORDS,
    OUTCOME,
    PER_TOKEN,
    READ_FAILED,
    REPEAT,
    SCRATCH,
    SCRATCH_BYTES,
    STEADY,
    TASKS,
    THEN,
    TIMES,
    WORD,
    are_few,
    word,
)
from ondevice.kernels.simd import load_i64, store_i64
from quant.errors import Error, ResourceError
from quant.jit import Compiled, inner

CONTROL_WORDS = 256
TICKET, DONE, GROUP, LEFT = 0, 16, 32, 48  # on cache lines of their own
FINISHED = LEFT + 1  # number of the last job that all workers have left
NEXT, TOTALS, HANDFULS = GROUP + 1, GROUP + 2, GROUP + 4  # the last two: of even and of odd turns
JOB, PROGRAM, OPERATIONS, STEP, MEMBERS, PROFILE = range(50, 56)
WORK_INPUT, WORK_OUTPUT, DONE_INPUT, READ, WRITE, NAP, CLOCK = range(56, 63)
BYTES = 64  # what goes through the pipes, one word per thread from here on
TURN, TASK = 32, (1 << 32) - 1  # a ticket is turn << 32 | task
ENDED = 1 << 30  # the turn after the last
SPINS = 1000
HANDFULS_PER_THREAD = 4
NAP_LENGTH = 20 if sys.platform != "win32" else 0  # microseconds; milliseconds on Windows
PR_SET_TIMERSLACK = 29  # of this thread alone, in nanoseconds; see prctl(2)
SPACE = 128  # two words per thread, for the clock
MOST_THREADS = SPACE - BYTES

call_kernel = function_call(4)
call_pipe = function_call(3, types.int32)
call_nap = function_call(1, types.int32)
call_clock = function_call(2, types.int32)
MONOTONIC = 6 if sys.platform == "darwin" else 1

short_call = functools.partial(Compiled, signature=types.void(types.int64), nogil=False)
"""For what takes less time than giving up the interpreter's lock."""
worker_life = functools.partial(Compiled, signature=types.void(types.int64, types.int64))


@inner
def operation_at(control, index):
    return word(control, PROGRAM) + WORD * OPERATION_WORDS * index


@inner
def task_count(operation, step):
    """Tasks of an operation in this step."""
    tasks = word(operation, TASKS)
    if word(operation, FEW_TASKS) != 0 and are_few(step):
        tasks = word(operation, FEW_TASKS)
    if word(operation, PER_TOKEN) != 0:
        tasks *= word(step, COUNT)
    times = word(operation, TIMES)
    if times != 0:
        tasks *= load_i64(times)
    return tasks


@inner
def last_of_chain(control, index):
    """The operation itself, or the last of those that its tasks go on with."""
    while word(operation_at(control, index), THEN) == CHAIN:
        index += 1
    return index


@inner
def open_group(control, first, turn):
    """Offer the tasks of the group that begins with operation `first`."""
    step, total, index, small = word(control, STEP), 0, first, 1
    while True:
        operation = operation_at(control, index)
        total += task_count(operation, step)
        if word(operation, PER_TOKEN) == 0 or word(operation, TIMES) != 0:
            small = 0
        index = last_of_chain(control, index)
        if word(operation_at(control, index), THEN) == BARRIER:
            break
        index += 1
    store_i64(control + WORD * GROUP, first)
    store_i64(control + WORD * (TOTALS + turn % 2), total)
    handfuls = HANDFULS_PER_THREAD * word(control, MEMBERS) if small != 0 else 0
    store_i64(control + WORD * (HANDFULS + turn % 2), handfuls)
    store_i64(control + WORD * NEXT, index + 1)
    store_i64(control + WORD * DONE, 0)
    atomic_store(control + WORD * TICKET, turn << TURN)


@inner
def go_on(control, turn):
    """The group is done: open the next one, the first again, or none."""
    step, following = word(control, STEP), word(control, NEXT)
    ended = operation_at(control, following - 1)
    loop = word(ended, LOOP)
    if loop != 0 and load_i64(loop) != 0:
        following -= word(ended, BACK)
    aborted = atomic_load(step + WORD * ABORT) != 0 and word(step, COUNT) > 1
    aborted &= word(step, STEADY) == 0
    aborted |= word(step, OUTCOME) == READ_FAILED
    last = following == word(control, OPERATIONS)
    if aborted or (last and word(step, REPEAT) == 0):
        atomic_store(control + WORD * TICKET, ENDED << TURN)
    else:
        open_group(control, 0 if last else following, turn + 1)


@inner
def nanoseconds(control, space):
    """A clock that only goes forward; `space` is room for two words."""
    call_clock(word(control, CLOCK), (MONOTONIC, space))
    return word(space, 0) * 1_000_000_000 + word(space, 1)


@inner
def note_time(profile, index, nanoseconds_more):
    """Add to one of a thread's two times for an operation."""
    store_i64(profile + WORD * index, word(profile, index) + nanoseconds_more)


@inner
def perform(control, task, scratch):
    """Task number `task` of the current group; returns the index of its operation."""
    step, index = word(control, STEP), word(control, GROUP)
    while True:
        tasks = task_count(operation_at(control, index), step)
        if task < tasks:
            break
        task -= tasks
        index = last_of_chain(control, index) + 1
    first = index
    while True:
        operation = operation_at(control, index)
        times = word(operation, TIMES)
        if times == 0 or load_i64(times) != 0:
            call_kernel(word(operation, KERNEL), (operation, step, task, scratch))
        if word(operation, THEN) != CHAIN:
            return first
        index += 1


@inner
def work(control, scratch, profile, space):
    """Take tasks until the program ends; note where the time goes unless `profile` is 0."""
    spins = 0
    before, begun = 0, 0
    if profile != 0:
        before = nanoseconds(control, space)
    while True:
        ticket = atomic_load(control + WORD * TICKET)
        turn, task = ticket >> TURN, ticket & TASK
        if turn == ENDED:
            return
        # overwritten only when this turn is over, and then the exchange fails
        total = word(control, TOTALS + turn % 2)
        if task >= total:
            spins += 1
            if spins < SPINS:
                pause()
            else:
                call_nap(word(control, NAP), (NAP_LENGTH,))
            continue
        handfuls = word(control, HANDFULS + turn % 2)
        taken = 1 if handfuls == 0 else max(1, (total - task) // handfuls)
        if atomic_exchange(control + WORD * TICKET, ticket, ticket + taken):
            spins = 0
            for mine in range(task, task + taken):
                if profile != 0:
                    begun = nanoseconds(control, space)
                index = perform(control, mine, scratch)
                if profile != 0:
                    note_time(profile, 2 * index + 1, begun - before)
                    before = nanoseconds(control, space)
                    note_time(profile, 2 * index, before - begun)
            if atomic_add(control + WORD * DONE, taken) + taken == total:
                go_on(control, turn)


@short_call
def begin(control):
    """Start a job. One call, so that an interrupt finds it started or not: JOB tells which.

    It keeps the interpreter's lock, which another thread might not give back for 5 ms.
    """
    if word(control, OPERATIONS) != 0:
        open_group(control, 0, 0)
    store_i64(control + WORD * JOB, word(control, JOB) + 1)
    bytes_to_workers = control + WORD * BYTES
    call_pipe(
        word(control, WRITE), (word(control, WORK_INPUT), bytes_to_workers, word(control, MEMBERS))
    )


@worker_life
def serve(control, thread):
    """A worker's life: wait for a byte, run the job; the last to leave reports.

    A job without operations is the end of it.
    """
    byte = control + WORD * (BYTES + thread)
    while True:
        while call_pipe(word(control, READ), (word(control, WORK_OUTPUT), byte, 1)) < 0:
            pass  # interrupted by a signal
        if word(control, OPERATIONS) == 0:
            return
        step = word(control, STEP)
        profile = word(control, PROFILE)
        if profile != 0:
            profile += thread * 2 * WORD * word(control, OPERATIONS)
        scratch = word(step, SCRATCH) + thread * word(step, SCRATCH_BYTES)
        work(control, scratch, profile, control + WORD * (SPACE + 2 * thread))
        # all have left the program before anyone reports: the next job may follow at once
        if atomic_add(control + WORD * LEFT, 1) + 1 == word(control, MEMBERS):
            atomic_store(control + WORD * LEFT, 0)
            atomic_store(control + WORD * FINISHED, word(control, JOB))
            call_pipe(word(control, WRITE), (word(control, DONE_INPUT), byte, 1))


def _c_functions() -> list[int]:
    """Addresses of the platform's read, write, sleep and, where there is one, clock."""
    if sys.platform == "win32":
        runtime, system = ctypes.CDLL("ucrtbase"), ctypes.WinDLL("kernel32")
        functions = [runtime._read, runtime._write, system.Sleep]
    else:
        runtime = ctypes.CDLL(None)
        functions = [runtime.read, runtime.write, runtime.usleep, runtime.clock_gettime]
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]


class Team:
    """`threads` workers; one job at a time, the caller's business to keep apart."""

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= MOST_THREADS:
            raise ResourceError(f"{threads} threads: 1 to {MOST_THREADS} can work together")
        self.threads = threads
        self._process = os.getpid()
        storage = np.zeros(CONTROL_WORDS + 16, np.int64)
        skip = (-storage.ctypes.data % 128) // WORD
        self._control = storage[skip : skip + CONTROL_WORDS]
        functions = _c_functions()
        self._control[READ : READ + len(functions)] = functions
        pipes: list[int] = []
        workers: list[threading.Thread] = []
        self.close = weakref.finalize(self, _end, self._process, self._control, pipes, workers)
        """End the workers; the team is of no further use. Comes by itself when it is dropped."""
        self.close.atexit = False  # a job may be running; daemon threads end with the process
        try:
            for _ in range(2):
                pipes += os.pipe()
            self._control[[WORK_OUTPUT, WORK_INPUT]] = pipes[:2]
            self._done, self._control[DONE_INPUT] = pipes[2:]
            for i in range(threads):
                worker = threading.Thread(target=_serve, args=(self._control, i), daemon=True)
                worker.name = f"ondevice-{i}"
                worker.start()
                workers.append(worker)
        except (OSError, RuntimeError) as error:
            self.close()
            raise ResourceError(f"{threads} threads cannot be had: {error}") from None

    @property
    def share_done(self) -> float:
        """Of the operations of the job that is running, or of the last one."""
        return float(self._control[GROUP]) / max(1, int(self._control[OPERATIONS]))

    def run(
        self,
        program: np.ndarray,
        step: np.ndarray,
        profile: np.ndarray | None = None,
        threads: int | None = None,
    ) -> None:
        """Run a program (operations, OPERATION_WORDS) int64 on a step record, to its end.

        `threads` of the team take part, all by default.

        With `profile` (threads, operations, 2) int64, each thread adds the nanoseconds that it
        worked on each operation, and that it waited before, those of a chain to the first of it.

        The step's ABORT word, set by anyone meanwhile, ends a batch after this group; what the
        program was changing is then undefined. An exception while waiting (Ctrl-C) stops a
        decode loop after its token and aborts a batch, waits for the workers, and goes on.
        """
        if os.getpid() != self._process:
            raise Error("the model was opened before this process forked; open it again here")
        control = self._control
        control[PROGRAM], control[OPERATIONS] = program.ctypes.data, len(program)
        control[STEP] = step.ctypes.data
        control[MEMBERS] = threads or self.threads
        control[PROFILE] = 0 if profile is None else profile.ctypes.data
        job = int(control[JOB]) + 1
        try:
            begin(control.ctypes.data)
            self._wait(job)
        except BaseException:
            while control[JOB] == job:
                step[[CANCEL, ABORT]] = 1
                with contextlib.suppress(KeyboardInterrupt):
                    self._wait(job)
                    break
            raise

    def _wait(self, job: int) -> None:
        """Until every worker has left; a byte in the pipe only says that it is time to look."""
        while self._control[FINISHED] != job:
            os.read(self._done, MOST_THREADS)


def _serve(control: np.ndarray, thread: int) -> None:
    """A worker; holds on to the control record for as long as it lives."""
    if sys.platform == "linux":  # which else lets each nap last 50 microseconds longer
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    serve(control.ctypes.data, thread)


def _end(
    process: int, control: np.ndarray, pipes: list[int], workers: list[threading.Thread]
) -> None:
    if os.getpid() != process:
        return
    if workers:
        control[OPERATIONS], control[MEMBERS] = 0, len(workers)
        begin(control.ctypes.data)
    for worker in workers:
        worker.join()
    for pipe in pipes:
        os.close(pipe)
