"""The conversation in a terminal: reading messages, showing answers as they come, /commands.

Enter sends. Alt-Enter, or a backslash at the end of a line, starts a new line; so does Enter
between two lots of three double quotes. Ctrl-C stops the answer after the current token and keeps
the conversation, Ctrl-D at an empty prompt ends it. Piped input is plain: each line is a message,
slashes and all, and only the answers are written.
"""

import contextlib
import dataclasses
import difflib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

from ondevice.console import watched
from quant.errors import Error, UsageError

if TYPE_CHECKING:
    from ondevice.generate import Completion
    from ondevice.session import Session

FENCE = '"""'
HELP = {
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does",
    "/clear": "forget the conversation, keep the system prompt",
    "/turns": "list your messages by number",
    "/regen #N": "answer message N again, by default the last, and forget what came after it",
    "/edit #N TEXT": "answer TEXT in place of message N; without TEXT type at what was there",
    "/undo": "take back the last message and its answer",
    "/branch NAME": "go on as the session NAME; the one so far stays as it is",
    "/trim N": "drop the N oldest turns; without N until half the context is free",
    "/save FILE": "write the conversation and the model's state to a file",
    "/stats": "show tokens and speed of the last answer",
    "/system TEXT": "set the system prompt; without TEXT show it",
    "/set NAME VALUE": "set a sampling option; without NAME show them all",
}
KEYS = (
    "Enter sends; Alt-Enter or \\ at the end of a line starts a new line, and so does Enter "
    f"between {FENCE} and {FENCE}.\n"
    "Ctrl-C stops an answer. A space before / sends the line as a message."
)
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters but tab and newline become U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def timing_line(completion: "Completion") -> str:
    """One line on the speed of a finished answer, and one on what limits it if that is the disk."""
    timings = completion.timings
    guesses = ""
    if timings.get("drafted"):
        guesses = f", {timings['accepted']} of {timings['drafted']} guesses right"
    line = (
        f"read {completion.prefilled_tokens} tokens at "
        f"{timings['prompt_tokens_per_second']:.1f} per second, "
        f"wrote {len(completion.tokens)} at {timings['decode_tokens_per_second']:.1f} per second"
        f"{guesses}"
    )
    if not timings["disk_bytes"]:
        return line
    return (
        f"{line}\n{timings['expert_hit_rate']:.0%} of experts were in memory, "
        f"{timings['disk_bytes'] / 1e9:.2f} GB came from disk: {completion.limit}"
    )


def is_open(text: str) -> bool:
    """Whether Enter should continue the message rather than send it."""
    stripped = text.strip()
    if stripped.startswith(FENCE):
        return len(stripped) < 2 * len(FENCE) or not stripped.endswith(FENCE)
    return text.endswith("\\")


def unfold(text: str) -> str:
    """The message that was typed: without fences, and without backslashes that end a line."""
    text = text.encode(errors="replace").decode()  # a terminal may send half a character
    stripped = text.strip()
    if stripped.startswith(FENCE):
        return stripped.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
    return text.replace("\\\n", "\n")


