"""A prompt's continuation: which tokens, as text and as ids, when it ends and how it is stopped."""

import gc
import math
import sys
import time
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ondevice
from ondevice import generate
from ondevice.generate import Completion
from ondevice.model import Model
from ondevice.sampling import Sampling
from ondevice.state import State
from quant.errors import UsageError
from tests.ondevice.meanwhile import meanwhile

GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
WILD = Sampling(temperature=100.0, top_k=0, top_p=1.0, seed=4)
PROMPT = [5, 80, 200, 31, 7]


def finished(completion: Completion) -> Completion:
    """The completion, its text taken piece by piece to the end."""
    assert "".join(completion) == completion.text
    return completion


# ---- the tokens ----


@pytest.mark.parametrize("longest_burst", [1, 3, 128])
def test_greedy_is_the_best_logit_at_every_step(
    longest_burst: int, demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "LONGEST_BURST", longest_burst)
    prompt = demo.tokenize("It was a bright cold day, and")
    tokens = list(demo.generate(prompt, max_tokens=12, temperature=0.0, repeat_penalty=1.0))
    assert tokens
    for place, token in enumerate(tokens):
        assert token == demo.logits(prompt + tokens[:place])[-1].argmax()


@pytest.mark.parametrize("sampling", [GREEDY, WILD])
def test_bursts_change_no_token(
    sampling: Sampling, endless: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for burst in (1, 2, 128):
        monkeypatch.setattr(generate, "LONGEST_BURST", burst)
        found.append(finished(endless.complete(PROMPT, sampling, 100)).tokens)
    assert len(found[0]) == 100
    assert found[0] == found[1] == found[2]


def test_how_far_the_prompt_is(endless: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endless, "batch", 100)
    completion = endless.complete(PROMPT * 60, GREEDY, 3)
    assert completion.read_tokens == 0
    seen: list[float] = []
    prefill = endless.prefill

    def watched(*arguments: Any, **options: Any) -> bool:
        before = completion.read_tokens
        done = prefill(*arguments, **options)
        seen.extend((before, completion.read_tokens))
        return done

    monkeypatch.setattr(endless, "prefill", watched)
    finished(completion)
    assert len(seen) == 6 and max(seen) <= 300
    assert seen[1::2] == pytest.approx([200, 300, 300], abs=5)  # all but the last operations
    assert completion.read_tokens >= 299


def test_another_answer_in_between_changes_no_token(endless: Model) -> None:
    alone = finished(endless.complete(PROMPT, WILD, 60)).tokens
    running = endless.complete([9, 9, 9], WILD)
    again = endless.complete(PROMPT, WILD, 60)
    mixed = []
    for token in again.ids():
        mixed.append(token)
        next(running, None)
    assert mixed == alone == again.tokens


def test_ids_are_the_tokens_of_the_text(demo: Model) -> None:
    prompt = demo.template.encode([{"role": "user", "content": "Who are you?"}])
    as_text = finished(demo.complete(prompt, GREEDY))
    as_ids = demo.complete(prompt, GREEDY)
    assert list(as_ids.ids()) == as_ids.tokens == as_text.tokens
    assert list(demo.generate(prompt, temperature=0.0, repeat_penalty=1.0)) == as_text.tokens
    assert as_text.finish_reason == "stop"
    assert as_text.text == demo.detokenize(as_text.tokens) != ""
    assert not list(as_text) and not list(as_text.ids())


def test_characters_split_across_tokens(endless: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes hold whole characters, cut ones and impossible ones; pieces are never cut."""
    monkeypatch.setattr(generate, "LONGEST_BURST", 1)
    completion = endless.complete(PROMPT, WILD, 1000)
    pieces = list(completion)
    assert "".join(pieces) == completion.text == endless.detokenize(completion.tokens)
    joined = set(completion.text) - {"\ufffd"} - set(map(chr, range(128)))
    single = {endless.detokenize([token]) for token in completion.tokens}
    assert joined and not joined & single
    assert "\ufffd" in completion.text


# ---- the end ----


def test_it_stops_at_an_end_token_and_leaves_it_out(
    endless: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = finished(endless.complete(PROMPT, WILD, 50)).tokens
    ends = np.zeros_like(endless.ends)
    ends[free[20]] = 1
    monkeypatch.setattr(endless, "ends", ends)
    stopped = finished(endless.complete(PROMPT, WILD, 50))
    assert stopped.tokens == free[: free.index(free[20])]
    assert stopped.finish_reason == "stop"
    assert stopped.ended_with == free[20]


@pytest.mark.parametrize("count", [1, 2, 33])
def test_it_stops_at_max_tokens(count: int, endless: Model) -> None:
    completion = finished(endless.complete(PROMPT, GREEDY, count))
    assert len(completion.tokens) == count
    assert completion.finish_reason == "length"
    assert completion.ended_with is None
    assert len(list(endless.generate(PROMPT, max_tokens=count))) == count


def test_the_end_token_may_be_the_first(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "ends", np.ones_like(tiny.ends))
    completion = finished(tiny.complete(PROMPT, GREEDY, 5))
    assert (completion.tokens, completion.text, completion.finish_reason) == ([], "", "stop")


@pytest.mark.parametrize("left", [0, 1, 40])
def test_it_fills_the_context_exactly(left: int, tiny_path: Path) -> None:
    """The last token needs no place: it is only predicted."""
    with ondevice.load(tiny_path, threads=1, context=600) as model:
        model.ends[:] = 0
        prompt = np.random.default_rng(2).integers(0, 300, model.context - left).tolist()
        completion = finished(model.complete(prompt, GREEDY))
        assert completion.finish_reason == "length"
        assert len(completion.tokens) == left + 1
        logits = model.logits(prompt + completion.tokens[:-1])
    assert completion.tokens == logits[-left - 1 :].argmax(axis=1).tolist()


# ---- stopping it ----


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]])
def test_cancelled_before_it_begins(prompt: list[int], endless: Model) -> None:
    completion = endless.complete(prompt, GREEDY)
    completion.cancel()
    assert not list(completion) and not completion.tokens
    assert completion.finish_reason == "cancel"


def test_cancelled_while_it_is_read(endless: Model) -> None:
    completion = endless.complete(PROMPT, GREEDY)
    for _ in range(5):
        next(completion)
    completion.cancel()
    list(completion)
    assert completion.finish_reason == "cancel"
    assert len(completion.tokens) < 5 * generate.LONGEST_BURST
    expected = list(islice(endless.complete(PROMPT, GREEDY).ids(), len(completion.tokens)))
    assert completion.tokens == expected
    assert completion.text == endless.detokenize(expected)


def test_cancelled_by_another_thread_within_a_burst(
    endless: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last native call would make 4,000 tokens and fill the context: it looks up at each."""
    assert endless.ahead is not None
    monkeypatch.setattr(endless.ahead.depth, "fixed", 0)  # or calls are of other lengths
    monkeypatch.setattr(generate, "LONGEST_BURST", sys.maxsize)
    monkeypatch.setattr(generate, "BURST_SECONDS", 1e9)
    completion = endless.complete(PROMPT, GREEDY)
    with meanwhile(lambda: len(completion.tokens) >= 4095, completion.cancel):
        finished(completion)
    assert completion.finish_reason == "cancel"
    assert 4095 <= len(completion.tokens) < completion.max_tokens


def test_cancelled_in_the_prompt(endless: Model) -> None:
    """The batch is given up; the state stands where it began, and can go on from there."""
    prompt = np.random.default_rng(1).integers(0, 300, 4000).tolist()
    state = State(endless.config, endless.context)
    completion = Completion(endless, state, prompt, GREEDY)
    seen: list[int] = []

    def cancel() -> None:
        seen.append(state.position)
        completion.cancel()

    with meanwhile(lambda: state.position >= 512, cancel):
        finished(completion)
    assert (completion.tokens, completion.finish_reason) == ([], "cancel")
    assert seen == [state.position]
    assert state.position < len(prompt) - 1
    on = Completion(endless, state, prompt, GREEDY, 5)
    assert on.prefilled_tokens == len(prompt) - state.position
    assert finished(on).tokens == finished(endless.complete(prompt, GREEDY, 5)).tokens


def test_closed_early(endless: Model) -> None:
    completion = endless.complete(PROMPT, GREEDY)
    next(completion)
    completion.close()
    completion.close()
    assert completion.finish_reason == "cancel"
    assert completion.tokens
    assert not list(completion) and not list(completion.ids())


def test_closing_a_finished_answer_changes_nothing(tiny: Model) -> None:
    completion = finished(tiny.complete(PROMPT, GREEDY, 3))
    completion.close()
    completion.cancel()
    assert completion.finish_reason == "length"


def test_ids_of_a_closed_answer_run_nothing(endless: Model) -> None:
    state = State(endless.config, endless.context)
    completion = Completion(endless, state, PROMPT, GREEDY)
    ids = completion.ids()
    completion.close()
    assert list(ids) == []
    assert state.position == 0


@pytest.mark.parametrize("run", [finished, lambda completion: list(completion.ids())])
def test_an_answer_gives_its_memory_back_at_once(
    run: Callable[[Completion], object], tiny: Model
) -> None:
    """A state may hold gigabytes: it must not wait for the garbage collector."""
    state = State(tiny.config, tiny.context)
    held = weakref.ref(state)
    run(Completion(tiny, state, PROMPT, GREEDY, 3))
    gc.disable()
    try:
        del state
        assert held() is None
    finally:
        gc.enable()


# ---- timings ----


def test_timings_count_what_was_done(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "LONGEST_BURST", 1)
    prompt = demo.tokenize("It was a bright cold day, and")
    completion = demo.complete(prompt, GREEDY, 6)
    started, slept = time.perf_counter(), 0.0
    for _ in completion.ids():
        slept += 0.02
        time.sleep(0.02)
    taken = time.perf_counter() - started
    timings = completion.timings
    assert timings["load_seconds"] == demo.load_seconds > 0
    assert timings["prompt_seconds"] > 0
    assert timings["decode_seconds"] > 0
    assert timings["prompt_seconds"] + timings["decode_seconds"] <= taken - slept
    rate = len(prompt) / timings["prompt_seconds"]
    assert timings["prompt_tokens_per_second"] == pytest.approx(rate)
    rate = (len(completion.tokens) - 1) / timings["decode_seconds"]
    assert timings["decode_tokens_per_second"] == pytest.approx(rate)


@pytest.mark.parametrize("tokens", [0, 1])
def test_timings_of_nothing_are_plausible(tokens: int, endless: Model) -> None:
    completion = endless.complete(PROMPT * 100, GREEDY, 1)
    if not tokens:
        completion.cancel()
    finished(completion)
    assert len(completion.tokens) == tokens
    assert completion.timings["decode_tokens_per_second"] == 0
    assert all(math.isfinite(value) for value in completion.timings.values())
    assert completion.timings["prompt_tokens_per_second"] < 1e7


# ---- what is refused ----


@pytest.mark.parametrize("max_tokens", [0, -1, 2.5, "5"])
def test_max_tokens_out_of_range(max_tokens: Any, tiny: Model) -> None:
    with pytest.raises(UsageError) as caught:
        tiny.generate(PROMPT, max_tokens=max_tokens)
    assert str(caught.value) == f"max_tokens is {max_tokens!r}; it must be a whole number from 1"


def test_an_empty_prompt(tiny: Model) -> None:
    for start in (tiny.generate, tiny.complete):
        with pytest.raises(UsageError, match="the prompt is empty"):
            start([])


def test_an_unknown_option(tiny: Model) -> None:
    with pytest.raises(UsageError, match="unknown option temprature; there are min_p, repeat"):
        tiny.generate(PROMPT, temprature=0.5)
    with pytest.raises(UsageError, match="temperature is -1"):
        tiny.generate(PROMPT, temperature=-1)


def test_a_prompt_longer_than_the_context(tiny: Model) -> None:
    for start in (tiny.generate, tiny.complete, tiny.logits):
        with pytest.raises(UsageError, match=r"has 8193 tokens and the context only 8192"):
            start([1] * 8193)


@pytest.mark.parametrize("token", [-1, 384, 2**40, 2**70, 1.5, "a"])
def test_a_token_that_does_not_exist(token: Any, tiny: Model) -> None:
    for call in (tiny.generate, tiny.complete, tiny.logits, tiny.detokenize):
        with pytest.raises(UsageError, match="token") as caught:
            call([1, token])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [[True], np.ones(2, np.float32), {1, 2}, "", 5000, [[1, 5000]]])
def test_what_is_no_sequence_of_ids(tokens: Any, tiny: Model) -> None:
    with pytest.raises(UsageError):
        tiny.logits(tokens)
    with pytest.raises(UsageError):
        tiny.logits(iter([1, 2]))  # type: ignore[arg-type]
