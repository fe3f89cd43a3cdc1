"""The words of the shared records do not overlap."""

import numpy as np
import pytest

from ondevice.kernels import layout, routing, sample, team
from ondevice.kernels.simd import store_i64
from tests.ondevice.kernels.harness import three_integers

OPERATION = ("KERNEL", "TASKS", "PER_TOKEN", "TIMES", "THEN", "FEW_TASKS", "ARGUMENTS")
STEP = (
    *("COUNT", "POSITION", "FIRST", "STATE", "CACHE", "CONTEXT", "TOKENS", "SCRATCH"),
    *("SCRATCH_BYTES", "REPEAT", "STEPS_LEFT", "SAMPLER", "HISTORY", "HISTORY_LENGTH", "CANCEL"),
    *("ABORT", "OUTCOME"),
)
CONTROL = (
    *(
        "TICKET",
        "DONE",
        "GROUP",
        "NEXT",
        "TOTALS",
        "HANDFULS",
        "LEFT",
        "FINISHED",
        "JOB",
        "PROGRAM",
    ),
    *("OPERATIONS", "STEP", "MEMBERS", "PROFILE", "WORK_INPUT", "WORK_OUTPUT", "DONE_INPUT"),
    *("READ", "WRITE", "NAP", "CLOCK", "BYTES", "SPACE"),
)
SAMPLER = (
    *("LOGITS", "VOCABULARY", "TEMPERATURE", "TOP_K", "TOP_P", "MIN_P", "PENALTY", "SEED", "ENDS"),
    "SPACE",
)
ROUTING = ("TOUCHED", "NUMBERS", "STARTS", "SLOTS", "SLOT_TOKENS")


@pytest.mark.parametrize(
    ("module", "names", "words"),
    [
        (layout, OPERATION, layout.OPERATION_WORDS),
        (layout, STEP, layout.STEP_WORDS),
        (team, CONTROL, team.CONTROL_WORDS - 2 * team.MOST_THREADS + 1),
        (sample, SAMPLER, sample.SAMPLER_WORDS),
        (routing, ROUTING, routing.ROUTING_WORDS),
    ],
)
def test_words_are_distinct_and_inside(module: object, names: tuple[str, ...], words: int) -> None:
    places = [getattr(module, name) for name in names]
    assert len(set(places)) == len(places)
    assert all(0 <= place < words for place in places)


def test_what_every_thread_writes_has_a_cache_line_of_its_own() -> None:
    line = 64 // layout.WORD
    shared = [team.TICKET, team.DONE, team.GROUP, team.LEFT, team.BYTES]
    lines = [place // line for place in shared]
    assert len(set(lines)) == len(lines)


@three_integers
def look_up(record: int, index: int, out: int) -> None:
    store_i64(out, layout.word(record, index))
    store_i64(out + layout.WORD, layout.argument(record, index))


def test_words_and_arguments() -> None:
    record = np.arange(100, 100 + layout.OPERATION_WORDS, dtype=np.int64)
    out = np.zeros(2, np.int64)
    look_up(record.ctypes.data, 5, out.ctypes.data)
    assert out.tolist() == [105, 105 + layout.ARGUMENTS]
