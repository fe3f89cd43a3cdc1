"""Compiling many functions at once, before they are needed.

Numba compiles under one lock, so threads gain nothing. `Compilation` starts a Python process for
every core but one. They and this process, when it has nothing else to do, take functions from one
pipe and compile them into the shared folder of machine code; then this process loads what the
others made, and compiles what is still missing: all of it where there is no folder to share, no
second core, or no Python to start (a frozen application). While one process compiles, others that
need the same machine code wait for it.

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
from quant.cores import cores
from quant.jit import Compiled

RECORD = 256
FEWEST = 4
"""Missing functions from which on other processes are started: that costs each half a second."""
MOST_WORKERS = 7
PATIENCE = 60.0
"""Seconds without a new function after which this process compiles the rest by itself."""
POLL = 0.03

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
        self._jobs: int | None = None
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Compilation":
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._wait(lambda: self._lock is not None or self._begin())
                if self._jobs is not None:
                    work(self._jobs, self._look)
                    self._wait(lambda: all(worker.poll() is not None for worker in self._workers))
                for function in self.functions:
                    _ = function.code
                    self._look()
        finally:
            self._end()

    def _begin(self) -> bool:
        """Start the workers; False if another process is compiling just now."""
        if self._missing and jit.FOLDER is not None:
            self._lock = jit.FOLDER.lock()
            if self._lock is None:
                return False
            self._look()  # the process before may have made them
            workers = min(cores() - 1, len(self._missing) - 1, MOST_WORKERS)
            command = worker_command()
            if len(self._missing) >= FEWEST and workers > 0 and command is not None:
                with contextlib.suppress(OSError):
                    self._start(workers, command)
        return True

    def _start(self, workers: int, command: list[str]) -> None:
        self._jobs, inlet = os.pipe()
        with os.fdopen(inlet, "wb", buffering=0) as pipe:
            for _ in range(workers):
                process = subprocess.Popen(
                    command,
                    stdin=self._jobs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                )
                self._workers.append(process)
            for function in sorted(self._missing, key=_weight, reverse=True):
                job = f"{function.__module__} {function.__name__}"
                pipe.write(job.encode().ljust(RECORD))

    def _wait(self, done: Callable[[], bool]) -> None:
        """Until it is done, all are there, or nothing has come for a long time."""
        last = time.monotonic()
        while self._missing and jit.FOLDER is not None and not done():
            time.sleep(POLL)
            if self._look():
                last = time.monotonic()
            elif time.monotonic() - last > PATIENCE:
                return

    def _look(self) -> bool:
        """Cross off what is there by now, and report."""
        before = len(self._missing)
        self._missing = [function for function in self._missing if not function.kept]
        if self._report is not None and self._needed:
            self._report(self._needed - len(self._missing), self._needed)
        return len(self._missing) < before

    def _end(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.kill()
            worker.wait()
        for descriptor in (self._jobs, self._lock):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._workers, self._jobs, self._lock = [], None, None


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


def work(jobs: int, done: Callable[[], object] = lambda: None) -> None:
    """Take functions from a pipe and compile them, until there are no more."""
    while len(record := os.read(jobs, RECORD)) == RECORD:
        module, name = record.decode().split()
        with contextlib.suppress(Exception):  # what is missing at the end is compiled again
            _ = getattr(importlib.import_module(module), name).code
        done()


if __name__ == "__main__" and jit.FOLDER is not None and jit.source_hash() == sys.argv[1]:
    gc.disable()  # 9 % of the time, and the process does not live long
    work(0)
