"""Machine code on disk, read back only if this user's own processes wrote it.

An entry holds a pickle: reading it runs code. So the folder must belong to the user alone, and each
entry begins with a signature under a random key that lies beside it and that nobody else can read.
What was altered, cut short, renamed or put there by somebody else does not match: it is deleted and
compiled anew.

    kernels-<hash>/         one folder for each version of sources, compiler and CPU
        key                 32 random bytes, mode 0600
        <name>.code         HMAC-SHA256 of the folder's name, the entry's and the data; the data
        lock                held by the process that compiles

Folders of other versions are deleted when a new one is made: those not used for 30 days, and all
but the three last used, unless that was today.
"""

import contextlib
import hmac
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from quant.folders import cache_root, private_folder

KEY_BYTES = SIGNATURE_BYTES = 32
LARGEST_ENTRY = 64 << 20
DAY = 24 * 3600
KEEP_DAYS, KEEP_FOLDERS = 30, 3
_OPEN = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


class CodeFolder:
    """A private folder of entries: name -> bytes."""

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self._key = key
        self._told = False

    @classmethod
    def open(cls, name: str) -> "CodeFolder | None":
        """The folder of that name in the cache or among the temporary files; None: nowhere."""
        for root in _roots():
            path = root / name
            new = not path.exists()
            if private_folder(path, writable=False) and (key := _key(path)):
                if new:
                    prune(root, keep=name)
                else:
                    _mark_used(path)
                return cls(path, key)
        return None

    def read(self, name: str) -> bytes | None:
        """What was written under that name; None if nothing, or nothing that can be trusted."""
        path = self.path / f"{name}.code"
        data = _read_file(path)
        if data is None:
            return None
        if hmac.compare_digest(data[:SIGNATURE_BYTES], self._sign(name, data[SIGNATURE_BYTES:])):
            return data[SIGNATURE_BYTES:]
        self.discard(name)
        return None

    def write(self, name: str, data: bytes) -> None:
        """Keep `data`; a warning, once, if that cannot be done."""
        try:
            try:
                _write_file(self.path / f"{name}.code", self._sign(name, data) + data)
            except FileNotFoundError:  # somebody removed the folder
                if not private_folder(self.path):
                    raise
                self._key = _key(self.path, self._key) or self._key
                _write_file(self.path / f"{name}.code", self._sign(name, data) + data)
        except OSError as error:
            if not self._told:
                self._told = True
                reason = error.strerror or error
                warnings.warn(
                    f"{self.path}: compiled kernels cannot be kept: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def __contains__(self, name: str) -> bool:
        """Whether there is an entry; it may turn out to be damaged."""
        return os.path.lexists(self.path / f"{name}.code")

    def discard(self, name: str) -> None:
        """Delete an entry."""
        with contextlib.suppress(OSError):
            (self.path / f"{name}.code").unlink()

    def lock(self) -> int | None:
        """A descriptor that holds the folder's lock until it is closed; None: another process does.

        -1 where there are no locks.
        """
        try:
            import fcntl

            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except (ImportError, OSError):
            return -1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return -1
        return descriptor

    def sizes(self) -> Iterator[int]:
        """Bytes of each entry."""
        for path in self.path.glob("*.code"):
            with contextlib.suppress(OSError):
                yield path.lstat().st_size

    def _sign(self, name: str, data: bytes) -> bytes:
        signed = hmac.new(self._key, f"{self.path.name}/{name}".encode() + b"\0", "sha256")
        signed.update(data)
        return signed.digest()


def prune(root: Path, keep: str) -> None:
    """Delete folders of other versions that are not in use any more."""
    now, folders = time.time(), []
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            if re.fullmatch(r"kernels-[0-9a-f]{12}", path.name) and path.name != keep:
                folders.append((path.lstat().st_mtime, path))
    for rank, (used, path) in enumerate(sorted(folders, reverse=True)):
        if now - used > KEEP_DAYS * DAY or (rank >= KEEP_FOLDERS and now - used > DAY):
            shutil.rmtree(path, ignore_errors=True)  # does not follow a link


def _roots() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # no home folder at all
        yield cache_root()
    owner = os.getuid() if hasattr(os, "getuid") else "kernels"
    temporary = Path(tempfile.gettempdir()) / f"ondevice-{owner}"
    if private_folder(temporary):  # anybody could have made it
        yield temporary


def _mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)


def _key(folder: Path, wanted: bytes | None = None) -> bytes | None:
    """The folder's key, made now if there is none that only its owner can read; None: no way."""
    path = folder / "key"
    key = _read_file(path, secret=True)
    if key is not None and len(key) == KEY_BYTES:
        return key
    key = wanted or secrets.token_bytes(KEY_BYTES)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        _write_file(path, key, replace=False)
    except FileExistsError:  # another process was quicker
        key = _read_file(path, secret=True)
    except OSError:
        return None
    return key if key is not None and len(key) == KEY_BYTES else None


def _read_file(path: Path, secret: bool = False) -> bytes | None:
    """A regular file's bytes; None if there is none, it is too large, or no `secret` of ours."""
    try:
        with os.fdopen(os.open(path, _OPEN), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_ENTRY:
                return None
            if secret and sys.platform != "win32":
                if status.st_mode & 0o077 or status.st_uid != os.getuid():
                    return None
            return stream.read()
    except OSError:
        return None


def _write_file(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a file of mode 0600 that is never seen half written."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(temporary, _CREATE, 0o600), "wb") as stream:
            stream.write(data)
        if replace:
            temporary.replace(path)
        else:
            _name_new(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _name_new(temporary: Path, path: Path) -> None:
    """Give a file its name unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # a file system without links
        temporary.replace(path)
