"""Reading a file past the page cache, in whole blocks of BLOCK bytes, and how fast that goes; and
having the page cache filled before it is needed.
"""

import contextlib
import ctypes
import mmap
import os
import random
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from ondevice.kernels.store import BLOCK
from quant.errors import ResourceError
from quant.format import Array

PROBE_BYTES = 320 << 20
"""How much of a file is read by a probe, again and again."""
FIRST_SECONDS = 5.0
"""For reading it the first time; what was not read by then is left out."""
WINDOW, WINDOWS, MOST_WINDOWS = 0.25, 16, 32
"""Seconds of a window; those that count, and the most there are. Disks that others use as well
change their speed by a quarter from second to second."""
STEADY = 0.1
"""How far apart the medians of the two halves of the windows that count may be."""
SLABS = 16
"""Pieces of memory that each reader reads into by turns."""
STRETCH = 8 << 20
"""Bytes that the page cache is asked to read at a time."""
WILL_NEED, POPULATE_READ = 3, 22  # madvise(2); the second since Linux 5.14
HAS_POPULATE = sys.platform == "linux"
SUPPORTED = hasattr(os, "preadv")
"""Whether files can be read like this here: not on Windows so far."""


def open_direct(path: Path) -> int:
    """A file descriptor whose reads go past the page cache, where the file system lets them."""
    try:
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            with contextlib.suppress(OSError):
                number = os.open(path, os.O_RDONLY | direct)
                try:
                    with mmap.mmap(-1, BLOCK) as buffer:
                        os.preadv(number, [buffer], 0)
                    return number
                except OSError:
                    os.close(number)
        number = os.open(path, os.O_RDONLY)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(number, fcntl.F_NOCACHE, 1)
        return number
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from None


class ReadAhead:
    """Has bytes of mapped files come into memory, in this order, in a thread, until it is closed or
    dropped.

    By themselves pages come as they are touched, each a wait for the disk. Nothing is said of what
    cannot be read: whoever needs it will. Does nothing on Windows.
    """

    def __init__(self, mapped: Sequence[Array]) -> None:
        closed = threading.Event()
        self._thread = threading.Thread(
            target=_read, args=(mapped, closed), name="ondevice-read-ahead", daemon=True
        )
        self._close = weakref.finalize(self, closed.set)
        self._thread.start()

    def join(self) -> None:
        """Wait until everything has been asked for."""
        self._thread.join()

    def close(self) -> None:
        """Ask for nothing more."""
        self._close()
        self._thread.join()


def _read(mapped: Sequence[Array], closed: threading.Event) -> None:
    if sys.platform == "win32":
        return
    library = ctypes.CDLL(None)
    stretches = [
        data[max(0, at) : at + STRETCH]
        for data in mapped
        for at in range(-(data.ctypes.data % mmap.PAGESIZE), data.nbytes, STRETCH)
    ]
    if all(_in_memory(library, stretch) for stretch in stretches):
        return
    for stretch in stretches:
        if closed.is_set():
            return
        # in large pages, where the mapping wants them
        if not HAS_POPULATE or _advise(library, stretch, POPULATE_READ):
            _advise(library, stretch, WILL_NEED)
        else:
            # in a virtual machine the first touch of a page from disk takes half a microsecond,
            # most likely since its host maps it then
            stretch[:: mmap.PAGESIZE].max()


def _in_memory(library: ctypes.CDLL, data: Array) -> bool:
    """Whether the first page of mapped bytes is in the page cache, as far as we may know."""
    answer = ctypes.c_ubyte(1)
    at = data.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    library.mincore(ctypes.c_void_p(at), ctypes.c_size_t(1), ctypes.byref(answer))
    return bool(answer.value & 1)


def _advise(library: ctypes.CDLL, data: Array, advice: int) -> int:
    """madvise(2) for all pages of mapped bytes; 0 where that worked."""
    begin = data.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = data.ctypes.data + data.nbytes - begin
    failed: int = library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)
    return failed


