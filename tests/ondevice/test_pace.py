"""The choice of threads, against a made-up machine."""

import pytest

from ondevice.pace import Pace


def speed(pace: Pace, seconds: dict[int, float], bursts: int = 200) -> dict[int, float]:
    """Share of the time that each number of threads gets, on a machine of these seconds a token."""
    spent = dict.fromkeys(seconds, 0.0)
    for _ in range(bursts):
        threads = pace.choose()
        tokens = max(1, int(0.08 / seconds[threads])) // (2 if pace.trying else 1) or 1
        spent[threads] += tokens * seconds[threads]
        pace.note(tokens, tokens * seconds[threads])
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
        assert not pace.trying


def test_a_fixed_number_stays() -> None:
    pace = Pace(8, fixed=True)
    for seconds in (1.0, 5.0, 0.1, 9.0):
        pace.note(1, seconds)
        assert not pace.trying
        assert pace.choose() == 8
