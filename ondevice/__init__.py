"""Run Qwen3-Next models on this machine's CPU.

    import ondevice

    with ondevice.load("model.gguf") as model:
        session = model.session(system="You are brief.")
        for piece in session.send("Hello"):
            print(piece, end="")

Expected failures are subclasses of `Error`, with a message of one line.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import Error

if TYPE_CHECKING:
    from ondevice.model import Model
    from ondevice.sampling import Sampling
    from ondevice.session import Session

__all__ = ["Error", "Model", "Sampling", "Session", "load"]
_LAZY = {"Model": "model", "Sampling": "sampling", "Session": "session"}


def load(
    path: str | Path,
    threads: int | None = None,
    context: int | None = None,
    memory: int | None = None,
    kv: str = "i12",
    progress: Callable[[int, int], None] | None = None,
    prompt_cache: bool = False,
    mtp: str = "auto",
) -> "Model":
    """Open a GGUF file, or the bundled model by the name "demo".

    threads: of computation, all available cores by default.
    context: tokens of prompt and answer together, the model's own up to 32,768 by default.
    memory: bytes that the model may take; less than it needs is refused.
    kv: how keys and values are kept: "i12" about as accurately as bfloat16, "i16" as half
        floats, "q8_0" as in a file of that type, in two thirds of the memory of "i12".
    progress: called with (done, needed) while kernels are compiled, once on every machine.
    prompt_cache: keep what was computed for long beginnings of prompts in the cache folder, 2 GB at
        most, and find it there; what prompts say can be told from it.
    mtp: whether to guess tokens ahead, which changes no token: "auto" where it is faster, "on"
        always, with the file's multi-token-prediction block, "off" never.
    Raises Error, with one line that names what is wrong with the file or the options.
    """
    from ondevice.model import Model

    if str(path) == "demo" and not Path("demo").is_file():
        from ondevice.demo import gguf_path

        path = gguf_path(progress)
    return Model(Path(path), threads, context, memory, kv, progress, prompt_cache, mtp)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"ondevice.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
