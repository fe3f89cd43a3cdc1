"""Tokens that a killed process had chosen since the last burst are in the file of the answer."""

import dataclasses
import random
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

import ondevice
from ondevice import answer_file
from ondevice.generate import Completion
from ondevice.journal import go_on_as, names, open_session
from ondevice.model import Model
from ondevice.sampling import Sampling
from ondevice.session import Session
from tests.ondevice.test_journal import (
    GREEDY,
    WILD,
    assert_as_before,
    assert_fresh,
    found,
    take,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def left_behind(session: Session, name: str, answer: bytes | None = None) -> str:
    """A session as it would be found if the process were killed now.

    answer: what the file of the running answer is to hold; nothing removes it.
    """
    assert session.journal is not None
    folder = session.journal.path.parent
    copy = folder.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    if answer is not None:
        (copy / "answer").unlink(missing_ok=True)
    if answer:
        (copy / "answer").write_bytes(answer)
    return name


def in_a_burst(model: Model, sampling: Sampling = GREEDY, name: str = "one") -> Session:
    """A session whose decode loop has chosen tokens that its journal has not heard of."""
    session = open_session(model, name, "Be brief.", sampling)
    take(session.send("Hello"), 12)
    take(session.send("Why?"), 12)
    answer = session.send("Who are you?")
    take(answer, 3)
    go_on_unheard(answer)
    return session


def go_on_unheard(answer: Completion) -> None:
    """Let the decode loop choose some tokens without a word to anybody."""
    enough = len(answer.tokens) + 8
    while len(answer.tokens) < enough:
        answer._decode(8)


def answer_bytes(session: Session) -> bytes:
    assert session.journal is not None
    return session.journal.path.with_name("answer").read_bytes()


@pytest.mark.parametrize("guesses", [0, 2])
@pytest.mark.parametrize("sampling", [GREEDY, WILD])
def test_a_kill_within_a_burst_loses_no_token(
    guesses: int, sampling: Sampling, endless: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endless.ahead.depth, "fixed", guesses)
    session = in_a_burst(endless, sampling)
    left_behind(session, "killed")
    left_behind(session, "journal alone", b"")
    again = open_session(endless, "killed")
    left_behind(again, "killed again", b"")  # by now the journal has them
    assert_as_before(again, session)
    assert len(found(endless, "journal alone")._tokens) <= len(session._tokens) - 8
    assert_fresh(again)
    take(again.send("And?"))
    again.close()
    assert_as_before(found(endless, "killed"), again)
    assert_as_before(found(endless, "killed again"), session)
    session.close()


def test_an_answer_that_ended_within_the_lost_burst(
    endless: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = open_session(endless, "free", None, WILD)
    take(free.send("Hello"), 20)
    free.close()
    tokens = free._tokens[free._turns[0].prompt :]
    ends = np.zeros_like(endless.ends)
    ends[tokens[12]] = 1
    monkeypatch.setattr(endless, "ends", ends)
    session = open_session(endless, "one", None, WILD)
    answer = session.send("Hello")
    take(answer, 1)
    while answer.finish_reason is None:
        answer._decode(40)
    assert answer.ended_with == tokens[12]
    assert answer.tokens == tokens[: tokens.index(tokens[12])]
    left_behind(session, "killed")
    again = found(endless, "killed")
    assert again._tokens[again._turns[0].prompt :] == answer.tokens
    assert_as_before(again, session)
    session.close()


@pytest.mark.parametrize("what", ["edit", "regenerate", "send", "undo", "trim", "clear", "system"])
def test_a_discarded_answer_does_not_come_back(what: str, endless: Model) -> None:
    session = in_a_burst(endless, dataclasses.replace(WILD, seed=None))  # no answer is another's
    stale = answer_bytes(session)
    left_behind(session, "killed")
    if what == "edit":
        session.edit(2, "Who is she?")
    elif what == "regenerate":
        session.regenerate()
    elif what == "send":
        session.send("And?")
    elif what == "system":
        session.system = "Be kind."
        session.messages  # noqa: B018
    else:
        getattr(session, what)()
    left_behind(session, "begun")
    left_behind(session, "begun, file as before", stale)
    if what in ("edit", "regenerate", "send"):
        assert session.last is not None
        take(session.last, 3)
        left_behind(session, "answered, file as before", stale)
        go_on_unheard(session.last)
        left_behind(session, "answered")
        assert len(found(endless, "answered")._tokens) > len(
            found(endless, "answered, file as before")._tokens
        )
    session._settle()
    left_behind(session, "over")
    left_behind(session, "over, file as before", stale)
    for name in ("over", "over, file as before", "answered"):
        if name in names():
            again = found(endless, name)
            assert (again._tokens, again.messages) == (session._tokens, session.messages)
    for name in ("begun", "begun, file as before", "answered, file as before"):
        if name in names():
            again = found(endless, name)
            assert again._tokens == session._tokens[: len(again._tokens)]
            assert again.turns == session.turns
            assert "answered" in name or "answered" not in names() or again._turns[-1].answer == ""
    before = found(endless, "killed")
    session.close()
    assert_as_before(found(endless, "one"), session)
    assert len(before._tokens) == stale_length(stale)


def stale_length(answer: bytes) -> int:
    tokens = np.frombuffer(answer[answer_file.HEAD :], "<i4")
    return int(np.argmax(tokens == answer_file.UNKNOWN))


def test_an_answer_file_that_is_damaged_counts_as_none(endless: Model) -> None:
    session = in_a_burst(endless)
    other = in_a_burst(endless, name="other")
    foreign = answer_bytes(other)
    other.close()
    whole = answer_bytes(session)
    alone = found(endless, left_behind(session, "alone", b""))
    assert session.last is not None
    head, known = answer_file.HEAD, len(alone._tokens)
    chosen = stale_length(whole)
    assert found(endless, left_behind(session, "whole", whole))._tokens[known:]

    def changed(token: int, value: int) -> bytes:
        data = bytearray(whole)
        data[head + 4 * token : head + 4 * token + 4] = value.to_bytes(4, "little", signed=True)
        return bytes(data)

    damaged = [whole[:cut] for cut in (0, 5, head - 1, head, head + 3, len(whole) // 2)]
    damaged += [whole[:-1], whole[:-4], whole + bytes(4), whole[: head + 4 * chosen], foreign]
    damaged += [random.Random(1).randbytes(len(whole)), bytes(len(whole)), whole[4:] + bytes(4)]
    damaged += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in (0, 8, 15, 16, 23, 40)]
    damaged += [changed(n, whole[head + 4 * n] ^ 1) for n in (0, known - 1)]
    worst = (endless.config.vocabulary, -2, 2**31 - 1, -(2**31))
    damaged += [changed(n, value) for n in (known, chosen - 1) for value in worst]
    damaged += [whole[: head + 4 * chosen] + whole[head : head + 4] * (len(whole) // 4)]
    damaged += [damaged[-1][: len(whole)]]
    for data in damaged:
        left_behind(session, "killed", data)
        again = open_session(endless, "killed")
        assert_as_before(again, alone)
        take(again.send("And?"), 2)
        again.close()
        assert_as_before(found(endless, "killed"), again)
    session.close()


def test_a_folder_in_the_answer_files_place(endless: Model) -> None:
    session = in_a_burst(endless)
    left_behind(session, "killed", b"")
    assert session.journal is not None
    place = session.journal.path.parent.with_name("killed") / "answer"
    place.mkdir()
    again = open_session(endless, "killed")
    with pytest.warns(UserWarning, match="'killed' loses the last tokens: .*answer: .*directory"):
        take(again.send("And?"))
    take(again.send("But?"))  # told once
    again.close()
    assert_as_before(found(endless, "killed"), again)
    session.close()


def test_an_answer_file_of_another_context(endless: Model) -> None:
    with ondevice.load(endless.path, threads=1, context=400) as model:
        model.ends[:] = 0
        small = in_a_burst(model)
        left_behind(small, "killed")
        again = open_session(endless, "killed")
        assert_as_before(again, small)
        take(again.send("And?"), 4)
        assert len(answer_bytes(again)) > len(answer_bytes(small))
        left_behind(again, "killed again")
        again.close()
        assert_as_before(found(model, "killed again"), again)
        small.close()


def test_the_answer_file_goes_with_its_answer(endless: Model) -> None:
    session = open_session(endless, "one")
    assert session.journal is not None
    path = session.journal.path.with_name("answer")
    assert not path.exists()
    take(session.send("Hello"), 4)
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert any(path.read_bytes()[: answer_file.HEAD])
    session.cancel()
    session.messages  # noqa: B018
    assert not any(path.read_bytes()[: answer_file.HEAD])
    take(session.send("Hello"), 4)
    go_on_as(session, "two")
    assert not path.exists()
    take(session.send("Hello"), 4)
    session.close()
    assert not path.with_name("two").exists()
    assert names() == ["two", "one"]


def test_a_disk_with_little_room(
    endless: Model, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mapped might not be written to: bursts are recorded as they end, and no sooner."""
    monkeypatch.setattr(answer_file, "FREE", 1 << 62)
    session = open_session(endless, "one", None, GREEDY)
    with pytest.warns(UserWarning, match="'one' loses the last tokens: .*answer: the disk is full"):
        answer = session.send("Hello")
    take(answer, 12)
    shown = len(answer.tokens)
    go_on_unheard(answer)
    left_behind(session, "killed")
    again = found(endless, "killed")
    assert again._tokens[again._turns[0].prompt :] == answer.tokens[:shown]
    take(session.send("And?"))
    session.close()
    assert_as_before(found(endless, "one"), session)
