"""Compiling ahead: in several processes, in one, and in many programs at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant import compiling, jit
from quant.code_folder import CodeFolder
from quant.compiling import Compilation, worker_command
from quant.jit import Compiled
from tests.quant.functions import FUNCTIONS, SECOND

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
from quant.compiling import Compilation
from tests.quant.functions import FUNCTIONS
with Compilation(FUNCTIONS): pass
print([function(10) for function in FUNCTIONS])
"""
EXPECTED = [11, 12, 13, 14, 15]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CodeFolder:
    """The folder that processes started from here use, empty; functions are not compiled yet."""
    monkeypatch.setenv("ONDEVICE_CACHE", str(tmp_path))
    opened = CodeFolder.open(f"kernels-{jit.source_hash()}")
    assert opened is not None
    monkeypatch.setattr(jit, "FOLDER", opened)
    for function in FUNCTIONS:
        function.__dict__.pop("code", None)
    return opened


def results() -> list[int]:
    return [function(10) for function in FUNCTIONS]


def hits(function: Compiled) -> int:
    return sum(function.code.stats.cache_hits.values())


def only_workers(jobs: int, done: object = None) -> None:
    """In place of `work`: leave everything to the other processes."""


def test_other_processes_compile(folder: CodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "cores", lambda: 3)
    monkeypatch.setattr(compiling, "work", only_workers)
    reports: list[tuple[int, int]] = []
    with Compilation(FUNCTIONS, lambda done, needed: reports.append((done, needed))):
        pass
    assert [hits(function) for function in FUNCTIONS] == [1] * 5
    assert results() == EXPECTED
    assert reports[0] == (0, 5) and reports[-1] == (5, 5)
    assert reports == sorted(reports)


def test_this_process_takes_its_share(folder: CodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "cores", lambda: 2)
    monkeypatch.setattr(compiling, "worker_command", lambda: [sys.executable, "-c", "pass"])
    with Compilation(FUNCTIONS):
        pass
    assert [hits(function) for function in FUNCTIONS] == [0] * 5
    assert results() == EXPECTED


@pytest.mark.parametrize("obstacle", ["frozen", "no Python", "one core", "no process", "no folder"])
def test_without_other_processes_this_one_compiles(
    folder: CodeFolder, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(compiling, "cores", lambda: 1 if obstacle == "one core" else 4)
    if obstacle == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        assert worker_command() is None
    elif obstacle == "no Python":
        monkeypatch.setattr(sys, "executable", "/opt/application/bin/application")
        assert worker_command() is None
    elif obstacle == "no folder":
        monkeypatch.setattr(jit, "FOLDER", None)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with Compilation(FUNCTIONS):
        pass
    assert [hits(function) for function in FUNCTIONS] == [0] * 5
    assert results() == EXPECTED


def test_nothing_happens_when_all_is_there(folder: CodeFolder) -> None:
    for function in FUNCTIONS:
        _ = function.code
        del function.__dict__["code"]
    reports: list[tuple[int, int]] = []
    with Compilation(FUNCTIONS, lambda *counts: reports.append(counts)) as compilation:
        assert compilation._workers == []
    assert reports == []
    assert [hits(function) for function in FUNCTIONS] == [1] * 5


def test_a_failure_meanwhile_ends_the_workers(
    folder: CodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "cores", lambda: 3)
    with pytest.raises(KeyboardInterrupt), Compilation(FUNCTIONS) as compilation:
        workers = list(compilation._workers)
        raise KeyboardInterrupt
    assert len(workers) == 2
    assert all(worker.returncode is not None for worker in workers)
    lock = folder.lock()
    assert lock is not None
    if lock >= 0:
        os.close(lock)


def test_who_comes_second_waits_for_the_first(
    folder: CodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = folder.lock()
    if held in (None, -1):
        pytest.skip("no file locks here")
    assert held is not None
    code = "from tests.quant.functions import FUNCTIONS\nfor f in FUNCTIONS: f.code"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    with Compilation(FUNCTIONS):
        pass
    first.wait()
    os.close(held)
    assert [hits(function) for function in FUNCTIONS] == [1] * 5


def test_nobody_waits_for_ever(folder: CodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    held = folder.lock()
    monkeypatch.setattr(compiling, "PATIENCE", 0.1)
    with Compilation(FUNCTIONS):
        pass
    assert results() == EXPECTED
    if held is not None and held >= 0:
        os.close(held)


def test_a_worker_survives_what_it_cannot_compile(folder: CodeFolder) -> None:
    command = worker_command()
    assert command is not None
    records = ["no.such.module f", "tests.quant.functions nothing", f"{SECOND.__module__} add_2"]
    done = subprocess.run(
        command,
        input=b"".join(record.encode().ljust(compiling.RECORD) for record in records),
        env=compiling._environment(),
        cwd="/",
    )
    assert done.returncode == 0
    assert SECOND.kept


def test_a_worker_for_other_sources_does_nothing(folder: CodeFolder) -> None:
    command = worker_command()
    assert command is not None
    subprocess.run(
        [*command[:-1], "0" * 12],
        input=f"{SECOND.__module__} add_2".encode().ljust(compiling.RECORD),
        env=compiling._environment(),
        check=True,
    )
    assert not SECOND.kept


def test_a_worker_imports_nothing_from_the_current_folder(
    folder: CodeFolder, tmp_path: Path
) -> None:
    (tmp_path / "numpy.py").write_text("import os; os.mkdir(os.environ['MARKER'])")
    (tmp_path / "quant").mkdir()
    command = worker_command()
    assert command is not None
    marker = tmp_path / "marker"
    environment = {**compiling._environment(), "MARKER": str(marker)}
    done = subprocess.run(command, input=b"", env=environment, cwd=tmp_path)
    assert done.returncode == 0
    assert not marker.exists()


def test_eight_programs_at_once(folder: CodeFolder) -> None:
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for program in programs:
        out, error = program.communicate(timeout=300)
        assert (program.returncode, out, error) == (0, f"{EXPECTED}\n", "")
    assert len(list(folder.path.glob("*.code"))) == 5
    assert list(folder.path.glob(".*")) == []
