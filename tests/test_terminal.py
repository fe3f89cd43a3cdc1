"""The conversation: commands, keys, Ctrl-C, and the plain behaviour when piped."""

import io
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from ondevice import journal, terminal
from quant.errors import Error, ResourceError, UsageError
from tests.fake_model import FakeCompletion, FakeModel, FakeSession

Run = Callable[..., Result]


class Screen:
    """A chat whose output is collected."""

    def __init__(self, stats: bool = False) -> None:
        self.model = FakeModel()
        self.session = self.model.session()
        self.text = ""
        self.chat = terminal.Chat(self.session, self.write, stats)  # type: ignore[arg-type]

    def write(self, text: str) -> None:
        self.text += text

    def turn(self, typed: str) -> str:
        """What one turn shows."""
        self.text = ""
        assert not self.chat.turn(typed)
        return self.text


def test_an_answer_streams_and_the_conversation_goes_on() -> None:
    screen = Screen()
    screen.model.enqueue("안", "녕 ", "🌍")
    screen.model.enqueue("Fine.")
    assert screen.turn("Hello") == "안녕 🌍\n"
    assert screen.turn("How are you?") == "Fine.\n"
    assert [message["content"] for message in screen.session.messages] == ["Hello", "How are you?"]
    assert screen.turn(" \n") == ""


def test_help_names_every_command() -> None:
    screen = Screen()
    shown = screen.turn("/help")
    assert [name for name in screen.chat.commands if f"{name} " not in shown] == []


def test_exit_ends_the_conversation() -> None:
    assert Screen().chat.turn("/exit")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("/hepl", "did you mean /help?"), ("/quux", "/help lists the commands")],
)
def test_unknown_commands(typed: str, hint: str) -> None:
    assert Screen().turn(typed) == f"error: there is no command {typed}; {hint}\n"


def test_a_space_sends_a_slash() -> None:
    screen = Screen()
    screen.model.enqueue("ok")
    assert screen.turn(" /help") == "ok\n"


def test_regen_and_clear() -> None:
    screen = Screen()
    assert screen.turn("/regen").startswith("error: ")
    screen.model.enqueue("one")
    screen.model.enqueue("two")
    screen.turn("Hi")
    assert screen.turn("/regen") == "two\n"
    screen.turn("/clear")
    assert screen.session.messages == []


def said(screen: Screen) -> list[str]:
    return [message["content"] for message in screen.session.messages]


def test_earlier_messages_by_number() -> None:
    screen = Screen()
    for command in ("/regen", "/regen #1", "/edit", "/edit again"):
        assert screen.turn(command) == "error: there is no message yet\n"
    assert screen.turn("/turns") == ""
    for text in ("one", "two\nlines", "three"):
        screen.model.enqueue("ok")
        screen.turn(text)
    assert screen.turn("/turns") == "#1   one\n#2   two lines\n#3   three\n"
    for command in ("/regen #4", "/edit #0 x"):
        shown = screen.turn(command)
        assert shown == f"error: there is no message {command.split()[1]}; /turns lists them\n"
    assert screen.turn("/regen 2") == "error: /regen needs a number like #2, not '2'\n"
    assert said(screen) == ["one", "two\nlines", "three"]
    for command, answer, left in (
        ("/edit drei\nvier", "new", ["one", "two\nlines", "drei\nvier"]),
        ("/edit #2 zwei", "newer", ["one", "zwei"]),
        ("/edit #2\n7 eggs", "eggs", ["one", "7 eggs"]),
        ("/regen", "again", ["one", "7 eggs"]),
        ("/regen #1", "first", ["one"]),
        ("/edit #2nd", "no number", ["#2nd"]),
    ):
        screen.model.enqueue(answer)
        assert screen.turn(command) == answer + "\n"
        assert said(screen) == left


def test_an_edit_without_text_offers_what_was_there() -> None:
    screen = Screen()
    for text in ("one\x1b", "two\nlines"):
        screen.model.enqueue("ok")
        screen.turn(text)
    assert screen.turn("/edit") == ""
    assert screen.chat.draft == "/edit #2 two\nlines"
    screen.turn("/edit #1")
    assert screen.chat.draft == "/edit #1 one\ufffd"
    screen.turn("/turns")
    assert screen.chat.draft == ""


def test_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()

    def go_on_as(session: FakeSession, name: str) -> None:
        if name == "one":
            raise UsageError("there is a session 'one' already")
        session.journal = SimpleNamespace(name=name)

    monkeypatch.setattr(journal, "go_on_as", go_on_as)
    assert screen.turn("/branch") == "error: /branch needs the name of a new session\n"
    assert screen.turn("/branch one") == "error: there is a session 'one' already\n"
    assert screen.turn("/branch two") == "This is session two now.\n"
    assert screen.turn("/branch 3 b") == "This is session 3 b now; two is as it was.\n"


