"""Sessions with names: what a killed process leaves is whole, and goes on where it was."""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import ondevice
from ondevice import journal
from ondevice.generate import Completion
from ondevice.journal import go_on_as, model_of, names, open_session
from ondevice.kernels import layout
from ondevice.model import Model
from ondevice.sampling import Sampling
from ondevice.session import Session
from ondevice.state import State
from ondevice.state_folder import StateFolder
from quant.errors import Error, ResourceError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
WILD = Sampling(temperature=100.0, top_k=0, top_p=1.0, seed=4)


def take(completion: Completion, count: int = 10) -> None:
    list(islice(completion.ids(), count))


def found(model: Model, name: str) -> Session:
    """A session as it is opened, closed again."""
    session = open_session(model, name, must_exist=True)
    session.close()
    return session


def assert_as_before(session: Session, before: Session) -> None:
    assert session.messages == before.messages
    assert session._tokens == before._tokens
    assert session.system == before.system
    assert session.sampling == before.sampling


def assert_fresh(session: Session) -> None:
    """The state is that of a fresh run over the first of the session's tokens."""
    session._settle()
    model = session.model
    state = State(model.config, model.context)
    tokens = session._tokens[: session.position]
    if tokens:
        list(Completion(model, state, tokens, GREEDY, 1).ids())
    assert np.array_equal(session._state.memory, state.memory)


def test_a_session_goes_on_where_it_was(endless: Model) -> None:
    first = open_session(endless, "one", "Be brief.", GREEDY)
    for text in ("Hello", "Who are you?", "é\n\0🌍"):
        take(first.send(text))
    first.close()
    position = first.position
    assert names() == ["one"]
    second = open_session(endless, "one", must_exist=True)
    assert_as_before(second, first)
    assert second.position == position
    assert_fresh(second)
    answer = second.send("And?")
    assert answer.prefilled_tokens < 60
    take(answer)
    third = first.send("And?")
    take(third)
    assert third.tokens[:10] == answer.tokens[:10]
    edited = second.edit(3, "But?")
    assert edited.prefilled_tokens < 60
    take(edited)
    assert_fresh(second)
    second.close()


def test_whatever_is_done_is_what_comes_back(endless: Model) -> None:
    chance = random.Random(5)
    session = open_session(endless, "one", None, GREEDY)
    for _ in range(40):
        kind = chance.choice(["send", "edit", "regenerate", "undo", "trim", "system", "clear"])
        if not session.turns or kind == "send" or (kind == "trim" and session.turns < 2):
            take(session.send("x" * chance.randrange(300)), chance.randrange(20))
        elif kind == "edit":
            take(session.edit(chance.randrange(session.turns), "edited"), 4)
        elif kind == "regenerate":
            take(session.regenerate(chance.randrange(session.turns)), 4)
        elif kind == "system":
            session.system = chance.choice([None, "Be kind."])
        elif kind == "clear" and chance.random() < 0.8:
            continue
        else:
            getattr(session, kind)()
        if chance.random() < 0.4:
            session.close()
            again = open_session(endless, "one")
            assert_as_before(again, session)
            assert_fresh(again)
            session = again
    session.close()


def test_most_recent_first(endless: Model) -> None:
    assert names() == []
    for name in ("b", "a", "c", "b"):
        session = open_session(endless, name)
        take(session.send("Hello"))
        session.close()
        time.sleep(0.01)
    assert names() == ["b", "c", "a"]
    assert model_of("a") == str(endless.path)
    with pytest.raises(UsageError, match="there is no session 'd'; there are: b, c, a"):
        open_session(endless, "d", must_exist=True)


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "a\\b", ".hidden", "x\n", "con:", "n" * 65, " a"]
)
def test_names_that_are_refused(name: str, endless: Model) -> None:
    with pytest.raises(UsageError, match="session's name") as caught:
        open_session(endless, name)
    assert "\n" not in str(caught.value)


def test_options_and_system_replace_what_was(endless: Model) -> None:
    session = open_session(endless, "one", "Be brief.", GREEDY)
    session.close()
    session = open_session(endless, "one", "Be kind.", options={"top_k": 3})
    session.close()
    session = open_session(endless, "one")
    assert session.system == "Be kind."
    assert (session.sampling.top_k, session.sampling.temperature) == (3, 0.0)
    session.close()


