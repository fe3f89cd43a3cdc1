"""The machine's probes: what they divide by what, and that they run on a team."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from ondevice import machine
from ondevice.kernels import probe
from ondevice.kernels.layout import ARGUMENTS, TASKS
from ondevice.machine import Machine
from ondevice.model import Model
from ondevice.program import Operations
from quant.format import Array

MIB = 1 << 20
last_cache = machine.last_cache


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_BYTES", 8 * MIB)
    monkeypatch.setattr(machine, "PASS_BYTES", 4 * MIB)
    monkeypatch.setattr(machine, "last_cache", lambda: 0)


def test_rates_are_amounts_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: passes take 3, 2, 3, 3 ... seconds, and 1 before they count."""
    ran: list[Array] = []
    lengths = itertools.chain([1.0, 1.0, 3.0, 2.0], itertools.repeat(3.0))
    ticks = iter(tick for length in lengths for tick in (0.0, length))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))

    def run(operations: Operations, step: Array) -> None:
        ran.append(operations.records)

    probes = Machine(run, 3)
    assert len(ran) == 2  # all of the memory is read before any of it is timed
    ran.clear()
    assert probes.read_bandwidth() == 4 * MIB / 2
    assert len(ran) == machine.PASSES
    assert all(records[0, TASKS] * probe.CHUNK == 4 * MIB for records in ran)
    assert len({id(records) for records in ran}) == 2  # halves of the memory by turns
    ran.clear()
    assert probes.int8_peak() == ran[0][0, TASKS] * probe.PRODUCTS / 3
    assert ran[0][0, TASKS] == 3 * machine.TASKS


def test_it_runs_on_a_models_threads(tiny: Model) -> None:
    probes = Machine(tiny.run, tiny.threads)
    assert 1e7 < probes.read_bandwidth() < 1e13
    assert 1e7 < probes.int8_peak() < 1e14


def test_the_memory_read_is_far_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_cache", lambda: 5 * MIB)
    starts = set[int]()

    def run(operations: Operations, step: Array) -> None:
        starts.add(int(operations.records[0, ARGUMENTS]))

    probes = Machine(run, 1)
    for _ in range(3):
        probes.read_bandwidth()
    assert np.diff(sorted(starts)).tolist() == 4 * [4 * MIB]


def test_the_last_cache_is_found_where_linux_says_it() -> None:
    if not Path("/sys/devices/system/cpu/cpu0/cache/index0/size").exists():
        pytest.skip("this system does not say")
    assert 8 << 10 <= last_cache() < 1 << 32
