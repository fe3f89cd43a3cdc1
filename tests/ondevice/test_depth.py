"""The choice of depth, on machines that are made up: what a cycle costs and how often it pays."""

import numpy as np
import pytest

from ondevice.depth import PLACES, Depth

BURST, PHASE = 0.08, 2.0
"""Seconds of a burst, and of a phase, about."""


class Machine:
    """Costs in plain tokens: a draft, a further row of a batch; the share of right guesses."""

    def __init__(
        self, draft: float, row: float, right: tuple[float, ...], seed: int = 0, noise: float = 0.03
    ) -> None:
        self.draft, self.row, self.right = draft, row, right
        self.random = np.random.default_rng(seed)
        self.noise = noise
        self.plain = 0.02
        self.phases: tuple[float, ...] = (1.0,)
        """How many times longer everything takes, for a while each."""
        self.phase = 1.0
        self.spoilt = 0.0
        """Share of cycles that something else makes up to three times as long."""
        self.wave = 0.0
        """By how much bursts differ, each like the one before."""
        self._swell = 0.0

    def cost(self, depth: int) -> float:
        return self.plain * (1 + depth * (self.draft + self.row))

    def rate(self, depth: int) -> float:
        """Tokens a second."""
        return (1 + sum(np.cumprod(self.right[:depth]))) / self.cost(depth)

    def burst(self, depth: int, cycles: int) -> tuple[int, float, list[int]]:
        """(tokens, seconds, figures) of so many cycles."""
        figures = [0] * (2 + 2 * PLACES)
        made, seconds = 0, 0.0
        self._swell = 0.6 * self._swell + 0.8 * self.wave * self.random.standard_normal()
        while figures[0] < cycles:
            disturbed = 1 + self.noise * abs(self.random.standard_normal())
            if self.spoilt and self.random.random() < self.spoilt:
                disturbed *= 1 + 2 * self.random.random()
            seconds += self.phase * self.cost(depth) * disturbed * np.exp(self._swell)
            made += 1
            figures[0] += 1
            figures[-1] += depth
            for place in range(depth):
                figures[1 + place] += 1
                if self.random.random() >= self.right[place]:
                    break
                figures[1 + PLACES + place] += 1
                made += 1
        return made, seconds, figures

    def run(self, depth: Depth, tokens: int) -> float:
        """Seconds for so many tokens, relative to plain decoding in the same phases."""
        made, seconds = 0, 0.0
        while made < tokens:
            chosen = depth.choose()
            if len(self.phases) > 1 and self.random.random() < BURST / PHASE:
                self.phase = float(self.random.choice(self.phases))
            more, taken, figures = self.burst(chosen, depth.cycles(4))
            depth.note(chosen, more, taken, figures)
            made, seconds = made + more, seconds + taken / self.phase
        plain = self.plain * (1 + self.noise * 0.8)
        return seconds / made / plain


USEFUL = Machine(0.2, 0.2, (0.85, 0.8, 0.7, 0.6))
POOR = Machine(0.3, 0.3, (0.2, 0.1, 0.1, 0.1))


