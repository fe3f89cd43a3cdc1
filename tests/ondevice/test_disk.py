"""Reading past the page cache."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from ondevice import disk
from quant.errors import ResourceError


def test_what_is_read_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = np.random.default_rng(0).bytes(5 * disk.BLOCK + 17)
    path.write_bytes(data)
    number = disk.open_direct(path)
    try:
        with mmap.mmap(-1, 6 * disk.BLOCK) as aligned:
            assert os.preadv(number, [aligned], 0) == len(data)
            assert aligned[: len(data)] == data
    finally:
        os.close(number)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be read"):
        disk.open_direct(tmp_path / "none")


@pytest.mark.parametrize("offsets", [None, [0, 8192, 1 << 40]])
def test_bandwidth(
    offsets: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PROBE_SECONDS", 0.01)
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert 1e6 < disk.bandwidth(path, 60_000, 2, offsets) < 1e12


def test_bandwidth_of_a_file_shorter_than_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PROBE_SECONDS", 0.01)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    assert disk.bandwidth(path, 60_000, 2) > 0
