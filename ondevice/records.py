"""Files of checksummed records: what sessions, journals and caches are written in.

    file     magic (8 bytes) | version u32 | record "head" | records
    record   kind (4 bytes) | crc32 u32 | length u64 | payload

The checksum is of kind, length and payload; the head's payload is a JSON object. Numbers are
little-endian. Nothing in a file is run, and a length is held against the bytes that exist before
memory is taken for it.
"""

import errno
import json
import os
import secrets
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quant.errors import Error, ResourceError
from quant.format import Array

MAGIC = b"ONDEVSES"
VERSION = 5
"""Changes with the format, and with what a state's bytes mean."""
LARGEST = 1 << 28
"""Bytes of a record that is read as a whole."""
_START = struct.Struct("<8sI")
_RECORD = struct.Struct("<4sIQ")
Bytes = bytes | memoryview


class Damaged(Error):
    """A file that is not whole, or not what it should be; its message names the file."""


def record_bytes(payload: int) -> int:
    """Bytes that a record with so many takes."""
    return _RECORD.size + payload


def _crc(kind: bytes, length: int, payload: Bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(kind + struct.pack("<Q", length)))


class Writer:
    """Appends records to a file that is open for writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def begin(self, head: dict[str, Any]) -> None:
        self._file.write(_START.pack(MAGIC, VERSION))
        self.json(b"head", head)

    def record(self, kind: bytes, payload: Bytes | Array) -> None:
        data = payload.data if isinstance(payload, np.ndarray) else memoryview(payload)
        crc = _crc(kind, data.nbytes, data)
        self._file.write(_RECORD.pack(kind, crc, data.nbytes))
        self._file.write(data)

    def json(self, kind: bytes, value: Any) -> None:
        self.record(kind, json.dumps(value).encode())


class Reader:
    """Reads records in order; every failure is `Damaged`, with the file's name and the byte."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.good = 0
        """Bytes up to the end of the last record that was read."""

    def begin(self, kind: str) -> dict[str, Any]:
        """The head; Damaged unless this is a file of that kind and of our version."""
        start = self._file.read(_START.size)
        if start[:8] != MAGIC[: len(start)] or not start:
            shown = start[:8].hex(" ") or "nothing"
            raise Damaged(f"{self.path}: this is no {kind} file: it begins with {shown}")
        if len(start) < _START.size:
            raise Damaged(f"{self.path}: the file is cut short after {self._size} bytes")
        version = _START.unpack(start)[1]
        if version != VERSION:
            raise Damaged(
                f"{self.path}: the file has version {version} of the format; "
                f"this program reads version {VERSION}"
            )
        self.good = _START.size
        head = self.json(b"head")
        if not isinstance(head, dict) or head.get("kind") != kind:
            found = head.get("kind") if isinstance(head, dict) else None
            raise Damaged(f"{self.path}: this is no {kind} file but holds {found!r}")
        return head

    def next(self) -> tuple[bytes, int] | None:
        """Kind and length of the next record, whose payload is to be read then; None at the end."""
        self._at = self.good
        left = self._size - self._at
        raw = self._file.read(_RECORD.size)
        if not raw:
            return None
        if len(raw) < _RECORD.size:
            raise Damaged(f"{self.path}: the file is cut short: a record at byte {self._at} ends")
        kind, self._expected, length = _RECORD.unpack(raw)
        if length > left - _RECORD.size:
            raise Damaged(
                f"{self.path}: the file is cut short or damaged: the record at byte {self._at} "
                f"is to have {length:,} bytes and {left - _RECORD.size:,} are left"
            )
        self._kind, self._length = kind, length
        return kind, length

    def payload(self) -> bytes:
        if self._length > LARGEST:
            raise Damaged(
                f"{self.path}: the file is damaged: the record at byte {self._at} has "
                f"{self._length:,} bytes; at most {LARGEST:,} make sense"
            )
        data = self._file.read(self._length)
        self._checked(data)
        return data

    def payload_into(self, target: Array) -> None:
        """Read the record into (n,) u8; Damaged if it has another length."""
        if self._length != target.nbytes:
            raise Damaged(
                f"{self.path}: the record at byte {self._at} has {self._length:,} bytes; "
                f"{target.nbytes:,} are needed"
            )
        got = self._file.readinto(target.data)  # type: ignore[attr-defined]
        self._checked(target.data[:got])

    def expect(self, kind: bytes) -> int:
        """Length of the next record, which must be of that kind."""
        found = self.next()
        if found is None:
            raise Damaged(
                f"{self.path}: the file is cut short: it ends at byte {self._at}, "
                f"before {kind.decode()!r}"
            )
        if found[0] != kind:
            raise Damaged(
                f"{self.path}: the file is damaged: the record at byte {self._at} is "
                f"{found[0]!r} and not {kind!r}"
            )
        return found[1]

    def json(self, kind: bytes) -> Any:
        self.expect(kind)
        try:
            return json.loads(self.payload())
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{self.path}: the record at byte {self._at} is no JSON") from error

    def end(self) -> None:
        """Damaged unless the file ends here."""
        if self.good != self._size:
            raise Damaged(
                f"{self.path}: {self._size - self.good:,} bytes follow the end of the file"
            )

    def _checked(self, data: Bytes) -> None:
        if _crc(self._kind, self._length, data) != self._expected:
            raise Damaged(
                f"{self.path}: the file is damaged: the checksum of the record at byte {self._at} "
                "does not match"
            )
        self.good = self._at + _RECORD.size + self._length


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, unbuffered; OSError becomes an Error of one line."""
    try:
        with path.open("rb", buffering=0) as raw:
            yield _Whole(raw)  # type: ignore[misc]
    except FileNotFoundError:
        raise Error(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise Error(f"{path}: this is a folder, not a file") from None
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Whole:
    """An unbuffered file whose reads return all they can."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.fileno = raw.fileno
        self.seek = raw.seek

    def read(self, count: int) -> bytes:
        target = bytearray(count)
        got = self.readinto(memoryview(target))
        return bytes(target[:got]) if got < count else bytes(target)

    def readinto(self, target: memoryview) -> int:
        got = 0
        while got < len(target):
            step = self._raw.readinto(target[got : got + (1 << 28)])
            if not step:
                break
            got += step
        return got


@contextmanager
def whole_file(path: Path, needed: int, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends without an exception.

    needed: bytes that it will have. durable: wait until it is on the disk. ResourceError if it
    cannot be written; whatever was at `path` is then still there.
    """
    partial = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.partial")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise ResourceError(f"{path}: the disk is full: {needed:,} bytes needed, {free:,} free")
        if path.is_dir():
            raise ResourceError(f"{path}: this is a folder; a file name is needed")
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)
        try:
            with os.fdopen(number, "wb", buffering=1 << 16) as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        if durable:
            flush_folder(path.parent)
    except OSError as error:
        raise failure(path, needed, error) from None


_BINARY = getattr(os, "O_BINARY", 0)


def flush_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk, where the system can do that."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def failure(path: Path, needed: int, error: OSError) -> ResourceError:
    """What went wrong in writing, in one line."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return ResourceError(f"{path}: the disk is full; {needed:,} bytes are needed")
    if error.errno == errno.ENOENT:
        return ResourceError(f"{path}: there is no folder {path.parent}")
    return ResourceError(f"{path}: cannot be written: {error.strerror or error}")
