"""Choosing a token: exact against float64 for a known random number, and by frequency."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from ondevice.kernels import layout, sample
from quant.format import Array
from tests.ondevice.kernels.harness import peaks_of, record, step_record

POSITION = 10
LENGTH = 70  # of the history: more than the penalty looks back
MASK = 2**64 - 1
PIECE = 16  # logits that have a peak


@dataclass(frozen=True)
class Options:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0


class Sampler:
    """A sampler record over `logits`, and what a step shows of the choice."""

    def __init__(self, logits: Array, options: Options = Options(), history: Array | None = None):
        size = len(logits)
        self.logits = np.array(logits, np.float32)
        self.original = self.logits.copy()
        self.ends = np.zeros(size, np.uint8)
        self._space = np.zeros(2 * size + 1, np.float32)
        self._space[-1] = np.nan
        self.history = np.zeros(LENGTH + 2, np.int32)
        self.past = history if history is not None else np.zeros(0, np.int32)
        self.history[: len(self.past)] = self.past
        self.tokens = np.full(2, -1, np.int32)
        self._record = np.zeros(sample.SAMPLER_WORDS, np.int64)
        reals = self._record.view(np.float64)
        reals[sample.TEMPERATURE], reals[sample.PENALTY] = options.temperature, options.penalty
        reals[sample.TOP_P], reals[sample.MIN_P] = options.top_p, options.min_p
        self._record[[sample.VOCABULARY, sample.TOP_K]] = size, options.top_k
        self._record[[sample.LOGITS, sample.ENDS, sample.SPACE]] = (
            self.logits.ctypes.data,
            self.ends.ctypes.data,
            self._space.ctypes.data,
        )
        self.step = step_record()

    def __call__(self, seed: int = 0, **words: int) -> int:
        """The token chosen; the step record is in `step`."""
        self.logits[:] = self.original
        self._record[sample.SEED] = seed
        given = {"position": POSITION, "count": 1, "steps_left": 5, **words}
        self.step = step_record(
            sampler=self._record,
            tokens=self.tokens,
            history=self.history,
            history_length=len(self.past),
            repeat=1,
            **given,
        )
        peaks = peaks_of(self.logits[None], PIECE)
        operation = record(sample.sample, peaks, PIECE)
        sample.sample(operation.ctypes.data, self.step.ctypes.data, 0, 0)
        assert np.isnan(self._space[-1]), "written beyond 8 bytes per token"
        return int(self.tokens[0])


def uniform(seed: int, position: int) -> float:
    """Two rounds of splitmix64 over seed and position."""
    z = seed + (position + 1) * 0x9E3779B97F4A7C15 & MASK
    for _ in range(2):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        z ^= z >> 31
    return (z >> 11) / 2**53


def penalized(logits: Array, penalty: float, history: Array) -> Array:
    result = np.array(logits, np.float32).astype(np.float64)
    for token in np.unique(history[-sample.PENALTY_WINDOW :]):
        result[token] *= 1 / penalty if result[token] > 0 else penalty
    return result


def distribution(logits: Array, options: Options, history: Array | None = None) -> Array:
    """The probability of every token, as the options say, in float64."""
    logits = penalized(logits, options.penalty, np.zeros(0, int) if history is None else history)
    order = np.argsort(-logits, kind="stable")[: options.top_k or None]
    share = np.exp((logits[order] - logits[order[0]]) / options.temperature)
    share /= share.sum()
    before = np.cumsum(share) - share
    kept = (before < options.top_p) & (share >= options.min_p * share[0])
    kept[0] = True
    result = np.zeros(len(logits))
    result[order[kept]] = share[kept] / share[kept].sum()
    return result


def drawn(probability: Array, logits: Array, number: float) -> int | None:
    """The token at `number` of the sum, likeliest first; None too close to a border to tell."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    ends = np.cumsum(probability[order])
    if abs(ends - number).min() < 1e-6:
        return None
    return int(order[np.searchsorted(ends, number)])


LOGITS = 2 * np.random.default_rng(1).standard_normal(300)
OPTIONS = {
    "plain": Options(1.0),
    "warm": Options(3.0),
    "cold": Options(0.2),
    "top k": Options(1.0, top_k=7),
    "one": Options(1.0, top_k=1),
    "top k of more than all": Options(1.0, top_k=1000),
    "top p": Options(1.0, top_p=0.6),
    "top p of nothing": Options(1.0, top_p=0.0),
    "min p": Options(1.0, min_p=0.08),
    "min p of all": Options(1.0, min_p=1.0),
    "all": Options(0.7, top_k=20, top_p=0.8, min_p=0.05),
    "penalty": Options(1.0, penalty=1.8),
    "reward": Options(1.0, top_k=9, penalty=0.5),
}
HISTORY = np.random.default_rng(2).integers(0, 300, LENGTH).astype(np.int32)
HISTORY[-64:-44] = np.argsort(-LOGITS)[:20]  # the likeliest, and some of them twice
HISTORY[-5:] = HISTORY[-64:-59]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("original", [LOGITS, np.round(LOGITS)], ids=["distinct", "many equal"])
def test_draws_follow_the_distribution(original: Array, options: Options) -> None:
    probability = distribution(original, options, HISTORY)
    logits = penalized(original, options.penalty, HISTORY)
    choose = Sampler(original, options, HISTORY)
    checked = 0
    for seed in range(500):
        wanted = drawn(probability, logits, uniform(seed, POSITION + 1))
        got = choose(seed)
        if wanted is not None:
            assert got == wanted, f"seed {seed}"
            checked += 1
    assert checked > 450


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (Options(1.0, top_p=0.25), 1),
        (Options(1.0, top_p=0.26), 2),
        (Options(1.0, top_p=0.5), 2),
        (Options(1.0, top_p=0.501), 3),
        (Options(1.0, top_p=0.76), 4),
        (Options(1.0, min_p=1.0), 4),
        (Options(1.0, top_k=3, top_p=0.5), 2),
    ],
)
def test_limits_that_are_just_reached(options: Options, kept: int) -> None:
    choose = Sampler(np.zeros(4), options)
    assert {choose(seed) for seed in range(100)} == set(range(kept))


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies(vary: str) -> None:
    """Whatever the random numbers are, tokens come as often as they should."""
    logits, draws = np.linspace(0, 3, 16), 8000
    options = Options(1.5)
    choose = Sampler(logits, options)
    found = np.zeros(len(logits))
    for i in range(draws):
        found[choose(i) if vary == "seed" else choose(3, position=i)] += 1
    expected = draws * distribution(logits, options)
    square = ((found - expected) ** 2 / expected).sum()
    freedom = len(logits) - 1
    assert abs(square - freedom) < 4 * math.sqrt(2 * freedom)


