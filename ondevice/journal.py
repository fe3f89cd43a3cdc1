"""Conversations by name, which outlive their process: a journal and the states beside it.

    sessions/NAME/lock       held by the one process that has the session open
    sessions/NAME/journal    what was said: records, appended as it happens
    sessions/NAME/answer     the running answer, token by token (answer_file.py)
    sessions/NAME/state/     states at the ends of answers, and of a long one that runs, the last
                             of each so many tokens (state_folder.py)

Records of the journal, each a JSON object and then tokens (int32):

    full   the whole conversation, as in a session file
    turn   turns and tokens that stay of what there was, then a message and the prompt's new tokens
    more   tokens of the answer, written before anybody sees them

What is appended goes to the operating system at once, so that it survives the process, and to the
disk at the beginning and end of an answer. Tokens are appended some at a time; those that a killed
process had chosen since are in the file of the running answer, which a tag ties to its turn, and
are appended when the session is opened. Reading stops at the first record that is not whole, which
a killed process may have left. A journal of more than twice what is needed is rewritten.

What cannot be written is reported by a warning, once, and the conversation goes on unrecorded.
"""

import dataclasses
import json
import os
import re
import secrets
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ondevice.answer_file import HEAD, TAG_BYTES, AnswerFile, tokens_beyond
from ondevice.locks import FileLock
from ondevice.records import Damaged, Reader, Writer, failure, opened, record_bytes, whole_file
from ondevice.session_file import check_head, session_of, talk
from ondevice.snapshots import thinned
from ondevice.state_folder import BLOCK, Saved, StateFolder
from quant.errors import Error, ResourceError, UsageError
from quant.folders import cache_root, private_folder
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.model import Model
    from ondevice.sampling import Sampling
    from ondevice.session import Session, Turn

KIND = "journal"
MOST_CUT = 1 << 20
"""Bytes at the end that a kill may have spoilt; more are worth a warning."""
SLACK = 1 << 16
"""Bytes of a journal that are not worth rewriting it."""
MEMORIES = 512 << 20
"""Bytes of memories that a session keeps on disk, beside the newest two."""
STRIDE = 512
"""Tokens of a running answer between two states that are kept, each in place of the one before."""
NAME_LIMIT = 64
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_LENGTH = struct.Struct("<I")


def sessions_folder() -> Path:
    """Where conversations with names are kept; ResourceError without a home folder."""
    try:
        return cache_root() / "sessions"
    except RuntimeError:
        raise ResourceError("there is no home folder to keep sessions in") from None


def checked_name(name: str) -> str:
    """UsageError unless a session may be called that, on any system."""
    if not name or len(name.encode(errors="replace")) > NAME_LIMIT:
        raise UsageError(f"a session's name has 1 to {NAME_LIMIT} bytes; {name[:80]!r} does not")
    if _FORBIDDEN.search(name) or name[0] in ". " or name[-1] in ". ":
        raise UsageError(
            f"the session's name is {name!r}; it must not begin or end with a dot or a space, "
            'nor hold a slash or any of \\ < > : " | ? *'
        )
    return name


def existing(name: str | None) -> str:
    """The name of a session that there is, by default the most recent; UsageError otherwise."""
    there = names()
    if name is None:
        if not there:
            raise UsageError("there is no session to continue; --session NAME begins one")
        return there[0]
    if not (sessions_folder() / checked_name(name) / "journal").exists():
        known = ", ".join(there[:5]) or "none"
        raise UsageError(f"there is no session {name!r}; there are: {known}")
    return name


def names() -> list[str]:
    """The sessions there are, the most recent first."""
    found = []
    with suppress(OSError):
        for folder in sessions_folder().iterdir():
            with suppress(OSError):
                found.append(((folder / "journal").stat().st_mtime_ns, folder.name))
    return [name for _, name in sorted(found, reverse=True)]


def model_of(name: str) -> str | None:
    """The path of the model that a session was made with; None where that is not known."""
    path = sessions_folder() / checked_name(name) / "journal"
    with suppress(Error), opened(path) as file:
        made_with = Reader(path, file).begin(KIND).get("path")
        return made_with if isinstance(made_with, str) else None
    return None


