"""Reading past the page cache."""

import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ondevice import disk
from quant.errors import ResourceError


def test_what_is_read_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = np.random.default_rng(0).bytes(5 * disk.BLOCK + 17)
    path.write_bytes(data)
    number = disk.open_direct(path)
    try:
        with mmap.mmap(-1, 6 * disk.BLOCK) as aligned:
            assert os.preadv(number, [aligned], 0) == len(data)
            assert aligned[: len(data)] == data
    finally:
        os.close(number)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="no way to see the page cache")
def test_the_page_cache_is_filled_ahead(tmp_path: Path) -> None:
    path = tmp_path / "file"
    nbytes = 3 * disk.STRETCH + 5000
    with path.open("wb") as file:
        file.write(bytes(nbytes))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def cached(at: int) -> bool:
        with path.open("rb") as file:
            try:
                return os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                return False

    if cached(disk.STRETCH):
        pytest.skip("this file system keeps what it is told to drop")
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    disk.ReadAhead([mapped[disk.STRETCH + 100 :]]).join()
    end = time.monotonic() + 10
    while not all(map(cached, (disk.STRETCH + 100, 2 * disk.STRETCH, nbytes - 1))):
        assert time.monotonic() < end
    assert not cached(0)


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_reading_ahead_ends(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started, may_go_on, asked = threading.Event(), threading.Event(), []

    def advise(library: object, data: np.ndarray, advice: int) -> int:
        asked.append(len(data))
        started.set()
        assert may_go_on.wait(10)
        return 0

    monkeypatch.setattr(disk, "_advise", advise)
    monkeypatch.setattr(disk, "_in_memory", lambda library, data: False)
    reading: disk.ReadAhead | None = disk.ReadAhead([np.zeros(3 * disk.STRETCH, np.uint8)])
    assert reading is not None
    assert started.wait(10)
    threading.Timer(0.1, may_go_on.set).start()
    thread = reading._thread
    if how == "closed":
        reading.close()
        assert not thread.is_alive()
    reading = None
    thread.join(10)
    assert len(asked) == 1


def test_what_is_in_memory_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(disk, "_advise", lambda library, data, advice: asked.append(advice) or 1)
    memory = np.zeros(3 * disk.STRETCH, np.uint8)
    monkeypatch.setattr(disk, "_in_memory", lambda library, data: True)
    disk.ReadAhead([memory]).join()
    assert not asked
    last = memory[-1:].ctypes.data
    monkeypatch.setattr(
        disk, "_in_memory", lambda library, data: data.ctypes.data + data.nbytes <= last
    )
    disk.ReadAhead([memory]).join()
    assert asked


def test_every_byte_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.zeros(5 * disk.STRETCH, np.uint8)
    pieces = [memory[10:20], memory[100 : 3 * disk.STRETCH + 1], memory[-disk.STRETCH - 5 :]]
    asked: list[tuple[int, int]] = []

    def advise(library: object, data: np.ndarray, advice: int) -> int:
        asked.append((data.ctypes.data, data.nbytes))
        return 0

    monkeypatch.setattr(disk, "_advise", advise)
    monkeypatch.setattr(disk, "_in_memory", lambda library, data: False)
    monkeypatch.setattr(disk, "HAS_POPULATE", False)
    disk.ReadAhead(pieces).join()
    at = 0
    for piece in pieces:
        end = piece.ctypes.data
        while end < piece.ctypes.data + piece.nbytes:
            assert asked[at][0] == end
            assert 0 < asked[at][1] <= disk.STRETCH
            end += asked[at][1]
            at += 1
        assert end == piece.ctypes.data + piece.nbytes
    assert at == len(asked)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be read"):
        disk.open_direct(tmp_path / "none")


@pytest.mark.parametrize("nbytes", [1 << 20, 60_001, 1000])
def test_bandwidth(nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "WINDOW", 0.01)
    path = tmp_path / "file"
    path.write_bytes(bytes(nbytes))
    assert 1e6 < disk.bandwidth(path, 60_000, 2) < 1e12


class Storage:
    """In place of `os.preadv`: a place takes `first` seconds, and `again` from then on."""

    def __init__(self, first: float, again: float, until: int = 1 << 60) -> None:
        self.first, self.again, self.reads_left = first, again, until
        self.known: set[int] = set()

    def __call__(self, number: int, views: list[memoryview], at: int) -> int:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError(5, "Input/output error")
        time.sleep(self.again if at in self.known else self.first)
        self.known.add(at)
        return len(views[0])


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(disk, "open_direct", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(disk, "PROBE_BYTES", 40 * 65536)
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    return path


@pytest.mark.parametrize("first_seconds", [5.0, 0.1])
def test_what_counts_is_reading_again(
    first_seconds: float, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.1 seconds are too few to read everything once."""
    monkeypatch.setattr(disk, "FIRST_SECONDS", first_seconds)
    storage = Storage(0.04, 0.004)
    monkeypatch.setattr(os, "preadv", storage)
    rate = disk.bandwidth(sparse, 65536, 2)
    assert 2 * 65536 / 0.008 < rate <= 2 * 65536 / 0.004
    assert (len(storage.known) == 40) == (first_seconds == 5.0)


def test_a_disk_that_becomes_faster_is_waited_for(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "WINDOW", 0.05)
    storage = Storage(0.004, 0.004)
    monkeypatch.setattr(os, "preadv", storage)
    begun = time.perf_counter()

    def read(number: int, views: list[memoryview], at: int) -> int:
        elapsed = time.perf_counter() - begun
        storage.again = max(0.004, 0.04 * (1 - elapsed / 0.5))
        return storage(number, views, at)

    monkeypatch.setattr(os, "preadv", read)
    assert disk.bandwidth(sparse, 65536, 2) > 2 * 65536 / 0.008


def test_a_read_error_ends_the_probe(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", Storage(0.001, 0.001, until=100))
    with pytest.raises(ResourceError, match="cannot be read"):
        disk.bandwidth(sparse, 65536, 2)