def test_undo_trim_and_save() -> None:
    screen = Screen()
    for _ in range(3):
        screen.model.enqueue("ok")
    for text in ("one", "two", "three\n" * 40):
        screen.turn(text)
    assert screen.turn("/undo") == "Taken back: " + "three " * 9 + "three…\n"
    assert screen.turn("/trim 1").startswith("Forgotten: the oldest turn. The rest has 50 of 100")
    assert [message["content"] for message in screen.session.messages] == ["two"]
    assert screen.turn("/trim all") == "error: /trim needs a whole number, not 'all'\n"
    assert screen.turn("/save") == "error: /save needs the name of a file\n"
    assert screen.turn("/save my chat") == "Written to my chat\n"
    assert screen.session.saved == "my chat"


def test_a_full_context_is_told_with_its_size() -> None:
    screen = Screen()
    completion = FakeCompletion(90, ["cut"], finish_reason="length")
    screen.session.send = lambda text: completion  # type: ignore[method-assign]
    assert screen.turn("Hi") == (
        "cut\n(the context of 100 tokens is full: /trim drops the oldest turns, "
        "/clear starts again)\n"
    )


def test_stats() -> None:
    screen = Screen()
    assert screen.turn("/stats") == "error: there is no answer yet\n"
    screen.model.enqueue("four")
    screen.turn("Hello")
    assert screen.turn("/stats") == (
        "read 5 tokens at 10.0 per second, wrote 4 at 2.0 per second\n"
        "the conversation holds 9 tokens\n"
    )
    screen = Screen(stats=True)
    screen.model.enqueue("four")
    assert screen.turn("Hello").splitlines() == [
        "four",
        "read 5 tokens at 10.0 per second, wrote 4 at 2.0 per second",
    ]


def test_system() -> None:
    screen = Screen()
    assert screen.turn("/system") == "system prompt: (none)\n"
    assert screen.turn("/system Be brief.") == "system prompt: Be brief.\n"
    assert screen.session.system == "Be brief."


def test_set() -> None:
    screen = Screen()
    assert "temperature       0.5\n" in screen.turn("/set")
    assert "temperature       1.5\n" in screen.turn("/set temp 1.5")
    assert "top_k             3\n" in screen.turn("/set top-k 3")
    assert "seed              random\n" in screen.turn("/set seed random")
    sampling = screen.session.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (1.5, 3, None)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/set heat 1", "there is no option heat; there are temperature, "),
        ("/set temp hot", "/set temperature needs a number, not 'hot'"),
        ("/set top_k 1.5", "/set top_k needs a whole number, not '1.5'"),
        ("/set seed", "/set seed needs a whole number, not 'nothing'"),
        ("/set temp nan", "temperature"),
        ("/set top_p 7", "top_p"),
    ],
)
def test_set_refuses(typed: str, message: str) -> None:
    screen = Screen()
    before = screen.session.sampling
    shown = screen.turn(typed)
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert message in shown
    assert screen.session.sampling == before


def test_an_error_keeps_the_conversation() -> None:
    screen = Screen()
    screen.model.answers.append(Error("the context is full"))
    assert screen.turn("Hi") == "error: the context is full\n"


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert terminal.printable("a\x1b[31mb\x07\x9b\x7f\ttab\r\nnew") == (
        "a\ufffd[31mb\ufffd\ufffd\ufffd\ttab\nnew"
    )


def test_ctrl_c_stops_the_answer_and_keeps_the_chat() -> None:
    screen = Screen()

    class Endless(FakeCompletion):
        def __iter__(self) -> Iterator[str]:
            yield "one "
            os.kill(os.getpid(), signal.SIGINT)
            while not screen.session.cancelled:
                yield ""
            yield "two"

    screen.session.send = lambda text: Endless(3, [])  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    assert screen.turn("Count") == "one two\n(stopped)\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    screen = Screen()

    class Deaf(FakeCompletion):
        def __iter__(self) -> Iterator[str]:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                yield "more"

    screen.session.send = lambda text: Deaf(3, [])  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        screen.turn("Count")


# Reading messages


