"""The output file: only ever complete, never one of the inputs, and gone after any failure."""

import errno
import io
import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import convert.partial
from convert import Progress
from convert import convert as run
from quant.errors import Error, Interrupted, ResourceError, UsageError


def test_existing_output_needs_force(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already; use --force"):
        run(pristine, output, "BF16")
    assert output.read_bytes() == b"precious"
    run(pristine, output, "BF16", force=True)
    assert output.read_bytes()[:4] == b"GGUF"


def test_existing_output_is_reported_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match="exists already"):
        run(tmp_path / "absent", tmp_path / "out.gguf")


def test_output_in_the_checkpoint(checkpoint: Path) -> None:
    before = sorted(path.name for path in checkpoint.iterdir())
    for output in (checkpoint / "out.gguf", checkpoint / "config.json"):
        with pytest.raises(UsageError, match="lies in the checkpoint's own folder"):
            run(checkpoint, output, "BF16", force=True)
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_output_that_is_an_input_by_another_name(checkpoint: Path, tmp_path: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    (tmp_path / "link.gguf").hardlink_to(shard)
    with pytest.raises(UsageError, match=r"link\.gguf: is a file of the checkpoint"):
        run(checkpoint, tmp_path / "link.gguf", "BF16", force=True)


def test_output_folder(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        run(pristine, tmp_path / "absent" / "out.gguf")
    with pytest.raises(UsageError, match="is a folder"):
        run(pristine, tmp_path, force=True)


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_threads(pristine: Path, tmp_path: Path, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}"):
        run(pristine, tmp_path / "out.gguf", threads=threads)


def test_an_unknown_type_is_reported_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="type 'Q9' is unknown"):
        run(tmp_path / "absent", tmp_path / "out.gguf", "Q9")


def test_no_space(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"\d+ bytes needed, 1000 free"):
        run(pristine, tmp_path / "out.gguf", "BF16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "part"),
    [(errno.ENOSPC, "the disk is full"), (errno.EFBIG, "cannot hold"), (errno.EIO, "cannot be")],
)
def test_a_write_that_fails(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, part: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, "it failed")

    monkeypatch.setattr(convert.partial.os, "fsync", fail)
    with pytest.raises(ResourceError, match=part) as caught:
        run(pristine, tmp_path / "out.gguf", "BF16")
    assert "bytes" in str(caught.value)
    assert not list(tmp_path.iterdir())


def interrupt(progress: Progress) -> None:
    raise KeyboardInterrupt


def test_interrupted(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    with pytest.raises(Interrupted, match="stopped, nothing was written"):
        run(pristine, output, "BF16", force=True, progress=interrupt)
    assert output.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_failing_callback_is_a_bug_and_cleans_up(pristine: Path, tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(pristine, tmp_path / "out.gguf", "BF16", progress=fail)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_nothing_in_the_way(pristine: Path, tmp_path: Path) -> None:
    run(pristine, tmp_path / "first.gguf", "BF16")
    (tmp_path / "out.gguf.partial").write_bytes(bytes(10_000_000))
    run(pristine, tmp_path / "out.gguf", "BF16")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    assert not (tmp_path / "out.gguf.partial").exists()


def test_whole_blocks_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the bytes come: writes begin and end at multiples of a block, but for the last."""
    block, sizes = convert.partial.BLOCK, []

    class Noting(io.FileIO):
        def write(self, data: Any) -> int:
            sizes.append(memoryview(data).nbytes)
            return super().write(data)

    monkeypatch.setattr(io, "FileIO", Noting)
    data = np.random.default_rng(0).bytes(3 * block + 1000)
    cuts = [0, 5, 5, block - 1, block + 7, 3 * block + 1, len(data)]
    with convert.partial.partial_file(tmp_path / "out", len(data)) as file:
        for begin, end in itertools.pairwise(cuts):
            assert file.write(data[begin:end]) == end - begin
        assert file.tell() == len(data)
    assert sizes == [block, block, block, 1000]
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.skipif(not convert.partial.LOCKS, reason="no file locks on this system")
def test_two_conversions_of_one_output(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    failures: list[Error] = []

    def second(progress: Progress) -> None:
        def attempt() -> None:
            try:
                run(pristine, output, "F32")
            except Error as error:
                failures.append(error)

        if not failures:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()

    run(pristine, output, "BF16", progress=second)
    assert "another conversion is writing this file" in str(failures[0])
    run(pristine, tmp_path / "alone.gguf", "BF16")
    assert output.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_progress(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.write.PROGRESS_SECONDS", 0.0)
    seen: list[Progress] = []
    report = run(pristine, tmp_path / "out.gguf", "BF16", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert [item.done_bytes for item in seen] == sorted(item.done_bytes for item in seen)
    assert {item.tensor for item in seen} >= {"token_embd.weight", "output.weight"}
    assert seen[-1].eta == 0
    assert report.output == tmp_path / "out.gguf"
    assert report.bits_per_weight > 16
    assert report.seconds > 0
    assert report.peak_memory > 1 << 20


@pytest.fixture(autouse=True)
def no_threads_left() -> Any:
    """Every worker thread has ended when a conversion has, however it ended."""
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("convert") for name in names)


def test_memory_does_not_grow_with_a_tensor(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces_alive: Callable[[], int]
) -> None:
    monkeypatch.setattr("convert.write.PIECE", 512)
    run(pristine, tmp_path / "out.gguf", "BF16", threads=3)
    assert pieces_alive() <= 2 * 3 + 1


@pytest.fixture
def pieces_alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The largest number of pieces that were in memory at once."""
    import convert.write as write

    lock, alive, most = threading.Lock(), [0], [0]
    encode, written = write._encode, write._Meter.add

    def counted(piece: Any) -> Any:
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return encode(piece)

    def added(self: Any, nbytes: int, tensor: str) -> None:
        with lock:
            alive[0] -= 1
        written(self, nbytes, tensor)

    monkeypatch.setattr(write, "_encode", counted)
    monkeypatch.setattr(write._Meter, "add", added)
    return lambda: most[0]
