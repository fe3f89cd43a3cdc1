"""Copies of a state's memory, to come back to: few in memory, more on disk, all within budgets.

The memory of a sequence cannot be cut back, so a copy is kept at every boundary of a message; keys
and values need none, they lie by position and are overwritten. Copies beyond the budget of memory
go to a private folder beside the cache, which disappears with the process; beyond the budget of
disk space the history is thinned, so that what is kept lies the closer together the newer it is.
Position 0 needs no copy.
"""

import itertools
import os
import secrets
import shutil
import threading
import weakref
import zlib
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ondevice.locks import FileLock
from ondevice.state import Snapshot, State
from quant.folders import cache_root, private_folder
from quant.format import Array

LEAST_MEMORY = 16 << 20
"""Bytes of copies in memory that are nobody's concern."""
DISK = 2 << 30
"""Bytes of copies on disk, unless a tenth of what is free is less."""


class Copy:
    """A place in a sequence that can be returned to; what it takes is given back with it."""

    def __init__(self, store: "Snapshots", position: int, key: int) -> None:
        self._store = store
        self.position = position
        self.key = key

    @property
    def held(self) -> bool:
        """Whether it is still to be had."""
        return self._store.holds(self)

    def restore(self, state: State) -> bool:
        """Take the state back there; False, with the state cleared, if the copy is lost."""
        return self._store.restore(self, state)


class Place(Protocol):
    """What a history needs of a copy, wherever it is."""

    @property
    def held(self) -> bool: ...
    @property
    def position(self) -> int: ...
    def restore(self, state: State) -> bool: ...


@dataclass(eq=False, slots=True)
class _Slot:
    """Where a copy's bytes are: in memory, in a file, or (neither) lost."""

    memory: Array | None
    nbytes: int
    path: Path | None = None
    checksum: int = 0