def open_session(
    model: "Model",
    name: str,
    system: str | None = None,
    sampling: "Sampling | None" = None,
    options: dict[str, Any] | None = None,
    must_exist: bool = False,
) -> "Session":
    """The session of that name, as it was left, or a new one; `Session.close` lets go of it.

    system, sampling: of a new one; a system message also replaces that of an old one.
    options: fields of `Sampling` to change. Error if it is open elsewhere, was made with another
    model or kind of cache, or has more tokens than the model's context.
    """
    folder = sessions_folder() / checked_name(name)
    path = folder / "journal"
    if must_exist:
        existing(name)
    lock = _locked(folder, name)
    try:
        states = StateFolder(folder / "state", model)
        if path.exists():
            session, good, unrecorded = _read(model, path)
            _resume(session, states)
        else:
            from ondevice.session import Session

            session, good, unrecorded = Session(model, system, sampling), 0, []
        if lock is not None:
            for left in folder.glob(".*.partial"):  # by a killed process
                states.remove(left)
            session.journal = Journal(name, path, lock, states)
            session.journal.begin(session, good, unrecorded)
        if system is not None:
            session.system = system
        if options:
            session.sampling = dataclasses.replace(session.sampling, **options)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return session


def go_on_as(session: "Session", name: str) -> None:
    """Record a session under a new name from here on; what it was recorded under stays as it is.

    UsageError if there is a session of that name. Where nothing can be written a warning says so,
    and all stays as it is.
    """
    folder = sessions_folder() / checked_name(name)
    session._settle()
    lock = _locked(folder, name)
    if lock is None:
        return
    path = folder / "journal"
    if path.exists():
        lock.release()
        raise UsageError(f"there is a session {name!r} already")
    if session.journal is not None:
        session.journal.close(session)
    session.journal = Journal(name, path, lock, StateFolder(folder / "state", session.model))
    session.journal.begin(session, 0, [])
    session.journal.reached(session)


def _locked(folder: Path, name: str) -> FileLock | None:
    """The lock of a session's folder; None, with a warning, where nothing can be written."""
    try:
        if all(map(private_folder, (folder.parent, folder, folder / "state"))):
            return FileLock(folder / "lock")
        reason = f"{folder} cannot be written, or is not private"
    except BlockingIOError:
        raise ResourceError(f"session {name!r} is open in another process") from None
    except OSError as error:
        reason = str(failure(folder / "lock", 0, error))
    warnings.warn(f"session {name!r} is not recorded: {reason}", stacklevel=3)
    return None


