"""The benchmark measures what it says: so many tokens, at that depth, with plausible numbers."""

import math
import os
from typing import Any

import numpy as np
import pytest

from ondevice import bench
from ondevice.model import Model
from ondevice.state import State
from quant.errors import UsageError

KEYS = {
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "bytes_per_token",
    "read_bandwidth",
    "decode_fraction_of_limit",
    "load_seconds",
    "compile_seconds",
    "peak_memory",
}


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PROBE_BYTES", 1 << 20)


def test_it_reports_positive_numbers(tiny: Model) -> None:
    found = bench.run(tiny, prompt=20, generate=5, repeat=2)
    assert found.keys() >= KEYS
    for name in KEYS:
        assert math.isfinite(found[name]) and found[name] > 0, name
    assert found["bytes_per_token"] < tiny.path.stat().st_size
    given = {name: found[name] for name in ("prompt", "generate", "depth", "repeat", "threads")}
    assert given == {"prompt": 20, "generate": 5, "depth": 0, "repeat": 2, "threads": 1}


def test_it_runs_what_it_was_asked_for(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The depth is read once, each repetition goes back to it, and no end token cuts it short."""
    prefilled: list[tuple[int, int]] = []
    ends: list[int] = []
    prefill, decode = tiny.prefill, tiny.decode

    def watched_prefill(state: State, step: np.ndarray, tokens: np.ndarray) -> bool:
        prefilled.append((state.position, len(tokens)))
        return prefill(state, step, tokens)

    def watched_decode(state: State, step: np.ndarray, threads: int) -> None:
        decode(state, step, threads)
        ends.append(state.position)

    monkeypatch.setattr(tiny, "prefill", watched_prefill)
    monkeypatch.setattr(tiny, "decode", watched_decode)
    monkeypatch.setattr(tiny, "ends", np.ones_like(tiny.ends))
    found = bench.run(tiny, prompt=600, generate=7, depth=50, repeat=2)
    assert found["depth"] == 50
    assert prefilled == [(0, 50)] + 2 * [(50, 512), (562, 88)]
    assert ends == 2 * [50 + 600 + 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 0}, "prompt is 0; it must be a whole number from 1"),
        ({"generate": 0}, "generate is 0; it must be a whole number from 1"),
        ({"depth": -1}, "depth is -1; it must be a whole number from 0"),
        ({"repeat": 0}, "repeat is 0; it must be a whole number from 1"),
        ({"depth": 8192}, "the context only 8192"),
        ({"generate": 8192}, "the context only 8192"),
    ],
)
def test_it_refuses(options: dict[str, Any], message: str, tiny: Model) -> None:
    with pytest.raises(UsageError, match=message):
        bench.run(tiny, **({"prompt": 4, "generate": 2, "repeat": 1} | options))


def test_peak_memory_is_in_bytes() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 20 << 20 < bench.peak_memory() < physical
