"""Experts from disk under a budget: a pool of slabs that reader threads fill (kernels/store.py).

`Pool` plans the slabs from the file's tensors, opens the files for direct reads, and keeps the
readers. How many slabs there are is told last (`allocate`), when all other memory is known. A read
that fails ends the running batch, whose reason `fault` then tells.
"""

import ctypes
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ondevice.config import Config
from ondevice.disk import anonymous, open_direct
from ondevice.gguf_file import Tensor
from ondevice.kernels import routing, store
from ondevice.kernels.layout import WORD
from ondevice.usage import Usage
from ondevice.weights import Weights
from quant.errors import Error, ResourceError
from quant.format import Array

BLOCK = store.BLOCK
READERS = 4
"""Reader threads: docs/log.md has what other numbers came to."""
FEW_GUESSES, MANY_GUESSES = 0.6, 1.0
"""Experts of the next layer that are asked for ahead of its router, of those that a token takes:
where the disk is what limits speed, and where it has time."""
SETTLING = 5.0
"""Seconds that reads which are under way have to end after one has failed."""
PIECE = 16 << 20
"""Bytes of a tensor that are read at once."""


@dataclass
class _Shelf:
    """Slabs of one size, for `layers` layers."""

    slab_bytes: int
    layers: int = 0
    slabs: int = 0
    record: Array = field(default_factory=lambda: np.zeros(store.SHELF_WORDS, np.int64))
    arrays: list[Array] = field(default_factory=list)
    memory: mmap.mmap | None = None
    given: list[int] = field(default_factory=list)
    """Slabs whose memory was given back."""


@dataclass(frozen=True)
class Counts:
    """What the pool has done so far."""

    hits: int = 0
    late: int = 0
    """Experts that were on their way when they were wanted."""
    misses: int = 0
    bytes_read: int = 0
    waiting: float = 0.0
    """Seconds that threads waited for the disk, all of them together."""
    reading: float = 0.0
    """Seconds that readers spent in reads, all of them together."""
    guessed: int = 0
    """Experts that were read before they were wanted, or for nothing."""

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))

    def __sub__(self, other: "Counts") -> "Counts":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(a - b for a, b in pairs))

    @property
    def hit_rate(self) -> float:
        """Of the experts wanted, how many were there; 1 where none was wanted."""
        wanted = self.hits + self.late + self.misses
        return self.hits / wanted if wanted else 1.0


