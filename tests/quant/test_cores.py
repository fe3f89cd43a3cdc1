"""Processors and memory of a container."""

import os
from pathlib import Path

import pytest

from quant import cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's control group, two below the top."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores, "affinity", lambda: 16)
    (tmp_path / "membership").write_text("3:cpu:/elsewhere\n0::/a/b\n")
    folder = tmp_path / "cgroup" / "a" / "b"
    folder.mkdir(parents=True)
    return folder


def test_without_a_container_all_processors_count() -> None:
    assert 1 <= cores.cores() <= cores.affinity() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("own", "around", "quota", "count"),
    [
        ("max 100000", "max 100000", None, 16),
        ("250000 100000", "max 100000", 2.5, 3),
        ("max 100000", "50000 100000", 0.5, 1),
        ("400000 100000", "200000 100000", 2, 2),
        ("6400000 100000", "max 100000", 64, 16),
    ],
)
def test_the_tightest_quota_counts(
    groups: Path, own: str, around: str, quota: float | None, count: int
) -> None:
    (groups / "cpu.max").write_text(own)
    (groups.parent / "cpu.max").write_text(around)
    assert cores.cpu_quota() == quota
    assert cores.cores() == count


def test_the_tightest_memory_limit_counts(groups: Path) -> None:
    assert cores.memory_limit() is None
    (groups / "memory.max").write_text("max\n")
    assert cores.memory_limit() is None
    (groups / "memory.max").write_text("4096\n")
    (groups.parent / "memory.max").write_text("8192\n")
    assert cores.memory_limit() == 4096


def test_memory_of_a_group_of_version_1(groups: Path) -> None:
    (groups.parents[2] / "membership").write_text("9:name=systemd:/\n4:memory,cpu:/box\n")
    box = groups.parents[1] / "memory" / "box"
    box.mkdir(parents=True)
    assert cores.memory_limit() is None
    assert cores.memory_in_use() is None
    (box.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cores.memory_limit() is None
    (box / "memory.limit_in_bytes").write_text("8192\n")
    (box / "memory.stat").write_text("cache 5\nrss 1\ntotal_cache 5\ntotal_rss 3000\n")
    assert (cores.memory_limit(), cores.memory_in_use()) == (8192, 3000)


def test_memory_that_a_group_of_version_2_has_taken(groups: Path) -> None:
    (groups / "memory.stat").write_text("anon 100\nfile 5000\nkernel 20\nshmem 3\n")
    assert cores.memory_in_use() == 123
