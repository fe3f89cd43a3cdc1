"""The thread team: runs a program of kernels on all threads, without Python in between.

Every worker thread sits in one compiled function, `serve`, for its whole life and never holds the
interpreter's lock: it waits for a byte in a pipe, runs the job, meets the others at barriers, and
waits again. So an application's busy Python thread cannot stall a step, parked workers cost
nothing, and the caller waits in Python, where Ctrl-C reaches it. Pipes are what every platform
has; their C functions are called by address.

A barrier is a counter: the last to arrive zeroes the work cursors since the barrier before, takes
note of an abort, and raises the generation that the others watch. They spin a while, which costs
0.2 us when all run, and then sleep in short naps: on a core that falls idle, the scheduler puts
the worker that everybody is waiting for, where yielding would only run whatever else is there.
"""

import ctypes
import os
import sys
import threading

import numpy as np
from numba.core import types

from ondevice.kernels.layout import (
    ABORT,
    CANCEL,
    COUNT,
    CURSOR,
    KERNEL,
    MEET,
    OPERATION_WORDS,
    REPEAT,
    WORD,
    word,
)
from ondevice.kernels.simd import (
    atomic_add,
    atomic_load,
    atomic_store,
    function_call,
    pause,
    store_i64,
)
from quant.errors import Error, ResourceError
from quant.jit import inner, kernel

CONTROL_WORDS = 128
ARRIVED, GENERATION = 0, 16  # on cache lines of their own
ABORTED, PROGRAM, OPERATIONS, STEP, MEMBERS = 32, 48, 49, 50, 51
WORK_PIPE, DONE_PIPE, READ, WRITE, NAP = 52, 53, 54, 55, 56
BYTES = 64  # what goes through the pipes, one word per thread from here on
SPINS = 1000
NAP_LENGTH = 20 if sys.platform != "win32" else 0  # microseconds; milliseconds on Windows
MOST_THREADS = CONTROL_WORDS - BYTES

call_kernel = function_call(3)
call_pipe = function_call(3, types.int32)
call_nap = function_call(1, types.int32)


@inner
def meet(control, generation, first, last):
    """Wait until every thread is here; operations first .. last of the program are done."""
    members = word(control, MEMBERS)
    program = word(control, PROGRAM)
    if atomic_add(control + WORD * ARRIVED, 1) + 1 == members:
        atomic_store(control + WORD * ARRIVED, 0)
        for i in range(first, last + 1):
            store_i64(program + WORD * (OPERATION_WORDS * i + CURSOR), 0)
        abort = atomic_load(word(control, STEP) + WORD * ABORT)
        store_i64(control + WORD * ABORTED, abort)
        atomic_store(control + WORD * GENERATION, generation + 1)
        return
    spins = 0
    while atomic_load(control + WORD * GENERATION) <= generation:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            call_nap(word(control, NAP), (NAP_LENGTH,))


@inner
def run(control, thread):
    """This thread's part of the job: every operation in turn, again while the step says so."""
    program, count = word(control, PROGRAM), word(control, OPERATIONS)
    step = word(control, STEP)
    generation = atomic_load(control + WORD * GENERATION)
    while True:
        first = 0
        for i in range(count):
            operation = program + WORD * OPERATION_WORDS * i
            call_kernel(word(operation, KERNEL), (operation, step, thread))
            if word(operation, MEET) != 0:
                meet(control, generation, first, i)
                generation += 1
                first = i + 1
                if word(control, ABORTED) != 0:
                    return
        if word(step, REPEAT) == 0:
            return


@kernel("void(int64, int64)")
def serve(control, thread):
    """A worker's life: wait for a byte, run the job; the last to leave reports.

    A job without operations is the end of it.
    """
    byte = control + WORD * (BYTES + thread)
    while True:
        while call_pipe(word(control, READ), (word(control, WORK_PIPE), byte, 1)) < 0:
            pass  # interrupted by a signal
        if word(control, OPERATIONS) == 0:
            return
        run(control, thread)
        # all have left the program before anyone reports: the next job may follow at once
        members, slot = word(control, MEMBERS), control + WORD * (BYTES - 1)
        if atomic_add(slot, 1) + 1 == members:
            atomic_store(slot, 0)
            call_pipe(word(control, WRITE), (word(control, DONE_PIPE), byte, 1))


def _c_functions() -> tuple[int, int, int]:
    """Addresses of the platform's read, write and sleep."""
    if sys.platform == "win32":
        runtime, system = ctypes.CDLL("ucrtbase"), ctypes.WinDLL("kernel32")
        functions = (runtime._read, runtime._write, system.Sleep)
    else:
        runtime = ctypes.CDLL(None)
        functions = (runtime.read, runtime.write, runtime.usleep)
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return addresses[0] or 0, addresses[1] or 0, addresses[2] or 0


class Team:
    """`threads` workers; one job at a time, the caller's business to keep apart."""

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= MOST_THREADS:
            raise ResourceError(f"{threads} threads: 1 to {MOST_THREADS} can work together")
        self.threads = threads
        self._process = os.getpid()
        storage = np.zeros(CONTROL_WORDS + 16, np.int64)
        skip = (-storage.ctypes.data % 128) // WORD
        self._storage = storage
        self._control = storage[skip : skip + CONTROL_WORDS]
        work, self._work = os.pipe()
        self._done, done = os.pipe()
        self._pipes = (work, self._work, self._done, done)
        functions = _c_functions()
        self._control[[WORK_PIPE, DONE_PIPE, MEMBERS]] = work, done, threads
        self._control[[READ, WRITE, NAP]] = functions
        address = self._control.ctypes.data
        self._workers = [
            threading.Thread(target=serve, args=(address, i), daemon=True, name=f"ondevice-{i}")
            for i in range(threads)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, program: np.ndarray, step: np.ndarray) -> None:
        """Run a program (operations, OPERATION_WORDS) int64 on a step record, to its end.

        The step's ABORT word, set by anyone meanwhile, ends it at the next barrier; what the
        program was changing is then undefined. An exception while waiting (Ctrl-C) stops a
        decode loop after its token and aborts a batch, waits for the workers, and goes on.
        """
        if os.getpid() != self._process:
            raise Error("the model was opened before this process forked; open it again here")
        control = self._control
        control[PROGRAM], control[OPERATIONS] = program.ctypes.data, len(program)
        control[STEP] = step.ctypes.data
        control[ABORTED] = 0
        os.write(self._work, bytes(self.threads))
        try:
            os.read(self._done, 1)
        except BaseException:
            step[CANCEL if step[COUNT] == 1 else ABORT] = 1
            self._wait()
            raise
        finally:
            if step[ABORT]:
                program[:, CURSOR] = 0

    def _wait(self) -> None:
        while True:
            try:
                os.read(self._done, 1)
                return
            except KeyboardInterrupt:
                continue

    def close(self) -> None:
        """End the workers; the team is of no further use."""
        if not self._workers or os.getpid() != self._process:
            return
        self._control[OPERATIONS] = 0
        os.write(self._work, bytes(self.threads))
        for worker in self._workers:
            worker.join()
        self._workers = []
        for pipe in self._pipes:
            os.close(pipe)
