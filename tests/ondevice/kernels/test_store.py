"""The pool's lists against a least-recently-used cache in Python, slot by slot."""

import ctypes
import os
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import ondevice
from ondevice.experts import Pool
from ondevice.kernels import routing, store
from ondevice.model import Model
from quant.format import Array
from tests.ondevice.gguf_builder import Shape, encode_f16, tiny_model
from tests.ondevice.kernels.harness import run

pytestmark = pytest.mark.usefixtures("small_batches")

SHAPE = Shape(layers=5, mtp_layers=0, experts=24, experts_used=3, expert_width=64)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """One whose pool has room for 30 of 120 experts."""
    path = tiny_model(tmp_path / "m.gguf", shape=SHAPE, encode=encode_f16)
    with ondevice.load(path, threads=1, context=128) as mapped:
        needs = mapped.plan.needs
    memory = needs.dense + needs.working + needs.most_pool // 4
    opened = ondevice.load(path, threads=1, context=128, memory=memory)
    assert opened._pool is not None
    assert opened._pool.slabs == 30
    return opened


class Layer:
    """Claims experts of one layer as a program does."""

    def __init__(self, model: Model, index: int) -> None:
        assert model._pool is not None
        self.pool, self.index = model._pool, index
        self.record = np.zeros(routing.ROUTING_WORDS, np.int64)
        self.order = np.zeros(24, np.int32)
        self.places = np.zeros(24 * routing.PLACE_WORDS, np.int64)
        self.pool.connect(self.record, index, self.order.ctypes.data, self.places.ctypes.data)

    def claim(self, experts: list[int], slots: int = 1, count: int = 1) -> None:
        """Touch these experts with so many slots each."""
        self.numbers = np.array(experts, np.int32)
        self.starts = np.arange(0, slots * len(experts) + 1, slots, dtype=np.int32)
        self.record[[routing.NUMBERS, routing.STARTS]] = (
            self.numbers.ctypes.data,
            self.starts.ctypes.data,
        )
        self.record[routing.ALL] = len(experts)
        claim = (self.pool.address, self.index, self.record, 0, 0)  # uses are not noted
        run(store.claim, *claim, threads=1, count=count)

    def wait(self) -> None:
        """Until all slices of the claimed experts are there."""
        for i in range(int(self.record[routing.ASSIGNED])):
            place = self.places[routing.PLACE_WORDS * self.order[i] :]
            word = ctypes.c_int64.from_address(int(place[routing.PLACE_WORD]))
            while word.value & 7 != 7:
                os.sched_yield()

    def bytes_of(self, i: int, place: int, nbytes: int) -> Array:
        address = int(self.places[routing.PLACE_WORDS * i + place])
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def test_the_least_recently_used_goes_first(model: Model) -> None:
    random = np.random.default_rng(0)
    layers = [Layer(model, index) for index in range(SHAPE.layers)]
    known: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    with model:
        for _ in range(200):
            index = int(random.integers(SHAPE.layers))
            experts = sorted(int(e) for e in random.choice(24, 3, replace=False))
            layers[index].claim(experts)
            layers[index].wait()
            present = [expert for expert in experts if (index, expert) in known]
            hits += len(present)
            for expert in [*experts]:
                if (index, expert) in known:
                    known.move_to_end((index, expert))
            for expert in experts:
                if expert not in present:
                    if len(known) == 30:
                        known.popitem(last=False)
                    known[index, expert] = None
            assert model.expert_counts.hits == hits
        assert 100 < hits < 500


def test_what_is_read_is_what_the_file_holds(model: Model) -> None:
    with model:
        for index in (0, 3):
            layer = Layer(model, index)
            layer.claim([2, 7, 23])
            layer.wait()
            for i, expert in enumerate([2, 7, 23]):
                for place, part in (
                    (routing.PLACE_GATE, "gate"),
                    (routing.PLACE_UP, "up"),
                    (routing.PLACE_DOWN, "down"),
                ):
                    data = model._file.tensors[f"blk.{index}.ffn_{part}_exps.weight"].data
                    want = data.reshape(24, -1)[expert]
                    assert (layer.bytes_of(i, place, len(want)) == want).all()


