"""Damaged and hostile checkpoints: one line each, before any output."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the BF16 of the safetensors library)
import pytest
from safetensors.numpy import load_file, save_file

from convert import convert, plan
from quant.errors import Error, UsageError
from tests.convert.conftest import read_shard, shards, write_shard

INDEX = "model.safetensors.index.json"


def refused(folder: Path, *parts: str, error: type[Error] = Error) -> None:
    """Converting fails with one line holding every part, and writes nothing."""
    output = folder.parent / "out.gguf"
    with pytest.raises(error) as caught:
        convert(folder, output, "BF16")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not list(folder.parent.glob("out*"))


def test_git_lfs_pointer(checkpoint: Path) -> None:
    path = shards(checkpoint)[1]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(checkpoint, path.name, "Git-LFS pointer", "git lfs pull")


def test_html_page(checkpoint: Path) -> None:
    path = shards(checkpoint)[1]
    path.write_text("\n<!DOCTYPE html><html><body>404</body></html>")
    refused(checkpoint, path.name, "HTML page")


@pytest.mark.parametrize("size", [0, 7])
def test_almost_empty_shard(checkpoint: Path, size: int) -> None:
    path = shards(checkpoint)[0]
    path.write_bytes(path.read_bytes()[:size])
    refused(checkpoint, path.name, f"{size} bytes")


def test_truncated_shard(checkpoint: Path) -> None:
    path = shards(checkpoint)[0]
    size = path.stat().st_size
    os.truncate(path, size - 10)
    refused(checkpoint, path.name, f"{size} bytes expected, {size - 10} found")


def test_truncated_header(checkpoint: Path) -> None:
    path = shards(checkpoint)[0]
    os.truncate(path, 100)
    refused(checkpoint, path.name, "truncated in its header", "100 bytes")


def test_every_damaged_shard_is_named(checkpoint: Path) -> None:
    for path in shards(checkpoint):
        os.truncate(path, path.stat().st_size - 2)
    refused(checkpoint, *(path.name for path in shards(checkpoint)))


def test_missing_shards_are_all_named(checkpoint: Path) -> None:
    names = [path.name for path in shards(checkpoint)]
    for path in shards(checkpoint):
        path.unlink()
    refused(checkpoint, "2 of 2 shards are missing", *names)


@pytest.mark.parametrize("length", [1 << 63, 100_000_001])
def test_header_length(checkpoint: Path, length: int) -> None:
    path = shards(checkpoint)[0]
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(checkpoint, path.name, "not a safetensors file")


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": {}, "a": {}}', "'a' appears twice"),
        (b'{"a": \xff}', "not UTF-8"),
        (b'{"a": ', "invalid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "header"),
        (b'{"a": 1}', "needs exactly dtype"),
    ],
)
def test_header_json(checkpoint: Path, raw: bytes, part: str) -> None:
    path = shards(checkpoint)[0]
    write_shard(path, raw, b"")
    refused(checkpoint, path.name, part)


def first_tensor(header: dict[str, Any]) -> str:
    return min(
        (name for name in header if name != "__metadata__"),
        key=lambda name: int(header[name]["data_offsets"][0]),
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"dtype": "F31"}, "unknown dtype 'F31'"),
        ({"shape": [1 << 60]}, "is not a list of sizes"),
        ({"shape": [-1]}, "is not a list of sizes"),
        ({"shape": [True]}, "is not a list of sizes"),
        ({"shape": [3]}, "needs 6 bytes"),
        ({"shape": [1 << 39, 1 << 39]}, "bytes, its offsets span"),
        ({"data_offsets": [0]}, "are not [begin, end]"),
        ({"data_offsets": [8, 0]}, "are not [begin, end]"),
        ({"data_offsets": [0.0, 8.0]}, "are not [begin, end]"),
    ],
)
def test_tensor_entry(checkpoint: Path, change: dict[str, Any], part: str) -> None:
    path = shards(checkpoint)[0]
    header, data = read_shard(path)
    name = first_tensor(header)
    header[name] |= change
    write_shard(path, header, data)
    refused(checkpoint, path.name, name, part)


@pytest.mark.parametrize(("shift", "part"), [(2, "follows a hole"), (-2, "overlaps")])
def test_holes_and_overlaps(checkpoint: Path, shift: int, part: str) -> None:
    path = shards(checkpoint)[0]
    header, data = read_shard(path)
    name = max(
        (name for name in header if name != "__metadata__"),
        key=lambda name: header[name]["data_offsets"][0],
    )
    header[name]["data_offsets"] = [offset + shift for offset in header[name]["data_offsets"]]
    write_shard(path, header, data)
    refused(checkpoint, path.name, name, part)


def test_trailing_bytes(checkpoint: Path) -> None:
    path = shards(checkpoint)[0]
    with path.open("ab") as file:
        file.write(b"PK\x03\x04")
    refused(checkpoint, path.name, "4 bytes follow the last tensor")


def test_shard_metadata_is_accepted(checkpoint: Path) -> None:
    path = shards(checkpoint)[0]
    header, data = read_shard(path)
    write_shard(path, {"__metadata__": {}, **header}, data)
    plan(checkpoint)


def test_eight_bit_weights(checkpoint: Path) -> None:
    path = shards(checkpoint)[0]
    header, data = read_shard(path)
    name = first_tensor(header)
    header[name]["dtype"] = "F8_E4M3"
    header[name]["shape"][0] *= 2
    write_shard(path, header, data)
    refused(checkpoint, name)
    header[name]["shape"][0] //= 2
    header[name]["shape"] = [*header[name]["shape"]]
    length = header[name]["data_offsets"][1] // 2
    wide = {"dtype": "F8_E4M3", "shape": header[name]["shape"], "data_offsets": [0, length]}
    shift = header[name]["data_offsets"][1] - length
    for other, entry in header.items():
        if other not in ("__metadata__", name):
            entry["data_offsets"] = [offset - shift for offset in entry["data_offsets"]]
    header[name] = wide
    write_shard(path, header, data[shift:])
    refused(checkpoint, f"{name} ({path.name}) is F8_E4M3", "F32, F16, BF16")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a\0b.safetensors", "..", "c\\d.safetensors", ""],
)
def test_shard_names_that_leave_the_folder(
    checkpoint: Path, edit: Callable[..., None], name: str
) -> None:
    content = json.loads((checkpoint / INDEX).read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    (checkpoint / INDEX).write_text(json.dumps(content))
    refused(checkpoint, INDEX, "leaves the folder")


def test_link_out_of_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    path = shards(checkpoint)[0]
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(checkpoint, path.name, "link that leaves the folder")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_link_to_a_file_that_is_not_a_shard(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).rename(tmp_path / "elsewhere.json")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere.json")
    refused(checkpoint, name, "link that leaves the folder")


def test_hugging_face_cache_layout(pristine: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--someone--tiny-model"
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(pristine.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    planned = plan(snapshot)
    assert planned.metadata["general.name"].data.endswith(b"tiny model")


def test_index_against_shards(checkpoint: Path) -> None:
    content = json.loads((checkpoint / INDEX).read_text())
    name, file = next(iter(content["weight_map"].items()))
    content["weight_map"]["model.extra.weight"] = file
    other = next(item for item in content["weight_map"].values() if item != file)
    content["weight_map"][name] = other
    (checkpoint / INDEX).write_text(json.dumps(content))
    refused(checkpoint, f"puts {name} in {other}", f"puts model.extra.weight in {file}")


def test_tensor_in_two_shards(checkpoint: Path) -> None:
    first, second = shards(checkpoint)
    header, data = read_shard(first)
    name = first_tensor(header)
    length = header[name]["data_offsets"][1]
    other, more = read_shard(second)
    other[name] = {**header[name], "data_offsets": [len(more), len(more) + length]}
    write_shard(second, other, more + data[:length])
    refused(checkpoint, f"{name} is in {first.name} and in {second.name}")


def test_unlisted_shard_is_noted(checkpoint: Path) -> None:
    shutil.copy(shards(checkpoint)[0], checkpoint / "model-extra.safetensors")
    assert "model-extra.safetensors" in plan(checkpoint).notes[0]


def test_pickle_only(checkpoint: Path) -> None:
    for path in [*shards(checkpoint), checkpoint / INDEX]:
        path.unlink()
    refused(checkpoint, "no model.safetensors")
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(checkpoint, "pytorch_model.bin", "a pickle can run any code")


def test_empty_weight_map(checkpoint: Path, edit: Callable[..., None]) -> None:
    edit(checkpoint / INDEX, weight_map={})
    refused(checkpoint, INDEX, "weight_map must name a shard")


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such folder", error=UsageError)
    (tmp_path / "file").write_bytes(b"GGUF")
    refused(tmp_path / "file", "a checkpoint folder is needed", error=UsageError)


def test_missing_and_misshapen_tensors(checkpoint: Path, edit: Callable[..., None]) -> None:
    edit(checkpoint / "config.json", num_experts=5, moe_intermediate_size=16)
    refused(
        checkpoint,
        "model.layers.0.mlp.experts.4.gate_proj.weight is missing",
        "model.layers.0.mlp.gate.weight",
        "config.json needs (5, 64)",
        "more",
    )


def test_incomplete_mtp_block(checkpoint: Path) -> None:
    content = json.loads((checkpoint / INDEX).read_text())
    path = checkpoint / content["weight_map"].pop("mtp.fc.weight")
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != "mtp.fc.weight"}, path)
    (checkpoint / INDEX).write_text(json.dumps(content))
    refused(checkpoint, "mtp.fc.weight is missing")
    assert not plan(checkpoint, mtp=False).mtp


def test_tensor_without_a_place(checkpoint: Path) -> None:
    path = shards(checkpoint)[0]
    header, data = read_shard(path)
    name = "model.layers.0.self_attn.q_proj.bias"
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    write_shard(path, header, data + bytes(4))
    refused(checkpoint, f"{name} has no place")


def test_non_ascii_folder(pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "Zażółć 模型 😊"))
    convert(folder, tmp_path / "결과 😊.gguf", "BF16")
    assert (tmp_path / "결과 😊.gguf").exists()
