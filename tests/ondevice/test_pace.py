"""The choice of threads, against a made-up machine."""

import pytest

from ondevice.pace import Pace


def speed(
    pace: Pace, seconds: dict[int, float], bursts: int = 200, depth: int = 0
) -> dict[int, float]:
    """Share of the time that each number of threads gets, on a machine of these seconds a turn."""
    spent = dict.fromkeys(seconds, 0.0)
    for _ in range(bursts):
        threads = pace.choose(depth)
        turns = max(1, int(0.08 / seconds[threads])) // (2 if pace.trying(depth) else 1) or 1
        spent[threads] += turns * seconds[threads]
        pace.note(turns, turns * seconds[threads], depth)
    total = sum(spent.values())
    return {threads: value / total for threads, value in spent.items()}


def test_all_threads_where_they_help() -> None:
    shares = speed(Pace(8), {8: 0.01, 4: 0.019, 2: 0.037, 1: 0.073}, bursts=1000)
    assert shares[8] > 0.985


def test_fewer_threads_when_a_core_is_wanted_elsewhere_and_all_again() -> None:
    pace = Pace(2)
    assert speed(pace, {2: 0.001, 1: 0.0019})[2] > 0.9
    disturbed = speed(pace, {2: 0.006, 1: 0.002}, bursts=12)
    assert disturbed[1] > 0.8, "a second has to be enough"
    assert speed(pace, {2: 0.001, 1: 0.0019})[2] > 0.85


def test_a_slow_model_is_not_made_slower_by_trials() -> None:
    """A token on half the threads takes two seconds: such a trial is rare."""
    shares = speed(Pace(8), {8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0})
    assert shares[8] > 0.9


@pytest.mark.parametrize("depth", [0, 1])
def test_a_trial_is_not_left_to_bursts_of_another_depth(depth: int) -> None:
    """They may be all there is for long, and would all run on fewer threads."""
    pace, other = Pace(2), 1 - depth
    while not pace.trying(depth):
        pace.note(4, 0.08, depth)
    assert pace.choose(depth) == 1
    assert (pace.trying(other), pace.choose(other)) == (False, 2)
    pace.note(3, 0.09, other)
    assert (pace.trying(depth), pace.choose(depth)) == (False, 2)


def test_turns_of_another_depth_may_take_longer() -> None:
    pace = Pace(2)
    for _ in range(10):
        pace.note(1, 0.02)
        pace.note(1, 0.02)
        assert not pace.trying()
        pace.note(1, 0.03, 1)
        assert not pace.trying(1)
        pace._wait = 1.0


def test_guessing_too_gives_up_a_core_that_is_wanted_elsewhere() -> None:
    pace = Pace(2)
    assert speed(pace, {2: 0.02, 1: 0.038}, depth=1)[2] > 0.9
    assert speed(pace, {2: 0.1, 1: 0.04}, bursts=16, depth=1)[1] > 0.7


@pytest.mark.parametrize("threads", [1, 3, 6, 64])
def test_choices_are_the_threads_and_halves_of_them(threads: int) -> None:
    pace = Pace(threads)
    assert pace.choose() == threads
    seen = set()
    for _ in range(1000):
        seen.add(pace.choose())
        pace.note(10, 0.1)
    assert seen <= {threads >> i for i in range(7)}


def test_short_bursts_say_nothing() -> None:
    pace = Pace(2)
    for seconds in (0.001, 0.007, 0.0001):
        pace.note(1, seconds)
        assert not pace.trying()


def test_a_fixed_number_stays() -> None:
    pace = Pace(8, fixed=True)
    for seconds in (1.0, 5.0, 0.1, 9.0):
        pace.note(1, seconds)
        assert not pace.trying()
        assert pace.choose() == 8
