"""Drafts, their check, and the ring, each against what plain Python does."""

from typing import Any

import numpy as np
import pytest

from ondevice.kernels import ahead, layout, sample
from ondevice.kernels.ahead import MOST_DRAFTS, RECORD_WORDS, ring_rows
from ondevice.kernels.formats import READERS
from quant.format import Array
from tests.ondevice.kernels import harness
from tests.ondevice.kernels.harness import Rows, bits, peaks_of, run, step_record

VOCABULARY = 50
PIECE = 16  # logits that have a peak
BATCH = 100
RING_ROWS = ring_rows(BATCH)


def drafts_of(record: Array) -> list[int]:
    """The certain token and the drafts behind it."""
    tokens = record[RECORD_WORDS:].view(np.int32)
    return tokens[: 1 + int(record[ahead.MADE])].tolist()


# ---- the ring ----


def test_the_ring_keeps_the_last_vectors() -> None:
    columns = 37
    vectors = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    ring, record = Rows(1, RING_ROWS * columns), ahead.new_record(BATCH)
    run(ahead.remember, record, Rows.of(vectors), columns, per_token=True, count=3)
    record[ahead.RING] = ring.address
    for position in (0, 5, 10 * RING_ROWS - 1):
        run(
            ahead.remember,
            *(record, Rows.of(vectors), columns),
            per_token=True,
            count=3,
            position=position - 2,
            first=2,
        )
        kept = ring.values.reshape(RING_ROWS, columns)
        places = [(position + i) % RING_ROWS for i in range(3)]
        assert bits(kept[places]) == bits(vectors)
        ring.check()


# ---- the block's input ----


@pytest.mark.parametrize("made", [0, 2])
def test_head_inputs(made: int) -> None:
    columns, random = 48, np.random.default_rng(2)
    table, ring, own = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((VOCABULARY, columns), (RING_ROWS, columns), (1, columns))
    )
    weights = 1 + random.standard_normal((2, columns)).astype(np.float32) / 8
    history = random.integers(0, VOCABULARY, 2000).astype(np.int32)
    record = ahead.new_record(BATCH)
    record[[ahead.RING, ahead.START, ahead.MADE]] = ring.ctypes.data, 1000, made
    record[RECORD_WORDS:].view(np.int32)[made] = 7
    count = 1 if made else 3
    out = Rows(count, 2 * columns)
    run(
        ahead.head_inputs,
        *(record, table, 4 * columns, columns, READERS["F32"].expand.address),
        *(weights[0], weights[1], 1e-6, own, out, 0, 0, 0, 0),
        per_token=True,
        count=count,
        position=600,
        history=history,
    )
    for t in range(count):
        position = 1600 + t
        token = 7 if made else history[position + 1]
        vector = own[0] if made else ring[position % RING_ROWS]
        halves = []
        for x, weight in ((table[token], weights[0]), (vector, weights[1])):
            wide = x.astype(np.float64)
            halves.append(wide / np.sqrt(np.mean(wide * wide) + 1e-6) * weight)
        np.testing.assert_allclose(out.values[t], np.concatenate(halves), rtol=2e-6)


# ---- the turns of a cycle ----


def drafts_from(logits: Array, common: int = VOCABULARY, others: Any = 0) -> tuple[Any, ...]:
    """What `draft` wants to know of its logits."""
    return logits, VOCABULARY, PIECE, peaks_of(logits, PIECE), VOCABULARY, common, others


