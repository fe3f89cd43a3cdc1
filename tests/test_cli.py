"""The command line with a model that has no weights: what goes in, what comes out, exit codes."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import cli
from ondevice import console
from ondevice.console import size
from ondevice.sampling import Sampling
from quant.errors import Error, Interrupted, ResourceError
from tests.fake_model import FakeCompletion, FakeModel

Run = Callable[..., Result]
ROOT = Path(__file__).resolve().parent.parent


def last_json(result: Result) -> dict[str, object]:
    """The JSON object that must be all of stdout."""
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


# generate


def test_generate_prints_the_text_and_nothing_else(model: FakeModel, run: Run) -> None:
    model.enqueue("안녕", ", ", "세상 🌍")
    result = run("generate", "model.gguf", "-p", "Hi")
    assert (result.stdout, result.stderr, result.exit_code) == ("안녕, 세상 🌍\n", "", 0)
    assert model.completed["ids"] == list(map(ord, "<Hi>"))
    assert model.closed


def test_generate_json_is_one_line(model: FakeModel, run: Run) -> None:
    model.enqueue("He", "y\n")
    found = last_json(run("generate", "model.gguf", "-p", "Hi", "--json"))
    assert found.pop("timings")
    assert found == {
        "text": "Hey\n",
        "tokens": [72, 101, 121, 10],
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "finish_reason": "stop",
    }


@pytest.mark.parametrize("name", ["-", "prompt.txt"])
def test_the_prompt_may_come_from_a_file_or_a_pipe(model: FakeModel, run: Run, name: str) -> None:
    Path("prompt.txt").write_bytes("\ufeffZwei\nZeilen é\n".encode())
    model.enqueue("x")
    run("generate", "m", "-f", name, "--raw", input="Zwei\nZeilen é\n")
    assert model.completed["ids"] == list(map(ord, "Zwei\nZeilen é"))


def test_a_raw_prompt_gets_the_begin_of_text_token(model: FakeModel, run: Run) -> None:
    model.tokenizer.bos = 1
    for model.tokenizer.add_bos, ids in ((False, [72, 105]), (True, [1, 72, 105])):
        model.enqueue("x")
        run("generate", "m", "-p", "Hi", "--raw")
        assert model.completed["ids"] == ids


def test_a_piped_prompt_needs_no_option(model: FakeModel, run: Run) -> None:
    model.enqueue("x")
    run("generate", "m", input="Hi\r\n")
    assert model.completed["ids"] == list(map(ord, "<Hi>"))


def test_sampling_options_replace_the_defaults_of_the_file(model: FakeModel, run: Run) -> None:
    model.enqueue("x")
    result = run("generate", "m", "-p", "Hi", "--temp", "0", "--top-k", "5", "-n", "9")
    assert result.exit_code == 0
    assert model.completed["sampling"] == Sampling(temperature=0.0, top_k=5, seed=7)
    assert model.completed["max_tokens"] == 9


def test_options_of_the_machine_reach_load(model: FakeModel, run: Run) -> None:
    model.enqueue("x")
    arguments = ("-t", "3", "-c", "77", "--memory", "1.5G", "--mtp", "off")
    run("generate", "m", "-p", "Hi", *arguments)
    machine = {"threads": 3, "context": 77, "memory": 3 << 29, "prompt_cache": True}
    assert model.loaded == ("m", {**machine, "kv": "i12", "mtp": "off"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temp", "nan"], "temperature"),
        (["--temp", "inf"], "temperature"),
        (["--temp", "-1"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
        (["--top-k", "-3"], "top_k"),
        (["--min-p", "2"], "min_p"),
        (["--repeat-penalty", "0"], "repeat_penalty"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--file", "prompt.txt"], "give either --prompt or --file, not both"),
    ],
)
def test_generate_refuses_in_one_line(
    model: FakeModel, run: Run, arguments: list[str], message: str
) -> None:
    result = run("generate", "m", "-p", "Hi", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "0"],
        ["-t", "0"],
        ["-c", "none"],
        ["--memory", "2X"],
        ["--memory", "0"],
        ["--memory", "-1G"],
        ["--mtp", "maybe"],
        ["--nonsense"],
    ],
)
def test_options_click_refuses_end_with_2(run: Run, arguments: list[str]) -> None:
    result = run("generate", "m", "-p", "Hi", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def test_a_prompt_that_is_not_text_is_refused(model: FakeModel, run: Run) -> None:
    result = run("generate", "m", input=b"abc\xff")
    assert (result.exit_code, result.stderr) == (
        3,
        "error: standard input: byte 3 is not UTF-8 text\n",
    )
    assert run("generate", "m", "-f", "gone.txt").stderr == (
        "error: gone.txt: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("512M", 512 << 20), ("2G", 2 << 30), ("1.5g", 3 << 29), ("2GiB", 2 << 30)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


# How a command ends


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (Error("m.gguf: wrong\nmagic"), 3, "error: m.gguf: wrong magic\n"),
        (ResourceError("no room"), 4, "error: no room\n"),
        (Interrupted("stopped"), 5, "error: stopped\n"),
        (MemoryError(), 4, "error: out of memory\n"),
        (OSError(28, "No space left on device", "f"), 4, "error: f: No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    model: FakeModel, run: Run, error: BaseException, exit_code: int, line: str
) -> None:
    model.answers.append(error)
    result = run("generate", "m", "-p", "Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", line)


def test_a_bug_keeps_its_traceback(model: FakeModel, run: Run) -> None:
    model.answers.append(ZeroDivisionError("ours"))
    result = run("generate", "m", "-p", "Hi")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: ours" in result.stderr


def test_a_closed_pipe_is_quiet() -> None:
    code = "import cli, click\n@cli.main.command()\ndef spam():\n"
    code += "    for _ in range(100000): click.echo('spam')\ncli.main(['spam'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"spam{os.linesep}".encode()
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"ondevice {cli.VERSION}\n"
    for name in ("convert", "inspect", "generate", "chat", "bench", "perplexity", "doctor"):
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"Usage: ondevice {name}" in result.stdout


# perplexity


def test_perplexity_against_a_reference(
    model: FakeModel, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.table = np.random.default_rng(1).normal(size=(128, 128)).astype(np.float32)
    Path("text.txt").write_text("the same model twice")
    found = last_json(
        run("perplexity", "m", "text.txt", "--reference", "m", "--ctx-size", "8", "--json")
    )
    assert found["tokens"] == 20 - 3  # windows of 8, 8 and 4 tokens; the first of each is only read
    assert found["kl_divergence"] == 0
    assert found["top1_agreement"] == 1


def test_perplexity_in_words(model: FakeModel, run: Run) -> None:
    Path("text.txt").write_text("abcdefgh")
    result = run("perplexity", "m", "text.txt")
    assert result.stdout == "perplexity     128\nbits per byte  7\ntokens         7\n"


# convert and inspect


def test_convert_offers_what_the_converter_writes() -> None:
    from convert.recipe import FILE_TYPES

    assert set(cli.TYPES) == set(FILE_TYPES)


# The first start


def test_compiling_shows_a_line_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.compiling(12, 31)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console.compiling(12, 31)
    assert "compiling kernels for this machine, once: 12 of 31" in capsys.readouterr().err
    console.compiling(31, 31)
    assert "compiling" not in capsys.readouterr().err


def shown() -> str:
    """What a test that took stderr for itself finds there."""
    assert isinstance(sys.stderr, io.StringIO)
    return sys.stderr.getvalue()


class SlowCompletion(FakeCompletion):
    """Its prompt is half read until somebody has been told so."""

    prefilled_tokens = 1000
    read_tokens = 500.0

    def __iter__(self) -> Iterator[str]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and "50%" not in shown():
            time.sleep(0.01)
        yield from super().__iter__()


def test_a_long_prompt_shows_how_far_it_is_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    quick = FakeCompletion(1000, ["Yes", "."])
    assert list(console.watched(quick)) == ["Yes", "."]
    assert shown() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    pieces = console.watched(SlowCompletion(1000, ["Yes", "."]))
    assert next(pieces) == "Yes"
    line = shown()
    assert "reading the prompt:  50%" in line and "left" in line
    assert line.endswith("\r\x1b[K")
    assert list(pieces) == ["."]
    assert shown() == line


def test_load_reports_progress_to_a_terminal_only(
    model: FakeModel, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.load("m")
    assert model.loaded == ("m", {})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.load("m")
    assert model.loaded == ("m", {"progress": console.compiling})
