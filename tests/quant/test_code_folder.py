"""The folder of machine code: what is written comes back, what was altered does not."""

import os
import pickle
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quant import code_folder
from quant.code_folder import DAY, CodeFolder, prune

NAME = "kernels-0123456789ab"
posix = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX")
root_only = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away"
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONDEVICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache"


def opened() -> CodeFolder:
    folder = CodeFolder.open(NAME)
    assert folder is not None
    return folder


def test_what_is_written_is_read_by_the_next_process(root: Path) -> None:
    opened().write("a", b"data")
    folder = opened()
    assert folder.path == root / NAME
    assert (folder.read("a"), folder.read("b")) == (b"data", None)
    assert "a" in folder and "b" not in folder
    assert list(folder.sizes()) == [32 + 4]


@posix
def test_everything_is_private(root: Path) -> None:
    old = os.umask(0)
    try:
        opened().write("a", b"data")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (root / NAME).iterdir()}
    assert modes == {"key": 0o600, "a.code": 0o600}
    assert stat.S_IMODE((root / NAME).stat().st_mode) == 0o700


class Poison:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def damages(path: Path, other: Path) -> dict[str, Callable[[], object]]:
    """Ways in which an entry can be wrong."""
    whole = path.read_bytes()

    def link() -> None:
        other.with_name("elsewhere").write_bytes(whole)
        path.unlink()
        path.symlink_to(other.with_name("elsewhere"))

    def pipe() -> None:
        path.unlink()
        os.mkfifo(path)

    def folder() -> None:
        path.unlink()
        path.mkdir()

    return {
        "empty": lambda: path.write_bytes(b""),
        "cut short": lambda: path.write_bytes(whole[:-1]),
        "only a signature": lambda: path.write_bytes(whole[:32]),
        "one bit": lambda: path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]),
        "random": lambda: path.write_bytes(os.urandom(len(whole))),
        "another entry": lambda: path.write_bytes(other.read_bytes()),
        "a link": link,
        "a pipe": pipe,
        "a folder": folder,
    }


@posix
@pytest.mark.parametrize("kind", damages(Path(__file__), Path(__file__)))
def test_a_damaged_entry_is_not_read(root: Path, kind: str) -> None:
    folder = opened()
    folder.write("a", bytes(100))
    folder.write("b", bytes(100))
    damages(folder.path / "a.code", folder.path / "b.code")[kind]()
    assert folder.read("a") is None
    assert folder.read("b") == bytes(100)
    if kind != "a folder":
        folder.write("a", b"again")
        assert folder.read("a") == b"again"


def test_an_entry_of_another_version_is_not_read(root: Path) -> None:
    first = opened()
    first.write("a", b"data")
    other = CodeFolder.open("kernels-ba9876543210")
    assert other is not None
    for name in ("key", "a.code"):
        (other.path / name).write_bytes((first.path / name).read_bytes())
    again = CodeFolder.open("kernels-ba9876543210")
    assert again is not None and again.read("a") is None


@posix
def test_a_key_that_others_can_read_is_replaced(root: Path) -> None:
    folder = opened()
    folder.write("a", b"data")
    key = folder.path / "key"
    before = key.read_bytes()
    for damage in (
        lambda: key.chmod(0o640),
        lambda: key.write_bytes(b"short"),
        lambda: key.unlink(),
        lambda: (key.rename(root / "stolen"), key.symlink_to(root / "stolen")),
    ):
        damage()
        again = opened()
        assert again.read("a") is None
        again.write("a", b"data")
        assert opened().read("a") == b"data"
        assert not key.is_symlink() and stat.S_IMODE(key.stat().st_mode) == 0o600
        assert key.read_bytes() != before


@posix
def test_a_folder_that_others_can_write_is_closed(root: Path) -> None:
    path = opened().path
    path.chmod(0o777)
    assert opened().path == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@posix
def test_a_link_in_place_of_the_folder_is_not_followed(root: Path, tmp_path: Path) -> None:
    root.mkdir()
    (tmp_path / "target").mkdir(mode=0o700)
    (root / NAME).symlink_to(tmp_path / "target")
    assert opened().path.parent.parent == tmp_path / "temporary"
    assert list((tmp_path / "target").iterdir()) == []


@root_only
@pytest.mark.parametrize("which", ["folder", "key"])
def test_what_belongs_to_somebody_else_is_not_used(root: Path, which: str) -> None:
    folder = opened()
    folder.write("a", b"data")
    os.chown(folder.path if which == "folder" else folder.path / "key", 12345, 12345)
    again = opened()
    assert again.read("a") is None
    assert (again.path == folder.path) == (which == "key")


@root_only
def test_a_temporary_folder_of_somebody_else_is_not_used(root: Path, tmp_path: Path) -> None:
    root.write_text("a file in the way")
    taken = tmp_path / "temporary" / f"ondevice-{os.getuid()}"
    taken.mkdir(mode=0o777)
    os.chown(taken, 12345, 12345)
    assert CodeFolder.open(NAME) is None


def test_without_a_cache_folder_temporary_files_will_do(root: Path, tmp_path: Path) -> None:
    root.write_text("a file in the way")
    opened().write("a", b"data")
    assert opened().read("a") == b"data"
    assert opened().path.is_relative_to(tmp_path / "temporary")


def test_a_folder_removed_meanwhile_is_made_again(root: Path) -> None:
    folder = opened()
    folder.write("a", b"data")
    for path in folder.path.iterdir():
        path.unlink()
    folder.path.rmdir()
    assert folder.read("a") is None
    folder.write("a", b"again")
    assert folder.read("a") == opened().read("a") == b"again"


def test_a_full_disk_is_said_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code_folder, "_write_file", full)
    with pytest.warns(RuntimeWarning, match="cannot be kept: No space left on device"):
        folder.write("a", b"data")
    folder.write("b", b"data")  # pytest makes a warning here an error


def test_half_written_files_are_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened()

    def broken(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.warns(RuntimeWarning):
        folder.write("a", b"data")
    assert [path.name for path in folder.path.iterdir()] == ["key"]


def test_the_lock_is_held_by_one(root: Path) -> None:
    folder = opened()
    held = folder.lock()
    assert held is not None
    assert held == -1 or folder.lock() is None
    if held != -1:
        os.close(held)
    again = folder.lock()
    assert again is not None
    if again != -1:
        os.close(again)


def test_old_versions_are_deleted(tmp_path: Path) -> None:
    ages = {
        "kernels-000000000001": 0.5,
        "kernels-000000000002": 2,
        "kernels-000000000003": 3,
        "kernels-000000000004": 4,
        "kernels-000000000005": 31,
        "kernels-000000000006": 40,
        "kernels-mine": 50,
        "chat": 50,
    }
    for name, days in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        used = time.time() - days * DAY
        os.utime(tmp_path / name, (used, used))
    prune(tmp_path, keep="kernels-000000000006")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "chat",
        *(f"kernels-00000000000{i}" for i in (1, 2, 3, 6)),
        "kernels-mine",
    ]


def test_versions_in_use_today_are_kept(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"kernels-00000000000{i}").mkdir()
    prune(tmp_path, keep="")
    assert len(list(tmp_path.iterdir())) == 6


def test_opening_marks_a_folder_as_used(root: Path) -> None:
    path = opened().path
    os.utime(path, (1e9, 1e9))
    opened()
    assert time.time() - path.stat().st_mtime < DAY


def test_poison_does_what_the_other_tests_rely_on(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Poison(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()
