"""A file that one process holds at a time; the lock goes with the process, however that ends."""

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import errno
    import fcntl

    _WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FileLock:
    """Held from when it is made until `release`; OSError if the file cannot be made."""

    def __init__(self, path: Path, wait: bool = False) -> None:
        """BlockingIOError if somebody else holds it, unless told to wait."""
        self._number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(self._number, wait)
        except BaseException:
            os.close(self._number)
            raise

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _lock(number: int, wait: bool) -> None:
    if sys.platform == "win32":
        while True:
            try:
                msvcrt.locking(number, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if not wait:
                    raise BlockingIOError(*error.args) from None
            else:
                return
    else:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:  # a file system without locks
            if error.errno not in _WITHOUT_LOCKS:
                raise