def test_waves_cover_every_expert_once(model: Model) -> None:
    with model:
        pool = model._pool
        assert pool is not None
        for shelf in pool._shelves.values():
            assert shelf.slabs == 30
        layer, other = Layer(model, 1), Layer(model, 2)
        other.claim(list(range(24)), slots=2, count=40)
        other.wait()
        layer.claim(list(range(24)), slots=2, count=40)
        seen: list[int] = []
        while True:
            first, wave = (int(layer.record[w]) for w in (routing.FIRST, routing.TOUCHED))
            seen += [int(layer.numbers[i]) for i in layer.order[first : first + wave]]
            layer.wait()
            run(store.claim_more, pool.address, 1, layer.record, threads=1, count=40)
            if not layer.record[routing.AGAIN]:
                break
        assert sorted(seen) == list(range(24))


def test_a_prompt_leaves_each_layer_its_most_used(model: Model) -> None:
    with model:
        layer = Layer(model, 0)
        layer.claim([1, 2, 3, 4], slots=5, count=40)
        layer.wait()
        keeps = layer.places[routing.PLACE_KEEP :: routing.PLACE_WORDS][:4]
        quota = (30 - 24 - 24 // store.AHEAD) // (SHAPE.layers - 1)
        assert keeps.sum() == max(0, quota)
        layer.claim([1, 2, 3, 4], slots=5, count=1)
        assert layer.places[routing.PLACE_KEEP :: routing.PLACE_WORDS][:4].all()


def guess(pool: Pool, layer: Layer, near: list[int], far: list[int]) -> None:
    """Guess the experts of the two layers after the first one."""
    chosen = [np.array(experts, np.int32) for experts in (near, far)]
    space = np.zeros(48, np.int32)
    run(*(store.guess, pool.address, 0, layer.record, 3, space, *chosen), threads=1, count=1)


def test_a_guess_is_read_and_then_a_hit(model: Model) -> None:
    with model:
        pool = model._pool
        assert pool is not None
        here, there = Layer(model, 0), Layer(model, 1)
        here.claim([1, 2, 3])  # all of them missing: the disk is busy
        here.wait()
        guess(pool, here, [5, 9, 11], [2, 3, 4])
        guessed = pool.counts.guessed
        assert guessed == round(0.6 * 3)
        while pool.counts.bytes_read == 0:
            os.sched_yield()
        there.claim([5, 6, 7])
        there.wait()
        counts = pool.counts
        assert counts.hits + counts.late == 1
        assert counts.misses == 5


def test_the_layer_after_the_next_is_guessed_at_leisure(model: Model) -> None:
    with model:
        pool = model._pool
        assert pool is not None
        here, far = Layer(model, 0), Layer(model, 2)
        here.claim([1, 2, 3])
        here.wait()
        pool._store[store.HIT_SHARE] = 1 << 16
        here.claim([1, 2, 3])
        guess(pool, here, [5, 9, 11], [2, 3, 4])
        assert pool.counts.guessed == 3 + round(0.6 * 3)
        until = time.monotonic() + 10
        while pool.counts.bytes_read < 8 * pool.expert_bytes and time.monotonic() < until:
            os.sched_yield()
        before = pool.counts
        far.claim([2, 3, 4])
        assert (pool.counts - before).hits == 2
        far.wait()


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_slabs_that_wrong_guesses_hold_are_given_all_the_same(model: Model, ahead: int) -> None:
    with model:
        pool = model._pool
        assert pool is not None
        here, there = Layer(model, 0), Layer(model, 1)
        here.claim([1, 2, 3])
        here.wait()
        for shelf in pool._shelves.values():
            claims = shelf.arrays[4]
            claims[:] = 2 * (pool._store[store.TURN] + 1 + ahead)
        there.claim([5, 6, 7])
        there.wait()
        assert there.record[routing.ASSIGNED] >= 1
