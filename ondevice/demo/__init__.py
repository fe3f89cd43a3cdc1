"""The bundled demo model: Qwen3-Next in miniature, a checkpoint of about 16 million parameters.

Its GGUF is made on first use and kept in the private cache folder under a name that holds a hash
of the checkpoint and of the code that converts it, so an upgrade never meets an old file. One
process converts while others wait; where the operating system has no file locks each converts its
own and the last one to finish wins. Without a cache folder that can be written, the machine's
folder for temporary files is used.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from quant.errors import ResourceError
from quant.folders import cache_root, private_folder

TYPE = "Q4_K_M"
_ROOT = Path(__file__).resolve().parents[2]


def checkpoint_path() -> Path:
    """The folder of the bundled Hugging Face checkpoint."""
    return Path(__file__).resolve().parent


def model_path(name: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The file that MODEL means: "demo" is the demo model, unless a file of that name exists."""
    path = Path(name)
    return gguf_path(progress) if str(name) == "demo" and not path.is_file() else path


def gguf_path(progress: Callable[[int, int], None] | None = None) -> Path:
    """The demo model as a Q4_K_M GGUF file, converted now if it never was.

    `progress` is called with (done, needed) while encoders are compiled for that.
    """
    folder = _folder()
    path = folder / f"demo-{TYPE}-{_source_hash()}.gguf"
    if not path.exists():
        with _locked(folder / "demo.lock"):
            if not path.exists():
                _convert(path, progress)
    return path


def _convert(path: Path, progress: Callable[[int, int], None] | None) -> None:
    from convert import convert

    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="demo-") as work:
            made = Path(work) / path.name
            convert(checkpoint_path(), made, TYPE, compiling=progress)
            made.replace(path)
    except OSError as error:
        raise ResourceError(f"{path}: cannot write the demo model: {error.strerror}") from error


def _folder() -> Path:
    candidates = []
    with contextlib.suppress(RuntimeError):  # no home folder at all
        candidates.append(cache_root() / "demo")
    owner = os.getuid() if hasattr(os, "getuid") else "demo"
    candidates.append(Path(tempfile.gettempdir()) / f"ondevice-{owner}")
    for folder in candidates:
        if private_folder(folder):
            return folder
    tried = " and ".join(map(str, candidates))
    raise ResourceError(f"no private folder for the demo model: {tried} cannot be written")


def _source_hash() -> str:
    """12 hex digits naming the bundled checkpoint and the code that converts it."""
    files = [path for path in checkpoint_path().iterdir() if path.suffix != ".py"]
    files += [*_ROOT.glob("convert/*.py"), *_ROOT.glob("quant/*.py")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the operating system frees it when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: converting twice is wasteful, not wrong
        yield
        return
    with path.open("wb") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