class Journal:
    """What a session that has a name writes down as it happens."""

    def __init__(self, name: str, path: Path, lock: FileLock, states: StateFolder) -> None:
        self.name = name
        self.path = path
        self._lock = lock
        self._states = states
        self._file: BinaryIO | None = None
        self._size = 0
        self._answered = 0  # tokens of the running answer that are written
        self._kept = 0  # tokens that the last state taken or found here had
        self._midway: int | None = None  # the same of a state within the running answer
        self._answer = AnswerFile(path.with_name("answer"))
        self._settings: Any = None
        self._given_up = self._stateless = self._unmapped = False

    def begin(self, session: "Session", good: int, unrecorded: list[int]) -> None:
        """Append after the first `good` bytes, or begin a new file where there are none.

        unrecorded: the last tokens of the session, which those bytes lack.
        """
        self._guarded(lambda: self._begin(session, good, unrecorded))

    def full(self, session: "Session") -> None:
        """The conversation has changed in another way than by a turn."""
        self._guarded(lambda: self._rewrite(session))

    def turn(
        self, session: "Session", kept: "Sequence[Turn]", text: str, taken: list[int], common: int
    ) -> Array | None:
        """A message is going to be answered after the turns `kept`.

        The prompt is `taken`, whose first `common` tokens are those of the session. Returns the
        history that the decode loop is to write; None where that cannot be had.
        """
        self._answered = 0
        self._midway = None
        tag = secrets.token_bytes(TAG_BYTES)
        self._settings = _settings(session)
        described = self._settings | {
            "keep": len(kept),
            "forget": bool(kept) and kept[-1].end is None,
            "from": common,
            "text": text,
            "tag": tag.hex(),
        }
        self._guarded(lambda: self._append(b"turn", described, taken[common:], flush=True))
        return self._mapped(tag, taken, session.model.context + 2)

    def more(self, tokens: list[int]) -> None:
        """The running answer has these tokens so far."""
        new = tokens[self._answered :]
        self._answered = len(tokens)
        if new:
            self._guarded(lambda: self._append(b"more", {}, new))

    def passed(self, session: "Session", answer: list[int]) -> None:
        """The state has these tokens of the running answer; keep it if it has come far."""
        if session.position - self._kept >= STRIDE:
            self._keep_state(session, answer)
            self._midway = self._kept

    def rest(self, session: "Session") -> None:
        """An answer is over, and the state one to come back to."""
        self._guarded(lambda: self._end_answer(session))
        self._keep_state(session)

    def reached(self, session: "Session") -> None:
        """A prompt is taken in; keep the state if that would save much reading."""
        found = memories(self._states, session._tokens[: session.position])
        self._kept = max(found, default=0)
        if session.position - self._kept >= BLOCK:
            self._keep_state(session)

    def close(self, session: "Session") -> None:
        """Write what is not yet written, and let others have the session."""
        if self._settings != _settings(session):
            self.full(session)
        self._guarded(self._end)
        if self._file is not None:
            self._file.close()
            self._file = None
        self._given_up = True
        self._lock.release()

    # ---- inside ----

    def _guarded(self, write: Callable[[], None]) -> None:
        """Write; if that fails, say so and write no more."""
        if self._given_up:
            return
        try:
            write()
        except (OSError, Error) as error:
            reason = failure(self.path, 0, error) if isinstance(error, OSError) else error
            self._given_up = True
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
                self._file = None
            warnings.warn(f"session {self.name!r} is not recorded: {reason}", stacklevel=3)

    def _begin(self, session: "Session", good: int, unrecorded: list[int]) -> None:
        self._settings = _settings(session)
        if not good:
            self._rewrite(session)
            return
        self._file = self.path.open("r+b", buffering=0)
        self._file.truncate(good)
        self._file.seek(good)
        self._size = good
        if unrecorded:
            self._append(b"more", {}, unrecorded, flush=True)

    def _rewrite(self, session: "Session") -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        described = talk(session)
        needed = len(json.dumps(described)) + 4 * len(session._tokens) + 4096
        with whole_file(self.path, needed) as file:
            writer = Writer(file)
            writer.begin(_head(session.model))
            writer.record(b"full", _payload(described, session._tokens))
        self._file = self.path.open("r+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._settings = _settings(session)
        self._answered = 0

    def _append(
        self, kind: bytes, described: dict[str, Any], tokens: list[int], flush: bool = False
    ) -> None:
        assert self._file is not None
        payload = _payload(described, tokens)
        whole = _Buffer()
        Writer(whole).record(kind, payload)  # type: ignore[arg-type]
        written = self._file.write(whole.data)
        if written != len(whole.data):
            raise OSError(28, "No space left on device")
        self._size += record_bytes(len(payload))
        if flush:
            self._flush()

    def _flush(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())

    def _mapped(self, tag: bytes, prompt: list[int], room: int) -> Array | None:
        if self._given_up or self._unmapped:
            return None
        try:
            return self._answer.begin(tag, prompt, room)
        except OSError as error:
            self._unmapped = True
            warnings.warn(
                f"if the process is killed, session {self.name!r} loses the last tokens: "
                f"{failure(self._answer.path, HEAD + 4 * room, error)}",
                stacklevel=3,
            )
            return None

    def _end_answer(self, session: "Session") -> None:
        self._flush()
        self._answer.end()
        self._compact(session)

    def _end(self) -> None:
        self._flush()
        self._answer.remove()

    def _compact(self, session: "Session") -> None:
        texts = sum(len(turn.text) + len(turn.answer or "") + 64 for turn in session._turns)
        if self._size > 2 * (4 * len(session._tokens) + texts) + SLACK:
            self._rewrite(session)

    def _keep_state(self, session: "Session", answer: Sequence[int] = ()) -> None:
        """Save the state, and remove what is not of these tokens or is too much.

        answer: tokens of the running answer, which the session does not count yet.
        """
        tokens = [*session._tokens, *answer][: session.position]
        self._kept = len(tokens)
        if self._given_up or self._stateless or not tokens:
            return
        try:
            needed = set(self._states.save(tokens, session._state))
            kept = memories(self._states, tokens)
            if self._midway is not None and self._midway < len(tokens):
                kept.pop(self._midway, None)
            most = 2 + MEMORIES // self._states.memory_bytes
            while len(kept) > most:
                del kept[thinned(sorted(kept))]
            for path in list(self._states.folder.iterdir()):
                if path not in needed and path not in kept.values():
                    self._states.remove(path)
        except (OSError, Error) as error:
            self._stateless = True
            warnings.warn(
                f"the state of session {self.name!r} is not kept, so it will take longer to go on "
                f"with it: {error}",
                stacklevel=2,
            )


def memories(states: StateFolder, tokens: Sequence[int]) -> dict[int, Path]:
    """The memories in a folder that lie on the way of these tokens, by position."""
    digests = list(states.chain(tokens))
    found = {}
    with suppress(OSError):
        for path in states.folder.glob("*.memory"):
            position = path.stem.rpartition("-")[2]
            if not position.isdecimal() or int(position) > len(tokens):
                continue
            prefix = tokens[: int(position)]
            if states.memory_path(prefix, digests[len(prefix) // BLOCK]) == path:
                found[int(position)] = path
    return found


class _Buffer:
    """Collects a record, to be written by one call."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


def _head(model: "Model") -> dict[str, Any]:
    return {
        "kind": KIND,
        "model": model.fingerprint,
        "name": model.config.name,
        "kv": model.kv,
        "path": str(model.path.absolute()),
        "made": int(time.time()),
    }


def _settings(session: "Session") -> dict[str, Any]:
    return {"system": session._system, "sampling": dataclasses.asdict(session.sampling)}


def _payload(described: dict[str, Any], tokens: Sequence[int]) -> bytes:
    text = json.dumps(described).encode()
    return _LENGTH.pack(len(text)) + text + np.asarray(tokens, "<i4").tobytes()


def _read(model: "Model", path: Path) -> tuple["Session", int, list[int]]:
    """The conversation in a journal, how many of its bytes are good, and its tokens beyond them."""
    replay = _Replay(model)
    good = 0
    with opened(path) as file:
        reader = Reader(path, file)
        check_head(model, path, reader.begin(KIND))
        try:
            while (found := reader.next()) is not None:
                replay.take(found[0], reader.payload())
                good = reader.good
        except Damaged as error:  # cut by a kill, most likely
            lost = os.fstat(file.fileno()).st_size - good
            if lost > MOST_CUT:
                warnings.warn(f"{error}; {lost:,} bytes are lost", stacklevel=2)
        except (LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
            raise Damaged(f"{path}: a record after byte {good} makes no sense: {error}") from None
    if not good:
        raise Damaged(f"{path}: the file is damaged: it holds no conversation")
    unrecorded = replay.finish(path.with_name("answer"))
    tokens = replay.tokens
    if len(tokens) > model.context + 1:
        raise UsageError(
            f"{path}: the session has {len(tokens)} tokens and the context only {model.context}; "
            "open the model with a larger one"
        )
    return session_of(model, path, replay.talk, np.array(tokens, "<i4")), good, unrecorded


class _Replay:
    """The conversation, record by record."""

    def __init__(self, model: "Model") -> None:
        self._model = model
        self.talk: dict[str, Any] = {}
        self.tokens: list[int] = []
        self._tag: Any = None

    def take(self, kind: bytes, payload: bytes) -> None:
        """One more record; KeyError, TypeError or ValueError if it cannot follow."""
        (length,) = _LENGTH.unpack_from(payload)
        start = _LENGTH.size + length
        part = json.loads(payload[_LENGTH.size : start])
        tokens = np.frombuffer(payload[start:], "<i4").tolist()
        if kind == b"full":
            self.talk, self.tokens, self._tag = part, tokens, None
        elif kind == b"more":
            self.tokens += tokens
        elif kind == b"turn":
            self.settle()
            turns = self.talk["turns"][: part["keep"]]
            if part["forget"]:
                turns = [[text, answer, None, None] for text, answer, _, _ in turns]
            self.tokens = self.tokens[: part["from"]] + tokens
            turns.append([part["text"], None, len(self.tokens), None])
            self._tag = part.get("tag")
            self.talk = {
                "system": part["system"],
                "rendered_system": part["system"],
                "sampling": part["sampling"],
                "turns": turns,
            }
        else:
            raise ValueError(f"its kind is {kind!r}")

    def finish(self, path: Path) -> list[int]:
        """No more records follow: the tokens that the file of the running answer adds to them."""
        found = []
        if isinstance(self._tag, str):
            with suppress(ValueError):
                tag, vocabulary = bytes.fromhex(self._tag), self._model.config.vocabulary
                found = tokens_beyond(path, tag, self.tokens, vocabulary)
        ends = self._model.ends
        added = list(takewhile(lambda token: not ends[token], found))
        self.tokens += added
        self.settle()
        return added

    def settle(self) -> None:
        """End the answer that was running."""
        turns = self.talk["turns"]
        if turns and turns[-1][1] is None:
            text, _, prompt, _ = turns[-1]
            answer = self._model.checked(self.tokens[prompt:]).tolist()
            turns[-1] = [text, self._model.tokenizer.decode(answer), prompt, len(self.tokens)]


def _resume(session: "Session", states: StateFolder) -> None:
    """Bring the session's state as far along its tokens as one was kept."""
    kept = memories(states, session._tokens)
    for position in sorted(kept, reverse=True):
        if states.load(session._tokens[:position], session._state):
            break
    for position, path in kept.items():
        if position <= session.position:
            session._history.adopt(Saved(states, path, position))