class Pool:
    """The experts of a model in a bounded number of slabs."""

    def __init__(self, weights: Weights, config: Config) -> None:
        self._config = config
        self._files: dict[Path, int] = {}
        self._threads: list[threading.Thread] = []
        self._pipe: list[int] = []
        self._shelves: dict[int, _Shelf] = {}
        self._paths: list[list[Path]] = []
        count = config.experts
        self.usage = Usage.none(config)
        """How experts are used while this pool is open."""
        self._last_used = np.zeros((config.layers, count), np.int32)
        self._slabs_of = np.full((config.layers, count), store.NOBODY, np.int32)
        self._layers = np.zeros((config.layers, store.LAYER_WORDS), np.int64)
        storage = np.zeros(store.STORE_WORDS + store.LINE, np.int64)
        skip = (-storage.ctypes.data % (WORD * store.LINE)) // WORD
        self._store = storage[skip : skip + store.STORE_WORDS]
        self._end = weakref.finalize(
            self, _end, self._store, self._threads, self._pipe, self._files
        )
        for layer in range(config.layers):
            self._plan_layer(weights, layer)

    # ---- planning ----

    def _plan_layer(self, weights: Weights, layer: int) -> None:
        config, record = self._config, self._layers[layer]
        gate, up, _ = weights.expert_gate_up(layer)
        names = [gate.name] if gate.name == up.name else [gate.name, up.name]
        names.append(f"blk.{layer}.ffn_down_exps.weight")
        record[store.SLABS_OF] = self._slabs_of[layer].ctypes.data
        record[store.USES] = self.usage.uses[layer].ctypes.data
        record[store.LAST_USED] = self._last_used[layer].ctypes.data
        record[store.EXPERTS] = config.experts
        record[store.SLICES] = len(names)
        record[store.UP_SLICE] = len(names) - 2
        record[store.UP_OFFSET] = 0 if len(names) == 3 else up.address - gate.address
        record[store.DOWN_SLICE] = len(names) - 1
        area = 0
        for i, name in enumerate(names):
            tensor = weights.tensors[name]
            nbytes = tensor.nbytes // config.experts
            place = store.SLICE + store.SLICE_WORDS * i
            record[place : place + store.SLICE_WORDS] = 0, tensor.offset, nbytes, nbytes, area
            area += -(-nbytes // BLOCK) * BLOCK + BLOCK
        shelf = self._shelves.setdefault(area, _Shelf(area))
        shelf.layers += 1
        record[store.SHELF] = shelf.record.ctypes.data
        self._paths.append([weights.tensors[name].path for name in names])

    @property
    def least_bytes(self) -> int:
        """The smallest pool: two tokens' experts of a layer on every shelf."""
        return sum(self._least(shelf) * shelf.slab_bytes for shelf in self._shelves.values())

    @property
    def most_bytes(self) -> int:
        """A pool that holds all experts."""
        return sum(
            shelf.layers * self._config.experts * shelf.slab_bytes
            for shelf in self._shelves.values()
        )

    @property
    def expert_bytes(self) -> int:
        """Of a slab, on average over the layers."""
        layers = sum(shelf.layers for shelf in self._shelves.values())
        return sum(shelf.layers * shelf.slab_bytes for shelf in self._shelves.values()) // layers

    @property
    def slice_bytes(self) -> int:
        """Of the reads that an expert comes with, on average."""
        return self.expert_bytes * self._config.layers // sum(map(len, self._paths))

    def _least(self, shelf: _Shelf) -> int:
        return min(2 * self._config.experts_used, self._config.experts * shelf.layers)

    # ---- memory and threads ----

    def open(self) -> None:
        """Open the files; what follows needs them."""
        for layer, paths in enumerate(self._paths):
            for i, path in enumerate(paths):
                place = store.SLICE + store.SLICE_WORDS * i + store.FILE
                self._layers[layer, place] = self._open(path)

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = open_direct(path)
        return self._files[path]

    def allocate(self, nbytes: int) -> None:
        """Make slabs out of at most `nbytes`, and start the readers."""
        wanted = sum(s.layers * s.slab_bytes for s in self._shelves.values())
        spare = nbytes - self.least_bytes
        for shelf in self._shelves.values():
            most = shelf.layers * self._config.experts
            more = max(0, spare) * shelf.layers // wanted
            shelf.slabs = min(most, self._least(shelf) + more)
            self._fill(shelf)
        self._start()

    @property
    def slabs(self) -> int:
        """Experts that the pool has room for."""
        return sum(shelf.slabs for shelf in self._shelves.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(shelf.slabs * shelf.slab_bytes for shelf in self._shelves.values())

    def _fill(self, shelf: _Shelf) -> None:
        count = shelf.slabs
        try:
            shelf.memory = anonymous(count * shelf.slab_bytes)
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"no memory for {count} experts of {shelf.slab_bytes:,} bytes: {error}"
            ) from None
        ring = np.arange(count + 1)
        following = np.roll(ring, -1).astype(np.int32)
        before = np.roll(ring, 1).astype(np.int32)
        holders = np.full(count, store.NOBODY, np.int64)
        words, claims = np.zeros(count, np.int64), np.zeros(count, np.int64)
        shelf.arrays = [following, before, holders, words, claims]
        shelf.record[store.SLABS] = count
        shelf.record[store.SLAB_BYTES] = shelf.slab_bytes
        shelf.record[store.MEMORY] = np.frombuffer(shelf.memory, np.uint8).ctypes.data
        shelf.record[store.QUOTA] = _quota(count, shelf.layers, self._config.experts)
        for word, array in zip(
            (store.NEXT, store.PREVIOUS, store.HOLDERS, store.WORDS, store.CLAIMS),
            shelf.arrays,
            strict=True,
        ):
            shelf.record[word] = array.ctypes.data

    def _start(self) -> None:
        units = 1
        while units < 4 * store.MOST_SLICES * self._config.experts:
            units *= 2
        self._rings = []
        for word in (store.DEMAND, store.GUESSES):
            ring = np.zeros(store.RING_WORDS, np.int64)
            memory = np.zeros(units * store.UNIT_WORDS, np.int64)
            ring[store.UNITS], ring[store.MASK] = memory.ctypes.data, units - 1
            self._rings += [ring, memory]
            self._store[word] = ring.ctypes.data
        self._store[store.LAYERS] = self._layers.ctypes.data
        self._store[store.INTERVALS] = self.usage.ended.ctypes.data
        self._store[store.OPEN_INTERVALS] = self.usage.open.ctypes.data
        self._store[store.DISK] = self.usage.disk.ctypes.data
        used = self._config.experts_used
        self._store[store.FEW_GUESSES] = round(FEW_GUESSES * used)
        self._store[store.MANY_GUESSES] = round(MANY_GUESSES * used)
        functions = ctypes.CDLL(None)
        for word, function in (
            (store.READ, functions.read),
            (store.WRITE, functions.write),
            (store.NAP, functions.usleep),
            (store.CLOCK, functions.clock_gettime),
            (store.READ_AT, functions.pread),
        ):
            self._store[word] = ctypes.cast(function, ctypes.c_void_p).value or 0
        try:
            self._pipe += os.pipe()
            self._store[[store.PIPE_OUTPUT, store.PIPE_INPUT]] = self._pipe
            for i in range(READERS):
                thread = threading.Thread(target=_read, args=(self._store, i), daemon=True)
                thread.name = f"ondevice-reader-{i}"
                thread.start()
                self._threads.append(thread)
        except (OSError, RuntimeError) as error:
            raise ResourceError(f"{READERS} reader threads cannot be had: {error}") from None

    def close(self) -> None:
        """End the readers and let go of files and memory."""
        self._end()
        self._shelves = {}

    # ---- filling ahead of time, giving back ----

    def warm(self, usage: Usage, go_on: Callable[[], AbstractContextManager[bool]]) -> None:
        """Read the most used experts into slabs that nobody has had, from the far end on.

        `go_on` is held while one is read; what it gives is false when it is time to stop.
        """
        room = {id(shelf): shelf.slabs for shelf in self._shelves.values()}
        for layer, expert in usage.by_use()[: self.slabs]:
            shelf = self._shelf_of(layer)
            if room[id(shelf)] > self._least(shelf):
                room[id(shelf)] -= 1
                with go_on() as worth:
                    if not worth or not self._read_ahead(layer, expert, shelf, room[id(shelf)]):
                        return

    def _shelf_of(self, layer: int) -> _Shelf:
        area = int(self._layers[layer, store.SHELF])
        return next(s for s in self._shelves.values() if s.record.ctypes.data == area)

    def _read_ahead(self, layer: int, expert: int, shelf: _Shelf, slab: int) -> bool:
        """Read an expert into a slab while no program runs; false if that is not to be."""
        _, _, holders, words, _ = shelf.arrays
        if holders[slab] != store.NOBODY or self._slabs_of[layer, expert] != store.NOBODY:
            return bool(holders[slab] == store.NOBODY)
        assert shelf.memory is not None
        record, view = self._layers[layer], memoryview(shelf.memory)
        slices = int(record[store.SLICES])
        for number in range(slices):
            place = store.SLICE + store.SLICE_WORDS * number
            file, offset, stride, nbytes, area = map(int, record[place : place + store.SLICE_WORDS])
            begin = offset + expert * stride
            at, end = begin // BLOCK * BLOCK, -(-(begin + nbytes) // BLOCK) * BLOCK
            to = slab * shelf.slab_bytes + area
            try:
                got = os.preadv(file, [view[to : to + end - at]], at)
            except OSError:
                return False
            if at + got < begin + nbytes:
                return False
        whole = (1 << slices) - 1
        words[slab] = words[slab] >> 16 << 16 | whole << 8 | whole
        holders[slab] = layer << 32 | expert
        self._slabs_of[layer, expert] = slab
        return True

    def shrink(self, nbytes: int) -> int:
        """Give back about so many bytes while no program runs, least used first; bytes given."""
        given = 0
        for shelf in self._shelves.values():
            share = nbytes * shelf.slabs * shelf.slab_bytes // max(1, self.nbytes)
            given += self._shrink_shelf(shelf, -(-share // shelf.slab_bytes))
        return given

    def _shrink_shelf(self, shelf: _Shelf, count: int) -> int:
        following, before, holders, words, _ = shelf.arrays
        assert shelf.memory is not None
        sentinel = int(shelf.record[store.SLABS])
        slab, given = int(following[sentinel]), 0
        while given < min(count, shelf.slabs - self._least(shelf)) and slab != sentinel:
            after, state = int(following[slab]), int(words[slab])
            if state >> 8 & 255 == state & 255:
                following[before[slab]], before[following[slab]] = following[slab], before[slab]
                if holders[slab] != store.NOBODY:
                    layer, expert = divmod(int(holders[slab]), 1 << 32)
                    self._slabs_of[layer, expert] = store.NOBODY
                holders[slab] = store.NOBODY
                words[slab] = ((state >> 16) + 1) << 16
                if hasattr(mmap, "MADV_DONTNEED"):
                    begin = slab * shelf.slab_bytes
                    shelf.memory.madvise(mmap.MADV_DONTNEED, begin, shelf.slab_bytes)
                shelf.given.append(slab)
                given += 1
            slab = after
        self._resize(shelf, -given)
        return given * shelf.slab_bytes

    def grow(self, nbytes: int) -> None:
        """Use again, while no program runs, about so many of the bytes that were given back."""
        share = min(1.0, nbytes / max(1, self.given_bytes))
        for shelf in self._shelves.values():
            following, before, *_ = shelf.arrays
            sentinel, count = int(shelf.record[store.SLABS]), round(share * len(shelf.given))
            for _ in range(count):
                slab, first = shelf.given.pop(), int(following[sentinel])
                following[slab], before[slab] = first, sentinel
                following[sentinel], before[first] = slab, slab
            self._resize(shelf, count)

    @property
    def given_bytes(self) -> int:
        """Bytes that were given back."""
        return sum(len(shelf.given) * shelf.slab_bytes for shelf in self._shelves.values())

    def _resize(self, shelf: _Shelf, more: int) -> None:
        shelf.slabs += more
        shelf.record[store.QUOTA] = _quota(shelf.slabs, shelf.layers, self._config.experts)

    def filled(self) -> Array:
        """The largest stretch of slabs from the first on that have all been read into."""
        largest = np.zeros(0, np.uint8)
        for shelf in self._shelves.values():
            empty = np.flatnonzero(shelf.arrays[2] == store.NOBODY)
            count = int(empty[0]) if len(empty) else len(shelf.arrays[2])
            if shelf.memory is not None and count * shelf.slab_bytes > len(largest):
                largest = np.frombuffer(shelf.memory, np.uint8, count * shelf.slab_bytes)
        return largest

    # ---- for programs ----

    @property
    def address(self) -> int:
        """Of the store record."""
        return int(self._store.ctypes.data)

    def guessing(self, distance: int) -> int:
        """Of the word that says whether experts are guessed, so many layers after the next one."""
        return self.address + WORD * (store.GUESSING, store.GUESSING_FAR)[distance]

    def masks(self, layer: int) -> tuple[int, int]:
        """Which slices of an expert gate and up need, and which down, a bit for each."""
        down = 1 << int(self._layers[layer, store.DOWN_SLICE])
        return down - 1, down

    def connect(self, record: Array, layer: int, order: int, places: int) -> None:
        """Make a routing record one of a layer whose experts come from here."""
        gate_up, down = self.masks(layer)
        record[routing.ORDER], record[routing.PLACES] = order, places
        record[routing.STORE] = self.address
        record[routing.GATE_UP_MASK], record[routing.DOWN_MASK] = gate_up, down

    def read_tensor(self, tensor: Tensor) -> Array:
        """The bytes of a tensor in private memory."""
        file = self._open(tensor.path)
        begin = tensor.offset // BLOCK * BLOCK
        end = tensor.offset + tensor.nbytes
        memory = anonymous(-(-(end - begin) // BLOCK) * BLOCK)
        view, at = memoryview(memory), begin
        while at < end:
            piece = view[at - begin : at - begin + PIECE]
            try:
                got = os.preadv(file, [piece], at)
            except OSError as error:
                raise _failed(tensor.path, at, len(piece), error) from None
            if got <= 0:
                raise _failed(tensor.path, at, len(piece))
            at += got
        skip = tensor.offset - begin
        return np.frombuffer(memory, np.uint8)[skip : skip + tensor.nbytes]

    # ---- what happened ----

    def fault(self) -> Error:
        """Why a read failed; reads go on after this."""
        layer, expert, number = (int(self._store[store.FAULT + i]) for i in range(3))
        self._settle()
        self._store[store.FAILED] = 0
        place = store.SLICE + store.SLICE_WORDS * number
        file, offset, stride, nbytes, _ = (
            int(word) for word in self._layers[layer, place : place + store.SLICE_WORDS]
        )
        path = self._paths[layer][number]
        begin = offset + expert * stride
        block = begin // BLOCK * BLOCK
        buffer = mmap.mmap(-1, -(-nbytes // BLOCK) * BLOCK + BLOCK)
        try:
            os.preadv(file, [buffer], block)
        except OSError as error:
            return _failed(path, begin, nbytes, error)
        return _failed(path, begin, nbytes)

    def _settle(self) -> None:
        """Let reads that nobody waits for any more end: they may fail as well."""
        until = time.monotonic() + SETTLING
        while time.monotonic() < until:
            asked = any(ring[store.TAKEN] < ring[store.PUSHED] for ring in self._rings[::2])
            words = [shelf.arrays[3] for shelf in self._shelves.values()]
            if not asked and not any(((w >> 8 ^ w) & 255).any() for w in words):
                return
            time.sleep(0.001)

    @property
    def counts(self) -> Counts:
        """What has happened since the start."""
        words = self._store
        return Counts(
            hits=int(words[store.HITS]),
            late=int(words[store.LATE]),
            misses=int(words[store.MISSES]),
            bytes_read=int(words[store.BYTES]),
            waiting=int(words[store.WAITED]) * 1e-9,
            reading=int(words[store.READING]) * 1e-9,
            guessed=int(words[store.GUESSED]),
        )


def _quota(slabs: int, layers: int, experts: int) -> int:
    """Experts that each layer keeps, so that one layer's others and those read ahead have room."""
    if slabs >= layers * experts:
        return experts
    spare = slabs - experts - experts // store.AHEAD
    return max(0, spare // (layers - 1)) if layers > 1 else 0


def _read(record: Array, reader: int) -> None:
    """A reader; holds on to the store record for as long as it lives."""
    store.read(record.ctypes.data, reader)


def _end(
    record: Array,
    threads: list[threading.Thread],
    pipe: list[int],
    files: dict[Path, int],
) -> None:
    if pipe:
        record[store.STOPPING] = 1
        os.write(pipe[1], bytes(len(threads)))
    for thread in threads:
        thread.join()
    for number in (*pipe, *files.values()):
        os.close(number)


def _failed(path: Path, offset: int, nbytes: int, error: OSError | None = None) -> Error:
    reason = f": {error.strerror}" if error else ""
    return ResourceError(f"{path}: {nbytes:,} bytes at byte {offset:,} cannot be read{reason}")
