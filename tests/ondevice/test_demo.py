"""The demo model's file: made once, under a name of its own, wherever something can be written."""

import threading
from pathlib import Path

import pytest

import convert
from ondevice import demo
from quant.errors import ResourceError


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that a stand-in for the converter wrote."""
    written: list[Path] = []

    def stand_in(source: Path, output: Path, type: str, **options: object) -> None:
        written.append(output)
        output.write_bytes(f"{source.name} {type}".encode())

    monkeypatch.setattr(convert, "convert", stand_in)
    monkeypatch.setenv("ONDEVICE_CACHE", str(tmp_path / "cache"))
    return written


def test_the_checkpoint_is_bundled() -> None:
    names = {path.name for path in demo.checkpoint_path().iterdir()}
    assert {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    } <= names
    assert len(list(demo.checkpoint_path().glob("*.safetensors"))) >= 2


def test_it_is_made_once(made: list[Path], tmp_path: Path) -> None:
    path = demo.gguf_path()
    assert path.parent == tmp_path / "cache" / "demo"
    assert path.read_bytes() == b"demo Q4_K_M"
    assert demo.gguf_path() == demo.model_path("demo") == path
    assert len(made) == 1
    assert not made[0].exists()  # it was moved, the folder it was made in is gone


def test_many_at_once_make_one(made: list[Path]) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(demo.gguf_path())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(set(paths)) == len(made) == 1


def test_another_checkpoint_gets_another_file(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = demo.gguf_path()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "checkpoint_path", lambda: tmp_path / "demo")
    assert demo.gguf_path() != before
    assert len(made) == 2


def test_without_a_cache_folder_the_temporary_one_serves(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("ONDEVICE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    assert demo.gguf_path().is_relative_to(tmp_path / "temporary")

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="no private folder for the demo model"):
        demo.gguf_path()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(source: Path, output: Path, type: str, **options: object) -> None:
        output.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "convert", full)
    with pytest.raises(ResourceError, match="cannot write the demo model: No space left"):
        demo.gguf_path()
    assert [path.name for path in (tmp_path / "cache" / "demo").iterdir()] == ["demo.lock"]


def test_a_file_called_demo_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").touch()
    assert demo.model_path("demo") == Path("demo")
    assert demo.model_path("other.gguf") == Path("other.gguf")