def test_neighbouring_positions_are_independent() -> None:
    choose = Sampler(np.zeros(4), Options(1.0))
    found = np.zeros((4, 4))
    tokens = [choose(5, position=i) for i in range(8000)]
    np.add.at(found, (tokens[:-1], tokens[1:]), 1)
    square = ((found - 7999 / 16) ** 2 / (7999 / 16)).sum()
    assert abs(square - 15) < 4 * math.sqrt(30)


def test_a_seed_and_a_position_make_the_token() -> None:
    choose = Sampler(LOGITS, Options(1.0))
    tokens = [choose(7, position=position) for position in range(50)]
    again = Sampler(LOGITS, Options(1.0))
    assert [again(7, position=position) for position in range(50)] == tokens
    # the position after the batch counts, however many tokens were in it
    assert [again(7, position=p - 2, count=3) for p in range(2, 50)] == tokens[2:]
    assert [again(8, position=position) for position in range(50)] != tokens
    assert 0 <= again(2**63 - 1) < len(LOGITS)


def test_equal_logits_go_by_number() -> None:
    logits = np.array([1, 4, 2, 4, 4, 0], np.float32)
    assert Sampler(logits)() == 1
    choose = Sampler(logits, Options(1.0, top_k=2))
    assert {choose(seed) for seed in range(50)} == {1, 3}


def test_greedy_with_penalty() -> None:
    logits, history = np.array([3, 2.9, -1], np.float32), np.array([0], np.int32)
    assert Sampler(logits, Options(penalty=1.2), history)() == 1
    logits = np.array([-2, -1, -3], np.float32)
    assert Sampler(logits, Options(penalty=4.0), np.array([1, 1], np.int32))() == 0
    assert Sampler(logits, Options(penalty=1.0), np.array([1], np.int32))() == 1


def test_penalty_looks_back_64_tokens() -> None:
    logits = np.array([3, 2, 1], np.float32)
    for distance, token in ((64, 1), (65, 0)):
        history = np.full(LENGTH, 2, np.int32)
        history[-distance] = 0
        assert Sampler(logits, Options(penalty=3.0), history)() == token


@pytest.mark.parametrize("options", [Options(), Options(1.0)], ids=["greedy", "drawn"])
def test_one_token_is_all_there_is(options: Options) -> None:
    assert Sampler(np.array([-5.0]), options)() == 0


def test_extreme_logits_and_temperatures() -> None:
    logits = np.array([-3.3e38, 3.3e38, 0], np.float32)
    for temperature in (0.0, 1e-300, 1e-3, 1.0, 100.0):
        assert Sampler(logits, Options(temperature))() == 1
    choose = Sampler(np.array([1e-30, 2e-30]), Options(100.0))
    assert {choose(seed) for seed in range(50)} == {0, 1}


def test_the_step_moves_on() -> None:
    choose = Sampler(np.array([0, 1, 0]), history=np.array([2, 2], np.int32))
    assert choose(position=20, count=4) == 1
    assert choose.history[:4].tolist() == [2, 2, 1, 0]
    assert choose.tokens.tolist() == [1, -1]
    step = choose.step
    assert step[layout.POSITION] == 24
    assert step[layout.HISTORY_LENGTH] == 3
    assert step[layout.STEPS_LEFT] == 4
    assert step[layout.REPEAT] == 1
    assert step[layout.OUTCOME] == 0


@pytest.mark.parametrize("words", [{"steps_left": 1}, {"cancel": 1}, {}])
def test_what_ends_the_loop(words: dict[str, int]) -> None:
    choose = Sampler(np.array([0, 1, 0]))
    choose.ends[1] = not words
    assert choose(**words) == 1
    assert choose.step[layout.REPEAT] == 0
    assert choose.step[layout.HISTORY_LENGTH] == 1


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [Options(), Options(1.0, penalty=1.1)])
@pytest.mark.parametrize("place", [0, 150, 299])
def test_wrong_logits_are_reported(wrong: float, options: Options, place: int) -> None:
    logits = LOGITS.copy()
    logits[place] = wrong
    choose = Sampler(logits, options, HISTORY)
    choose()
    assert choose.step[layout.OUTCOME] == layout.NOT_FINITE
    assert choose.step[layout.REPEAT] == 0
    assert choose.step[layout.HISTORY_LENGTH] == len(HISTORY)
    assert choose.tokens[0] == -1
