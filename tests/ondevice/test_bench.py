"""The benchmark measures what it says: so many tokens, at that depth, with plausible numbers."""

import ctypes
import math
import os
from typing import Any

import numpy as np
import pytest

from ondevice import bench, machine
from ondevice.config import Config
from ondevice.inspection import describe
from ondevice.model import Model
from ondevice.state import State
from quant.errors import UsageError

KEYS = {
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "bytes_per_token",
    "read_bandwidth",
    "decode_limit_tokens_per_second",
    "decode_fraction_of_limit",
    "int8_peak",
    "prefill_macs_per_second",
    "prefill_dense_macs_per_second",
    "prefill_expert_macs_per_second",
    "prefill_fraction_of_int8_peak",
    "load_seconds",
    "compile_seconds",
    "peak_memory",
}


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_BYTES", 2 << 20)
    monkeypatch.setattr(machine, "PASS_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "last_cache", lambda: 0)


def test_it_reports_positive_numbers(tiny: Model) -> None:
    found = bench.run(tiny, prompt=20, generate=5, repeat=2)
    assert found.keys() >= KEYS
    for name in KEYS:
        assert math.isfinite(found[name]) and found[name] > 0, name
    assert found["bytes_per_token"] < tiny.path.stat().st_size
    given = {name: found[name] for name in ("prompt", "generate", "depth", "repeat", "threads")}
    assert given == {"prompt": 20, "generate": 5, "depth": 0, "repeat": 2, "threads": 1}


def test_fractions_are_of_the_limits_it_reports(tiny: Model) -> None:
    found = bench.run(tiny, prompt=20, generate=6, depth=10, repeat=1)
    config = tiny.config
    attention = config.layers - sum(config.recurrent)
    memory = config.value_heads * config.state_size**2
    window = (config.conv_kernel - 1) * config.conv_channels
    assert found["state_bytes_per_token"] == 2 * 4 * sum(config.recurrent) * (memory + window)
    per_position = 2 * attention * 2 * config.kv_heads * config.head_dim
    positions = found["cache_bytes_per_token"] / per_position
    assert 10 + 20 + 3 <= positions <= 64  # whole tiles
    moved = sum(found[f"{name}bytes_per_token"] for name in ("", "state_", "cache_"))
    limit = found["read_bandwidth"] / moved
    assert found["decode_limit_tokens_per_second"] == pytest.approx(limit)
    fraction = found["decode_tokens_per_second"] / limit
    assert found["decode_fraction_of_limit"] == pytest.approx(fraction)
    macs = found["prefill_macs_per_token"] * found["prefill_tokens_per_second"]
    assert found["prefill_macs_per_second"] == pytest.approx(macs)
    assert found["prefill_fraction_of_int8_peak"] == pytest.approx(macs / found["int8_peak"])


def test_each_round_has_a_fraction_of_its_own_limit(tiny: Model) -> None:
    class Slowing:
        """Memory that gives 1, 2, 3 ... GB/s, one after the other."""

        int8_peak, reads = staticmethod(lambda: 1e12), 0

        def read_bandwidth(self) -> float:
            self.reads += 1
            return 1e9 * self.reads

    measurement = bench.Measurement(tiny, 20, 6, machine=Slowing())  # type: ignore[arg-type]
    measurement.round()
    measurement.round()
    found = measurement.figures()
    moved = sum(found[f"{name}bytes_per_token"] for name in ("", "state_", "cache_"))
    limits = [2.5e9 / moved, 5.5e9 / moved]
    rates = [6 / seconds for seconds in measurement.decodes]
    expected = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
    assert measurement.fractions == pytest.approx(expected)


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_multiply_adds_are_those_of_the_layers_equations(
    name: str, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(name)
    config: Config = model.config
    hidden, heads, kv_heads, size = config.hidden, config.heads, config.kv_heads, config.head_dim
    delta = sum(config.recurrent)
    qkv = 2 * config.key_heads * config.state_size + config.value_dim
    dense = delta * hidden * (qkv + 2 * config.value_dim + 2 * config.value_heads)
    dense += (config.layers - delta) * hidden * size * (3 * heads + 2 * kv_heads)
    dense += config.layers * hidden * (config.experts + 3 * config.shared_width + 1)
    experts = config.layers * config.experts_used * 3 * hidden * config.expert_width
    assert bench.macs_per_token(describe(model.path)) == (dense, experts)


def test_it_runs_what_it_was_asked_for(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The depth is read once, each repetition goes back to it, and no end token cuts it short."""
    prefilled: list[tuple[int, int]] = []
    ends: list[int] = []
    prefill, decode = tiny.prefill, tiny.decode

    def watched_prefill(state: State, step: np.ndarray, tokens: np.ndarray, **rest: Any) -> bool:
        prefilled.append((state.position, len(tokens)))
        return prefill(state, step, tokens, **rest)

    def watched_decode(state: State, step: np.ndarray, threads: int, **rest: Any) -> None:
        decode(state, step, threads, **rest)
        ends.append(state.position)

    monkeypatch.setattr(tiny, "prefill", watched_prefill)
    monkeypatch.setattr(tiny, "decode", watched_decode)
    monkeypatch.setattr(tiny, "ends", np.ones_like(tiny.ends))
    monkeypatch.setattr(tiny, "batch", 512)
    found = bench.run(tiny, prompt=600, generate=7, depth=50, repeat=2)
    assert found["depth"] == 50
    # one round to warm up, then each measured once and once more for the profile
    assert prefilled == [(0, 50)] + 5 * [(50, 300), (350, 300)]
    assert ends == 3 * [50 + 600 + 7]


def test_prefill_ends_with_the_logits_of_the_last_token(tiny: Model) -> None:
    runner = bench.Runner(tiny, prompt=70, generate=3)
    runner.prefill()
    tokens = np.random.default_rng(0).integers(0, tiny.config.vocabulary, 70)
    expected = tiny.logits(tokens)[-1]
    runner.prefill(profiled=True)
    row = ctypes.c_float * tiny.config.vocabulary
    assert (np.array(row.from_address(tiny.logits_address)) == expected).all()
    runner.decode()
    assert runner.decoded[0] == 0 and len(runner.decoded) == 3
    rows = tiny.logits([*tokens, *runner.decoded])[-3:-1]
    for i, row in enumerate(rows):
        for token in runner.decoded[: i + 1]:
            row[token] *= 100 if row[token] < 0 else 0.01
    assert runner.decoded[1:] == rows.argmax(axis=1).tolist()


def test_decoding_does_not_repeat_itself(tiny: Model) -> None:
    runner = bench.Runner(tiny, prompt=1, generate=60)
    runner.prefill()
    runner.decode()
    assert len(set(runner.decoded)) == 60


def test_a_profile_on_request(tiny: Model) -> None:
    options: dict[str, Any] = {"prompt": 20, "generate": 5, "repeat": 2}
    assert "profile" not in bench.run(tiny, **options)
    found = bench.run(tiny, **options, profile=True)
    assert found["profile"]["decode"]["tokens"] == 5
    assert found["profile"]["prefill"]["tokens"] == 20
    shown = bench.report(found)
    assert "decode, per token" in shown and "prefill, per token" in shown
    limit = f"{found['decode_limit_tokens_per_second']:.4g} tokens/s"
    assert f"limit         {limit}" in shown


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