class Chat:
    """One conversation and the commands that act on it; `write` shows text to the user."""

    def __init__(self, session: "Session", write: Callable[[str], None], stats: bool) -> None:
        self.session = session
        self.write = write
        self.stats = stats
        self.draft = ""
        """What the next line should begin with."""
        self.commands: dict[str, Callable[[str], bool | None]] = {
            "/help": self.help,
            "/exit": lambda _: True,
            "/clear": self.clear,
            "/turns": self.turns,
            "/regen": self.regenerate,
            "/edit": self.edit,
            "/undo": self.undo,
            "/branch": self.branch,
            "/trim": self.trim,
            "/save": self.save,
            "/stats": self.show_stats,
            "/system": self.system,
            "/set": self.set,
        }

    def turn(self, typed: str) -> bool:
        """Send one message or obey one command; True when the conversation is to end."""
        self.draft = ""
        if not typed.strip():
            return False
        try:
            if typed.startswith("/"):
                return bool(self.obey(typed))
            message = unfold(typed)
            self.answer(lambda: self.session.send(message))
        except Error as error:
            self.write(f"error: {error}\n")
        return False

    def obey(self, typed: str) -> bool | None:
        name, _, rest = typed.strip().partition(" ")
        if name in self.commands:
            return self.commands[name](rest.strip())
        close = difflib.get_close_matches(name, self.commands, n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists the commands"
        raise UsageError(f"there is no command {name}; {hint}")

    def answer(self, start: Callable[[], "Completion"]) -> None:
        with _stopped_by_ctrl_c(self.session.cancel) as stopped:
            completion = start()
            for piece in watched(completion):
                self.write(printable(piece))
        self.write("\n")
        if stopped.is_set():
            self.write("(stopped)\n")
        elif completion.finish_reason == "length":
            self.write(
                f"(the context of {self.session.model.context} tokens is full: /trim drops the "
                "oldest turns, /clear starts again)\n"
            )
        if self.stats:
            self.write(timing_line(completion) + "\n")

    def help(self, _: str) -> None:
        for usage, meaning in HELP.items():
            self.write(f"{usage:16}  {meaning}\n")
        self.write(KEYS + "\n")

    def clear(self, _: str) -> None:
        self.session.clear()
        self.write("The conversation is forgotten.\n")

    def turns(self, _: str) -> None:
        for number, text in enumerate(self._texts(), start=1):
            self.write(f"#{number:<3} {printable(_shortened(text))}\n")

    def regenerate(self, rest: str) -> None:
        index, rest = self._numbered(rest)
        if rest:
            raise UsageError(f"/regen needs a number like #2, not {rest!r}")
        self.answer(lambda: self.session.regenerate(index))

    def edit(self, rest: str) -> None:
        index, text = self._numbered(rest)
        if text:
            self.answer(lambda: self.session.edit(index, unfold(text)))
        else:
            self.draft = f"/edit #{index + 1} {printable(self._texts()[index])}"

    def _texts(self) -> list[str]:
        """The messages of the user."""
        return [m["content"] for m in self.session.messages if m["role"] == "user"]

    def _numbered(self, rest: str) -> tuple[int, str]:
        """Which turn is meant, from 0, the last where no #N says so, and what follows that."""
        count = len(self._texts())
        found = re.match(r"#(\d{1,9})(?:\s+|$)", rest)
        number = int(found[1]) if found else count
        if not count:
            raise UsageError("there is no message yet")
        if not 1 <= number <= count:
            raise UsageError(f"there is no message #{number}; /turns lists them")
        return number - 1, rest[found.end() :] if found else rest

    def branch(self, name: str) -> None:
        from ondevice.journal import go_on_as

        if not name:
            raise UsageError("/branch needs the name of a new session")
        before = self.session.journal
        go_on_as(self.session, name)
        if self.session.journal is not before:
            self.write(f"This is session {name} now")
            self.write(f"; {before.name} is as it was.\n" if before else ".\n")

    def undo(self, _: str) -> None:
        self.write(f"Taken back: {printable(_shortened(self.session.undo()))}\n")

    def trim(self, rest: str) -> None:
        if rest and not rest.isdecimal():
            raise UsageError(f"/trim needs a whole number, not {rest!r}")
        dropped, tokens = self.session.trim(int(rest) if rest else None)
        self.write(
            f"Forgotten: {'the oldest turn' if dropped == 1 else f'the {dropped} oldest turns'}. "
            f"The rest has {tokens} of {self.session.model.context} tokens and is read again with "
            "the next message.\n"
        )

    def save(self, path: str) -> None:
        if not path:
            raise UsageError("/save needs the name of a file")
        self.session.save(path)
        self.write(f"Written to {path}\n")

    def show_stats(self, _: str) -> None:
        last = self.session.last
        if last is None:
            raise UsageError("there is no answer yet")
        self.write(timing_line(last) + "\n")
        held = last.prompt_tokens + len(last.tokens)
        self.write(f"the conversation holds {held} tokens\n")

    def system(self, text: str) -> None:
        if text:
            self.session.system = unfold(text)
        self.write(f"system prompt: {self.session.system or '(none)'}\n")

    def set(self, rest: str) -> None:
        sampling = self.session.sampling
        types = {field.name: field.type for field in dataclasses.fields(sampling)}
        if rest:
            name, _, value = rest.replace("-", "_", 1).partition(" ")
            name = {"temp": "temperature"}.get(name, name)
            if name not in types:
                raise UsageError(f"there is no option {name}; there are {', '.join(types)}")
            changes: dict[str, Any] = {name: _number(name, value.strip(), str(types[name]))}
            self.session.sampling = sampling = dataclasses.replace(sampling, **changes)
        for name, value in dataclasses.asdict(sampling).items():
            self.write(f"{name:16}  {'random' if value is None else value}\n")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def _number(name: str, text: str, kind: str) -> int | float | None:
    if "None" in kind and text == "random":
        return None
    try:
        return int(text) if "int" in kind else float(text)
    except ValueError:
        wanted = "a whole number" if "int" in kind else "a number"
        raise UsageError(f"/set {name} needs {wanted}, not {text or 'nothing'!r}") from None


@contextlib.contextmanager
def _stopped_by_ctrl_c(cancel: Callable[[], None]) -> Iterator[threading.Event]:
    """The first Ctrl-C calls `cancel` and sets the event; a second one interrupts as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def piped(session: "Session", lines: Iterable[str], out: TextIO, stats: TextIO | None) -> None:
    """Answer each line of `lines`; `stats`, where given, gets a line on speed per answer."""
    for line in lines:
        message = line.rstrip("\r\n")
        if not message.strip():
            continue
        completion = session.send(message)
        for piece in completion:
            out.write(piece)
            out.flush()
        out.write("\n")
        out.flush()
        if stats is not None:
            stats.write(timing_line(completion) + "\n")


def interactive(session: "Session", stats: bool) -> None:
    """Talk until the user leaves."""
    from ondevice.prompt import message_prompt  # a tenth of a second that only this needs

    def write(text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()

    chat = Chat(session, write, stats)
    prompt = message_prompt(list(chat.commands))
    write("/help lists the commands, Ctrl-D leaves.\n")
    while True:
        try:
            if chat.turn(prompt.prompt(">>> ", default=chat.draft)):
                return
        except KeyboardInterrupt:
            write("Ctrl-D or /exit leaves.\n")
        except EOFError:
            return
