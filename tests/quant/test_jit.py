"""Compiled functions: kept between processes, compiled anew when what is kept cannot be trusted."""

import hmac
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import types

from quant import jit
from quant.code_folder import CodeFolder
from quant.jit import Compiled
from tests.quant.test_code_folder import Poison

ROOT = Path(__file__).resolve().parent.parent.parent


def twice(x: int) -> int:
    return 2 * x


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CodeFolder:
    """An empty folder that the functions of this test use."""
    monkeypatch.setenv("ONDEVICE_CACHE", str(tmp_path))
    opened = CodeFolder.open("kernels-0123456789ab")
    assert opened is not None
    monkeypatch.setattr(jit, "FOLDER", opened)
    return opened


def run() -> bool:
    """As a new process would: call a function that may be kept; whether it was."""
    function = Compiled(twice, types.int64(types.int64))
    assert function(21) == 42
    return sum(function.code.stats.cache_hits.values()) == 1


def entry(folder: CodeFolder) -> Path:
    (path,) = folder.path.glob("*.code")
    return path


def test_a_function_is_compiled_once(folder: CodeFolder) -> None:
    assert not Compiled(twice, types.int64(types.int64)).kept
    assert not run()
    assert Compiled(twice, types.int64(types.int64)).kept
    assert run()
    assert entry(folder).name.startswith("tests.quant.test_jit.twice-python-")


def test_other_types_and_other_uses_are_other_entries(folder: CodeFolder) -> None:
    names = {
        jit.CodeCache(twice, kind).name(arguments)
        for kind in ("python", "c")
        for arguments in ((types.int64,), (types.float64,))
    }
    assert len(names) == 4


def test_functions_with_a_closure_are_not_kept(folder: CodeFolder) -> None:
    factor = 3

    def scaled(x: int) -> int:
        return factor * x

    assert Compiled(scaled, types.int64(types.int64))(2) == 6
    assert list(folder.path.glob("*.code")) == []


@pytest.mark.parametrize("kind", ["bare", "signed with another key", "under a signature"])
def test_a_poisoned_entry_is_never_executed(folder: CodeFolder, tmp_path: Path, kind: str) -> None:
    run()
    path, marker = entry(folder), tmp_path / "marker"
    poison = pickle.dumps(Poison(marker))
    name = f"{folder.path.name}/{path.stem}".encode() + b"\0"
    signature = {
        "bare": b"",
        "signed with another key": hmac.digest(bytes(32), name + poison, "sha256"),
        "under a signature": path.read_bytes()[:32],
    }[kind]
    path.write_bytes(signature + poison)
    assert not run()
    assert not marker.exists()
    assert run()


def test_files_of_numbas_own_cache_are_not_looked_at(folder: CodeFolder, tmp_path: Path) -> None:
    run()
    poison = pickle.dumps(Poison(tmp_path / "marker"))
    for suffix in ("nbi", "1.nbc"):
        entry(folder).with_suffix(f".{suffix}").write_bytes(poison)
        (folder.path / f"test_jit.twice-1.py311.{suffix}").write_bytes(poison)
    assert run()
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps(1), pickle.dumps((1,) * 9)])
def test_an_entry_of_ours_that_makes_no_sense_is_compiled_anew(
    folder: CodeFolder, data: bytes
) -> None:
    run()
    folder.write(entry(folder).stem, data)
    assert not run()
    assert run()


def test_without_a_folder_everything_is_compiled(
    folder: CodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "FOLDER", None)
    assert not run()
    assert not run()
    assert list(folder.path.glob("*.code")) == []


def test_another_setting_of_the_compiler_means_another_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = jit.source_hash()
    assert before == jit.source_hash()
    monkeypatch.setattr(numba.config, "LOOP_VECTORIZE", 17)
    assert jit.source_hash() != before
    monkeypatch.undo()
    monkeypatch.setattr(numba, "__version__", "1.0")
    assert jit.source_hash() != before
    monkeypatch.undo()
    monkeypatch.setattr(jit, "_SOURCES", jit._SOURCES[1:])
    assert jit.source_hash() != before


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_old_numba_is_refused_in_one_line() -> None:
    done = python(
        "import numba; numba.version_info = numba.version_info._replace(short=(0, 67))\n"
        "numba.__version__ = '0.67.0'\n"
        "import cli; cli.main(['generate', 'demo', '-p', 'Hi'])"
    )
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: numba 0.67.0 is too old: 0.68 is needed")


KEPT = """
import json, sys
from quant import encoders, jit
from quant.jit import Compiled
from ondevice.kernels import expand, linear, team
import numpy as np
functions = [linear.linear, team.begin, expand.expand_f32, encoders.q8_0]
before = [function.kept for function in functions]
for function in functions[:3]: function.code
compiler = "numba.cpython.unicode" in sys.modules
values, out = np.ones((1, 32), np.float32), np.zeros((1, 34), np.uint8)
values.flags.writeable = False
encoders.q8_0(values, out)
assert out[0, 2:].tolist() == [127] * 32
print(json.dumps([before, compiler, str(jit.FOLDER.path)]))
"""


def test_the_next_process_loads_and_does_not_even_load_the_compiler(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        done = python(KEPT, ONDEVICE_CACHE=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        results.append(json.loads(done.stdout))
    (first, compiler, path), again = results
    assert first == [False] * 4 and compiler
    assert again == [[True] * 4, False, path]
    assert Path(path).is_relative_to(tmp_path)


def limit_file_size() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_disk_that_takes_no_more_does_not_matter(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEPT],
        cwd=ROOT,
        env={**os.environ, "ONDEVICE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )
    assert done.returncode == 0
    assert done.stderr.count("cannot be kept") == 1
    assert json.loads(done.stdout)[0] == [False] * 4


def test_an_encoder_refuses_other_arrays() -> None:
    from quant import encoders

    with pytest.raises(TypeError):
        encoders.q8_0(np.ones((1, 32), np.float64), np.zeros((1, 34), np.uint8))


def test_decorated_functions_keep_name_and_documentation() -> None:
    named: Callable[..., object] = Compiled(twice, types.int64(types.int64))
    assert (named.__name__, named.__module__) == ("twice", __name__)


def test_functions_begin_on_a_whole_vector_of_the_stack(folder: CodeFolder) -> None:
    (code,) = Compiled(twice, types.int64(types.int64)).code.inspect_llvm().values()
    assert_aligned(code)


def assert_aligned(code: str) -> None:
    groups = dict(re.findall(r"^attributes (#\d+) = \{(.*)\}$", code, re.MULTILINE))
    used = re.findall(r"^define .*(#\d+) \{$", code, re.MULTILINE)
    assert used
    assert all("alignstack=64" in groups[name] for name in used)


def test_an_inner_function_cannot_be_called_from_python_by_mistake() -> None:
    function = jit.inner(twice)
    with pytest.raises(TypeError, match="twice is compiled into kernels only"):
        function(1)
    assert jit.from_python(function)(21) == 42
