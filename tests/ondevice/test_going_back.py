"""Editing, answering again, branching, saving: always what a fresh run over the tokens gives."""

import ctypes
import gc
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

import ondevice
from ondevice import generate, journal
from ondevice.generate import Completion
from ondevice.journal import open_session
from ondevice.model import Model
from ondevice.prompt_cache import PromptCache
from ondevice.sampling import Sampling
from ondevice.session import Session
from ondevice.snapshots import History, Snapshots, thinned
from ondevice.state import State
from quant.errors import Error, UsageError
from tests.ondevice.gguf_builder import Shape, tiny_model

GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
WILD = Sampling(temperature=100.0, top_k=0, top_p=1.0)


def take(completion: Completion, count: int) -> None:
    """Let an answer begin, and leave it."""
    list(islice(completion.ids(), count))


def logits_after(model: Model, state: State, tokens: list[int]) -> np.ndarray:
    """(vocab,): what follows `tokens`, of which the state has taken in the first."""
    list(Completion(model, state, tokens, GREEDY, 1).ids())
    row = model._forward.logits.memory[: 4 * model.config.vocabulary]
    return row.view(np.float32).copy()


def assert_fresh(session: Session) -> None:
    """The state, and what it says next, are those of a fresh run over the session's tokens."""
    session._settle()
    model, position = session.model, session.position
    tokens = session._tokens
    assert position <= len(tokens)
    state = State(model.config, model.context, model.kv)
    if position:
        list(Completion(model, state, tokens[:position], GREEDY, 1).ids())
    assert state.position == position
    assert np.array_equal(session._state.memory, state.memory)
    ahead = [*tokens[:position], 65]
    before = session._state.snapshot()
    expected = logits_after(model, state, ahead)
    assert np.array_equal(logits_after(model, session._state, ahead), expected)
    session._state.restore(before)


class Trace:
    """A random life of some sessions."""

    def __init__(self, model: Model, seed: int, folder: Path, guess: bool) -> None:
        self.guess = guess
        self.model, self.random = model, random.Random(seed)
        self.path = folder / "session"
        # guesses are wrong in the one, and often right in the other
        sampling = GREEDY if guess and seed % 2 else WILD
        self.sessions = [model.session(self.random.choice([None, "Be brief. " * 9]), sampling)]
        self.texts: dict[int, list[str]] = {id(self.sessions[0]): []}

    def session(self) -> Session:
        return self.random.choice(self.sessions)

    def text(self) -> str:
        return "".join(self.random.choices("abc xyz é\n", k=self.random.choice([0, 3, 40, 90])))

    def turn(self, session: Session) -> int:
        return self.random.randrange(-session.turns, session.turns)

    def replace(self, session: Session) -> None:
        if len(self.sessions) > 2:
            self.sessions.pop(self.random.randrange(3))
        self.sessions.append(session)

    def step(self) -> str:
        session = self.session()
        kinds = ["send", "send", "system", "clear"]
        if session.turns:
            kinds += ["edit", "regenerate", "branch", "undo", "save"] * 2
        if session.turns > 1:
            kinds += ["trim"]
        kind = self.random.choice(kinds)
        if self.guess:
            assert self.model.ahead is not None
            self.model.ahead.depth.fixed = self.random.choice([None, 0, 1, 2, 3, 4])
        count = self.random.choice([0, 1, 2, 7, 30])
        if kind == "send":
            take(session.send(self.text()), count)
        elif kind == "edit":
            take(session.edit(self.turn(session), self.text()), count)
        elif kind == "regenerate":
            take(session.regenerate(self.random.choice([None, self.turn(session)])), count)
        elif kind == "branch":
            self.replace(session.branch(self.turn(session)))
        elif kind == "undo":
            session.undo()
        elif kind == "trim":
            session.trim(self.random.choice([None, 1]))
        elif kind == "system":
            session.system = self.random.choice([None, "Be kind."])
        elif kind == "clear":
            session.clear()
        else:
            session.save(self.path)
            restored = self.model.restore(self.path)
            assert restored.messages == session.messages
            assert (restored.position, restored.system) == (session.position, session.system)
            assert restored.sampling == session.sampling
            self.replace(restored)
        return kind