def bandwidth(path: Path, piece: int, readers: int) -> float:
    """Bytes per second of direct reads of `piece` bytes at random places, as experts are read.

    Places that were read before: what a network disk or its host gives for the first time may take
    ten times as long, and decoding comes back to the same experts again and again. So the places
    are read once, and then in turn until the rate is steady; it is the median of the last windows.
    Takes 4 to 13 seconds.
    """
    piece = max(BLOCK, -(-piece // BLOCK) * BLOCK)
    blocks = range(max(1, (path.stat().st_size - piece) // BLOCK))
    # the same ones every time: they are at hand the next time
    places = random.Random(0).sample(blocks, min(len(blocks), max(readers, PROBE_BYTES // piece)))
    number = open_direct(path)
    try:
        with contextlib.suppress(OSError):
            os.fsync(number)  # reads past the page cache would wait for what is to be written
        with _Probe(number, piece, places, readers) as probe:
            rate = _steady_rate(probe)
            if not probe.running:
                raise ResourceError(f"{path}: cannot be read")
            return rate
    finally:
        os.close(number)


class _Probe:
    """Threads that read pieces at the given places, in turn, into memory like a pool's."""

    def __init__(self, number: int, piece: int, places: Sequence[int], readers: int) -> None:
        self._number, self._piece = number, piece
        self._shares = [places[i::readers] for i in range(min(readers, len(places)))]
        self._done = [0] * len(self._shares)
        self._turns = [0] * len(self._shares)
        self._again = self._stopping = False
        self._memory = anonymous(len(self._shares) * SLABS * piece)
        self._threads = [
            threading.Thread(target=self._read, args=(i,)) for i in range(len(self._shares))
        ]

    def __enter__(self) -> "_Probe":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join()

    @property
    def nbytes(self) -> int:
        """Read so far."""
        return sum(self._done)

    @property
    def running(self) -> bool:
        """Whether no read has failed."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def all_read(self) -> bool:
        """Whether all places have been read once."""
        return all(
            turns >= len(share) for turns, share in zip(self._turns, self._shares, strict=True)
        )

    def repeat(self) -> None:
        """From now on read only what was read before."""
        self._again = True

    def _read(self, reader: int) -> None:
        share, turn, again = self._shares[reader], 0, False
        view = memoryview(self._memory)
        while not self._stopping:
            if self._again and not again:
                again, share = True, share[: max(1, turn)]
            to = (reader * SLABS + turn % SLABS) * self._piece
            try:
                at = share[turn % len(share)] * BLOCK
                self._done[reader] += os.preadv(self._number, [view[to : to + self._piece]], at)
            except OSError:
                return
            turn += 1
            self._turns[reader] = turn


def _steady_rate(probe: _Probe) -> float:
    started = time.perf_counter()
    while probe.running and not probe.all_read and time.perf_counter() - started < FIRST_SECONDS:
        time.sleep(WINDOW / 10)
    probe.repeat()
    rates: list[float] = []
    before, begun = probe.nbytes, time.perf_counter()
    while probe.running and len(rates) < MOST_WINDOWS:
        time.sleep(WINDOW)
        done, now = probe.nbytes, time.perf_counter()
        rates.append((done - before) / (now - begun))
        before, begun = done, now
        if len(rates) >= WINDOWS and _is_steady(rates[-WINDOWS:]):
            break
    return statistics.median(rates[-WINDOWS:] or [0.0])


def _is_steady(rates: list[float]) -> bool:
    half = len(rates) // 2
    earlier, later = statistics.median(rates[:half]), statistics.median(rates[half:])
    return abs(later - earlier) <= STEADY * later


def anonymous(nbytes: int) -> mmap.mmap:
    """Zeroed pages of this process alone, large ones where there are any.

    Python's default would be shared ones, which are never large and cannot be given back.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