def test_it_finds_what_pays() -> None:
    depth = Depth("auto")
    USEFUL.run(depth, 1500)
    best = max(range(PLACES + 1), key=USEFUL.rate)
    assert best > 0
    assert USEFUL.rate(depth.choose()) >= 0.97 * USEFUL.rate(best)
    relative = USEFUL.run(depth, 2000)
    assert 1 / relative >= 0.95 * USEFUL.rate(best) / USEFUL.rate(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("right", [0.0, 0.1, 0.2, 0.3])
def test_it_costs_next_to_nothing_where_it_does_not_pay(right: float, seed: int) -> None:
    machine = Machine(0.3, 0.4, (right,) * PLACES, seed)
    depth = Depth("auto")
    machine.run(depth, 200)
    assert machine.run(depth, 3000) <= 1 / 0.98


def test_the_first_answer_does_not_suffer() -> None:
    assert Machine(0.3, 0.4, (0.2,) * PLACES).run(Depth("auto"), 300) <= 1 / 0.96


def test_it_stops_when_guesses_go_wrong_and_begins_again() -> None:
    depth = Depth("auto")
    USEFUL.run(depth, 1500)
    assert depth.choose() > 0
    poor = Machine(USEFUL.draft, USEFUL.row, POOR.right, 1)
    poor.run(depth, 300)
    assert poor.run(depth, 3000) <= 1 / 0.97
    USEFUL.run(depth, 5000)
    assert depth.choose() > 0


def test_guesses_from_the_context_cost_nothing_where_there_are_none() -> None:
    """Cycles without drafts: as fast as plain ones, and no reason to stop trying."""
    depth = Depth("auto")
    random = np.random.default_rng(2)
    for _ in range(400):
        chosen, tokens = depth.choose(), depth.cycles(4)
        figures = [tokens if chosen else 0] + [0] * (1 + 2 * PLACES)
        depth.note(chosen, tokens, tokens * 0.02 * (1 + 0.01 * random.random()), figures)
    copying = Machine(0.0, 0.1, (0.95,) * PLACES)
    copying.run(depth, 600)
    assert depth.choose() > 0


def test_the_prediction_is_near_what_is_measured() -> None:
    """Within 10 % for the depths in use."""
    for machine in (USEFUL, Machine(0.1, 0.5, (0.7, 0.6, 0.5, 0.4), 3)):
        depth = Depth("auto")
        machine.run(depth, 4000)
        for d in {0, depth.choose()}:
            assert depth.rate(d) == pytest.approx(machine.rate(d), rel=0.1)


@pytest.mark.parametrize(("right", "median", "least"), [(0.85, 0.97, 0.94), (0.2, 0.985, 0.98)])
def test_a_machine_whose_speed_changes_within_seconds_does_not_mislead_it(
    right: float, median: float, least: float
) -> None:
    """Seconds of different times are not compared: memory may be twice as fast a moment later."""
    relative = []
    for seed in range(24):
        machine = Machine(0.2, 0.22, (right,) * PLACES, seed, noise=0.05)
        machine.phases = (1.0, 1.3, 1.7, 2.2)
        depth = Depth("auto")
        machine.run(depth, 300)
        relative.append(1 / machine.run(depth, 2500))
    best = max(machine.rate(d) for d in range(PLACES + 1)) / machine.rate(0)
    assert np.median(relative) >= median * best
    assert min(relative) >= least * best


def test_the_gain_is_known_on_a_machine_that_does_something_else_as_well() -> None:
    misses = []
    for seed in range(24):
        machine = Machine(0.2, 0.2, (0.85,) * PLACES, seed)
        machine.phases, machine.spoilt = (1.0, 1.6), 0.03
        depth = Depth("auto")
        machine.run(depth, 300)
        found = []
        for _ in range(9):
            machine.run(depth, 128)
            best = depth.choose()
            gain = machine.rate(best) / machine.rate(0)
            found.append(depth.rate(best) / depth.rate(0) / gain - 1)
        misses.append(np.median(found))
    assert abs(np.median(misses)) < 0.05
    assert np.mean(np.abs(misses) > 0.1) < 0.2


@pytest.mark.parametrize(("draft", "row"), [(0.1, 0.4), (0.1, 0.35), (0.1, 0.28)])
def test_the_gain_is_known_where_bursts_differ_by_a_tenth(draft: float, row: float) -> None:
    """As on a virtual machine whose neighbours come and go: one trial says little, many a lot."""
    misses = []
    for seed in range(24):
        machine = Machine(draft, row, (0.85,) * PLACES, seed, noise=0.0)
        machine.wave = 0.095
        depth = Depth("auto")
        machine.run(depth, 128)
        found = []
        for _ in range(13):
            best = depth.choose()
            expected = depth.rate(best) / depth.rate(0)
            found.append(expected * machine.run(depth, 128) - 1)
        misses.append(np.median(found))
    assert abs(np.median(misses)) < 0.04
    assert np.mean(np.abs(misses) > 0.1) < 0.1


def test_on_is_never_none() -> None:
    depth = Depth("on")
    assert depth.choose() == 1
    for _ in range(30):
        POOR.run(depth, 50)
        assert depth.choose() >= 1


def test_bursts_without_tokens_say_nothing() -> None:
    depth = Depth("auto")
    depth.note(0, 0, 0.1, [0] * 10)
    depth.note(1, 0, 0.1, [0] * 10)
    assert depth.choose() == 0 and depth.rate(0) == depth.rate(3) == 0


def test_weights_from_disk_at_first_do_not_keep_it_from_guessing() -> None:
    depth = Depth("auto")
    USEFUL.run(depth, 20)
    depth.charge(3.0)
    USEFUL.run(depth, 600)
    relative = USEFUL.run(depth, 1000)
    assert 1 / relative >= 0.9 * max(map(USEFUL.rate, range(PLACES + 1))) / USEFUL.rate(0)


def test_another_machine_is_noticed() -> None:
    """What was learned while something else ran does not stand for long."""
    depth = Depth("auto")
    busy = Machine(0.9, 0.9, USEFUL.right, 4)
    busy.plain = 0.06
    busy.run(depth, 600)
    assert depth.choose() == 0
    USEFUL.run(depth, 2500)
    best = max(range(PLACES + 1), key=USEFUL.rate)
    assert USEFUL.rate(depth.choose()) >= 0.95 * USEFUL.rate(best)