@pytest.mark.parametrize(
    ("text", "unfinished"),
    [
        ("hello", False),
        ("hello\\", True),
        ("hello\\\nworld", False),
        ('"""', True),
        ('"""a\nb', True),
        ('"""a\nb"""', False),
        ('""""""', False),
        ('say """', False),
        ("", False),
    ],
)
def test_which_messages_go_on(text: str, unfinished: bool) -> None:
    assert terminal.is_open(text) == unfinished


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("plain", "plain"),
        ("two\\\nlines", "two\nlines"),
        ('"""\ntwo\n  lines\n"""', "two\n  lines"),
        ("half \ud83d", "half ?"),
    ],
)
def test_unfold(typed: str, message: str) -> None:
    assert terminal.unfold(typed) == message


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PipeInput]:
    monkeypatch.setenv("ONDEVICE_CACHE", str(tmp_path / "cache"))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def converse(keyboard: PipeInput, keys: str, answers: int) -> FakeSession:
    """The session after a user pressed `keys` and then Ctrl-D."""
    model = FakeModel()
    for _ in range(answers):
        model.enqueue("ok")
    session = model.session()
    keyboard.send_text(keys + "\x04")
    terminal.interactive(session, stats=False)  # type: ignore[arg-type]
    return session


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("Hi\r", "Hi"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ('"""one\rtwo"""\r', "one\ntwo"),
        ("\x1b[200~pasted\ntext\x1b[201~\r", "pasted\ntext"),
        ("wrong\x03right\r", "right"),
        ("안녕 🌍\r", "안녕 🌍"),
    ],
    ids=["enter", "alt-enter", "backslash", "fence", "paste", "ctrl-c", "korean"],
)
def test_keys(keyboard: PipeInput, keys: str, message: str) -> None:
    assert converse(keyboard, keys, 1).messages == [{"role": "user", "content": message}]


def test_an_edit_begins_with_the_old_message(keyboard: PipeInput) -> None:
    session = converse(keyboard, "one\rtwo\r/edit #1\r\x7fce\r", answers=3)
    assert [message["content"] for message in session.messages] == ["once"]


def test_ctrl_c_at_the_empty_prompt_says_how_to_leave(
    keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(keyboard, "\x03", 0)
    assert capsys.readouterr().out.endswith("Ctrl-D or /exit leaves.\n")


def test_history_is_kept_and_private(keyboard: PipeInput, tmp_path: Path) -> None:
    converse(keyboard, "first\r", 1)
    assert converse(keyboard, "\x1b[A\r", 1).messages == [{"role": "user", "content": "first"}]
    path = tmp_path / "cache" / "chat" / "history"
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_written_only_costs_the_history(
    keyboard: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONDEVICE_CACHE", str(tmp_path / "file"))
    assert len(converse(keyboard, "Hi\r", 1).messages) == 1


# Piped


def test_piped_is_plain(model: FakeModel, run: Run) -> None:
    model.enqueue("Hello", " you")
    model.enqueue("/what?\x1b[0m")
    result = run("chat", "m", "-s", "Be kind.", "--temp", "0", input="Hi\n\n/help\r\n")
    assert (result.stdout, result.stderr) == ("Hello you\n/what?\x1b[0m\n", "")
    (session,) = model.sessions
    assert [message["content"] for message in session.messages] == ["Hi", "/help"]
    assert session.system == "Be kind."
    assert session.sampling.temperature == 0


def test_piped_stats_go_to_stderr(model: FakeModel, run: Run) -> None:
    model.enqueue("Hello")
    result = run("chat", "m", "--stats", input="Hi\n")
    assert result.stdout == "Hello\n"
    assert result.stderr == "read 2 tokens at 4.0 per second, wrote 5 at 2.5 per second\n"


def test_piped_bytes_that_are_not_text(model: FakeModel, run: Run) -> None:
    model.enqueue("Hello")
    assert run("chat", input=b"caf\xe9\n").stdout == "Hello\n"
    assert model.loaded is not None and model.loaded[0] == "demo"
    assert model.sessions[0].messages[0]["content"] == "caf\ufffd"


def test_piped_failures_end_the_command(model: FakeModel, run: Run) -> None:
    model.enqueue("Hello")
    model.answers.append(ResourceError("no memory"))
    result = run("chat", "m", input="Hi\nAgain\nNever\n")
    assert (result.exit_code, result.stdout, result.stderr) == (
        4,
        "Hello\n",
        "error: no memory\n",
    )


def test_answers_appear_piece_by_piece() -> None:
    seen: list[str] = []

    class Out(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    model = FakeModel()
    model.enqueue("a", "b")
    terminal.piped(model.session(), ["Hi\n"], Out(), None)  # type: ignore[arg-type]
    assert seen == ["a", "ab", "ab\n"]
