"""Reading a file past the page cache, in whole blocks of BLOCK bytes, and how fast that goes."""

import contextlib
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ondevice.kernels.store import BLOCK
from quant.errors import ResourceError

PROBE_SECONDS, PROBES = 0.2, 10
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


def bandwidth(path: Path, piece: int, readers: int, offsets: Sequence[int] | None = None) -> float:
    """Bytes per second of direct reads of `piece` bytes at random places, as experts are read.

    At any places, or at those of `offsets`: what a storage system was asked for lately it may have
    at hand. The best of several short probes: what else runs can only slow one down.
    """
    piece = max(BLOCK, -(-piece // BLOCK) * BLOCK)
    end = max(BLOCK, path.stat().st_size - piece)
    places = [at // BLOCK for at in offsets or () if at < end] or range(end // BLOCK)
    number = open_direct(path)
    try:
        return max(_probe(number, piece, places, readers) for _ in range(PROBES))
    finally:
        os.close(number)


def _probe(number: int, piece: int, places: Sequence[int], readers: int) -> float:
    done = [0] * readers
    started = time.perf_counter()

    def read(reader: int) -> None:
        choose = random.Random()
        with mmap.mmap(-1, piece) as buffer:
            while time.perf_counter() - started < PROBE_SECONDS:
                try:
                    done[reader] += os.preadv(number, [buffer], choose.choice(places) * BLOCK)
                except OSError:
                    return

    threads = [threading.Thread(target=read, args=(i,)) for i in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)
