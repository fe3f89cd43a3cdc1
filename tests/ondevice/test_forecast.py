"""What a forecast says of cases that can be worked out by hand."""

import pytest

from ondevice.budget import plan
from ondevice.forecast import (
    COMPUTING,
    OVERLAP,
    WRONG,
    disk_rate,
    forecast,
    what_limits,
)
from tests.ondevice.test_budget import GIGABYTE, NEEDS, PATH


class Rate:
    """Usage of which the hit rate is known."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def hit_rate(self, experts: int, uses_per_token: int) -> float:
        return self.rate


def speed(memory: int, rate: float, disk: float) -> float:
    planned = plan(NEEDS, memory, PATH)
    usage = Rate(rate)
    return forecast(planned, usage, 480, 2 * 10**9, 40e9, disk).tokens_per_second  # type: ignore[arg-type]


def test_in_memory_the_bandwidth_counts() -> None:
    assert speed(NEEDS.mapped, 0.0, 1.0) == pytest.approx(20 * COMPUTING)


def test_the_slower_of_two_counts() -> None:
    assert speed(8 * GIGABYTE, 1.0, 1e9) == pytest.approx(20 * COMPUTING)
    disk_alone = 1e9 / (480 * 0.5 * (1 + WRONG) * NEEDS.expert)
    assert speed(8 * GIGABYTE, 0.5, 1e9) == pytest.approx(disk_alone, rel=0.02)
    both = speed(8 * GIGABYTE, 0.5, 1e9 * 20 * COMPUTING / disk_alone)
    assert both == pytest.approx(20 * COMPUTING / 2 ** (1 / OVERLAP), rel=0.01)


def test_what_computing_took_before_counts_more_than_bandwidth() -> None:
    planned = plan(NEEDS, 8 * GIGABYTE, PATH)
    found = forecast(planned, Rate(1.0), 480, 2 * 10**9, 40e9, 1e9, 0.1)  # type: ignore[arg-type]
    assert found.tokens_per_second == pytest.approx(10)


def test_the_disk_by_probe_and_by_runs() -> None:
    assert disk_rate(2e9, None) == pytest.approx(2e9)
    assert disk_rate(4e9, 1e9) == pytest.approx(2e9)


def test_what_limits() -> None:
    small, whole = plan(NEEDS, 8 * GIGABYTE, PATH), plan(NEEDS, NEEDS.mapped, PATH)
    assert "whole model" in what_limits(whole, 1.0, 0.0)
    assert "93% of the experts" in what_limits(small, 0.93, 0.1)
    assert "the disk limits the speed" in what_limits(small, 0.4, 0.6)
    assert "more than 8G" in what_limits(small, 0.4, 0.6)
