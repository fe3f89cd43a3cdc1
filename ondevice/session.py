"""A conversation whose state is kept between turns: a turn prefills only its own tokens.

The template renders the whole conversation every time. What the state has taken in is that
rendering up to the last answer, and then the answer's own tokens, which need not be those that
encoding its text would give. So a new rendering is compared with the one before up to its last
control token, the answer is recognised by its text, and only what follows is new. A template that
rewrites earlier turns makes the session begin again from the start, with the same result.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ondevice.generate import Completion
from ondevice.sampling import Sampling
from ondevice.state import Snapshot, State
from quant.errors import UsageError

if TYPE_CHECKING:
    from ondevice.model import Model


class Session:
    """Turns of a conversation; one answer at a time. Made by `Model.session`."""

    def __init__(self, model: "Model", system: str | None, sampling: Sampling | None) -> None:
        self.model = model
        self.sampling = sampling or model.sampling
        self.last: Completion | None = None
        """The latest answer, running or done."""
        self._state = State(model.config, model.context, model.kv)
        self._messages: list[dict[str, str]] = []
        self._system = system
        self._rendered: list[int] = []  # the latest prompt as the template gives it
        self._taken: list[int] = []  # the latest prompt as the state takes it
        self._start: Snapshot | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, without the system message."""
        self._settle()
        return [dict(message) for message in self._messages]

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
        messages = [*self._messages, {"role": "user", "content": text}]
        completion = self._answer(messages)
        self._messages = messages
        return completion

    def regenerate(self) -> Completion:
        """Answer the last message again, in place of the last answer."""
        self._settle()
        if not self._messages or self.last is None:
            raise UsageError("there is no answer to make again")
        self._messages.pop()
        rendered = self.model.template.encode([*self._system_message(), *self._messages])
        if rendered != self._rendered:  # the system message is another one
            self.last = None
            return self._answer(self._messages)
        if self._start is not None:
            self._state.restore(self._start)
        self.last = self._completion(self._taken)
        return self.last

    def cancel(self) -> None:
        """Stop the answer at its next token; from any thread."""
        if self.last is not None:
            self.last.cancel()

    def clear(self) -> None:
        """Forget the conversation, except for the system message."""
        self._settle()
        self._messages = []
        self.last = None
        self._start = None
        self._rendered, self._taken = [], []
        self._state.reset()

    def _system_message(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def _answer(self, messages: list[dict[str, str]]) -> Completion:
        rendered = self.model.template.encode([*self._system_message(), *messages])
        new = self._after_last_answer(rendered)
        if new is None:
            taken = rendered
            self.model.check_room(len(taken))
            self._state.reset()
        else:
            taken = self._taken + self._answer_tokens() + new
            self.model.check_room(len(taken))
        self._rendered, self._taken = rendered, taken
        self.last = self._completion(taken)
        return self.last

    def _completion(self, tokens: Sequence[int]) -> Completion:
        self._start = None
        return Completion(
            self.model, self._state, tokens, self.sampling, when_prefilled=self._keep_start
        )

    def _keep_start(self) -> None:
        self._start = self._state.snapshot()

    def _answer_tokens(self) -> list[int]:
        return self.last.tokens if self.last is not None else []

    def _after_last_answer(self, rendered: list[int]) -> list[int] | None:
        """What of a new rendering follows the state and the last answer; None if it departs."""
        if self.last is None:
            return None
        control = frozenset(self.model.tokenizer.control_tokens.values())
        old = self._rendered
        cut = max((i for i, token in enumerate(old) if token in control), default=-1) + 1
        if rendered[:cut] != old[:cut]:
            return None
        end = next((i for i in range(cut, len(rendered)) if rendered[i] in control), None)
        if end is None:
            return None
        decode = self.model.tokenizer.decode
        expected = decode(old[cut:]) + decode(self._answer_tokens())
        if decode(rendered[cut:end]).strip() != expected.strip():
            return None
        return rendered[end:]

    def _settle(self) -> None:
        """Make what the last answer came to a part of the conversation, and end it if it runs."""
        if self.last is None or not self._messages or self._messages[-1]["role"] != "user":
            return
        self.last.close()
        text = self.model.tokenizer.decode(self.last.tokens)
        self._messages.append({"role": "assistant", "content": text})
