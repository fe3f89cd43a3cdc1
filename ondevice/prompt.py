"""The line that a message is typed into: keys, completion of commands, history."""

import contextlib
import os

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ondevice.terminal import is_open
from quant.folders import cache_root, private_folder


def message_prompt(commands: list[str]) -> PromptSession[str]:
    """A prompt for messages of one or more lines; Tab completes the commands."""
    return PromptSession(
        history=_history(),
        multiline=True,
        key_bindings=_keys(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        prompt_continuation="... ",
    )


def _keys() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-c")
    def _discard(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return bindings


class _PrivateHistory(FileHistory):
    """What was typed, in a file; a full disk must not end the conversation."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeEncodeError):
            super().store_string(string)


def _history() -> History:
    try:
        folder = cache_root() / "chat"
        if private_folder(folder):
            path = folder / "history"
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            return _PrivateHistory(path)
    except (OSError, RuntimeError):  # no home folder, or none that can be written
        pass
    return InMemoryHistory()