@pytest.fixture
def small(endless: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The random model with room for two copies in memory and six on disk, in short bursts."""
    monkeypatch.setattr(generate, "LONGEST_BURST", 8)
    nbytes = State(endless.config, 64).memory.nbytes
    store = Snapshots(2 * nbytes, 6 * nbytes, tmp_path / "snapshots")
    monkeypatch.setattr(endless, "snapshots", store)
    monkeypatch.setattr(endless, "context", 6000)
    return endless


def run_traces(model: Model, seeds: range, folder: Path, guess: bool = False) -> set[str]:
    kinds = set()
    for seed in seeds:
        trace = Trace(model, seed, folder, guess)
        for _ in range(trace.random.randrange(3, 12)):
            kinds.add(trace.step())
            store = model.snapshots
            assert store.memory_bytes <= store.memory_budget
            assert store.disk_bytes <= store.disk_budget
        for session in trace.sessions:
            assert_fresh(session)
    return kinds


def test_random_lives(small: Model, tmp_path: Path) -> None:
    kinds = run_traces(small, range(40), tmp_path)
    assert kinds == {
        "send",
        "edit",
        "regenerate",
        "branch",
        "undo",
        "save",
        "trim",
        "system",
        "clear",
    }


@pytest.mark.slow
def test_a_thousand_random_lives(small: Model, tmp_path: Path) -> None:
    run_traces(small, range(1000, 2000), tmp_path)


@pytest.fixture(params=["head", "context"])
def guessing(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Model]:
    """A model that guesses ahead, with its own head or from the context, few tokens a burst."""
    monkeypatch.setattr(generate, "LONGEST_BURST", 8)
    layers = 1 if request.param == "head" else 0
    path = tiny_model(tmp_path / "m.gguf", shape=Shape(context_length=6000, mtp_layers=layers))
    with ondevice.load(path, threads=2) as model:
        model.ends[:] = 0
        nbytes = State(model.config, 64).memory.nbytes
        store = Snapshots(2 * nbytes, 6 * nbytes, tmp_path / "snapshots")
        monkeypatch.setattr(model, "snapshots", store)
        yield model


def test_random_lives_with_guesses(guessing: Model, tmp_path: Path) -> None:
    run_traces(guessing, range(20), tmp_path, guess=True)


@pytest.mark.slow
def test_a_thousand_random_lives_with_guesses(guessing: Model, tmp_path: Path) -> None:
    run_traces(guessing, range(1000, 2000), tmp_path, guess=True)


@pytest.mark.parametrize("kv", ["i12", "q8_0"])
def test_saved_and_restored_in_another_process(kv: str, demo: Model, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ondevice.load(demo.path, threads=1, kv=kv) as model:
        session = model.session("Be brief.", GREEDY)
        "".join(session.send("Hello"))
        session.save(path)
        expected = "".join(session.send("Who are you?"))
    with ondevice.load(demo.path, threads=2, kv=kv) as model:
        restored = model.restore(path)
        assert restored.system == "Be brief."
        answer = restored.send("Who are you?")
        assert "".join(answer) == expected
        assert answer.prefilled_tokens < answer.prompt_tokens / 2
        assert "".join(restored.edit(1, "Who are you?")) == expected


# ---- what going back costs ----


def test_an_edit_reads_only_the_changed_tail(small: Model) -> None:
    session = small.session(sampling=GREEDY)
    for number in range(20):
        take(session.send(f"message {number}"), 20)
    last_end = session._turns[-2].end
    assert last_end is not None
    answer = session.edit(-1, "message 21")
    assert answer.prefilled_tokens == answer.prompt_tokens - last_end + 1
    take(answer, 20)
    assert_fresh(session)


def test_regenerating_an_earlier_turn(small: Model) -> None:
    session = small.session(sampling=WILD)
    for number in range(3):
        take(session.send(f"message {number}"), 10)
    answer = session.regenerate(1)
    assert answer.prefilled_tokens == 1
    take(answer, 5)
    assert [m["content"] for m in session.messages[::2]] == ["message 0", "message 1"]
    assert_fresh(session)


def test_a_branch_leaves_the_session_as_it_was(small: Model) -> None:
    session = small.session(sampling=WILD)
    for number in range(3):
        take(session.send(f"message {number}"), 10)
    messages = session.messages
    other = session.branch(1)
    assert other.messages == messages[:4]
    answer = other.send("elsewhere")
    assert answer.prefilled_tokens < 60
    take(answer, 10)
    assert session.messages == messages
    assert_fresh(session)
    assert_fresh(other)
    assert small.session().branch().messages == []


def test_undo_takes_back_a_turn(small: Model) -> None:
    session = small.session(sampling=GREEDY)
    take(session.send("one"), 10)
    messages = session.messages
    take(session.send("two"), 10)
    assert session.undo() == "two"
    assert session.messages == messages
    assert_fresh(session)
    assert session.undo() == "one"
    assert session.position == 0
    with pytest.raises(UsageError, match="there is no turn to take back"):
        session.undo()


def test_trim_keeps_the_system_message_and_the_last_turns(small: Model) -> None:
    session = small.session("Be brief.", WILD)
    for number in range(5):
        take(session.send(f"message {number} " * 10), 5)
    messages = session.messages
    dropped, tokens = session.trim(2)
    assert dropped == 2
    assert (session.system, session.messages) == ("Be brief.", messages[4:])
    answer = session.send("And?")
    assert tokens < answer.prompt_tokens < 900
    take(answer, 5)
    assert_fresh(session)
    with pytest.raises(UsageError, match="has 4 turns, of which the last one stays; 1 to 3 can"):
        session.trim(4)
    assert session.trim()[0] == 1  # it fits as it is


def test_trim_does_not_read_a_long_system_message_again(small: Model) -> None:
    session = small.session("Be brief. " * 30, GREEDY)
    for number in range(4):
        take(session.send(f"message {number}"), 5)
    head = len(small.tokenize("Be brief. " * 30))
    session.trim(1)
    assert session.position > head
    answer = session.send("And?")
    assert answer.prompt_tokens - answer.prefilled_tokens > head
    take(answer, 5)
    assert_fresh(session)


def test_trim_frees_half_of_the_context(endless: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endless, "context", 600)
    session = endless.session("Be brief.", GREEDY)
    for number in range(16):
        take(session.send(f"message {number}"), 1)
    assert len(session._without(0)) > 300
    dropped, rest = session.trim()
    assert rest == len(session._without(0)) <= 300
    assert 3 < dropped < 13
    assert session.turns == 16 - dropped
    with pytest.raises(UsageError, match=r"the prompt has \d+ tokens and the context only 600"):
        session.send("much " * 300)


@pytest.mark.parametrize("turn", [3, -4, "one", True])
def test_a_turn_that_is_not_there(turn: int, small: Model) -> None:
    session = small.session(sampling=WILD)
    for _ in range(3):
        take(session.send("Hello"), 2)
    for act in (session.branch, session.regenerate, lambda turn: session.edit(turn, "x")):
        with pytest.raises(UsageError, match=r"the turn is .*; there are 3, from 0"):
            act(turn)


# ---- copies ----


def test_thinning_keeps_the_new_and_some_of_the_old() -> None:
    kept: list[int] = []
    for position in range(10, 20000, 10):
        kept.append(position)
        if len(kept) > 12:
            kept.remove(thinned(kept))
    assert kept[-3:] == [19970, 19980, 19990]
    gaps = [b - a for a, b in pairwise(kept)]
    assert gaps == sorted(gaps, reverse=True) or max(gaps[-4:]) < max(gaps[:4])
    assert kept[0] < 15000


def test_what_is_lost_is_read_again(small: Model) -> None:
    session = small.session(sampling=WILD)
    for number in range(4):
        take(session.send(f"message {number}"), 10)
    session.messages  # noqa: B018
    folder = small.snapshots._folder
    assert folder is not None
    for path in folder.iterdir():
        if path.name != "lock":
            path.write_bytes(b"x" + path.read_bytes()[1:])
    take(session.edit(1, "other"), 10)
    assert_fresh(session)


def test_a_copy_that_goes_to_disk_leaves_its_memory_to_the_next(small: Model) -> None:
    state = State(small.config, 500)
    history = History(small.snapshots)
    memories = set()
    for end in (20, 40, 60, 80, 100):
        list(Completion(small, state, list(range(end)), GREEDY, 1).ids())
        history.add(state)
        held = [slot.memory for slot in small.snapshots._slots.values() if slot.memory is not None]
        memories |= {memory.ctypes.data for memory in held}
    assert len(memories) == 2
    for position in (40, 20, 100, 60):
        history.restore(state, position)
        fresh = State(small.config, 500)
        list(Completion(small, fresh, list(range(position)), GREEDY, 1).ids())
        assert state.position == position and np.array_equal(state.memory, fresh.memory)


def test_without_a_folder_there_are_fewer_copies(
    endless: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = State(endless.config, 64).memory.nbytes
    (tmp_path / "file").touch()
    store = Snapshots(nbytes, 6 * nbytes, tmp_path / "file")
    monkeypatch.setattr(endless, "snapshots", store)
    session = endless.session(sampling=WILD)
    for number in range(4):
        take(session.send(f"message {number}"), 10)
    assert len(session._history.positions) == 1
    take(session.edit(1, "other"), 10)
    assert_fresh(session)


def test_copies_go_with_their_session(small: Model) -> None:
    session = small.session(sampling=WILD)
    for number in range(4):
        take(session.send(f"message {number}"), 10)
    other = session.branch()
    folder = small.snapshots._folder
    assert folder is not None and len(list(folder.iterdir())) > 3
    del session
    take(other.regenerate(), 10)
    other.cancel()
    assert len(other.messages) == 8
    del other
    assert (small.snapshots.memory_bytes, small.snapshots.disk_bytes) == (0, 0)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    small.snapshots.close()
    assert not folder.exists()


def test_a_history_is_of_one_sequence(small: Model) -> None:
    state = State(small.config, 500)
    history = History(small.snapshots)
    tokens = list(range(100))
    for end in (20, 40, 60, 80):
        list(Completion(small, state, tokens[:end], GREEDY, 1).ids())
        history.add(state)
    assert history.positions == [20, 40, 60, 80]
    history.cut(70)
    history.restore(state, 59)
    assert state.position == 40
    history.restore(state, 39)
    assert state.position == 20
    history.restore(state, 60)
    assert state.position == 60
    history.restore(state, 10)
    assert state.position == 0


# ---- files that are refused ----


@pytest.fixture
def saved(small: Model, tmp_path: Path) -> Path:
    session = small.session(sampling=WILD)
    take(session.send("Hello"), 40)
    path = tmp_path / "saved"
    session.save(path)
    return path


def assert_refused(model: Model, path: Path, match: str) -> None:
    with pytest.raises(Error, match=match) as caught:
        model.restore(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_every_byte_counts(saved: Path, small: Model) -> None:
    whole = bytearray(saved.read_bytes())
    step = max(1, len(whole) // 300)
    for place in sorted(
        {*range(80), *range(0, len(whole), step), *range(len(whole) - 20, len(whole))}
    ):
        whole[place] ^= 0x10
        saved.write_bytes(whole)
        assert_refused(small, saved, "damaged|cut short|no session file|version|JSON")
        whole[place] ^= 0x10
    saved.write_bytes(whole)
    small.restore(saved)


def test_a_file_that_was_cut(saved: Path, small: Model) -> None:
    whole = saved.read_bytes()
    lengths = {*range(100), *range(100, len(whole), len(whole) // 100), len(whole) - 1}
    lengths |= {place + d for d in (0, 4, 8, 16) for place in boundaries(whole)[:-1]}
    for length in sorted(lengths - {len(whole)}):
        saved.write_bytes(whole[:length])
        assert_refused(small, saved, "cut short|no session file|damaged")
    saved.write_bytes(whole + b"more")
    assert_refused(small, saved, "4 bytes follow")


def boundaries(whole: bytes) -> list[int]:
    """Where the records of a file end."""
    places = [12]
    while places[-1] < len(whole):
        length = int.from_bytes(whole[places[-1] + 8 : places[-1] + 16], "little")
        places.append(places[-1] + 16 + length)
    return places


def test_foreign_files(saved: Path, small: Model, tmp_path: Path) -> None:
    assert_refused(small, tmp_path / "none", "there is no such file")
    assert_refused(small, tmp_path, "this is a folder")
    assert_refused(small, small.path, "no session file: it begins with 47 47 55 46")
    saved.write_bytes(saved.read_bytes().replace(b'"kind": "session"', b'"kind": "another"', 1))
    assert_refused(small, saved, "damaged")


def test_another_version(saved: Path, small: Model) -> None:
    raw = bytearray(saved.read_bytes())
    raw[8] = 1
    saved.write_bytes(raw)
    assert_refused(small, saved, "has version 1 of the format; this program reads version 5")


def test_another_model(saved: Path, small: Model, demo: Model) -> None:
    assert_refused(demo, saved, "made with another model")


def test_another_cache_or_context(saved: Path, small: Model) -> None:
    with ondevice.load(small.path, threads=1, kv="q8_0") as model:
        assert_refused(model, saved, "made with kv type i12; the model is open with q8_0")
    with ondevice.load(small.path, threads=1, context=20) as model:
        assert_refused(model, saved, r"has \d\d tokens and the context only 20")


def test_a_copy_of_the_model_is_the_same_model(saved: Path, small: Model, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.gguf"
    path.write_bytes(small.path.read_bytes())
    with ondevice.load(path, threads=1) as model:
        assert model.restore(saved).position > 40
    raw = bytearray(path.read_bytes())
    raw[-len(raw) // 3 :] = bytes(len(raw[-len(raw) // 3 :]))
    path.write_bytes(raw)
    with ondevice.load(path, threads=1) as model:
        assert_refused(model, saved, "made with another model")


def test_a_file_that_cannot_be_written(small: Model, tmp_path: Path) -> None:
    session = small.session(sampling=WILD)
    for path in (tmp_path / "none" / "s", tmp_path):
        with pytest.raises(Error, match=r"there is no folder|this is a folder"):
            session.save(path)
    path = tmp_path / "s"
    session.save(path)
    before = path.read_bytes()
    session.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


# ---- over a long time ----


def anonymous_memory() -> int:
    """Bytes of this process that no file backs.

    Without what the C library's heap keeps for later: glibc, up to twice the largest block that it
    ever gave back.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def soak(model: Model, turns: int, folder: Path) -> list[tuple[int, int, int]]:
    """So many short turns of two sessions: (turn, anonymous memory, Python objects) on the way."""
    cache = PromptCache(model, folder / "prompts", budget=2 << 20)
    model.prompt_cache = cache
    store = model.snapshots
    sessions = [open_session(model, "soak", "Be brief. " * 60), model.session("Be kind. " * 60)]
    chance = random.Random(1)
    taken = []
    for number in range(turns + 1):
        if number % 50 == 0:
            gc.collect()
            taken.append((number, anonymous_memory(), sys.getallocatedblocks()))
        session = chance.choice(sessions)
        if session.position > 2500:
            session.trim()
        take(session.send("word " * chance.choice([3, 3, 3, 300])), chance.randrange(1, 8))
        if chance.random() < 0.1:
            take(session.edit(chance.randrange(session.turns), "another"), 3)
        if chance.random() < 0.02:
            sessions[1] = sessions[0].branch()
        assert store.memory_bytes <= store.memory_budget
        assert store.disk_bytes <= store.disk_budget
        for path, budget in (
            (store._folder, store.disk_budget),
            (folder / "prompts", cache.budget),
            (folder / "cache" / "sessions", 8 << 20),
        ):
            used = sum(p.stat().st_size for p in path.rglob("*")) if path else 0
            assert used <= budget + (1 << 16), path
    for session in sessions:
        assert_fresh(session)
    sessions[0].close()
    return taken


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_budgets_hold(small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(small, "prompt_cache", None)
    assert [number for number, *_ in soak(small, 60, tmp_path)] == [0, 50]


SOAK = """
import json, random, string, sys
from pathlib import Path
import ondevice
from ondevice import generate, journal, usage
from ondevice.snapshots import Snapshots
from ondevice.state import State
from tests.ondevice.gguf_builder import Shape, tiny_model
from tests.ondevice.test_going_back import soak

folder, turns = Path(sys.argv[1]), int(sys.argv[2])
journal.cache_root = usage.cache_root = lambda: folder / "cache"
generate.LONGEST_BURST = 8
path = tiny_model(folder / "m.gguf", shape=Shape(context_length=6000))
model = ondevice.load(path, threads=2)
model.ends[:] = 0
nbytes = State(model.config, 64).memory.nbytes
model.snapshots = Snapshots(2 * nbytes, 6 * nbytes, folder / "snapshots")
# the tokenizer keeps the first 10,000 words that it sees, some 4 MB, and then no more
chance = random.Random(2)
for _ in range(12000):
    model.tokenize("".join(chance.choices(string.ascii_lowercase, k=8)))
json.dump(soak(model, turns, folder), sys.stdout)
"""


def soaked(folder: Path, turns: int) -> list[list[int]]:
    """What `soak` says in a process of its own, tokens being guessed ahead."""
    done = subprocess.run(
        [sys.executable, "-c", SOAK, str(folder), str(turns)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        check=True,
    )
    taken: list[list[int]] = json.loads(done.stdout)
    return taken


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_turns(tmp_path: Path) -> None:
    """Memory after 500 turns is memory after 2,000.

    It goes up and down by some 2 MB, as the caches of two states are filled and dropped, so peaks
    are compared. Between them lie a thousand turns, so that a kilobyte left behind by each would
    show, and so would one Python object by every third.
    """
    taken = soaked(tmp_path, 2000)
    early = [entry for entry in taken if 500 <= entry[0] <= 1000]
    late = [entry for entry in taken if 1500 <= entry[0] <= 2000]
    assert max(e[1] for e in late) - max(e[1] for e in early) < 1 << 20
    assert max(e[2] for e in late) - max(e[2] for e in early) < 300
