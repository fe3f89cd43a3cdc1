"""llama.cpp as a program under test (worker.py), through llama-cpp-python's C functions.

    python -m benchmarks.llama_cpp_worker FILE THREADS CONTEXT REPACK

Needs `llama_cpp` and nothing of ours, so that any interpreter which has a build of it will do. The
file is mapped; batches are of 512 tokens; flash attention and the cache's type are as llama.cpp
chooses. REPACK 1 lets it copy weights into layouts of its own, as it does by default. A request
gives the token ids of the `prompt` and those `decoded` after it: the same that the other program
took in, so that both use the same experts, and nothing is sampled in the time measured.
"""

import ctypes
import sys
import time
from typing import Any

import llama_cpp as lib

from benchmarks.worker import serve

BATCH = 512


def main() -> None:
    path, threads, context, repack = sys.argv[1], *map(int, sys.argv[2:5])
    started = time.perf_counter()
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.use_extra_bufts = bool(repack)
    if hasattr(lib, "LLAMA_LOAD_MODE_MMAP"):
        options.load_mode = lib.LLAMA_LOAD_MODE_MMAP
    else:
        options.use_mmap = True
    model = lib.llama_model_load_from_file(path.encode(), options)
    if not model:
        sys.exit(f"llama.cpp cannot open {path}")
    settings = lib.llama_context_default_params()
    settings.n_ctx = context
    settings.n_batch = settings.n_ubatch = BATCH
    settings.n_threads = settings.n_threads_batch = threads
    session = lib.llama_init_from_model(model, settings)
    if not session:
        sys.exit("llama.cpp cannot make a context")
    loaded = time.perf_counter() - started

    def take(tokens: list[int], at_once: int) -> float:
        """Seconds until the logits after the last token are there."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        pieces = [
            (ctypes.byref(ids, 4 * begin), min(at_once, len(tokens) - begin))
            for begin in range(0, len(tokens), at_once)
        ]
        batches = [
            lib.llama_batch_get_one(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32)), count)
            for address, count in pieces
        ]
        started = time.perf_counter()
        for batch in batches:
            status = lib.llama_decode(session, batch)
            if status:
                sys.exit(f"llama_decode failed with {status}")
        lib.llama_synchronize(session)
        return time.perf_counter() - started

    def answer(prompt: list[int], decoded: list[int]) -> dict[str, Any]:
        lib.llama_memory_clear(lib.llama_get_memory(session), True)
        return {"prefill_seconds": [take(prompt, BATCH)], "decode_seconds": [take(decoded, 1)]}

    features = lib.llama_print_system_info().decode().removeprefix("CPU : ")
    enabled = [part.split(" = ")[0].strip() for part in features.split("|") if "= 1" in part]
    version = getattr(lib, "llama_version", lambda: b"")().decode()
    serve(
        {
            "version": f"{version} (llama-cpp-python {lib.__version__}), {' '.join(enabled)}",
            "load_seconds": loaded,
        },
        answer,
    )


if __name__ == "__main__":
    main()