class Snapshots:
    """The copies of all sessions of a model; usable from any thread."""

    def __init__(self, memory: int, disk: int = DISK, folder: Path | None = None) -> None:
        """memory, disk: budgets in bytes; folder: where to make ours, the cache's by default."""
        self.memory_budget, self.disk_budget = memory, disk
        self.memory_bytes = self.disk_bytes = 0
        """Bytes that copies take now."""
        self._parent = folder
        self._folder: Path | None = None
        self._no_folder = False
        self._slots: dict[int, _Slot] = {}  # oldest first
        self._keys = itertools.count()
        self._gone: deque[int] = deque()
        self._lock = threading.Lock()

    def keep(self, state: State) -> Copy | None:
        """A copy of the state's memory; None where there is no room for one."""
        nbytes = state.memory.nbytes
        with self._lock:
            self._sweep()
            key = next(self._keys)
            copy = Copy(self, state.position, key)
            state.settle()
            if nbytes <= self.memory_budget:
                memory = None
                for older in list(self._slots.values()):
                    if self.memory_bytes + nbytes <= self.memory_budget:
                        break
                    if older.memory is not None:
                        memory = self._spill(older)
                # memory that is new costs more than the copy
                if memory is None or memory.nbytes != nbytes:
                    memory = np.empty_like(state.memory)
                memory[:] = state.memory
                slot = _Slot(memory, nbytes)
                self.memory_bytes += nbytes
            else:
                slot = _Slot(None, nbytes)
                if not self._write(slot, state.memory):
                    return None
            self._slots[key] = slot
            weakref.finalize(copy, self._forget, key).atexit = False
            return copy

    def restore(self, copy: Copy, state: State) -> bool:
        """Take the state back there; False if the copy is lost, the state then being cleared."""
        with self._lock:
            self._sweep()
            slot = self._slots.get(copy.key)
            if slot is None:
                return False
            if slot.memory is not None:
                state.restore(Snapshot(slot.memory, copy.position))
                return True
            if _read(slot, state.memory):
                state.arrive(copy.position)
                return True
            self._drop(copy.key)
            state.reset()
            return False

    def holds(self, copy: Copy) -> bool:
        """Whether the copy is still to be had."""
        return copy.key in self._slots

    def most(self, nbytes: int) -> int:
        """How many copies of so many bytes fit the budgets."""
        return self.memory_budget // nbytes + self.disk_budget // nbytes

    def close(self) -> None:
        """Remove everything."""
        with self._lock:
            self._slots.clear()
            self.memory_bytes = self.disk_bytes = 0
            if self._folder is not None:
                self._close()
                self._folder = None

    # ---- with the lock held ----

    def _sweep(self) -> None:
        while self._gone:
            self._drop(self._gone.popleft())

    def _drop(self, key: int) -> None:
        slot = self._slots.pop(key, None)
        if slot is None:
            return
        if slot.memory is not None:
            self.memory_bytes -= slot.nbytes
        if slot.path is not None:
            self.disk_bytes -= slot.nbytes
            with suppress(OSError):
                slot.path.unlink()

    def _spill(self, slot: _Slot) -> Array:
        """Move a copy to disk; the memory that it had."""
        memory, slot.memory = slot.memory, None
        assert memory is not None
        self.memory_bytes -= slot.nbytes
        if not self._write(slot, memory):
            for key, other in list(self._slots.items()):
                if other is slot:
                    self._drop(key)
        return memory

    def _write(self, slot: _Slot, memory: Array) -> bool:
        folder = self._made_folder()
        if folder is None or not self._room(folder, slot.nbytes):
            return False
        path = folder / secrets.token_hex(8)
        try:
            with path.open("xb", buffering=0) as file:
                written = 0
                while written < memory.nbytes:
                    written += file.write(memory.data[written:])
        except OSError:
            with suppress(OSError):
                path.unlink()
            return False
        slot.path, slot.checksum = path, zlib.crc32(memory.data)
        self.disk_bytes += slot.nbytes
        return True

    def _room(self, folder: Path, nbytes: int) -> bool:
        """Make room on disk at the cost of the oldest copies there."""
        try:
            free = shutil.disk_usage(folder).free
        except OSError:
            return False
        budget = min(self.disk_budget, (free + self.disk_bytes) // 10)
        if nbytes > budget:
            return False
        for key, slot in list(self._slots.items()):
            if self.disk_bytes + nbytes <= budget:
                break
            if slot.path is not None:
                self._drop(key)
        return True

    def _made_folder(self) -> Path | None:
        if self._folder is None and not self._no_folder:
            made = _own_folder(self._parent)
            self._no_folder = made is None
            if made is not None:
                self._folder, lock = made
                self._close = weakref.finalize(self, _remove, self._folder, lock)
        return self._folder

    def _forget(self, key: int) -> None:
        """A copy is gone. This may be in the middle of anything, so it only takes note if busy."""
        self._gone.append(key)
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()


class History:
    """The copies along one sequence of tokens, by position."""

    def __init__(self, store: Snapshots, copies: "dict[int, Place] | None" = None) -> None:
        self._store = store
        self._copies = dict(copies or {})

    @property
    def positions(self) -> list[int]:
        return sorted(p for p, copy in self._copies.items() if copy.held)

    def add(self, state: State) -> None:
        """Keep a copy of the state here."""
        if state.position == 0 or state.position in self.positions:
            return
        copy = self._store.keep(state)
        if copy is not None:
            self._copies[state.position] = copy
            kept = self.positions
            self._copies = {position: self._copies[position] for position in kept}
            while len(self._copies) > max(1, self._store.most(state.memory.nbytes)):
                del self._copies[thinned(sorted(self._copies))]

    def adopt(self, place: Place) -> None:
        """Know of a copy that something else keeps."""
        self._copies.setdefault(place.position, place)

    def cut(self, position: int) -> None:
        """Forget what lies beyond."""
        self._copies = {p: copy for p, copy in self._copies.items() if p <= position}

    def clear(self) -> None:
        self._copies = {}

    def restore(self, state: State, position: int) -> None:
        """Take the state to the nearest place at or before `position`, its own perhaps."""
        for place in sorted(self._copies, reverse=True):
            if place > position:
                continue
            if place <= state.position <= position:
                return
            if self._copies[place].restore(state):
                return
            del self._copies[place]
        if state.position > position:
            state.reset()

    def shared(self, position: int) -> "History":
        """The same copies up to a position, for a sequence that begins alike."""
        return History(self._store, {p: c for p, c in self._copies.items() if p <= position})


def thinned(positions: list[int]) -> int:
    """Which of the sorted positions to give up: where the gap it leaves is smallest for its age."""
    newest = positions[-1]
    if len(positions) < 2:
        return newest

    def cost(i: int) -> float:
        before = positions[i - 1] if i else 0
        return (positions[i + 1] - before) / (newest - before + 1)

    return positions[min(range(len(positions) - 1), key=cost)]


def _read(slot: _Slot, target: Array) -> bool:
    """Whether the copy's file was read, whole and unchanged."""
    if slot.path is None:
        return False
    try:
        with slot.path.open("rb", buffering=0) as file:
            got, view = 0, target.data
            while got < len(view):
                step = file.readinto(view[got:])
                if not step:
                    return False
                got += step
    except OSError:
        return False
    return zlib.crc32(target.data) == slot.checksum


def _own_folder(parent: Path | None) -> tuple[Path, FileLock] | None:
    """A new private folder that is ours alone; what dead processes left is removed."""
    try:
        parent = parent or cache_root() / "snapshots"
        if not private_folder(parent):
            return None
        with FileLock(parent / "lock", wait=True):
            for other in (path for path in parent.iterdir() if path.is_dir()):
                with suppress(OSError), FileLock(other / "lock"):
                    shutil.rmtree(other, ignore_errors=True)
            folder = parent / f"{os.getpid()}-{secrets.token_hex(4)}"
            folder.mkdir(mode=0o700)
            return folder, FileLock(folder / "lock")
    except (OSError, RuntimeError):
        return None


def _remove(folder: Path, lock: FileLock) -> None:
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)
