"""The models that tests of the runtime share: open for the whole run, read-only but for `ends`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import convert
import ondevice
from ondevice import generate, journal, planning
from ondevice.model import Model
from tools.random_checkpoint import Shape, write_checkpoint

TINY = Shape(hidden=64, layers=2, interval=2, experts=8, experts_used=2, mtp=False)


@pytest.fixture(scope="session")
def demo() -> Iterator[Model]:
    """The bundled model, which answers in English."""
    with ondevice.load("demo", threads=2) as model:
        yield model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights: 8,192 tokens of context, some ten thousand tokens a second."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.gguf"
    convert.convert(write_checkpoint(folder / "checkpoint", TINY), path, type="F32")
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[Model]:
    with ondevice.load(tiny_path, threads=1) as model:
        yield model


@pytest.fixture
def endless(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The random model without end tokens: its answers fill the context unless something stops."""
    monkeypatch.setattr(tiny, "ends", np.zeros_like(tiny.ends))
    return tiny


@pytest.fixture(scope="module")
def small_batches() -> Iterator[None]:
    """For tests with tight budgets: the batch that leaves most for the pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BATCHES", planning.BATCHES[-1:])
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test; machine code stays where it is."""
    monkeypatch.setattr(journal, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(generate, "LONGEST_BURST", 8)
    return tmp_path / "cache"
