"""What it costs to take guessed tokens back, against copying the memory as other runtimes do.

    python -m benchmarks.taking_back FILE --memory 12

Takes five tokens in one batch, four of them tentative, and forgets these four: the time of that,
and of the next step beside that of a step with nothing to forget. Then the time of `State.settle`,
which makes one to four of them a part of the memory, and of a copy of the memory. Medians, by
turns. A file of 48 layers (`python -m benchmarks.synthetic FILE --layers 48`) has the sizes of the
80B.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ondevice
from ondevice.kernels.ahead import MOST_DRAFTS
from ondevice.model import Model
from ondevice.state import State, journal_bytes


def measure(model: Model, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by what was done."""
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {}

    def timed(name: str, act: Callable[..., object], *arguments: object) -> None:
        started = time.perf_counter()
        act(*arguments)
        found.setdefault(name, []).append(time.perf_counter() - started)

    state = State(model.config, model.context, model.kv)
    model.look_ahead(state, random.integers(0, 1000, 5).tolist())
    state.settle()
    for _ in range(rounds + 1):
        start = state.snapshot()
        guessed = random.integers(0, 1000, 1 + MOST_DRAFTS).tolist()
        following = random.integers(0, 1000, 1).tolist()
        for name in ("warm up", "step"):  # its experts are in memory then
            model.look_ahead(state, guessed[:1])
            timed(name, model.look_ahead, state, following)
            state.restore(start)
        model.look_ahead(state, guessed)
        timed("take back 4", state.take_back, MOST_DRAFTS)
        timed("step after it", model.look_ahead, state, following)
        state.restore(start)
        for kept in range(1, 1 + MOST_DRAFTS):
            model.look_ahead(state, guessed)
            state.take_back(MOST_DRAFTS - kept)
            timed(f"settle {kept}", state.settle)
            state.restore(start)
        timed("copy", state.snapshot)
        timed("copy back", state.restore, start)
        model.look_ahead(state, guessed)
        state.settle()
    del found["warm up"]
    return {name: values[1:] for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure taking guessed tokens back.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--memory", type=float, help="GiB that the model may take")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    memory = arguments.memory and int(arguments.memory * (1 << 30))
    with ondevice.load(arguments.file, context=4096, memory=memory) as model:
        layers = sum(model.config.recurrent)
        nbytes = State(model.config, 1, model.kv).memory.nbytes
        print(
            f"{model.config.layers} layers, {layers} of them recurrent: "
            f"memory {nbytes / 1e6:.1f} MB, "
            f"journal for {MOST_DRAFTS} tokens {journal_bytes(model.config) / 1e6:.2f} MB"
        )
        for name, values in measure(model, arguments.rounds).items():
            median, least, most = statistics.median(values), min(values), max(values)
            print(f"{name:14} {1e3 * median:9.4f} ms ({1e3 * least:.4f} to {1e3 * most:.4f})")


if __name__ == "__main__":
    main()
