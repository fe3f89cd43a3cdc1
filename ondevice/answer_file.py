"""The tokens of a running answer, in a file that the decode loop itself writes.

    magic (8 bytes) | tag (8 bytes) | n u64 | zeros up to HEAD | n tokens int32

The tokens are the prompt, the answer so far, and UNKNOWN from there on; numbers are little-endian.
The loop runs natively for several tokens at a time, and appends each to its history as it is
chosen. That history is this file, mapped into memory: what was stored before a process is killed
is the system's to keep. The journal has the tokens for good; this file is for what it lacks.

The tag is that of the journal's turn, and is written when the rest is on the disk. So neither a
kill nor a power failure makes tokens of one answer those of another.
"""

import errno
import mmap
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np

from ondevice.records import LARGEST, opened
from quant.errors import Error
from quant.format import Array

MAGIC = b"ONDEVANS"
TAG_BYTES = 8
HEAD = 64
UNKNOWN = -1
FREE = 16 << 20
"""Bytes of free disk below which nothing is mapped: some file systems allocate when memory that is
mapped is written, and end a process that they have no room for."""
_HEAD = struct.Struct("<8s8sQ")


class AnswerFile:
    """The file of one session, for one answer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, tag: bytes, prompt: Sequence[int], room: int) -> Array:
        """The history of a new answer: (room,) int32 that begins with the prompt.

        OSError if the file cannot be written or mapped.
        """
        tokens = np.full(room, UNKNOWN, "<i4")
        tokens[: len(prompt)] = prompt
        self.path.touch(mode=0o600)
        with self.path.open("r+b", buffering=0) as file:
            _write(file, bytes(HEAD) + tokens.tobytes())
            if file.seek(0, os.SEEK_END) != HEAD + tokens.nbytes:
                file.truncate(HEAD + tokens.nbytes)
            os.fsync(file.fileno())
            if shutil.disk_usage(self.path.parent).free < FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.seek(0)
            _write(file, _head(tag, room))
            mapped = mmap.mmap(file.fileno(), HEAD + tokens.nbytes)
        return np.frombuffer(mapped, np.int32, offset=HEAD)

    def end(self) -> None:
        """The answer is over, and all of it recorded: the file is about none."""
        with suppress(OSError), self.path.open("r+b", buffering=0) as file:
            file.write(bytes(HEAD))

    def remove(self) -> None:
        """Where a file that is still mapped cannot be removed it stays, and is about no answer."""
        self.end()
        with suppress(OSError):
            self.path.unlink()


def tokens_beyond(path: Path, tag: bytes, known: list[int], vocabulary: int) -> list[int]:
    """What was chosen after the tokens `known`, a prompt and the first of its answer.

    Nothing if there is no such file, or it is damaged, or about another answer.
    """
    tokens = _tokens(path, tag)
    if tokens[: len(known)].tolist() != known:
        return []
    rest = tokens[len(known) :]
    unknown = np.flatnonzero(rest == UNKNOWN)
    if not len(unknown):  # there is always room for one more
        return []
    chosen = rest[: unknown[0]]
    return chosen.tolist() if np.all((chosen >= 0) & (chosen < vocabulary)) else []


def _tokens(path: Path, tag: bytes) -> Array:
    """All tokens of a file with this tag; none of another."""
    none = np.empty(0, "<i4")
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not HEAD <= size <= LARGEST:
                return none
            if file.read(HEAD) != _head(tag, (size - HEAD) // 4):
                return none
            data = file.read(size - HEAD)
    except Error:
        return none
    return np.frombuffer(data, "<i4") if len(data) % 4 == 0 else none


def _head(tag: bytes, room: int) -> bytes:
    return _HEAD.pack(MAGIC, tag, room).ljust(HEAD, b"\0")


def _write(file: FileIO, data: bytes) -> None:
    """Write all of it; OSError if there is no room."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
