"""What a profile makes of the threads' times, by hand and on a model."""

import time

import numpy as np
import pytest

from ondevice.kernels.layout import (
    BARRIER,
    BESIDE,
    CHAIN,
    OPERATION_WORDS,
    PER_TOKEN,
    TASKS,
    THEN,
    TIMES,
)
from ondevice.model import Model
from ondevice.profile import Profile, table
from ondevice.program import Operations

MS = 1_000_000


def operations(*described: tuple[str, int, int, int, int]) -> Operations:
    """Of (label, tasks, per token, times, then)."""
    records = np.zeros((len(described), OPERATION_WORDS), np.int64)
    records[:, [TASKS, PER_TOKEN, TIMES, THEN]] = [entry[1:] for entry in described]
    return Operations(records, tuple(entry[0] for entry in described))


STEP = operations(
    ("norm", 1, 1, 0, CHAIN),
    ("pack", 1, 1, 0, BARRIER),
    ("linear: q", 1, 0, 0, BESIDE),
    ("linear: k", 1, 0, 0, BARRIER),
    ("expert down", 1, 0, 123, BARRIER),
    ("norm", 1, 1, 0, CHAIN),
    ("pack", 1, 1, 0, BARRIER),
)
"""A serial chain, two operations side by side, one with a task per expert, the chain again."""


def test_times_are_added_up_by_kind() -> None:
    profile = Profile(STEP, threads=2, count=1, tokens=10)
    with profile.run() as times:
        times[0, :, 0] = np.array([40, 0, 200, 0, 100, 20, 0]) * MS
        times[1, :, 0] = np.array([0, 0, 0, 180, 140, 0, 0]) * MS
        times[0, :, 1] = np.array([0, 0, 0, 0, 2, 0, 0]) * MS
        times[1, :, 1] = np.array([0, 0, 0, 40, 20, 8, 0]) * MS
    found = {kind.name: kind for kind in profile.kinds()}
    assert list(found) == ["expert down", "linear: k", "linear: q", "norm + pack"]
    chain = found["norm + pack"]
    assert (chain.operations, chain.serial) == (2, True)
    assert (chain.work, chain.wait) == (pytest.approx(0.03), pytest.approx(0.004))
    assert not any(kind.serial for name, kind in found.items() if name != "norm + pack")
    assert profile.seconds("linear") == pytest.approx(0.19)
    assert profile.seconds("linear", "expert") == pytest.approx(0.31)

    summary = profile.summary()
    step = (680 + 70) / 2
    assert summary["seconds_per_token"] == pytest.approx(step / 1e3 / 10)
    # 60 ms in the serial chains; of 70 ms that threads waited, 60 are the other thread's
    assert summary["serial_fraction"] == pytest.approx(60 / step)
    assert summary["barrier_fraction"] == pytest.approx((70 - 60) / 2 / step)
    entries = summary["operations"]
    assert isinstance(entries, list)
    assert sum(entry["fraction"] for entry in entries) == pytest.approx(1)
    assert sum(entry["seconds"] for entry in entries) == pytest.approx(0.34 / 10)

    lines = table(summary, "decode, per token").splitlines()
    assert lines[-3].split() == ["norm", "+", "pack", "2", "3000.0", "400.0", "9.1%", "serial"]
    assert lines[-1] == "barriers 1.3% and serial operations 16.0% of the time"


def test_one_task_is_serial_only_for_one_token_and_several_threads() -> None:
    batch = Profile(STEP, threads=2, count=5, tokens=5)
    with batch.run():
        pass
    assert not any(kind.serial for kind in batch.kinds())
    alone = Profile(STEP, threads=1, count=1, tokens=1)
    with alone.run() as times:
        times[0, :, 0] = MS
    assert alone.summary()["serial_fraction"] == 0


def test_the_median_run_is_told_of() -> None:
    profile = Profile(STEP, threads=2, count=1, tokens=1)
    for spent in (30, 10, 90, 20):
        with profile.run() as times:
            times[:, 2, 0] = spent * MS
    assert profile.seconds() == pytest.approx(0.02)
    with profile.run() as times:
        times[:, 2, 1] = 100 * MS
    assert profile.seconds() == pytest.approx(0.03)


def test_a_models_profile_is_the_time_that_passes(demo: Model) -> None:
    from ondevice.bench import Runner

    runner = Runner(demo, prompt=200, generate=60)
    runner.prefill()
    runner.decode()
    for read, profile, tokens in (
        (runner.prefill, runner.prefill_profile, 200),
        (runner.decode, runner.decode_profile, 60),
    ):
        started = time.perf_counter()
        read(profiled=True)
        passed = time.perf_counter() - started
        summary = profile.summary()
        assert summary["tokens"] == tokens
        spent = float(str(summary["seconds_per_token"])) * tokens
        assert 0.4 * passed < spent <= passed
        names = {kind.name for kind in profile.kinds()}
        assert {"expert down", "delta_rule", "linear: qkv"} <= names
        assert any(name.startswith("attend") for name in names)
        products = profile.seconds("linear", "shared", "expert")
        assert 0.3 * spent < products < spent
    assert ("linear: logits + note_peaks" in names) and ("sample" in names)
