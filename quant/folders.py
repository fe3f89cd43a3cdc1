"""Where this project keeps what it can make again: machine code, the demo model, chat history."""

import os
import stat
import sys
from pathlib import Path


def cache_root() -> Path:
    """$ONDEVICE_CACHE or `ondevice` in the platform's cache folder; RuntimeError without a home."""
    if configured := os.environ.get("ONDEVICE_CACHE"):
        return Path(configured)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "ondevice"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ondevice"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ondevice"


def private_folder(path: Path, writable: bool = True) -> bool:
    """Make `path` a folder only its owner can write; False where that cannot be had.

    It need not be `writable`: a file system may be mounted to read only.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sys.platform != "win32":
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                return False
            if status.st_mode & 0o022:
                path.chmod(0o700)
                if path.lstat().st_mode & 0o022:  # a file system without modes
                    return False
        return os.access(path, (os.W_OK if writable else os.R_OK) | os.X_OK)
    except (OSError, RuntimeError):
        return False
