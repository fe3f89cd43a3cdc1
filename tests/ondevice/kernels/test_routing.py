"""The routing record's accessors."""

import numpy as np

from ondevice.kernels import routing
from ondevice.kernels.simd import store_i64
from quant.format import Array
from tests.ondevice.kernels.harness import three_integers


@three_integers
def look_up(record: int, index: int, out: int) -> None:
    expert, slots, tokens, size = routing.task_slots(record, index, 7)
    store_i64(out, expert)
    store_i64(out + 8, slots)
    store_i64(out + 16, tokens)
    store_i64(out + 24, size)
    store_i64(out + 32, routing.place_of(record, index))


class Record:
    """Experts 3, 5 and 8 with one, two and four slots."""

    def __init__(self) -> None:
        self.numbers = np.array([3, 5, 8, 0], np.int32)
        self.starts = np.array([0, 1, 3, 7], np.int32)
        self.slots = np.arange(7, dtype=np.int32)
        self.tokens = np.arange(7, dtype=np.int32)
        self.order = np.array([2, 0, 1], np.int32)
        self.places = np.zeros(3 * routing.PLACE_WORDS, np.int64)
        self.words = np.zeros(routing.ROUTING_WORDS, np.int64)
        arrays = (self.numbers, self.starts, self.slots, self.tokens)
        self.words[routing.NUMBERS : routing.NUMBERS + 4] = [a.ctypes.data for a in arrays]

    def found(self, index: int) -> Array:
        out = np.zeros(5, np.int64)
        look_up(self.words.ctypes.data, index, out.ctypes.data)
        return out


def test_tasks_of_a_mapped_batch_are_in_order() -> None:
    record = Record()
    for index, (expert, start, size) in enumerate([(3, 0, 1), (5, 1, 2), (8, 3, 4)]):
        slots, tokens = (a.ctypes.data + 4 * start for a in (record.slots, record.tokens))
        assert record.found(index).tolist() == [expert, slots, tokens, size, 0]


def test_tasks_of_a_wave_are_in_the_order_of_the_pool() -> None:
    record = Record()
    record.words[[routing.ORDER, routing.PLACES]] = (
        record.order.ctypes.data,
        record.places.ctypes.data,
    )
    record.words[routing.FIRST] = 1
    found = [record.found(index) for index in range(2)]
    assert [row[0] for row in found] == [3, 5]
    assert [row[4] - record.places.ctypes.data for row in found] == [0, 8 * routing.PLACE_WORDS]


def test_without_a_record_every_token_is_expert_0s() -> None:
    out = np.zeros(5, np.int64)
    look_up(0, 0, out.ctypes.data)
    assert out.tolist() == [0, 0, 0, 7, 0]
