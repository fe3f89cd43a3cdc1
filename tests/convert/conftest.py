"""Tiny checkpoints to convert, and ways to damage them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.random_checkpoint import Shape, write_checkpoint

SHAPE = Shape(hidden=64, layers=4, experts=4, experts_used=2, heads=4, kv_heads=2, vocabulary=384)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an MTP block in two shards; do not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("pristine") / "tiny-model", SHAPE)


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A private copy of `pristine`."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny-model"))


@pytest.fixture
def edit() -> Callable[..., None]:
    """edit(path, key=value): change keys of a JSON file; None deletes a key."""

    def change(path: Path, **values: Any) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, value in values.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


def shards(folder: Path) -> list[Path]:
    """The shards of a checkpoint, in order."""
    return sorted(folder.glob("*.safetensors"))


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_shard(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """A safetensors file of any header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