def test_a_session_goes_on_under_another_name(endless: Model) -> None:
    session = open_session(endless, "one", "Be brief.", GREEDY)
    take(session.send("Hello"))
    take(session.send("word " * 300))
    left = session.messages
    tokens = list(session._tokens)
    go_on_as(session, "two")
    assert session.journal is not None and session.journal.name == "two"
    old = open_session(endless, "one", must_exist=True)  # nobody holds it any more
    assert (old.messages, old._tokens) == (left, tokens)
    take(session.send("Why?"))
    session.close()
    new = open_session(endless, "two", must_exist=True)
    assert_as_before(new, session)
    assert new.position == session.position
    assert new.messages[:4] == left and new.turns == 3
    assert (old.turns, open_turns("one", endless, old)) == (2, 2)
    for back in (new, old):
        assert_fresh(back)
    with pytest.raises(UsageError, match="there is a session 'one' already"):
        go_on_as(new, "one")
    with pytest.raises(ResourceError, match="session 'two' is open"):
        go_on_as(new, "two")
    with pytest.raises(UsageError, match="the session's name is 'a/b'"):
        go_on_as(new, "a/b")
    assert new.journal is not None and new.journal.name == "two"
    new.close()


def open_turns(name: str, model: Model, session: Session) -> int:
    """How many turns a session has on disk."""
    session.close()
    again = open_session(model, name)
    again.close()
    return again.turns


def test_a_conversation_without_a_name_gets_one(endless: Model) -> None:
    session = endless.session(sampling=GREEDY)
    answer = session.send("word " * 300)
    take(answer)  # it has not ended yet
    go_on_as(session, "one")
    assert session.journal is not None
    begun = session.position
    take(session.send("And?"))
    session.close()
    again = open_session(endless, "one", must_exist=True)
    assert_as_before(again, session)
    assert again.turns == 2 and again.position == session.position > begun > 900
    assert_fresh(again)
    again.close()


# ---- damage ----


def test_a_journal_cut_anywhere(endless: Model, own_cache: Path) -> None:
    session = open_session(endless, "one", None, GREEDY)
    for text in ("Hello", "Who are you?"):
        take(session.send(text), 12)
    session.close()
    path = own_cache / "sessions" / "one" / "journal"
    whole, tokens = path.read_bytes(), session._tokens
    length = int.from_bytes(whole[20:28], "little") + 28
    shortest = int.from_bytes(whole[length + 8 : length + 16], "little") + length + 16
    seen = set()
    for cut in [*range(shortest, len(whole), 7), len(whole)]:
        path.write_bytes(whole[:cut])
        again = open_session(endless, "one")
        assert again._tokens == tokens[: len(again._tokens)]
        assert_fresh(again)
        seen.add(len(again._tokens))
        again.close()
    assert len(seen) > 4
    for cut in range(0, shortest, 9):
        path.write_bytes(whole[:cut])
        with pytest.raises(
            Error, match=r"journal: .*(cut short|no journal file|damaged)"
        ) as caught:
            open_session(endless, "one")
        assert "\n" not in str(caught.value)


