"""The bundled demo model through the commands: checkpoint, file, answer; nothing is faked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import ondevice
from ondevice import demo

Run = Callable[..., Result]
ROOT = Path(__file__).resolve().parent.parent
TEXT = "It was a bright cold day, and Mr. Sherlock Holmes had taken a long walk. " * 8


@pytest.fixture(scope="module")
def gguf() -> Path:
    return demo.gguf_path()


def as_json(result: Result) -> dict[str, object]:
    """All of stdout, which must be one line with one JSON object."""
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_convert_inspect_generate(run: Run, gguf: Path) -> None:
    made = as_json(run("convert", "demo", "made.gguf", "--type", "q4_k_m", "--json"))
    assert made["output"] == "made.gguf"
    assert made["bytes"] == Path("made.gguf").stat().st_size
    assert Path("made.gguf").read_bytes() == gguf.read_bytes()
    assert {"tensors", "bits_per_weight", "seconds", "peak_memory"} <= made.keys()

    facts = as_json(run("inspect", "made.gguf", "--json"))
    assert facts["architecture"] == "qwen3next"
    assert len(facts["tensors"]) == made["tensors"]  # type: ignore[arg-type]
    assert {"parameters", "active_parameters", "config", "bytes_per_token"} <= facts.keys()
    listed = run("inspect", "made.gguf", "--tensors").stdout
    assert "token_embd.weight  4096 x 256" in listed

    options = ["-p", "Hello", "-n", "12", "--temp", "0"]
    answer = as_json(run("generate", "made.gguf", *options, "--json"))
    assert answer == as_json(run("generate", "demo", *options, "--json")) | {
        "timings": answer["timings"]
    }
    assert run("generate", "demo", *options).stdout == f"{answer['text']}\n"
    with ondevice.load("demo") as model:
        ids = model.template.encode([{"role": "user", "content": "Hello"}])
        assert list(model.generate(ids, max_tokens=12, temperature=0.0)) == answer["tokens"]
        assert len(ids) == answer["prompt_tokens"]


def test_convert_refuses_and_foretells(run: Run) -> None:
    Path("there.gguf").touch()
    refused = run("convert", "demo", "there.gguf")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: there.gguf: exists already")
    planned = as_json(run("convert", "demo", "new.gguf", "--type", "Q8_0", "--dry-run", "--json"))
    assert not Path("new.gguf").exists()
    made = as_json(run("convert", "demo", "--type", "Q8_0", "--json"))
    assert made["output"] == "demo-Q8_0.gguf"
    assert (made["bytes"], made["tensors"]) == (planned["bytes"], planned["tensors"])
    assert run("convert", "demo", "--dry-run").stdout.count("blk.0.attn_norm.weight") == 1


def test_a_raw_prompt_is_continued(run: Run) -> None:
    answer = as_json(run("generate", "demo", "-p", "It was", "--raw", "-n", "3", "--json"))
    with ondevice.load("demo") as model:
        assert answer["prompt_tokens"] == len(model.tokenize("It was"))


def test_a_prompt_beyond_the_context(run: Run) -> None:
    result = run("generate", "demo", "-p", TEXT, "-c", "16")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "the context only 16" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_piped_chat_keeps_its_state(run: Run) -> None:
    lines = run("chat", "demo", "--temp", "0", "--stats", input="Hello\nWho are you?\n")
    assert lines.exit_code == 0
    second = lines.stderr.splitlines()[1]
    with ondevice.load("demo") as model:
        session = model.session(sampling=ondevice.Sampling(temperature=0.0))
        answers = ["".join(session.send(text)) for text in ("Hello", "Who are you?")]
        assert session.last is not None
        assert second.startswith(f"read {session.last.prefilled_tokens} tokens at ")
        assert session.last.prefilled_tokens < session.last.prompt_tokens
    assert lines.stdout == "".join(f"{answer}\n" for answer in answers)


def test_a_chat_goes_on_another_day(run: Run, gguf: Path) -> None:
    options = ["--temp", "0", "--stats"]
    whole = run("chat", "demo", *options, input="Hello\nWho are you?\nWhy?\n")
    first = run("chat", str(gguf), *options, "--session", "one", input="Hello\nWho are you?\n")
    assert first.exit_code == 0
    other = run("chat", "demo", *options, "--session", "two", input="Hi\n")
    assert other.exit_code == 0
    second = run("chat", *options, "--session", "one", "--continue", input="Why?\n")
    assert first.stdout + second.stdout == whole.stdout
    speed = [line.split(" at ")[0] for line in (second.stderr + whole.stderr).splitlines()]
    assert speed[0] == speed[3]  # as many tokens read as without the break
    third = run("chat", "--continue", "--temp", "0", input="And you?\n")
    whole = run("chat", "demo", *options, input="Hello\nWho are you?\nWhy?\nAnd you?\n")
    assert whole.stdout == first.stdout + second.stdout + third.stdout


def test_sessions_that_cannot_be_continued(run: Run) -> None:
    nothing = run("chat", "--continue", input="Hi\n")
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert nothing.stderr == "error: there is no session to continue; --session NAME begins one\n"
    assert run("chat", "--session", "one", "-c", "300", input="Hello\n").exit_code == 0
    for options, message in (
        (("--session", "two"), "error: there is no session 'two'; there are: one\n"),
        (("--session", "a/b"), "error: the session's name is 'a/b'; it must not "),
        (("-c", "9"), "tokens and the context only 9; open the model with a larger one\n"),
        (("--kv-type", "q8_0"), "made with kv type i12; the model is open with q8_0\n"),
    ):
        refused = run("chat", "--continue", *options, input="Hi\n")
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_document_is_read_once(run: Run) -> None:
    options = ["-p", TEXT * 3, "-n", "4", "--temp", "0", "--json"]
    first, second = (as_json(run("generate", "demo", *options)) for _ in range(2))
    assert first["tokens"] == second["tokens"]
    assert list(Path("cache/prompts").glob("*.memory"))
    assert as_json(run("generate", "demo", *options, "--no-prompt-cache"))["text"] == first["text"]


def test_perplexity_against_itself(run: Run, gguf: Path) -> None:
    Path("text.txt").write_text(TEXT)
    options = ["--ctx-size", "64", "--reference", str(gguf), "--json"]
    found = as_json(run("perplexity", "demo", "text.txt", *options))
    assert found["kl_divergence"] == 0
    assert found["top1_agreement"] == 1
    assert 0 < found["bits_per_byte"] < 8  # type: ignore[operator]


def test_bench(run: Run) -> None:
    options = ["--prompt", "32", "--generate", "8", "--depth", "8", "--repeat", "1", "--json"]
    found = as_json(run("bench", "demo", *options))
    assert {
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "bytes_per_token",
        "read_bandwidth",
        "decode_fraction_of_limit",
        "load_seconds",
        "compile_seconds",
        "peak_memory",
    } <= found.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html>" + bytes(100), "HTML"),
        (b"GGUF" + bytes(20), "version"),
    ],
)
def test_files_that_are_no_model(run: Run, content: bytes, message: str) -> None:
    Path("bad.gguf").write_bytes(content)
    for command in (["inspect"], ["generate", "-p", "Hi"], ["bench"], ["chat"]):
        result = run(*command, "bad.gguf", input="")
        assert result.exit_code == 3
        assert result.stdout == ""
        assert result.stderr.startswith("error: bad.gguf: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr


def test_the_readme_example_runs(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "case.session").exists()


@pytest.mark.slow
def test_eight_first_starts_at_once(tmp_path: Path) -> None:
    """With nothing cached: each answers the same, and no half-made file stays behind."""
    environment = {**os.environ, "ONDEVICE_CACHE": str(tmp_path)}
    command = [sys.executable, "cli.py", "generate", "demo", "-p", "Hi", "-n", "4"]
    programs = [
        subprocess.Popen(
            [*command, "--temp", "0"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(8)
    ]
    results = [(*program.communicate(timeout=600), program.returncode) for program in programs]
    assert {(error, code) for _, error, code in results} == {(b"", 0)}
    assert len({out for out, _, _ in results}) == 1
    assert list(tmp_path.rglob("*.part")) == []
