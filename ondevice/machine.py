"""What this machine can do at most: bytes read and int8 multiply-adds per second, by all threads.

What else runs can only slow a probe down, so a reading is the best of several short passes. Speeds
drift with the neighbours and with the clock, though, over seconds: who compares a speed with them
takes readings before, between and after its own runs, and their median.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ondevice.kernels import layout, probe
from ondevice.kernels.operation import CompiledFunction
from ondevice.program import Operations, Program, zeros
from quant.format import Array

Run = Callable[[Operations, Array], None]
"""Runs operations with a step record on all threads of a team, as `Model.run` does."""

Job = tuple[Program, Operations]
"""The operations, and what holds the memory they use."""

LEAST_BYTES = 512 << 20
PASS_BYTES = 128 << 20
CACHES = 4
"""The memory read is so many times the last cache, of which other programs use a part."""
PASSES = 10
TASKS = 8  # of each thread, in a pass of multiplications


class Machine:
    """Probes for `threads` threads.

    They read `memory`, which has real pages behind it, if it is LEAST_BYTES or more; otherwise they
    hold as much themselves.
    """

    def __init__(self, run: Run, threads: int, memory: Array | None = None) -> None:
        self._run = run
        self._step = np.zeros(layout.STEP_WORDS, np.int64)
        self._step[layout.COUNT] = 1
        self._threads = threads
        nbytes = max(LEAST_BYTES, CACHES * last_cache())
        if memory is None or len(memory) < LEAST_BYTES:
            memory = zeros(nbytes)
            memory[::4096] = 1  # have real pages behind it
        nbytes = min(nbytes, len(memory))
        self._reads = [
            self._operations(probe.read_memory, memory[start:], PASS_BYTES // probe.CHUNK)
            for start in range(0, nbytes - PASS_BYTES + 1, PASS_BYTES)
        ]
        vectors = np.random.default_rng(0).integers(0, 64, 64 * probe.VECTORS).astype(np.uint8)
        self._multiply = self._operations(probe.multiply_bytes, vectors, TASKS * threads)
        self._next = 0
        for job in self._reads:  # what the system has just zeroed is still in the caches
            self._seconds(job)

    def read_bandwidth(self) -> float:
        """Bytes per second; every pass reads another part, long since out of the caches."""
        seconds = []
        for _ in range(PASSES):
            self._next = (self._next + 1) % len(self._reads)
            seconds.append(self._seconds(self._reads[self._next]))
        return PASS_BYTES / min(seconds)

    def int8_peak(self) -> float:
        """Multiply-adds per second of the best int8 instruction there is, out of registers."""
        seconds = min(self._seconds(self._multiply) for _ in range(PASSES))
        return TASKS * self._threads * probe.PRODUCTS / seconds

    def _operations(self, kernel: CompiledFunction, data: Array, tasks: int) -> Job:
        program = Program(1, self._threads)
        sums = program.keep(np.zeros(tasks, np.int64))
        program.add(kernel, program.keep(data), sums, tasks=tasks)
        return program, program.take()

    def _seconds(self, job: Job) -> float:
        started = time.perf_counter()
        self._run(job[1], self._step)
        return time.perf_counter() - started


def last_cache() -> int:
    """Bytes of the largest cache of the first processor; 0 where the system does not say."""
    sizes = [0]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)
