"""Guessing ahead changes no token and no bit of a state, whatever is guessed and taken back."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
import ondevice
from ondevice import generate
from ondevice.generate import Completion
from ondevice.kernels import ahead, delta, layout
from ondevice.kernels.cache import TILE
from ondevice.kernels.team import Team
from ondevice.model import Model
from ondevice.pace import Pace
from ondevice.sampling import Sampling
from ondevice.speculate import Prediction, head_cache_bytes, random_hook, ring_bytes
from ondevice.state import Snapshot, State
from quant.errors import Error, UsageError
from tests.ondevice.gguf_builder import Shape, tiny_model
from tests.ondevice.meanwhile import interrupt_main, meanwhile
from tools.random_checkpoint import Shape as CheckpointShape
from tools.random_checkpoint import write_checkpoint

GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
PENALISED = Sampling(temperature=0.0, repeat_penalty=1.3)
WILD = Sampling(temperature=1.5, top_k=0, top_p=1.0, seed=4)
CAREFUL = Sampling(temperature=0.8, top_k=30, top_p=0.9, min_p=0.02, repeat_penalty=1.1, seed=9)
SAMPLINGS = (GREEDY, PENALISED, WILD, CAREFUL)
DEPTHS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("speculate")
    found = {
        "predicts": tiny_model(folder / "predicts.gguf"),
        "looks up": tiny_model(folder / "looks-up.gguf", shape=Shape(mtp_layers=0)),
        "quantised": folder / "quantised.gguf",
    }
    shape = CheckpointShape(
        hidden=256, state_size=64, expert_width=256, shared_width=256, vocabulary=512
    )
    convert.convert(write_checkpoint(folder / "checkpoint", shape, 1), found["quantised"], "Q4_K_M")
    return found


@pytest.fixture(scope="module")
def predicting(paths: dict[str, Path]) -> Iterator[Model]:
    with ondevice.load(paths["predicts"], threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def looking_up(paths: dict[str, Path]) -> Iterator[Model]:
    with ondevice.load(paths["looks up"], threads=2) as model:
        yield model


def at_depth(
    model: Model,
    depth: int | None,
    prompt: list[int],
    sampling: Sampling,
    count: int | None,
    truth: list[int] | None = None,
    chance: float = 1.0,
) -> Completion:
    """An answer with so many tokens guessed; None leaves that to the model."""
    assert model.ahead is not None
    model.ahead.depth.fixed = depth
    kept = random_hook(model, truth or [], chance)
    completion = model.complete(prompt, sampling, count)
    assert "".join(completion) == completion.text
    model.ahead.record[ahead.TRUTH] = 0
    model.ahead.depth.fixed = None
    del kept
    return completion


def same_end(a: Completion, b: Completion) -> bool:
    """Whether two answers, their states included, are the same."""
    first, second = a._state, b._state
    return (
        (a.tokens, a.text, a.finish_reason, a.ended_with)
        == (b.tokens, b.text, b.finish_reason, b.ended_with)
        and first.position == second.position
        and first.pending == second.pending == 0
        and np.array_equal(first.memory, second.memory)
    )


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(0, 256, random.integers(1, longest)).tolist() for _ in range(count)]


# ---- the answer ----


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", ["predicts", "quantised"])
def test_same_answer_however_many_guesses_are_right(
    name: str, sampling: Sampling, paths: dict[str, Path]
) -> None:
    for threads in (1, 2):
        with ondevice.load(paths[name], threads=threads) as model:
            for prompt in prompts(3):
                plain = at_depth(model, 0, prompt, sampling, 50)
                assert plain.acceptance.cycles == 0
                for depth in DEPTHS:
                    for chance in (0.0, 0.5, 1.0):
                        truth = prompt + plain.tokens
                        guessed = at_depth(model, depth, prompt, sampling, 50, truth, chance)
                        assert same_end(plain, guessed), (depth, chance)


def test_greedy_answers_to_200_prompts(predicting: Model, looking_up: Model) -> None:
    for model in (predicting, looking_up):
        accepted = 0
        for number, prompt in enumerate(prompts(200)):
            # repetition, so that something is found in the context
            prompt = prompt + prompt[: len(prompt) // 2]
            plain = at_depth(model, 0, prompt, GREEDY, 24)
            depth = (None, *DEPTHS)[number % 5]
            guessed = at_depth(model, depth, prompt, GREEDY, 24)
            assert same_end(plain, guessed), (number, depth)
            accepted += sum(guessed.acceptance.right)
        assert accepted > 0


@pytest.mark.parametrize("sampling", [GREEDY, WILD])
def test_the_context_finds_what_was_there_before(sampling: Sampling, looking_up: Model) -> None:
    prompt = list(range(60)) * 3
    plain = at_depth(looking_up, 0, prompt, sampling, 60)
    guessed = at_depth(looking_up, 4, prompt, sampling, 60)
    assert same_end(plain, guessed)
    assert guessed.timings["drafted"] >= guessed.timings["accepted"]


def test_the_demo_guesses_well(demo: Model) -> None:
    """Half of the first guesses are right where it continues a text that it did not learn."""
    assert demo.ahead is not None and demo.ahead.predicts
    compared, right = np.zeros(4), np.zeros(4)
    for text in (
        "Sherlock Holmes took his bottle from the corner of the mantel-piece and",
        "For some little time his eyes rested thoughtfully upon the",
        "Three times a day for many months I had witnessed this performance, but",
        "Which is it to-day, I asked, morphine or",
        "It is cocaine, he said, a seven-per-cent solution. Would you care to",
    ):
        ids = demo.tokenize(text)
        plain = at_depth(demo, 0, ids, GREEDY, 150)
        guessed = at_depth(demo, 4, ids, GREEDY, 150)
        assert same_end(plain, guessed)
        compared += guessed.acceptance.compared
        right += guessed.acceptance.right
    assert right[0] / compared[0] >= 0.5, (right / compared).round(2)


@pytest.mark.parametrize("kv", ["i12", "q8_0"])
def test_experts_from_disk_and_small_caches(kv: str, paths: dict[str, Path]) -> None:
    with ondevice.load(paths["quantised"], threads=2, context=1024, kv=kv) as model:
        wanted = model.plan.needs.least
        plain = [at_depth(model, 0, prompt, CAREFUL, 60) for prompt in prompts(3)]
    with ondevice.load(paths["quantised"], threads=2, context=1024, kv=kv, memory=wanted) as model:
        for expected, prompt in zip(plain, prompts(3), strict=True):
            truth = prompt + expected.tokens
            for depth in (1, 4):
                guessed = at_depth(model, depth, prompt, CAREFUL, 60, truth, 0.7)
                assert same_end(expected, guessed)


def test_it_stops_where_plain_decoding_does(predicting: Model) -> None:
    """At an end token among the guesses, at every length, and where the context is full."""
    model = predicting
    prompt = prompts(1)[0]
    plain = at_depth(model, 0, prompt, WILD, 40)
    truth = prompt + plain.tokens
    for count in range(1, 12):
        for depth in DEPTHS:
            expected = at_depth(model, 0, prompt, WILD, count)
            assert same_end(expected, at_depth(model, depth, prompt, WILD, count, truth))
    ends = model.ends.copy()
    try:
        model.ends[plain.tokens[7]] = 1
        expected = at_depth(model, 0, prompt, WILD, 40)
        assert expected.finish_reason == "stop"
        for depth in DEPTHS:
            guessed = at_depth(model, depth, prompt, WILD, 40, truth)
            assert same_end(expected, guessed)
            assert guessed.ended_with == plain.tokens[7]
    finally:
        model.ends[:] = ends


def test_the_context_is_filled_exactly(paths: dict[str, Path]) -> None:
    with ondevice.load(paths["predicts"], threads=1, context=70) as model:
        model.ends[:] = 0
        prompt = prompts(1, 30)[0]
        plain = at_depth(model, 0, prompt, WILD, None)
        assert len(prompt) + len(plain.tokens) == 71
        for depth in DEPTHS:
            guessed = at_depth(model, depth, prompt, WILD, None, prompt + plain.tokens)
            assert same_end(plain, guessed)


def test_guesses_take_no_part_in_a_trial_of_fewer_threads_for_plain_decoding(
    predicting: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predicting.ahead is not None
    pace, cycle, run = Pace(2), predicting.ahead.cycle.records, Team.run
    while not pace.trying():
        pace.note(1, 0.1)
    seen = []

    def spy(team: Team, records: Any, step: Any, profile: Any = None, threads: Any = None) -> None:
        if records is cycle:
            seen.append(threads)
        run(team, records, step, profile, threads)

    monkeypatch.setattr(predicting, "_pace", pace)
    monkeypatch.setattr(Team, "run", spy)
    at_depth(predicting, 1, [5, 6, 7], GREEDY, 40)
    assert len(seen) > 1
    assert set(seen) == {2}


def test_cancelled_among_guesses(predicting: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is what the tokens so far make of it, and goes on from there."""
    monkeypatch.setattr(generate, "LONGEST_BURST", 3)
    model = predicting
    assert model.ahead is not None
    prompt = prompts(1)[0]
    plain = at_depth(model, 0, prompt, WILD, 60)
    model.ahead.depth.fixed = 3
    kept = random_hook(model, prompt + plain.tokens, 0.8)
    for after in (1, 2, 5, 20):
        completion = model.complete(prompt, WILD, 60)
        for count, _ in enumerate(completion.ids(), start=1):
            if count == after:
                completion.cancel()
        assert completion.finish_reason == "cancel"
        made = completion.tokens
        assert made == plain.tokens[: len(made)]
        rest = Completion(model, completion._state, prompt + made, WILD, 60 - len(made))
        assert list(rest.ids()) == plain.tokens[len(made) :]
    model.ahead.record[ahead.TRUTH] = 0
    model.ahead.depth.fixed = None
    del kept


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("way", ["cancel", "interrupt"])
@pytest.mark.parametrize("mtp_layers", [1, 0])
def test_stopped_at_any_moment_among_guesses(
    mtp_layers: int, way: str, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a burst, by another thread or Ctrl-C: state and rest are as if unguessed."""
    monkeypatch.setattr(generate, "LONGEST_BURST", sys.maxsize)
    monkeypatch.setattr(generate, "BURST_SECONDS", 1e9)
    path = tiny_model(tmp_path / "m.gguf", shape=Shape(context_length=4096, mtp_layers=mtp_layers))
    moments, among = np.random.default_rng(depth).integers(1, 1500, 12).tolist(), 0
    with ondevice.load(path, threads=2) as model:
        model.ends[:] = 0
        assert model.ahead is not None
        prompt = prompts(1)[0]
        plain = at_depth(model, 0, prompt, GREEDY, None).tokens
        whole = [*prompt, *plain]
        settle = model.settle

        def noted(state: State) -> None:
            nonlocal among
            among += state.pending > 0
            settle(state)

        monkeypatch.setattr(model, "settle", noted)
        kept = random_hook(model, whole, 0.7)
        for moment in moments:
            model.ahead.depth.fixed = depth
            answer = model.complete(prompt, GREEDY)
            length = answer._step[layout.HISTORY_LENGTH :]
            act = answer.cancel if way == "cancel" else interrupt_main
            with meanwhile(lambda length=length, at=moment: length[0] > at, act):  # type: ignore[misc]
                if way == "cancel":
                    list(answer.ids())
                else:
                    with pytest.raises(KeyboardInterrupt):
                        list(answer.ids())
            made, state = answer.tokens, answer._state
            assert 0 < len(made) < len(plain) and made == plain[: len(made)]
            assert (state.position, state.pending) == (len(prompt) + len(made) - 1, 0)
            model.ahead.depth.fixed = 0
            fresh = State(model.config, model.context)
            list(Completion(model, fresh, whole[: state.position], GREEDY, 1).ids())
            assert fresh.position == state.position
            assert np.array_equal(fresh.memory, state.memory)
            full = state.position // TILE
            assert np.array_equal(fresh.tiles[:, :full], state.tiles[:, :full])
            for guesses in (0, depth):
                model.ahead.depth.fixed = guesses
                before = state.snapshot()
                ahead_of = whole[: len(prompt) + len(made)]
                rest = list(Completion(model, state, ahead_of, GREEDY, 20).ids())
                assert rest == plain[len(made) : len(made) + 20]
                state.restore(before)
        del kept
    assert among > 0


def test_a_session_is_the_same(predicting: Model) -> None:
    assert predicting.ahead is not None
    answers = []
    for depth in (0, 1, 4, None):
        predicting.ahead.depth.fixed = depth
        session = predicting.session(sampling=CAREFUL)
        said = []
        for text in ("Hello", "and then?", "Tell me more."):
            said.append("".join(session.send(text)))
        said.append("".join(session.regenerate()))
        answers.append((said, session.position, session._state.memory.tobytes()))
    predicting.ahead.depth.fixed = None
    assert answers.count(answers[0]) == len(answers)


def test_timings_tell_how_it_went(predicting: Model) -> None:
    prompt = prompts(1)[0]
    plain = at_depth(predicting, 0, prompt, WILD, 50)
    assert (plain.timings["drafted"], plain.timings["accepted"]) == (0, 0)
    assert "acceptance_1" not in plain.timings
    guessed = at_depth(predicting, 2, prompt, WILD, 50, prompt + plain.tokens, 1.0)
    timings = guessed.timings
    assert timings["acceptance_1"] == timings["acceptance_2"] == 1.0
    assert "acceptance_3" not in timings
    assert 30 <= timings["accepted"] <= timings["drafted"] <= 50


# ---- sampling: the distribution ----


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 4])
def test_sampled_tokens_have_the_right_distribution(depth: int, predicting: Model) -> None:
    """Chi-square against the exact probabilities, over more than 100,000 tokens.

    The seeds differ, the prompt does not. Guesses are what greedy decoding says, often right. After
    each beginning that occurs often enough, tokens should be as frequent as the logits say.
    """
    model, kept = predicting, 3
    prompt = prompts(1)[0]
    options = {"temperature": 1.0, "top_k": kept, "top_p": 1.0, "repeat_penalty": 1.0}
    truth = prompt + at_depth(model, 0, prompt, GREEDY, 6).tokens
    counts: dict[tuple[int, ...], int] = {}
    runs, accepted = 25_000, 0
    for seed in range(runs):
        sampling = Sampling(seed=seed, **options)  # type: ignore[arg-type]
        answer = at_depth(model, depth, prompt, sampling, 6, truth)
        accepted += sum(answer.acceptance.right)
        for length in range(1, len(answer.tokens) + 1):
            beginning = tuple(answer.tokens[:length])
            counts[beginning] = counts.get(beginning, 0) + 1
    assert sum(counts.values()) >= 100_000
    assert accepted >= 1000

    statistic, freedom = 0.0, 0
    often = [(key, n) for key, n in counts.items() if len(key) < 6 and n >= 300]
    for before, total in [((), runs), *often]:
        logits = model.logits([*prompt, *before])[-1].astype(np.float64)
        best = np.argsort(-logits, kind="stable")[:kept]
        shares = np.exp(logits[best] - logits[best[0]])
        for token, share in zip(best.tolist(), shares / shares.sum(), strict=True):
            expected = share * total
            statistic += (counts.get((*before, token), 0) - expected) ** 2 / expected
        freedom += kept - 1
    assert freedom >= 50
    # the 99.9th percentile, by Wilson and Hilferty's approximation
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, freedom)


# ---- the state ----


class Trace:
    """A state that is moved at random, and the tokens that it should be equivalent to."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.random = np.random.default_rng(seed)
        self.state = State(model.config, 256, model.kv)
        assert model.ahead is not None
        model.ahead.prepare(model, self.state)
        self.tokens: list[int] = []
        self.history = np.zeros(256, np.int32)
        self.snapshots: list[tuple[Snapshot, list[int]]] = []

    def draw(self, count: int) -> list[int]:
        return self.random.integers(0, 256, count).tolist()

    def prefill(self) -> None:
        tokens = self.draw(int(self.random.integers(1, 12)))
        self.history[len(self.tokens) : len(self.tokens) + len(tokens)] = tokens
        step = self.model.step(self.state)
        assert self.model.prefill(self.state, step, np.array(tokens, np.int32))
        self.tokens += tokens

    def guess(self) -> np.ndarray:
        tokens = self.draw(int(self.random.integers(1, 6)))
        logits = self.model.look_ahead(self.state, tokens)
        back = int(self.random.integers(0, len(tokens)))
        self.state.take_back(back)
        self.tokens += tokens[: len(tokens) - back]
        return logits[len(tokens) - back - 1]

    def move(self) -> None:
        choice = self.random.integers(0, 10)
        if choice < 6 or len(self.tokens) > 200:
            self.guess()
        elif choice < 8:
            self.prefill()
        elif choice == 8:
            self.snapshots.append((self.state.snapshot(), list(self.tokens)))
        elif self.snapshots:
            snapshot, tokens = self.snapshots[int(self.random.integers(len(self.snapshots)))]
            self.state.restore(snapshot)
            self.tokens = list(tokens)
            # keys and values after this position will be others: no way back to those
            self.snapshots = [kept for kept in self.snapshots if len(kept[1]) <= len(tokens)]


@pytest.mark.parametrize("name", ["predicts", "quantised"])
def test_random_traces_equal_fresh_runs(name: str, paths: dict[str, Path]) -> None:
    with ondevice.load(paths[name], threads=2, context=256) as model:
        for seed in range(1000 if name == "predicts" else 20):
            trace = Trace(model, seed)
            trace.guess()
            for _ in range(12):
                if len(trace.tokens) < 190:
                    trace.move()
            logits = trace.guess()
            fresh = State(model.config, 256, model.kv)
            step = model.step(fresh)
            assert model.prefill(fresh, step, np.array(trace.tokens, np.int32))
            assert fresh.position == trace.state.position == len(trace.tokens)
            trace.state.settle()
            assert trace.state.pending == 0
            assert np.array_equal(fresh.memory, trace.state.memory), seed
            wanted = model.logits(trace.tokens)[-1]
            assert np.array_equal(logits.view(np.uint32), wanted.view(np.uint32)), seed
            for state in (fresh, trace.state):
                following = model.look_ahead(state, [1, 2])
                wanted = model.logits([*trace.tokens, 1, 2])[-2:]
                assert np.array_equal(following, wanted)


def test_taking_back_is_bounded(predicting: Model) -> None:
    state = State(predicting.config, 64)
    predicting.look_ahead(state, [1, 2, 3])
    assert (state.position, state.pending) == (3, 2)
    with pytest.raises(AssertionError):
        state.take_back(3)
    state.take_back(2)
    assert (state.position, state.pending) == (1, 0)
    state.settle()


def test_taking_back_runs_nothing_and_moves_nothing(
    predicting: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it costs no time at any size; `benchmarks/taking_back.py` measures it at 48 layers."""
    state = State(predicting.config, 64)
    predicting.look_ahead(state, [1, 2, 3, 4, 5])
    memory, cache = state.memory.copy(), state.cache.copy()
    with monkeypatch.context() as patched:
        patched.delattr(Team, "run")
        state.take_back(4)
    assert (state.position, state.pending) == (1, 0)
    assert np.array_equal(state.memory, memory) and np.array_equal(state.cache, cache)
    rest = predicting.look_ahead(state, [6])
    assert np.array_equal(rest[0], predicting.logits([1, 6])[1])


def test_the_journal_is_small_at_full_size() -> None:
    """4 tokens of the 48 layers of Qwen3-Next-80B-A3B."""
    layer = delta.journal_bytes(key_heads=16, value_heads=32, size=128)
    assert 36 * layer <= 6e6


# ---- what the block remembers ----


def test_prediction_follows_or_begins_anew(predicting: Model) -> None:
    config = predicting.config
    prediction = Prediction(config, 1024, "i12", batch=512)
    assert prediction.cache.nbytes >= head_cache_bytes(config, 1024, "i12")
    assert prediction.ring.nbytes >= ring_bytes(config, 512)
    assert not prediction.ready(0)
    prediction.note(0, 100)
    assert prediction.ready(100) and (prediction.start, prediction.end) == (0, 0)
    prediction.end = 100
    assert not prediction.ready(100)
    prediction.note(100, 900)
    assert prediction.ready(900)
    assert prediction.start == prediction.end == 900 - 512
    prediction.end = 900
    prediction.cut(700)
    assert (prediction.end, prediction.upto) == (700, 700)
    prediction.note(701, 702)  # somebody else moved the state
    assert not prediction.ready(703) and prediction.ready(702)
    assert prediction.start == prediction.end == 701
    prediction.cut(0)
    assert (prediction.start, prediction.end, prediction.kept, prediction.upto) == (0, 0, 0, 0)


# ---- opening ----


def test_modes(paths: dict[str, Path]) -> None:
    with ondevice.load(paths["predicts"], threads=1, mtp="off") as model:
        assert model.ahead is None
        state = State(model.config, 64)
        assert state.journal is state.prediction is None
        assert len(list(model.generate([1, 2, 3], max_tokens=5))) <= 5
        kernels = {kernel.__name__ for kernel in model._forward.kernels}
        assert not kernels & {"remember", "accept", "head_inputs"}
    with ondevice.load(paths["predicts"], threads=1, mtp="on") as model:
        completion = model.complete([1, 2, 3], GREEDY, 20)
        list(completion.ids())
        assert completion.acceptance.cycles > 0
    with pytest.raises(UsageError, match="has no multi-token-prediction block"):
        ondevice.load(paths["looks up"], mtp="on")
    with pytest.raises(UsageError, match="mtp is 'maybe'"):
        ondevice.load(paths["predicts"], mtp="maybe")


def test_damaged_weights_are_an_error_as_without(paths: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_model(
        tmp_path / "damaged.gguf", tensors={"output.weight": np.full((261, 64), 3e38, np.float32)}
    )
    with (
        ondevice.load(path, threads=1, mtp="on") as model,
        pytest.raises(Error, match="are not finite"),
    ):
        list(model.complete([1, 2, 3], GREEDY, 20).ids())
