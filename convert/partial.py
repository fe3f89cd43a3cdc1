"""A file that appears under its name only when it is complete.

Bytes go to `<name>.partial` in the same folder, locked against a second conversion; on success
they are flushed to the disk and renamed over the final name in one step, on any failure the partial
file is removed. The final name never holds a half-written file.
"""

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from quant.errors import ResourceError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

try:
    import fcntl
except ImportError:
    LOCKS = False
else:
    LOCKS = True
"""Whether files can be locked, and renamed while they are open: everywhere but on Windows."""


BLOCK = 2 << 20
"""Bytes that are written at a time, from a multiple of as many on: Linux keeps a file that was
written so in pages of that size, and its weights are read faster than from small ones."""


class Blocks(io.BufferedWriter):
    """A file that is written in whole blocks, however it gets its bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "ab"), BLOCK)
        self._written = 0

    def write(self, data: "ReadableBuffer") -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            room = BLOCK - self._written % BLOCK
            count = super().write(view[done : done + room])
            self._written += count
            done += count
        return done


def _failure(path: Path, needed: int, error: OSError) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: the disk is full; the file needs {needed} bytes")
    if error.errno == errno.EFBIG:
        return ResourceError(f"{path}: this file system cannot hold a file of {needed} bytes")
    return ResourceError(f"{path}: cannot be written ({needed} bytes): {error.strerror}")


def check_space(path: Path, needed: int) -> None:
    """ResourceError unless the folder of `path` exists and has `needed` bytes free."""
    folder = path.parent
    try:
        free = shutil.disk_usage(folder).free
        with suppress(FileNotFoundError):
            free += partial_path(path).stat().st_size  # left by a killed run, overwritten now
    except OSError as error:
        raise ResourceError(f"{folder}: {error.strerror}") from None
    if free < needed:
        raise ResourceError(f"{folder}: {needed} bytes needed, {free} free")


def partial_path(path: Path) -> Path:
    """Where the bytes of `path` are collected."""
    return path.with_name(path.name + ".partial")


@contextmanager
def partial_file(path: Path, needed: int) -> Iterator[IO[bytes]]:
    """An empty file to write to; it becomes `path` when the block ends without an exception."""
    partial = partial_path(path)
    try:
        with _open_alone(partial, path) as file:
            try:
                file.truncate(0)
                file.seek(0)  # from behind what a killed run left
                yield file
                file.flush()
                os.fsync(file.fileno())
                if LOCKS:
                    _replace(partial, path)
            except BaseException:
                if not LOCKS:
                    file.close()
                partial.unlink(missing_ok=True)
                raise
        if not LOCKS:
            _replace(partial, path)
    except OSError as error:
        raise _failure(path, needed, error) from None


def _open_alone(partial: Path, path: Path) -> Blocks:
    """Open `partial` and lock it; ResourceError when another conversion holds the lock."""
    while True:
        file = Blocks(partial)
        if not LOCKS:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ResourceError(f"{path}: another conversion is writing this file") from None
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                file.close()
                raise
        # Between opening and locking, the other conversion may have finished and renamed the file.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                return file
        file.close()


def _replace(partial: Path, path: Path) -> None:
    partial.replace(path)
    if LOCKS:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # not every file system can flush a folder
                os.fsync(folder)
        finally:
            os.close(folder)
