"""This runtime as a program under test (worker.py).

    python -m benchmarks.ondevice_worker FILE THREADS CONTEXT

Requests: `case` [prompt, generate] warms up when it comes for the first time, and then measures a
round of `ondevice.bench`; with `profile` that round is run once more to see where the time goes,
with `figures` nothing is run and the medians of all its rounds so far come back.
"""

import platform
import sys
from pathlib import Path
from typing import Any

import numba

import ondevice
from benchmarks.worker import serve
from cli import VERSION
from ondevice.bench import Measurement
from ondevice.kernels import simd

INSTRUCTIONS = (
    ("avx512vnni", "AVX-512 VNNI"),
    ("avxvnni", "AVX-VNNI"),
    ("avx512bw", "AVX-512"),
    ("avx2", "AVX2"),
    ("i8mm", "NEON i8mm"),
    ("dotprod", "NEON dot product"),
)


def main() -> None:
    path, threads, context = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = ondevice.load(path, threads=threads, context=context, mtp="off")
    measurements: dict[tuple[int, int], Measurement] = {}

    def answer(
        case: tuple[int, int], profile: bool = False, figures: bool = False
    ) -> dict[str, Any]:
        prompt, generate = case
        found = measurements.get((prompt, generate))
        if figures:
            assert found
            return found.figures() | found.summaries() | {"fractions": found.fractions}
        if not found:
            machine = next((known.machine for known in measurements.values()), None)
            found = Measurement(model, prompt, generate, machine=machine)
            measurements[prompt, generate] = found
        else:
            found.round()
            if profile:
                found.profile()
        return {
            "prefill_seconds": found.prefills[-1:],
            "decode_seconds": found.decodes[-1:],
            "prompt": found.runner.prompt,
            "decoded": found.runner.decoded,
        }

    instructions = next((name for key, name in INSTRUCTIONS if key in simd.FEATURES), "plain code")
    version = f"{VERSION}, Numba {numba.__version__}, Python {platform.python_version()}"
    seconds = {"load_seconds": model.load_seconds, "compile_seconds": model.compile_seconds}
    serve({"version": f"{version}, {instructions}"} | seconds, answer)


if __name__ == "__main__":
    main()
