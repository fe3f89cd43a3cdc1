"""How long a prefill batch is."""

from functools import partial

import pytest

from ondevice.budget import Needs
from ondevice.generate import batch_of
from ondevice.planning import BATCH_SHARE, BATCHES, _batch

TOKEN = 1_000_000
FILE = 40 << 30


def needs(batch: int, file: int = FILE) -> Needs:
    return Needs(
        file=file,
        dense=2 << 30,
        keys_and_values=1 << 30,
        delta_memory=1 << 26,
        buffers=batch * TOKEN,
        least_pool=1 << 26,
        most_pool=file,
        expert=1 << 20,
        slice=1 << 19,
    )


def test_the_longest_with_which_the_file_fits() -> None:
    for batch in BATCHES:
        room = needs(batch).mapped
        assert _batch(room, TOKEN, needs) == batch
    assert _batch(None, TOKEN, needs) == BATCHES[0]


def test_otherwise_its_buffers_take_a_small_part() -> None:
    for batch in BATCHES[:-1]:
        enough = int(batch * TOKEN / BATCH_SHARE) + 1
        assert _batch(enough, TOKEN, needs) == batch
        assert _batch(enough - 2, TOKEN, needs) < batch


def test_a_short_one_where_a_long_one_leaves_too_little() -> None:
    heavy = partial(needs, file=FILE)
    assert _batch(heavy(BATCHES[0]).least, 1, heavy) == BATCHES[0]
    assert _batch(heavy(BATCHES[0]).least - 1, 1, heavy) == BATCHES[1]
    assert _batch(1, 1, heavy) == BATCHES[-1]


@pytest.mark.parametrize(
    ("tokens", "first"), [(1, 1), (512, 512), (513, 257), (1024, 512), (1025, 342)]
)
def test_batches_are_about_equally_long(tokens: int, first: int) -> None:
    assert batch_of(tokens, 512) == first
    left, taken = tokens, []
    while left:
        taken.append(batch_of(left, 512))
        left -= taken[-1]
    assert len(taken) == -(-tokens // 512)
    assert max(taken) - min(taken) <= 1
