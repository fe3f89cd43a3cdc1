"""A conversation whose state is kept between turns: a turn prefills only its own tokens.

The template renders the whole conversation every time. What the state has taken in is that
rendering up to the last answer, and then the answer's own tokens, which need not be those that
encoding its text would give. So a new rendering is compared with the one before up to its last
control token, the answer is recognised by its text, and only what follows is new. A template that
rewrites earlier turns makes the session begin again from the start, with the same result.

Going back is one rule for editing, answering again, branching and dropping turns. The session
knows the tokens that its state took, and the copies of the state that were kept on the way. Given
the tokens of the next prompt it returns to the last copy within what the two have in common, and
reads the rest. So a result is always that of a fresh run over the same tokens.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ondevice.chat import common_prefix
from ondevice.generate import Completion
from ondevice.prompt_cache import reading
from ondevice.sampling import Sampling
from ondevice.snapshots import History
from ondevice.state import State
from quant.errors import UsageError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.journal import Journal
    from ondevice.model import Model

LONG_SYSTEM = 64
"""Tokens from which on a system message is worth a copy of the state behind it."""


@dataclass(slots=True)
class Turn:
    """A message and its answer.

    Its answer is `tokens[prompt:end]` of the session's tokens, or unknown (None) where a
    template has written it anew.
    """

    text: str
    answer: str | None = None
    """None while it runs."""
    prompt: int | None = None
    end: int | None = None


class Session:
    """Turns of a conversation; one answer at a time. Made by `Model.session`.

    A turn is a message and its answer, counted from 0, or from -1 backwards.
    """

    def __init__(self, model: "Model", system: str | None, sampling: Sampling | None) -> None:
        self.model = model
        self.sampling = sampling or model.sampling
        self.last: Completion | None = None
        """The latest answer, running or done."""
        self.journal: Journal | None = None
        """Where the session is recorded, if it has a name (`journal.open_session`)."""
        self._state = State(model.config, model.context, model.kv)
        self._history = History(model.snapshots)
        self._turns: list[Turn] = []
        # What the state has taken in are the first of these; the running answer is not among them.
        self._tokens: list[int] = []
        self._system = system
        self._rendered: list[int] = []  # the latest prompt as the template gives it, if known
        self._rendered_system = system

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, without the system message."""
        self._settle()
        return _messages(self._turns)

    @property
    def turns(self) -> int:
        """How many turns there are."""
        return len(self._turns)

    @property
    def system(self) -> str | None:
        """The system message; changing it makes the next turn read the conversation again."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._settle()
        self._system = text

    @property
    def position(self) -> int:
        """Tokens that the state has taken in."""
        return self._state.position

    def send(self, text: str) -> Completion:
        """Answer a message: an iterator over pieces of text."""
        self._settle()
        return self._answer(self._turns, text)

    def edit(self, turn: int, text: str) -> Completion:
        """Answer another message in place of a turn's; the turns after it are forgotten."""
        self._settle()
        return self._answer(self._turns[: self._index(turn)], text)

    def regenerate(self, turn: int | None = None) -> Completion:
        """Answer a turn's message again, the last one's by default; later turns are forgotten."""
        self._settle()
        if not self._turns:
            raise UsageError("there is no answer to make again")
        index = self._index(-1 if turn is None else turn)
        again = self._turns[index]
        if again.prompt is None or self._system != self._rendered_system:
            return self._answer(self._turns[:index], again.text)
        if index < len(self._turns) - 1:
            self._rendered = []
        taken = self._tokens[: again.prompt]
        return self._begin(self._turns[:index], again.text, taken, self._rendered)

    def branch(self, turn: int | None = None) -> "Session":
        """A new session with the turns up to this one, the last by default, and their state."""
        self._settle()
        last = self._index(-1 if turn is None else turn) if self._turns or turn is not None else -1
        other = Session(self.model, self._system, self.sampling)
        other._turns = [replace(kept) for kept in self._turns[: last + 1]]
        end = other._turns[-1].end if other._turns else 0
        other._tokens = self._tokens[:end]
        other._rendered_system = self._rendered_system
        other._history = self._history.shared(len(other._tokens))
        held = max([self.position, *self._history.positions])
        count = self._state.tiles_to(min(held, len(other._tokens)))
        other._state.tiles[:, :count] = self._state.tiles[:, :count]
        if self.position <= len(other._tokens):
            self._state.settle()
            other._state.memory[:] = self._state.memory
            other._state.arrive(self.position)
        else:
            other._history.restore(other._state, len(other._tokens))
        return other

    def undo(self) -> str:
        """Take back the last turn; the message that it answered."""
        self._settle()
        if not self._turns:
            raise UsageError("there is no turn to take back")
        text = self._turns.pop().text
        self.last = None
        self._rendered = []
        end = self._turns[-1].end if self._turns else 0
        if end is not None:
            self._go_to(self._tokens[:end], end)
        self._changed()
        return text

    def trim(self, turns: int | None = None) -> tuple[int, int]:
        """Drop the oldest turns, by default until the rest takes at most half of the context.

        The system message and the last turn stay. Returns how many turns were dropped, and how
        many tokens the rest has, of which the next answer reads those anew that follow the
        system message. UsageError if there are not so many turns.
        """
        self._settle()
        most = len(self._turns) - 1
        if (turns is None and most < 1) or (turns is not None and not 1 <= turns <= most):
            raise UsageError(
                f"the conversation has {len(self._turns)} turns, of which the last one stays; "
                f"{'none' if most < 1 else f'1 to {most}'} can be dropped"
            )
        dropped = turns or bisect_left(
            range(most), True, lo=1, key=lambda n: 2 * len(self._without(n)) <= self.model.context
        )
        taken = self._without(dropped)
        kept = self._turns[dropped:]
        self._turns = [Turn(turn.text, turn.answer) for turn in kept]
        self._rendered, self._rendered_system = [], self._system
        self.last = None
        self._go_to(taken, len(taken))
        self._changed()
        return dropped, len(taken)

    def _without(self, turns: int) -> list[int]:
        """The tokens of the conversation as it would be without the oldest turns."""
        messages = [*self._system_message(), *_messages(self._turns[turns:])]
        return self.model.template.encode(messages, add_generation_prompt=False)

    def cancel(self) -> None:
        """Stop the answer at its next token; from any thread."""
        if self.last is not None:
            self.last.cancel()

    def clear(self) -> None:
        """Forget the conversation, except for the system message."""
        self._settle()
        self._turns = []
        self.last = None
        self._rendered, self._tokens = [], []
        self._history.clear()
        self._state.reset()
        self._changed()

    def close(self) -> None:
        """End a running answer, and let others have a recorded session."""
        self._settle()
        if self.journal is not None:
            self.journal.close(self)
            self.journal = None

    def save(self, path: str | Path) -> None:
        """Write the conversation and its state to a file, which `Model.restore` opens.

        The file gets its name only when it is complete. ResourceError if it cannot be written.
        """
        from ondevice.session_file import save

        self._settle()
        save(self, Path(path))

    def _system_message(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def _index(self, turn: int) -> int:
        count = len(self._turns)
        if not isinstance(turn, int) or isinstance(turn, bool) or not -count <= turn < count:
            there = f"there are {count}, from 0" if count else "there is none"
            raise UsageError(f"the turn is {turn!r}; {there}")
        return turn % count

    def _answer(self, turns: list[Turn], text: str) -> Completion:
        """Answer a message after these turns, which become the conversation."""
        messages = [*_messages(turns), {"role": "user", "content": text}]
        rendered = self.model.template.encode([*self._system_message(), *messages])
        new = self._after_last_answer(turns, rendered)
        if new is None:
            return self._begin([Turn(t.text, t.answer) for t in turns], text, rendered, rendered)
        return self._begin(turns, text, self._tokens[: turns[-1].end] + new, rendered)

    def _begin(
        self, turns: list[Turn], text: str, taken: list[int], rendered: list[int]
    ) -> Completion:
        """Answer the last of these tokens, having gone back as far as they demand."""
        self.model.check_room(len(taken))
        if len(self._tokens) - self.position <= 1:  # the end of an answer
            self._history.add(self._state)
        written = None
        if self.journal is not None:
            common = common_prefix(self._tokens, taken)
            written = self.journal.turn(self, turns, text, taken, common)
        self._go_to(taken, len(taken) - 1)
        self.last = self._completion(taken, written)
        self._turns = [*turns, Turn(text, prompt=len(taken))]
        self._rendered, self._rendered_system = rendered, self._system
        return self.last

    def _completion(self, tokens: Sequence[int], written: Array | None) -> Completion:
        """written: where the decode loop writes the tokens, if they are to outlive the process."""
        cache, state = self.model.prompt_cache, self._state
        head = self._head(tokens)
        stops, keep = reading(cache, tokens, state, head)
        # Without a journal nothing refers back to us, so that memory is free when we go, and not
        # when cycles are collected.
        journal, history = self.journal, self._history

        def reached() -> None:
            history.add(state)
            keep()
            if recorded is not None and recorded.journal is not None:
                recorded.journal.reached(recorded)

        recorded = self if journal is not None else None
        return Completion(
            self.model,
            state,
            tokens,
            self.sampling,
            when_reached=reached,
            stops=[*stops, head],
            when_taken=None if journal is None else lambda _: self._taken(),
            when_ended=None if journal is None else self._finish,
            history=written,
        )

    def _head(self, tokens: Sequence[int]) -> int:
        """How many tokens are those of a system message that is long and still to be read."""
        if not self._system or self.position or len(tokens) < LONG_SYSTEM:
            return 0
        other = [*self._system_message(), {"role": "user", "content": "?"}]
        head = common_prefix(tokens, self.model.template.encode(other))
        return head if LONG_SYSTEM <= head < len(tokens) else 0

    def _taken(self) -> None:
        """The running answer has come further, and nobody has seen that yet."""
        assert self.journal is not None
        self.journal.more(self._answer_tokens())
        self.journal.passed(self, self._answer_tokens())

    def _answer_tokens(self) -> list[int]:
        return self.last.tokens if self.last is not None else []

    def _changed(self) -> None:
        if self.journal is not None:
            self.journal.full(self)

    def _go_to(self, tokens: list[int], most: int) -> None:
        """Let the state be one that took the first of these tokens, at most so many."""
        common = common_prefix(self._tokens, tokens)
        self._history.cut(common)
        self._history.restore(self._state, min(common, most))
        self._tokens = tokens

    def _after_last_answer(self, turns: list[Turn], rendered: list[int]) -> list[int] | None:
        """What of a new rendering follows the answer of the last turn; None if it departs."""
        if not turns or turns[-1].end is None:
            return None
        last = turns[-1]
        old = self._rendered if len(turns) == len(self._turns) else []
        if not old:
            before = [*_messages(turns[:-1]), {"role": "user", "content": last.text}]
            system = self._rendered_system
            first = [{"role": "system", "content": system}] if system else []
            old = self.model.template.encode([*first, *before])
        control = frozenset(self.model.tokenizer.control_tokens.values())
        cut = max((i for i, token in enumerate(old) if token in control), default=-1) + 1
        if rendered[:cut] != old[:cut]:
            return None
        end = next((i for i in range(cut, len(rendered)) if rendered[i] in control), None)
        if end is None:
            return None
        decode = self.model.tokenizer.decode
        expected = decode(old[cut:]) + decode(self._tokens[last.prompt : last.end])
        if decode(rendered[cut:end]).strip() != expected.strip():
            return None
        return rendered[end:]

    def _settle(self) -> None:
        """Make what the last answer came to a part of the conversation, and end it if it runs."""
        if self.last is None or not self._turns or self._turns[-1].answer is not None:
            return
        self.last.close()
        self._finish()

    def _finish(self) -> None:
        """The last answer is over: it is a part of the conversation."""
        turn = self._turns[-1]
        answer = self._answer_tokens()
        self._tokens = self._tokens + answer
        turn.answer = self.model.tokenizer.decode(answer)
        turn.end = len(self._tokens)
        if self.journal is not None:
            self.journal.more(answer)
            self.journal.rest(self)


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.text})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages
