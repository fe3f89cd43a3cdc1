"""A conversation and its state in one file.

    head     JSON: which model, which kind of cache, how much follows
    talk     JSON: system message, sampling options, turns
    toks     (n,) int32: the tokens of the conversation
    memo     the delta memory, after the first `position` of them
    keys     (layers and heads, tiles, bytes): keys and values of those, some tiles at a time
    end.     nothing

The records are those of `records.py`.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.records import Damaged, Reader, Writer, opened, whole_file
from ondevice.sampling import Sampling
from ondevice.state import State
from quant.errors import Error, ResourceError, UsageError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.model import Model
    from ondevice.session import Session

KIND = "session"
RUN = 8
"""Tiles of a record."""


def save(session: "Session", path: Path) -> None:
    """Write a session that does not answer at the moment; ResourceError if that fails."""
    state = session._state
    needed = state.memory.nbytes + state.tiles[:, : state.tiles_to(state.position)].nbytes
    needed += 4 * len(session._tokens) + (1 << 16)
    with whole_file(path, needed) as file:
        writer = Writer(file)
        writer.begin(head(session.model, state, KIND) | {"tokens": len(session._tokens)})
        writer.json(b"talk", talk(session))
        writer.record(b"toks", np.array(session._tokens, "<i4"))
        write_state(writer, state)
        writer.record(b"end.", b"")


def restore(model: "Model", path: Path) -> "Session":
    """The session in a file; Error with the reason if there is none for this model."""
    with opened(path) as file:
        reader = Reader(path, file)
        found = reader.begin(KIND)
        check_head(model, path, found)
        described = reader.json(b"talk")
        reader.expect(b"toks")
        tokens = np.frombuffer(reader.payload(), "<i4")
        session = session_of(model, path, described, tokens)
        position = whole_number(path, found, "position", len(tokens))
        if position > model.context:
            raise UsageError(
                f"{path}: the session has {position} tokens and the context only "
                f"{model.context}; open the model with a larger one"
            )
        read_state(reader, session._state, position)
        reader.expect(b"end.")
        reader.payload()
        reader.end()
    session._history.add(session._state)
    return session


def head(model: "Model", state: State, kind: str) -> dict[str, Any]:
    """What a state in a file must agree in with the model that opens it."""
    return {
        "kind": kind,
        "model": model.fingerprint,
        "name": model.config.name,
        "kv": model.kv,
        "memory": state.memory.nbytes,
        "tile": state.tiles.nbytes // state.tiles.shape[1],
        "position": state.position,
    }


def check_head(model: "Model", path: Path, found: dict[str, Any]) -> None:
    """Error unless a file's head says that it was made with this model."""
    if found.get("model") != model.fingerprint:
        raise Error(
            f"{path}: made with another model, {str(found.get('name'))[:60]!r}; "
            f"{model.path} is {model.config.name!r} with other weights or settings"
        )
    if found.get("kv") != model.kv:
        raise UsageError(
            f"{path}: made with kv type {str(found.get('kv'))[:20]}; "
            f"the model is open with {model.kv}"
        )


def whole_number(path: Path, found: dict[str, Any], name: str, most: int) -> int:
    """A number of a head, from 0 to `most`; Damaged otherwise."""
    value = found.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Damaged(f"{path}: {name} is {value!r}; it must be from 0 to {most}")
    return value


def talk(session: "Session") -> dict[str, Any]:
    """What is said in a session, but for its tokens."""
    return {
        "system": session._system,
        "rendered_system": session._rendered_system,
        "sampling": dataclasses.asdict(session.sampling),
        "turns": [[turn.text, turn.answer, turn.prompt, turn.end] for turn in session._turns],
    }


def session_of(model: "Model", path: Path, described: Any, tokens: Array) -> "Session":
    """A session with a file's turns and tokens and a state that has taken nothing in."""
    from ondevice.session import Session, Turn

    try:
        system, rendered = described["system"], described["rendered_system"]
        if not all(text is None or isinstance(text, str) for text in (system, rendered)):
            raise ValueError("a system message")
        turns = [Turn(*_turn(turn, len(tokens))) for turn in described["turns"]]
        sampling = Sampling(**described["sampling"])
        checked = model.checked(tokens).tolist()
    except (KeyError, TypeError, ValueError, Error) as error:
        raise Damaged(f"{path}: the description of the conversation is wrong: {error}") from None
    try:
        session = Session(model, system, sampling)
    except MemoryError:
        raise ResourceError(f"{path}: no memory for the session") from None
    session._turns, session._tokens = turns, checked
    session._rendered_system = rendered
    return session


def _turn(values: Any, tokens: int) -> tuple[str, str, int | None, int | None]:
    text, answer, prompt, end = values
    if not isinstance(text, str) or not isinstance(answer, str):
        raise ValueError("a turn without text")
    if (prompt is None) != (end is None):
        raise ValueError("a turn with half its bounds")
    if prompt is not None and not 0 < prompt <= end <= tokens:
        raise ValueError(f"a turn from token {prompt} to {end} of {tokens}")
    return text, answer, prompt, end


def write_state(writer: Writer, state: State) -> None:
    """The records `memo` and `keys`."""
    state.settle()
    writer.record(b"memo", state.memory)
    count = state.tiles_to(state.position)
    for first in range(0, count, RUN):
        run = state.tiles[:, first : min(first + RUN, count)]
        writer.record(b"keys", np.ascontiguousarray(run).reshape(-1))


def read_state(reader: Reader, state: State, position: int) -> None:
    """Fill the state from the records that `write_state` made of one at `position`."""
    reader.expect(b"memo")
    reader.payload_into(state.memory)
    count = state.tiles_to(position)
    rows, _, nbytes = state.tiles.shape
    buffer = np.empty(rows * RUN * nbytes, np.uint8)
    for first in range(0, count, RUN):
        tiles = min(RUN, count - first)
        reader.expect(b"keys")
        target = buffer[: rows * tiles * nbytes]
        reader.payload_into(target)
        state.tiles[:, first : first + tiles] = target.reshape(rows, tiles, nbytes)
    state.arrive(position)