def test_states_that_were_damaged_are_read_again(endless: Model, own_cache: Path) -> None:
    session = open_session(endless, "one", None, GREEDY)
    take(session.send("Hello " * 100), 12)
    take(session.send("Why?"), 12)
    session.close()
    folder = own_cache / "sessions" / "one" / "state"
    files = sorted(folder.iterdir())
    assert {path.suffix for path in files} == {".keys", ".memory"}
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        for place in (0, len(whole[path]) // 2, len(whole[path]) - 1):
            for other, raw in whole.items():
                other.write_bytes(raw)
            raw = bytearray(whole[path])
            raw[place] ^= 1
            path.write_bytes(raw)
            again = open_session(endless, "one")
            assert_as_before(again, session)
            assert_fresh(again)
            take(again.send("And?"), 3)
            assert_fresh(again)
            again.undo()
            again.close()


def test_another_model_or_context(endless: Model, demo: Model) -> None:
    session = open_session(endless, "one", None, GREEDY)
    take(session.send("Hello"), 30)
    session.close()
    with pytest.raises(Error, match="journal: made with another model"):
        open_session(demo, "one")
    with (
        ondevice.load(endless.path, threads=1, kv="q8_0") as model,
        pytest.raises(UsageError, match="made with kv type i12; the model is open with q8_0"),
    ):
        open_session(model, "one")
    with (
        ondevice.load(endless.path, threads=1, context=20) as model,
        pytest.raises(UsageError, match=r"the session has \d+ tokens and the context only 20"),
    ):
        open_session(model, "one")
    open_session(endless, "one").close()  # none of them kept the lock


# ---- where nothing can be written ----


def test_a_folder_that_cannot_be_made(endless: Model, own_cache: Path) -> None:
    own_cache.mkdir()
    (own_cache / "sessions").touch()
    with pytest.warns(UserWarning, match="session 'one' is not recorded: "):
        session = open_session(endless, "one")
    take(session.send("Hello"))
    session.close()


@pytest.mark.parametrize("what", ["append", "state", "rewrite"])
def test_a_disk_that_fills_up(what: str, endless: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(endless, "one", None, GREEDY)
    take(session.send("Hello"))
    session.messages  # noqa: B018

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if what == "append":
        monkeypatch.setattr(journal.Journal, "_append", full)
    elif what == "state":
        monkeypatch.setattr(journal.StateFolder, "save", full)
    else:
        monkeypatch.setattr(journal.Journal, "_rewrite", full)
    with pytest.warns(UserWarning, match="is not recorded|is not kept"):
        take(session.send("Who are you?"))
        session.undo()
        take(session.send("Who?"))
        session.messages  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(session.send("And?"))
        assert session.turns == 3
        session.close()
    monkeypatch.undo()
    assert_fresh(session)


# ---- growth ----


@pytest.mark.parametrize("depth", [0, 2])
def test_a_long_answer_is_not_read_again(
    depth: int, endless: Model, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "STRIDE", 64)
    monkeypatch.setattr(endless.ahead.depth, "fixed", depth)
    plain = Session(endless, None, GREEDY).send("Who are you?")
    take(plain, 700)
    session = open_session(endless, "one", sampling=GREEDY)
    folder = own_cache / "sessions" / "one"
    answer = session.send("Who are you?")
    for number, _ in enumerate(islice(answer.ids(), 700)):
        if number % 100 == 99:
            shutil.copytree(folder, own_cache / "sessions" / f"killed {number}")
    assert len(list((folder / "state").glob("*.memory"))) == 1  # the newest
    assert answer.tokens[:700] == plain.tokens[:700]
    session.close()
    assert len(list((folder / "state").glob("*.memory"))) == 1  # the end's
    for number in range(99, 700, 100):
        killed = open_session(endless, f"killed {number}", must_exist=True)
        assert len(killed._tokens) - killed.position <= 64 + 16
        assert killed._tokens == session._tokens[: len(killed._tokens)]
        assert_fresh(killed)
        killed.close()


def test_a_session_takes_no_more_than_it_needs(
    endless: Model, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SLACK", 1000)
    monkeypatch.setattr(journal, "MEMORIES", 30000)
    session = open_session(endless, "one", None, GREEDY)
    folder = own_cache / "sessions" / "one"
    for number in range(60):
        take(session.send(f"message {number}"), 16)
        session.messages  # noqa: B018
        needed = 4 * len(session._tokens) + sum(100 + len(t.text) * 2 for t in session._turns) * 2
        assert (folder / "journal").stat().st_size < 2.5 * needed + 4000
        assert len(list((folder / "state").glob("*.memory"))) <= 2 + 30000 // 20000 + 1
        assert len(list((folder / "state").glob("*.keys"))) <= len(session._tokens) // 256
        if number % 3 == 2:
            session.undo()
    session.close()


# ---- other processes ----

CHILD = """
import mmap, random, sys
import numpy as np
import ondevice
from ondevice import generate, journal
from ondevice.kernels import layout
from ondevice.session import _messages
from pathlib import Path

folder, path, number, record = sys.argv[1:]
seed = int(number)
journal.cache_root = lambda: Path(folder)
generate.LONGEST_BURST = (256, 256, 256, 4)[seed % 4]
model = ondevice.load(path, threads=1)
model.ends[:] = 0
model.ahead.depth.fixed = seed // 2 % 3

# The step record is one that outlives the process, so that the number of tokens that the loop has
# counted is known whatever becomes of the journal.
with open(record, "r+b") as file:
    step = np.frombuffer(mmap.mmap(file.fileno(), 8 * layout.STEP_WORDS), np.int64)
made = generate.Completion.__init__
def __init__(self, *arguments, **options):
    made(self, *arguments, **options)
    step[:] = self._step
    self._step = step
generate.Completion.__init__ = __init__

options = {"seed": seed, "temperature": (100.0, 0.0)[seed % 3 == 2], "top_k": 0, "top_p": 1.0}
session = journal.open_session(model, "one", options=options)
chance = random.Random(seed)
print("open", flush=True)
while True:
    text = "".join(chance.choices("abc xyz", k=chance.choice([3, 300])))
    kind = chance.choice(["send", "send", "regenerate", "undo", "trim"])
    if session.turns > 1 and session.position > 6000:
        kind = "trim"
    elif not session.turns or (kind == "trim" and session.turns < 2):
        kind = "send"
    session._settle()
    if kind == "send" and session.turns:
        asked = [*_messages(session._turns), {"role": "user", "content": text}]
        rendered = model.template.encode([*session._system_message(), *asked])
        if session._after_last_answer(session._turns, rendered) is None:
            kind = "rendered anew"  # an answer whose text has other tokens, such as control tokens
    print(kind, flush=True)
    step[layout.HISTORY_LENGTH] = 0
    if kind in ("trim", "undo"):
        getattr(session, kind)()
        continue
    answer = session.regenerate() if kind == "regenerate" else session.send(text)
    print(*session._tokens, flush=True)
    for number, token in zip(range(chance.choice([40, 400])), answer.ids()):
        if number % 16 == 0:
            shown = session._tokens[: answer.prompt_tokens] + answer.tokens[: number + 1]
            print(*shown, flush=True)
"""


def start(folder: Path, model: Path, seed: int) -> subprocess.Popen[bytes]:
    (folder / "step").write_bytes(bytes(8 * layout.STEP_WORDS))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(model), str(seed), str(folder / "step")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )


def killed_after(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What a child prints until it is killed."""
    assert child.stdout is not None
    printed: list[bytes] = []
    reader = threading.Thread(target=lambda out=child.stdout: printed.append(out.read()))  # type: ignore[misc]
    reader.start()  # so that a full pipe does not hold up the child
    time.sleep(seconds)
    child.kill()
    reader.join()
    child.stdout.close()
    child.wait()
    return printed[0]


def counted(folder: Path) -> int:
    """Tokens of prompt and answer that a killed child's decode loop had; 0 between answers."""
    return int(np.fromfile(folder / "step", np.int64)[layout.HISTORY_LENGTH])


def assert_answer_right(session: Session) -> None:
    """The last answer is the beginning of what the model says."""
    last, model = session._turns[-1], session.model
    assert last.prompt is not None
    answer = session._tokens[last.prompt : last.end]
    state = State(model.config, model.context)
    again = Completion(model, state, session._tokens[: last.prompt], session.sampling)
    assert list(islice(again.ids(), len(answer))) == answer


def kill_and_open(model: Model, folder: Path, moments: int) -> tuple[int, int, int]:
    """What was shown is kept, and so is what was chosen, but for a token.

    At so many moments, and more until one of them is within an answer. How many were; after how
    many of them the journal alone would have lost tokens; the most that a moment lost.
    """
    folder.mkdir()
    chance = random.Random(moments)
    resumed, lost, rescued = 0, [], 0
    for seed in range(10 * moments):
        if seed >= moments and lost and resumed:
            break
        child = start(folder, model.path, seed)
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line == b"open\n"
        printed = killed_after(child, chance.random() * 0.5).decode()
        lines = printed.split("\n")[:-1]  # what has no end was not shown
        shutil.rmtree(folder / "sessions" / "alone", ignore_errors=True)
        leave = shutil.ignore_patterns("answer")
        shutil.copytree(folder / "sessions" / "one", folder / "sessions" / "alone", ignore=leave)
        session = open_session(model, "one", must_exist=True)
        if chosen := counted(folder):
            lost.append(chosen - len(session._tokens))
            rescued += len(session._tokens) - len(found(model, "alone")._tokens) > 1
            assert lost[-1] <= 1
            assert_answer_right(session)
        before = next((n for n in reversed(range(len(lines))) if lines[n][0].isdigit()), None)
        changes = {"undo", "trim", "regenerate", "rendered anew"}
        if before is not None and not changes & {*lines[before + 1 :]}:
            shown = [int(token) for token in lines[before].split()]
            assert session._tokens[: len(shown)] == shown
        kept = journal.memories(StateFolder(folder / "sessions/one/state", model), session._tokens)
        assert session.position == max(kept, default=0)
        resumed += session.position > 0
        assert_fresh(session)
        session.close()
    assert resumed
    return len(lost), rescued, max(lost)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_any_moment(endless: Model, tmp_path: Path, own_cache: Path) -> None:
    within, _, _ = kill_and_open(endless, own_cache, 8)
    assert within


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_a_hundred_moments(endless: Model, own_cache: Path) -> None:
    within, rescued, _ = kill_and_open(endless, own_cache, 100)
    assert within > 30 and rescued > 5


CHAT = """
import sys
import ondevice
from ondevice import journal, terminal
from pathlib import Path

folder, path, name, guesses = sys.argv[1:]
journal.cache_root = lambda: Path(folder)
model = ondevice.load(path, threads=2)
model.ends[:] = 0
model.ends[::50] = 1  # answers of some 50 tokens
model.ahead.depth.fixed = int(guesses)
sampling = ondevice.Sampling(temperature=100.0, top_k=0, top_p=1.0)
session = journal.open_session(model, name, sampling=sampling)
print("open", file=sys.stderr, flush=True)
terminal.piped(session, iter(lambda: "abc abc", None), sys.stdout, None)
"""


def kill_a_chat(model: Model, folder: Path, moments: int) -> tuple[int, int, int]:
    """Whatever a killed chat has printed is in its session, to the last character.

    At so many moments, and more until one of them cuts an answer. Answers printed in all, those
    that a kill cut, and the most characters that were kept unseen.
    """
    model.ends[::50] = 1  # as in the child
    chance, unseen, whole, cut = random.Random(moments), [], 0, 0
    for moment in range(10 * moments):
        if moment >= moments and cut:
            break
        name, guesses = f"chat {moment}", str(moment % 3)
        child = subprocess.Popen(
            [sys.executable, "-c", CHAT, str(folder), str(model.path), name, guesses],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        )
        assert child.stdout is not None and child.stderr is not None
        line = child.stderr.readline()
        assert line == b"open\n", line
        printed = killed_after(child, chance.random() * 0.3)
        child.stderr.close()
        session = open_session(model, name, must_exist=True)
        answers = [m["content"] for m in session.messages if m["role"] == "assistant"]
        kept = "".join(answer + "\n" for answer in answers)
        shown = printed.decode(errors="ignore")  # a write may be cut within a character
        assert kept.startswith(shown)
        assert_fresh(session)
        session.close()
        whole += shown.count("\n")
        cut += shown[-1:] not in ("", "\n")
        unseen.append(len(kept) - len(shown))
    return whole, cut, max(unseen)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_what_a_killed_chat_printed_is_kept(endless: Model, own_cache: Path) -> None:
    answers, cut, _ = kill_a_chat(endless, own_cache, 8)
    assert answers and cut


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_what_a_chat_killed_at_a_hundred_moments_printed_is_kept(
    endless: Model, own_cache: Path
) -> None:
    answers, cut, _ = kill_a_chat(endless, own_cache, 100)
    assert answers > 300 and cut > 30


def test_one_process_at_a_time(endless: Model, own_cache: Path) -> None:
    own_cache.mkdir()
    child = start(own_cache, endless.path, 1)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(ResourceError, match="session 'one' is open in another process"):
            open_session(endless, "one")
        open_session(endless, "two").close()
    finally:
        child.kill()
        child.stdout.close()
        child.wait()
    session = open_session(endless, "one")
    with pytest.raises(ResourceError, match="session 'one' is open"):
        open_session(endless, "one")
    session.close()
    open_session(endless, "one").close()
