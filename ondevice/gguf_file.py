"""A GGUF file opened for reading: metadata and read-only tensors, nothing copied.

    header (see `gguf_header`) | padding to `general.alignment`, 32 unless stated | tensor data

The file is not trusted: tensors lie inside it and apart from each other, and a file of any size
is accepted or refused in about a second. Offsets in the file count from the start of the data;
sizes there are listed fastest first, and `Tensor.shape` turns them round. A model may be split
into parts named `NAME-00001-of-00003.gguf`; opening the first opens them all.
"""

import hashlib
import itertools
import mmap
import os
import re
import stat
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from ondevice.gguf_header import Cursor, shown
from quant.errors import Error, ResourceError
from quant.format import Array, Format

DEFAULT_ALIGNMENT = 32
SAMPLED = 64
"""At most so many tensors, evenly spread, are looked into to tell files apart."""
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """One tensor of a mapped file; `shape` is (rows..., columns), `data` its (nbytes,) u8 bytes."""

    name: str
    shape: tuple[int, ...]
    format: Format
    data: Array
    path: Path
    offset: int

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def address(self) -> int:
        return int(self.data.__array_interface__["data"][0])


class GGUFFile:
    """A model file, all its parts joined; a context manager."""

    def __init__(self, parts: "list[_Part]") -> None:
        self.path = parts[0].path
        self.parts = tuple(part.path for part in parts)
        self.metadata = parts[0].metadata
        self.nbytes = sum(part.size for part in parts)
        self._maps = [part.map for part in parts]
        self._identities = [part.identity for part in parts]
        self.tensors = {tensor.name: tensor for part in parts for tensor in part.tensors()}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map `path` (the first part of a split file) and check its structure; Error if bad."""
        opened: list[_Part] = []
        try:
            for part in _open_parts(Path(path)):
                opened.append(part)
            return cls(opened)
        except BaseException:
            for part in opened:
                part.close()
            raise

    def check(self) -> None:
        """Error if a part was written to or cut since it was opened.

        One that was renamed, replaced by another or deleted is still there for us.
        """
        for identity in self._identities:
            identity.check()

    def want_large_pages(self) -> None:
        """Have what is not in memory yet come in large pages where the system has them for files.

        Linux then reads 2 MB at a time, so this is for files that will be in memory as a whole.
        """
        if hasattr(mmap, "MADV_HUGEPAGE"):
            for mapped in self._maps:
                with suppress(OSError):  # a kernel without them
                    mapped.madvise(mmap.MADV_HUGEPAGE)

    def fingerprint(self) -> str:
        """Tells this model from others wherever it lies: a hash of its headers and some weights."""
        digest = hashlib.blake2b(digest_size=16)
        for mapped, path in zip(self._maps, self.parts, strict=True):
            starts = [t.offset for t in self.tensors.values() if t.path == path]
            digest.update(mapped[: min(starts, default=len(mapped))])
        names = sorted(self.tensors)
        for name in names[:: -(-len(names) // SAMPLED)]:
            data = self.tensors[name].data
            middle = len(data) // 2
            digest.update(data[middle : middle + 4096].tobytes())
        digest.update(self.nbytes.to_bytes(8, "little"))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file; arrays still held elsewhere keep their part mapped."""
        self.tensors = {}
        for mapped in self._maps:
            try:
                mapped.close()
            except BufferError:  # a view is alive: unmapped when the last one goes
                continue
        for identity in self._identities:
            identity.close()
        self._maps, self._identities = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Identity:
    """What tells whether a file is as it was when it was opened: its size and time of change."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._number = os.dup(file.fileno())
        self.close = weakref.finalize(self, os.close, self._number)
        """Let go of the file; a second call does nothing."""
        status = os.fstat(self._number)
        self._size, self._changed = status.st_size, status.st_mtime_ns

    def check(self) -> None:
        status = os.fstat(self._number)
        if status.st_size != self._size:
            raise Error(
                f"{self._path}: the file changed while it was open: it had {self._size:,} bytes "
                f"and has {status.st_size:,}; open the model again"
            )
        if status.st_mtime_ns != self._changed:
            raise Error(
                f"{self._path}: the file was written to while it was open; open the model again"
            )


class _Part:
    """One mapped file, read up to its tensor data and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.map, self.identity = _map(path)
        self.size = len(self.map)
        try:
            cursor = Cursor(path, self.map)
            tensor_count, key_count = cursor.header()
            self.metadata = cursor.metadata(key_count)
            self.alignment = _alignment(path, self.metadata)
            self.records = cursor.records(tensor_count, self.alignment)
            self.data_start = _padded(cursor.position, self.alignment)
            self._check_layout()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.map.close()
        self.identity.close()

    def tensors(self) -> Iterator[Tensor]:
        """The part's tensors as views of the mapping."""
        raw = np.frombuffer(self.map, np.uint8)
        for record in self.records:
            begin = self.data_start + record.start
            data = raw[begin : begin + record.nbytes]
            yield Tensor(record.name, record.shape, record.format, data, self.path, begin)

    def _check_layout(self) -> None:
        """Tensors lie inside the file and do not overlap."""
        written = 0  # where a writer without gaps would put the next tensor
        gapless = True
        for record in self.records:
            gapless = gapless and record.start == written
            written = _padded(record.start + record.nbytes, self.alignment)
            end = self.data_start + record.start + record.nbytes
            if end <= self.size:
                continue
            if gapless:
                whole = self._end_of_data()
                raise Error(
                    f"{self.path}: file is {self.size:,} of {whole:,} bytes "
                    f"(tensor {record.name} ends at byte {end:,}): download incomplete?"
                )
            raise Error(
                f"{self.path}: tensor {record.name} lies outside the file: offset {record.start:,} "
                f"and {record.nbytes:,} bytes end at byte {end:,} of {self.size:,}"
            )
        ordered = sorted(self.records, key=lambda record: record.start)
        for before, after in itertools.pairwise(ordered):
            if before.start + before.nbytes > after.start:
                raise Error(
                    f"{self.path}: tensors {before.name} and {after.name} overlap at offset "
                    f"{after.start:,}; each needs its own bytes"
                )

    def _end_of_data(self) -> int:
        return self.data_start + max(record.start + record.nbytes for record in self.records)


