"""How fast a model runs on this machine, beside what the machine's memory would allow.

A decode step reads every dense weight, the chosen experts, and, once read and once written, the
recurrent state, and the keys and values so far. Those bytes over the read bandwidth measured in
the same run are the limit. Speeds are medians of repeated runs.
"""

import statistics
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from ondevice.inspection import describe
from ondevice.kernels import layout, probe
from ondevice.model import BATCH
from ondevice.program import Program, zeros
from ondevice.sampling import Sampling
from ondevice.state import State, cache_bytes, memory_bytes
from quant.errors import UsageError

if TYPE_CHECKING:
    from ondevice.model import Model

PROBE_BYTES = 512 << 20


def read_bandwidth(model: "Model", repeat: int = 5) -> float:
    """Bytes per second that the model's threads read from memory, the median of several passes."""
    program = Program(1, model.threads)
    memory = zeros(PROBE_BYTES)
    memory[::4096] = 1  # have real pages behind it
    sums = np.zeros(PROBE_BYTES // probe.CHUNK, np.int64)
    program.add(probe.read_memory, memory.ctypes.data, program.keep(sums), tasks=len(sums))
    operations = program.take()
    step = np.zeros(layout.STEP_WORDS, np.int64)
    step[layout.COUNT] = 1
    seconds = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        model.run(operations, step)
        seconds.append(time.perf_counter() - started)
    return PROBE_BYTES / statistics.median(seconds[1:])


def run(
    model: "Model", prompt: int = 512, generate: int = 128, depth: int = 0, repeat: int = 3
) -> dict[str, float | int]:
    """Speeds of prefill and decode; `depth` tokens are in the context before either is timed."""
    for name, value, least in (
        ("prompt", prompt, 1),
        ("generate", generate, 1),
        ("depth", depth, 0),
        ("repeat", repeat, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{name} is {value!r}; it must be a whole number from {least}")
    model.check_room(depth + prompt + generate)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocabulary, depth + prompt).astype(np.int32)
    state = State(model.config, model.context)
    step = model.step(state)
    history = np.zeros(generate + 2, np.int32)
    no_ends = np.zeros_like(model.ends)
    record = Sampling(temperature=0.0).record(
        model.logits_address,
        model.config.vocabulary,
        no_ends,
        model.sampling_space,
    )
    step[[layout.SAMPLER, layout.HISTORY]] = record.ctypes.data, history.ctypes.data
    _prefill(model, state, step, tokens[:depth])
    start = state.snapshot()
    prefill_seconds, decode_seconds, bandwidths = [], [], []
    for _ in range(repeat):
        bandwidths.append(read_bandwidth(model, 1))
        state.restore(start)
        started = time.perf_counter()
        _prefill(model, state, step, tokens[depth:])
        prefilled = time.perf_counter()
        _decode(model, state, step, history, generate)
        decode_seconds.append((time.perf_counter() - prefilled) / generate)
        prefill_seconds.append((prefilled - started) / prompt)
    bytes_per_token = int(describe(model.path)["bytes_per_token"])
    moved = bytes_per_token + 2 * memory_bytes(model.config)
    moved += cache_bytes(model.config, depth + prompt + generate // 2)
    bandwidth = statistics.median(bandwidths)
    decode = 1 / statistics.median(decode_seconds)
    return {
        "prefill_tokens_per_second": 1 / statistics.median(prefill_seconds),
        "decode_tokens_per_second": decode,
        "bytes_per_token": bytes_per_token,
        "read_bandwidth": bandwidth,
        "decode_limit_tokens_per_second": bandwidth / moved,
        "decode_fraction_of_limit": decode * moved / bandwidth,
        "load_seconds": model.load_seconds,
        "compile_seconds": model.compile_seconds,
        "peak_memory": peak_memory(),
        "threads": model.threads,
        "prompt": prompt,
        "generate": generate,
        "depth": depth,
        "repeat": repeat,
    }


def peak_memory() -> int:
    """Most bytes of memory that this process has had at once; 0 where the platform does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _prefill(model: "Model", state: State, step: np.ndarray, tokens: np.ndarray) -> None:
    for begin in range(0, len(tokens), BATCH):
        model.prefill(state, step, np.ascontiguousarray(tokens[begin : begin + BATCH]))


def _decode(
    model: "Model", state: State, step: np.ndarray, history: np.ndarray, count: int
) -> None:
    token = np.zeros(1, np.int32)
    step[[layout.TOKENS, layout.HISTORY_LENGTH]] = token.ctypes.data, 1
    step[layout.STEPS_LEFT] = count
    model.decode(state, step, model.threads)