def test_a_cycle_gives_the_step_to_the_block_and_back() -> None:
    history = np.arange(100, dtype=np.int32)
    record = ahead.new_record(BATCH)
    record[[ahead.DEPTH, ahead.HEAD_CACHE, ahead.START, ahead.END]] = 3, 1234, 10, 55
    given: dict[str, Any] = {"history": history, "position": 60, "cache": 99, "steps_left": 9}
    step = run(ahead.begin_cycle, record, **given)
    assert step[[layout.COUNT, layout.POSITION, layout.CACHE]].tolist() == [5, 45, 1234]
    assert record[[ahead.DRAFTED, ahead.AT]].tolist() == [3, 60]
    logits = np.zeros((1, VOCABULARY), np.float32)
    for made in range(3):
        logits[:] = 0
        logits[0, [made + 4, made + 9]] = 2  # of equal ones the first
        moved = run(ahead.draft, record, *drafts_from(logits), count=1, position=49 + made)
        assert moved[[layout.COUNT, layout.POSITION]].tolist() == [1, 50 + made]
        assert record[ahead.MORE] == (made < 2)
    step = run(ahead.begin_check, record, **given)
    assert drafts_of(record) == [60, 4, 5, 6]
    assert step[[layout.COUNT, layout.POSITION, layout.TENTATIVE]].tolist() == [4, 60, 3]
    assert step[layout.CACHE] == 99 and record[ahead.END] == 60

    record[ahead.END] = 59
    step = run(ahead.begin_cycle, record, **{**given, "steps_left": 2})
    assert record[ahead.DRAFTED] == 1 and step[layout.COUNT] == 1


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_last_row_becomes_the_batch(count: int) -> None:
    random = np.random.default_rng(1)
    rows = [random.standard_normal((count, n)).astype(np.float32) for n in (48, 16)]
    before = [x.copy() for x in rows]
    arguments = [value for x in rows for value in (x, x.strides[0])]
    step = run(ahead.take_last, *arguments, 0, 0, 0, 0, count=count, position=7)
    assert step[[layout.COUNT, layout.POSITION]].tolist() == [1, 6 + count]
    for x, old in zip(rows, before, strict=True):
        assert bits(x[0]) == bits(old[-1]) and bits(x[1:]) == bits(old[1:])


def test_drafts_behind_the_common_tokens_are_looked_up() -> None:
    others = np.array([70, 80, 90], np.int32)
    common = VOCABULARY - len(others)
    record = ahead.new_record(BATCH)
    for best, token in ((common - 1, common - 1), (common, 70), (common + 2, 90)):
        logits = np.zeros((1, VOCABULARY), np.float32)
        logits[0, best] = 2
        record[[ahead.AT, ahead.MADE]] = 0, 0
        run(ahead.draft, record, *drafts_from(logits, common, others), threads=1)
        assert drafts_of(record)[1] == token


def test_the_hook_makes_drafts_true_with_a_chance() -> None:
    truth = np.random.default_rng(3).integers(0, VOCABULARY, 5000).astype(np.int32)
    logits = np.zeros((1, VOCABULARY), np.float32)
    record = ahead.new_record(BATCH)
    record[[ahead.TRUTH, ahead.TRUTH_LENGTH]] = truth.ctypes.data, len(truth)
    record.view(np.float64)[ahead.CHANCE] = 0.7
    right, arguments = 0, drafts_from(logits)
    for position in range(0, 4000, 2):
        record[[ahead.AT, ahead.MADE]] = position, 0
        run(ahead.draft, record, *arguments, threads=1)
        right += drafts_of(record)[1] == truth[position + 1]
    assert 0.67 <= right / 2000 <= 0.73


# ---- what was there before ----


def looked_up(history: list[int], wanted: int) -> list[int]:
    """What follows the longest match of 2 to 4 tokens, the latest of equal ones."""
    for length in (4, 3, 2):
        last = history[-length:]
        for place in range(len(history) - 1, length - 1, -1):
            if len(last) == length and history[place - length : place] == last:
                line = list(history)
                for i in range(wanted):
                    line.append(line[place + i])
                return line[len(history) :]
    return []


@pytest.mark.parametrize("tokens", [2, 4, 12])
def test_look_up(tokens: int) -> None:
    random = np.random.default_rng(4)
    found = 0
    for _ in range(150):
        history = random.integers(0, tokens, random.integers(1, 40)).tolist()
        depth, left = int(random.integers(1, 5)), int(random.integers(1, 6))
        record = ahead.new_record(BATCH)
        record[ahead.DEPTH] = depth
        step = run(
            ahead.look_up,
            *(record, VOCABULARY),
            threads=1,
            history=np.array(history, np.int32),
            position=len(history) - 1,
            steps_left=left,
        )
        expected = looked_up(history, min(depth, left - 1))
        assert drafts_of(record) == [history[-1], *expected]
        assert step[[layout.COUNT, layout.TENTATIVE]].tolist() == [
            1 + len(expected),
            len(expected),
        ]
        found += bool(expected)
    assert found


# ---- the check ----


def rows_of(logits: Array) -> tuple[Any, ...]:
    """What `accept` wants to know of its logits."""
    peaks = peaks_of(logits, PIECE)
    return logits.strides[0], peaks, peaks.strides[0], PIECE


