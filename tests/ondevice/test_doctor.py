"""The findings about a machine, against what the machine itself says."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ondevice import doctor
from quant import jit
from quant.cores import cores


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    return doctor.examine()


def test_the_findings_agree_with_the_machine(found: dict[str, object]) -> None:
    import llvmlite
    import numba

    assert (found["numba"], found["llvmlite"]) == (numba.__version__, llvmlite.__version__)
    assert found["threads"] == cores()
    assert found["processors"] == os.cpu_count()
    total, available = found["memory_total"], found["memory_available"]
    assert isinstance(total, int) and isinstance(available, int)
    assert 0 < available <= total
    if hasattr(os, "sysconf"):
        assert total == pytest.approx(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.05
        )
    free = found["disk_free"]
    assert isinstance(free, int)
    assert abs(free - shutil.disk_usage(str(found["disk_folder"])).free) < 4 << 30
    speed, bandwidth = found["disk_speed"], found["read_bandwidth"]
    assert speed is None or (isinstance(speed, float) and speed > 1e6)
    assert isinstance(bandwidth, float) and 1e8 < bandwidth < 1e13


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"avx2", "fma", "avx512bw", "avx512vnni", "avxvnni"}, "AVX-512 VNNI"),
        ({"avx2", "avxvnni"}, "AVX-VNNI"),
        ({"avx2", "avx512bw"}, "AVX-512"),
        ({"avx2", "fma"}, "AVX2"),
        ({"neon", "dotprod", "i8mm"}, "NEON i8mm"),
        ({"neon", "dotprod"}, "NEON dotprod"),
        ({"neon"}, "plain code"),
        (set(), "plain code"),
    ],
)
def test_kernels_have_the_name_of_their_instructions(features: set[str], name: str) -> None:
    assert doctor.kernels(features) == name


def test_the_cache_is_described() -> None:
    described = doctor.cache()
    if jit.FOLDER is None:
        assert described["state"].startswith("none")
        return
    entries = list(jit.FOLDER.path.glob("*.code"))
    assert described["folder"] == str(jit.FOLDER.path)
    assert described["state"].startswith("private")
    assert described["entries"] == len(entries) > 0
    assert described["bytes"] == sum(path.stat().st_size for path in entries)


def test_why_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, found: dict[str, object]) -> None:
    monkeypatch.setattr(jit, "FOLDER", None)
    described = doctor.cache()
    assert described["folder"] is None
    assert "compiled every time" in described["state"]
    assert described["state"] in doctor.table({**found, "cache": described})


def test_disk_speed_leaves_nothing_behind(tmp_path: Path) -> None:
    doctor.disk_speed(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    model = tmp_path / "model"
    model.write_bytes(b"x" * 100_000)
    speed = doctor.disk_speed(tmp_path, model)
    assert speed is None or speed > 0
    assert doctor.disk_speed(tmp_path, tmp_path / "missing") is None


def test_the_command(run: Callable[..., Result]) -> None:
    started = time.perf_counter()
    result = run("doctor")
    assert time.perf_counter() - started < 15  # 3 on an idle machine
    assert (result.exit_code, result.stderr) == (0, "")
    labels = [line[:11].strip() for line in result.stdout.splitlines()]
    assert labels == [
        *("system", "compiler", "processor", "features", "kernels", "threads"),
        *("cache", "memory", "disk", "bandwidth", "int8 peak"),
    ]


def test_the_command_for_programs(run: Callable[..., Result]) -> None:
    Path("model.gguf").write_bytes(bytes(1 << 20))
    found = json.loads(run("doctor", "model.gguf", "--json").stdout)
    assert found["disk_folder"] == str(Path.cwd())
    assert {"cpu_features", "kernels", "cache", "memory_total"} <= set(found)
    assert found["read_bandwidth"] > 0 and found["int8_peak"] > 0
    missing = run("doctor", "missing.gguf")
    assert missing.exit_code == 4
    assert missing.stderr.startswith("error: ")
