"""What is noted of experts' use, against a least-recently-used cache that is really run."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from ondevice import usage
from ondevice.config import Config
from ondevice.gguf_file import GGUFFile
from ondevice.kernels import store
from ondevice.kernels.simd import store_i64
from ondevice.usage import BUCKETS, Usage
from quant.format import Array
from tests.ondevice.gguf_builder import tiny_model
from tests.ondevice.kernels.harness import three_integers

LAYERS, EXPERTS, USED = 4, 64, 5


@three_integers
def bucket_of(interval: int, _: int, out: int) -> None:
    store_i64(out, store.bucket(interval))


def bucket(interval: int) -> int:
    out = np.zeros(1, np.int64)
    bucket_of(interval, 0, out.ctypes.data)
    return int(out[0])


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12)] == [0, 2, 3, 4, 4, 5, 5, 6, 6, 7]
    starts = usage.bucket_starts()
    for interval in [*range(1, 70), 1000, 12345, 1 << 20]:
        at = bucket(interval)
        assert starts[at] <= interval < starts[at + 1]


def trace(skew: float, tokens: int) -> Array:
    """(tokens, LAYERS, USED) experts; a layer's likelihoods are log-normal."""
    random = np.random.default_rng(0)
    constant = skew * random.standard_normal((LAYERS, EXPERTS))
    logits = constant + random.gumbel(size=(tokens, LAYERS, EXPERTS))
    return np.argsort(logits, axis=2)[:, :, -USED:]


def noted(experts: Array) -> Usage:
    counts = Usage(np.zeros((LAYERS, EXPERTS), np.int64), *np.zeros((2, BUCKETS), np.int64))
    last = np.zeros((LAYERS, EXPERTS), int)
    for now, token in enumerate(experts, 1):
        for layer, chosen in enumerate(token):
            for expert in chosen:
                before = last[layer, expert]
                (counts.ended if before else counts.open)[bucket(now - before)] += 1
                counts.uses[layer, expert] += 1
                last[layer, expert] = now
    return counts


def hits_of_a_cache(experts: Array, capacity: int) -> float:
    """Of the second half of the trace."""
    known: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = wanted = 0
    for now, token in enumerate(experts):
        for layer, chosen in enumerate(token):
            for expert in chosen:
                key = layer, int(expert)
                wanted += now >= len(experts) // 2
                if key in known:
                    hits += now >= len(experts) // 2
                    known.move_to_end(key)
                else:
                    known[key] = None
                    if len(known) > capacity:
                        known.popitem(last=False)
    return hits / wanted


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.09, 0.125, 0.25, 0.5, 0.9])
def test_the_estimate_is_what_a_cache_does(skew: float, share: float) -> None:
    experts = trace(skew, 1200)
    capacity = round(share * LAYERS * EXPERTS)
    estimate = noted(experts).hit_rate(capacity, LAYERS * USED)
    assert estimate == pytest.approx(hits_of_a_cache(experts, capacity), abs=0.05)


def test_a_short_trace_is_not_trusted() -> None:
    counts = noted(trace(0.0, 10))
    assert counts.hit_rate(LAYERS * EXPERTS // 8, LAYERS * USED) == pytest.approx(0.67)
    assert counts.hit_rate(LAYERS * EXPERTS, LAYERS * USED) == 1


@pytest.fixture
def config(tmp_path: Path) -> Config:
    with GGUFFile.open(tiny_model(tmp_path / "m.gguf")) as file:
        return Config.from_gguf(file)


def some(config: Config, value: int) -> Usage:
    counts = Usage.none(config)
    for array in (counts.uses, counts.ended, counts.open, counts.disk):
        array[...] = value
    return counts


def test_counts_are_kept_and_fade(config: Config) -> None:
    usage.save("fades", some(config, 10), some(config, 4))
    again = usage.load("fades", config)
    assert (again.uses == 9).all()
    assert (again.ended == 9).all()


def test_the_disk_is_as_it_was_in_the_last_run_that_read_enough(config: Config) -> None:
    before, during = some(config, 10), some(config, 4)
    before.disk[:] = 20 * usage.ENOUGH_BYTES, 10**9
    during.disk[:] = usage.ENOUGH_BYTES - 1, 10**9
    usage.save("disk", before, during)
    assert usage.load("disk", config).disk[0] == 11 * usage.ENOUGH_BYTES - 1
    during.disk[0] += 1
    usage.save("disk", before, during)
    assert usage.load("disk", config).disk.tolist() == [usage.ENOUGH_BYTES, 10**9]


def test_the_speed_of_the_disk() -> None:
    counts = Usage(*(np.zeros(n, np.int64) for n in ((9, 9), BUCKETS, BUCKETS)))
    counts.disk[:] = usage.ENOUGH_BYTES - 1, 10**9
    assert counts.bytes_per_reading_second is None
    counts.disk[:] = 4 * usage.ENOUGH_BYTES, 2 * 10**9
    assert counts.bytes_per_reading_second == 2 * usage.ENOUGH_BYTES


def test_the_time_of_computing() -> None:
    counts = Usage(*(np.zeros(n, np.int64) for n in ((9, 9), BUCKETS, BUCKETS)))
    counts.note_computing(2, usage.ENOUGH_TOKENS // 2, 1.0)
    assert counts.computing_seconds(2) is None
    counts.note_computing(2, usage.ENOUGH_TOKENS // 2, 3.0)
    assert counts.computing_seconds(2) == pytest.approx(4 / usage.ENOUGH_TOKENS)
    assert counts.computing_seconds(1) is None


def test_a_damaged_profile_is_none(config: Config) -> None:
    usage.save("bad", Usage.none(config), some(config, 4))
    path = usage.profile_path("bad")
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(random.integers(len(whole)))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged if random.random() < 0.5 else whole[: random.integers(len(whole))])
        counts = usage.load("bad", config)
        assert counts.uses.shape == (config.layers + config.mtp_layers, config.experts)
        assert set(np.unique(counts.uses)) <= {0, 4}
    path.write_bytes(b"")
    assert not usage.load("bad", config).uses.any()


def test_a_profile_of_another_model_is_none(config: Config) -> None:
    larger = Usage(*(np.ones(n, np.int64) for n in ((9, 9), BUCKETS, BUCKETS)))
    usage.save("other", larger, larger)
    assert not usage.load("other", config).uses.any()


def test_nothing_is_kept_where_nothing_can_be(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(usage, "cache_root", lambda: blocked)
    usage.save("x", Usage.none(config), some(config, 4))
    assert not usage.load("x", config).uses.any()
    assert blocked.read_text() == ""


def test_models_are_told_apart(tmp_path: Path) -> None:
    names = set()
    for seed in (0, 0, 1):
        with GGUFFile.open(tiny_model(tmp_path / "m.gguf", seed=seed)) as file:
            names.add(usage.identity(file, Config.from_gguf(file)))
    assert len(names) == 2
