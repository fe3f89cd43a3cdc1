"""Compiling many functions at once, before they are needed.

Numba compiles under one lock, so threads gain nothing. `Compilation` starts a Python process for
each core; they take functions from one pipe, compile them into the shared folder of machine code,
and end. This process, which may do something else meanwhile, then loads what they made and compiles
what is missing: all of it where there is no folder to share, no second core, or no Python to start
(a frozen application). While one process compiles, others that need the same machine code wait for
it.

    python -P -m quant.compiling HASH       a worker: reads records of 256 bytes, "module name"
"""

import contextlib
import gc
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from quant import jit
from quant.jit import Compiled

RECORD = 256
FEWEST = 4
"""Missing functions from which on other processes are started: that costs each half a second."""
MOST_WORKERS = 8
PATIENCE = 60.0
"""Seconds without a new function after which this process compiles the rest by itself."""
POLL = 0.02

Report = Callable[[int, int], None]
"""report(done, needed): called again and again while functions are compiled."""


class Compilation(contextlib.AbstractContextManager["Compilation"]):
    """Compiles functions while the body of the `with` statement runs, and waits at its end.

    Nothing happens, and `report` is not called, if their machine code is there already.
    """

    def __init__(self, functions: Iterable[Compiled], report: Report | None = None) -> None:
        self.functions = list(dict.fromkeys(functions))
        self._missing = [function for function in self.functions if not function.kept]
        self._needed = len(self._missing)
        self._report = report
        self._lock: int | None = None
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Compilation":
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._wait()
                for function in self.functions:
                    _ = function.code
                    if function in self._missing:
                        self._missing.remove(function)
                        self._tell()
        finally:
            self._end()

    def _begin(self) -> bool:
        """Start the workers; False if another process is compiling just now."""
        if not self._missing or jit.FOLDER is None:
            return True
        self._lock = jit.FOLDER.lock()
        if self._lock is None:
            return False
        self._look()  # the process before may have made them
        self._tell()
        workers = min(cores(), len(self._missing), MOST_WORKERS)
        if len(self._missing) >= FEWEST and workers > 1:
            with contextlib.suppress(OSError):
                self._start(workers)
        return True

    def _start(self, workers: int) -> None:
        command = worker_command()
        if command is None:
            return
        jobs, inlet = os.pipe()
        try:
            for _ in range(workers):
                process = subprocess.Popen(
                    command,
                    stdin=jobs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                )
                self._workers.append(process)
        finally:
            os.close(jobs)
            try:
                for function in sorted(self._missing, key=_weight, reverse=True):
                    os.write(inlet, f"{function.__module__} {function.__name__}".encode().ljust(RECORD))
            finally:
                os.close(inlet)

    def _wait(self) -> None:
        """Until the workers, or another process, have made what they can."""
        last = time.monotonic()
        while self._missing and jit.FOLDER is not None:
            if self._look():
                last = time.monotonic()
                self._tell()
            if self._lock is None:
                if self._begin():
                    last = time.monotonic()
            elif all(worker.poll() is not None for worker in self._workers):
                self._look()
                return
            if time.monotonic() - last > PATIENCE:
                return
            time.sleep(POLL)

    def _look(self) -> bool:
        """Cross off what the folder has by now."""
        before = len(self._missing)
        self._missing = [function for function in self._missing if not function.kept]
        return len(self._missing) < before

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self._needed - len(self._missing), self._needed)

    def _end(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.kill()
            worker.wait()
        self._workers = []
        if self._lock is not None and self._lock >= 0:
            os.close(self._lock)
        self._lock = None


def cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def worker_command() -> list[str] | None:
    """How to start a worker; None if this program's executable is no Python."""
    executable = sys.executable or ""
    if getattr(sys, "frozen", False) or not Path(executable).name.lower().startswith("python"):
        return None
    return [executable, "-P", "-m", "quant.compiling", jit.source_hash()]


def _environment() -> dict[str, str]:
    """This process's, with its module search path but without the current folder in it."""
    root = str(Path(__file__).resolve().parent.parent)
    path = [entry for entry in sys.path if entry]
    if root not in path:
        path.insert(0, root)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _weight(function: Compiled) -> int:
    """Bytes of code of a function and of what it calls, once each: about how long it takes."""
    known, pending, total = set(), [function.function], 0
    while pending:
        code = pending.pop()
        if code in known:
            continue
        known.add(code)
        total += len(code.__code__.co_code)
        for name in code.__code__.co_names:
            called = getattr(code.__globals__.get(name), "py_func", None)
            if called is not None:
                pending.append(called)
    return total


def work(expected: str) -> None:
    """A worker's life. It ends at once if it would compile something else than was asked for."""
    if jit.FOLDER is None or jit.source_hash() != expected:
        return
    gc.disable()  # 9 % of the time, and the process is short-lived
    while len(record := os.read(0, RECORD)) == RECORD:
        module, name = record.decode().split()
        _ = getattr(importlib.import_module(module), name).code


if __name__ == "__main__":
    work(sys.argv[1])