def _map(path: Path) -> tuple[mmap.mmap, _Identity]:
    """The file as shared read-only memory, and what it is like now."""
    try:
        # looked at before opening: opening a pipe would wait for a writer
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise Error(f"{path}: {kind}; needed a GGUF file")
        if status.st_size == 0:
            raise Error(f"{path}: empty file (0 bytes)")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return mapped, _Identity(path, file)
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or emptied meanwhile
        reason = error.strerror if isinstance(error, OSError) else error
        raise ResourceError(f"{path}: cannot be read: {reason}") from None


def _open_parts(path: Path) -> Iterator[_Part]:
    """The file, then the other parts of a split model."""
    first = _Part(path)
    yield first
    number, count = (_split_number(first, key) for key in ("split.no", "split.count"))
    if count <= 1:
        return
    named = _PART_NAME.fullmatch(path.name)
    if number != 0:
        stem = named["stem"] if named else "NAME"
        raise Error(
            f"{path}: part {number + 1} of {count} of a split model; "
            f"open the first, {stem}-00001-of-{count:05d}.gguf"
        )
    if not named or int(named["number"]) != 1 or int(named["count"]) != count:
        raise Error(
            f"{path}: first of {count} parts; needed the name NAME-00001-of-{count:05d}.gguf "
            "to find the others"
        )
    seen = {record.name: path for record in first.records}
    for index in range(1, count):
        other = path.with_name(f"{named['stem']}-{index + 1:05d}-of-{count:05d}.gguf")
        if not other.exists():
            raise Error(f"{other}: part {index + 1} of {count} is missing")
        part = _Part(other)
        yield part
        for key, needed in (("split.no", index), ("split.count", count)):
            if (found := _split_number(part, key)) != needed:
                raise Error(f"{other}: {key} is {found}; needed {needed} to belong to {path.name}")
        for record in part.records:
            if record.name in seen:
                raise Error(f"{other}: tensor {record.name} is also in {seen[record.name].name}")
            seen[record.name] = other
    total = _split_number(first, "split.tensors.count")
    if total and total != len(seen):
        raise Error(f"{path}: the {count} parts hold {len(seen):,} of {total:,} tensors")


def _split_number(part: _Part, key: str) -> int:
    """A `split.*` key, 0 where absent."""
    value = part.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise Error(f"{part.path}: {key} is {shown(value)}; needed a number, 0 or more")
    return value


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
        raise Error(
            f"{path}: general.alignment is {shown(value)}; needed a power of two up to {1 << 20:,}"
        )
    return value


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
