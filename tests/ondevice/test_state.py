"""A state is all that a model remembers: it can be copied, restored, cleared, and may not fit."""

import numpy as np
import pytest

from ondevice import state as module
from ondevice.generate import Completion
from ondevice.model import Model
from ondevice.sampling import Sampling
from ondevice.state import State, cache_bytes, memory_bytes
from quant.errors import ResourceError

PROMPT = [5, 80, 200, 31, 7]
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)


def read_on(model: Model, state: State, tokens: list[int], count: int) -> list[int]:
    """The next `count` tokens after `tokens`, of which the state has taken in the first."""
    return list(Completion(model, state, tokens, GREEDY, count).ids())


def test_a_restored_state_continues_bit_for_bit(endless: Model) -> None:
    state = State(endless.config, 600)
    begun = PROMPT + read_on(endless, state, PROMPT, 20)
    snapshot = state.snapshot()
    assert snapshot.position == state.position == len(begun) - 1
    expected = read_on(endless, state, begun, 30)
    after = state.memory.copy()

    state.restore(snapshot)
    assert np.array_equal(state.memory, snapshot.memory)
    read_on(endless, state, begun + list(range(300)), 50)
    assert not np.array_equal(state.memory, after)

    state.restore(snapshot)
    assert state.position == snapshot.position
    assert read_on(endless, state, begun, 30) == expected
    assert np.array_equal(state.memory, after)


def test_a_snapshot_outlives_what_follows(endless: Model) -> None:
    state = State(endless.config, 600)
    read_on(endless, state, PROMPT, 3)
    snapshot = state.snapshot()
    copy = snapshot.memory.copy()
    read_on(endless, state, PROMPT * 5, 10)
    assert np.array_equal(snapshot.memory, copy)


def test_a_cleared_state_is_a_new_one(endless: Model) -> None:
    used, new = State(endless.config, 600), State(endless.config, 600)
    read_on(endless, used, list(range(100)), 40)
    used.reset()
    assert used.position == 0
    assert read_on(endless, used, PROMPT, 20) == read_on(endless, new, PROMPT, 20)
    assert np.array_equal(used.memory, new.memory)


def test_it_has_room_for_the_context(tiny: Model) -> None:
    for context in (1, 63, 64, 65, 8192):
        state = State(tiny.config, context)
        assert state.capacity >= context
        assert state.cache.nbytes >= cache_bytes(tiny.config, context) > 0
        assert state.memory.nbytes >= memory_bytes(tiny.config) > 0


def test_too_little_memory(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(module, "zeros", refuse)
    for start in (lambda: tiny.generate(PROMPT), lambda: tiny.complete(PROMPT), tiny.session):
        with pytest.raises(ResourceError, match=r"a context of 8192 tokens, which takes [\d,]+ by"):
            start()
    with pytest.raises(ResourceError, match="a context of 3 tokens"):
        tiny.logits([1, 2, 3])
