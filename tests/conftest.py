"""Fixtures that several test modules use."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import cli
import ondevice
from ondevice import usage
from tests.fake_model import FakeModel


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Ctrl-C raises KeyboardInterrupt, also where a shell started the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_usage_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models of tests leave nothing in the user's folder."""
    folder = tmp_path_factory.mktemp("kept")
    usage.cache_root = lambda: folder  # type: ignore[assignment]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """What `ondevice.load` returns in this test: answers that the test enqueues, no weights."""
    fake = FakeModel()

    def load(path: str, **settings: object) -> FakeModel:
        fake.loaded = (path, settings)
        return fake

    monkeypatch.setattr(ondevice, "load", load)
    return fake


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """run("generate", "demo", input="Hi"): the command in an empty folder, with stdout, stderr.

    Sessions and the prompt cache are this test's own; machine code is everybody's.
    """
    monkeypatch.chdir(tmp_path)
    for module in ("journal", "prompt_cache"):
        monkeypatch.setattr(f"ondevice.{module}.cache_root", lambda: tmp_path / "cache")

    def invoke(*arguments: str, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli.main, arguments, input=input, prog_name="ondevice")

    return invoke