def sampler(logits: Array, temperature: float, ends: Array, space: Array) -> Array:
    words = np.zeros(sample.SAMPLER_WORDS, np.int64)
    words[[sample.LOGITS, sample.VOCABULARY]] = logits.ctypes.data, logits.shape[1]
    words[[sample.TOP_K, sample.SEED]] = 10, 5
    words[[sample.ENDS, sample.SPACE]] = ends.ctypes.data, space.ctypes.data
    reals = words.view(np.float64)
    reals[sample.TEMPERATURE], reals[sample.TOP_P], reals[sample.PENALTY] = temperature, 0.95, 1.2
    return words


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_accept_chooses_as_plain_decoding_does(temperature: float) -> None:
    """Row after row through the plain kernel, up to the first guess that is wrong."""
    random = np.random.default_rng(5)
    seen = set()
    for trial in range(200):
        drafts = int(random.integers(0, MOST_DRAFTS + 1))
        logits = random.standard_normal((1 + drafts, VOCABULARY)).astype(np.float32)
        begun = random.integers(0, VOCABULARY, 20).astype(np.int32)
        ends, space = np.zeros(VOCABULARY, np.uint8), np.zeros(2 * VOCABULARY, np.float32)
        left = int(random.integers(1, 8))
        if trial % 4 == 0:
            ends[random.integers(0, VOCABULARY, 12)] = 1

        plain = np.zeros(40, np.int32)
        plain[:20] = begun
        truth: list[int] = []
        for row in range(1 + drafts):
            own = logits[row : row + 1].copy()
            words = sampler(own, temperature, ends, space)
            token = np.zeros(1, np.int32)
            run(
                sample.sample,
                *(peaks_of(own, PIECE), PIECE),
                threads=1,
                history=plain,
                history_length=20 + row,
                position=19 + row,
                sampler=words,
                tokens=token,
                steps_left=1,
            )
            truth.append(int(plain[20 + row]))
        guesses = [
            token if random.random() < 0.8 else (token + 1) % VOCABULARY for token in truth[:-1]
        ]

        expected, accepted = [], 0
        for row, token in enumerate(truth):
            expected.append(token)
            if ends[token] or len(expected) == left or row == drafts or guesses[row] != token:
                break
            accepted += 1

        record, history = ahead.new_record(BATCH), np.zeros(40, np.int32)
        history[:20] = begun
        record[RECORD_WORDS:].view(np.int32)[1 : 1 + drafts] = guesses
        record[ahead.CYCLES_LEFT] = 2 if trial % 3 else 1
        words = sampler(logits, temperature, ends, space)
        step = step_record(
            history=history,
            history_length=20,
            position=19,
            count=1 + drafts,
            tentative=drafts,
            sampler=words,
            steps_left=left,
        )
        # once: as a program it would go on
        given = rows_of(logits)
        line = harness.record(ahead.accept, record, *given)
        ahead.accept(line.ctypes.data, step.ctypes.data, 0, 0)
        made = int(step[layout.HISTORY_LENGTH]) - 20
        assert history[20 : 20 + made].tolist() == expected
        assert step[[layout.PENDING, layout.POSITION]].tolist() == [accepted, 20 + accepted]
        assert step[layout.TENTATIVE] == 0 and step[layout.STEPS_LEFT] == left - made
        going_on = trial % 3 and left - made > 1 and not ends[expected[-1]]
        assert step[layout.REPEAT] == bool(going_on)
        assert record[ahead.CYCLES] == 1 and record[ahead.TOTAL] == drafts
        seen.add((drafts, accepted))
    assert len(seen) > 10


def test_accept_reports_what_is_not_finite() -> None:
    logits = np.zeros((2, VOCABULARY), np.float32)
    logits[0, 3], logits[1, 7] = 5, np.nan
    ends, space = np.zeros(VOCABULARY, np.uint8), np.zeros(2 * VOCABULARY, np.float32)
    record, history = ahead.new_record(BATCH), np.zeros(40, np.int32)
    record[RECORD_WORDS:].view(np.int32)[1] = 3
    step = run(
        ahead.accept,
        *(record, *rows_of(logits)),
        history=history,
        history_length=1,
        position=0,
        count=2,
        tentative=1,
        sampler=sampler(logits, 0.0, ends, space),
        steps_left=9,
    )
    assert step[layout.OUTCOME] == layout.NOT_FINITE and step[layout.REPEAT] == 0
    assert history[1] == 3 and step[layout.POSITION] == 2


def test_settled() -> None:
    step = run(ahead.settled, threads=1, pending=3)
    assert step[layout.PENDING] == 0
