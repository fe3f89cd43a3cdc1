"""One safetensors file: its header checked in full, its tensors read by row.

    8 bytes   header length n, little endian, at most 100 MB
    n bytes   JSON  {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {}}
    the rest  tensor data: begins at 0, no hole, no overlap, ends with the file

The format's description is https://github.com/huggingface/safetensors (README, "Format"). The
checks are ours rather than the library's because a user needs to hear what is wrong with the
download, and "header too large" does not say that a file is a Git-LFS pointer.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.json_reader import parse_object
from quant.errors import Error, ResourceError

HEADER_LIMIT = 100_000_000
DIMENSION_LIMIT = 1 << 40
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element; only F32, F16 and BF16 are converted."""
READABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of a shard; offset counts from the start of the file."""

    name: str
    shard: "Shard"
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])


class Shard:
    """A checked safetensors file, opened at its first read."""

    def __init__(self, path: Path) -> None:
        """Read and check the header; Error names what is wrong with the file."""
        self.path = path
        self._lock = threading.Lock()
        self._file: Any = None
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(512)
                length = self._header_length(start, size)
                file.seek(8)
                data = file.read(length)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be read: {error.strerror}") from None
        self.tensors = self._tensors(data, size)

    def _header_length(self, start: bytes, size: int) -> int:
        name = self.path.name
        if start.startswith(b"version https://git-lfs"):
            raise Error(
                f"{name}: a Git-LFS pointer ({size} bytes), not the weights; run git lfs pull"
            )
        if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
            raise Error(f"{name}: looks like an HTML page, not the weights; download it again")
        if size < 8:
            raise Error(f"{name}: {size} bytes; a safetensors file has at least 10")
        length = int.from_bytes(start[:8], "little")
        if length > HEADER_LIMIT:
            raise Error(
                f"{name}: not a safetensors file (header length {length}, at most {HEADER_LIMIT})"
            )
        if length < 2 or start[8:9] != b"{":
            raise Error(f"{name}: not a safetensors file (its header is not a JSON object)")
        if 8 + length > size:
            raise Error(
                f"{name}: truncated in its header: {size} bytes, the header ends at {8 + length}"
            )
        return length

    def _tensors(self, data: bytes, size: int) -> dict[str, Source]:
        name = self.path.name
        header = parse_object(data, f"{name}: header")
        header.pop("__metadata__", None)
        base = 8 + len(data)
        sources = [self._source(key, value, base) for key, value in header.items()]
        end = base
        for source in sorted(sources, key=lambda source: (source.offset, source.nbytes)):
            if source.offset != end:
                kind = "overlaps the one before it" if source.offset < end else "follows a hole"
                raise Error(f"{name}: tensor {source.name}: its data {kind}")
            end += source.nbytes
        if end > size:
            raise Error(f"{name}: truncated: {end} bytes expected, {size} found; download it again")
        if end < size:
            raise Error(f"{name}: {size - end} bytes follow the last tensor")
        return {source.name: source for source in sources}

    def _source(self, key: str, value: Any, base: int) -> Source:
        where = f"{self.path.name}: tensor {key!r}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise Error(f"{where}: needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SIZES:
            raise Error(f"{where}: unknown dtype {dtype!r}")
        if not _is_integers(shape) or len(shape) > 8:
            raise Error(f"{where}: shape {str(shape)[:80]} is not a list of sizes")
        if not _is_integers(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
            raise Error(f"{where}: data_offsets {str(offsets)[:80]} are not [begin, end]")
        begin, end = offsets
        needed = prod(shape) * SIZES[dtype]
        if end - begin != needed:
            raise Error(
                f"{where}: {dtype} {tuple(shape)} needs {needed} bytes, "
                f"its offsets span {end - begin}"
            )
        return Source(key, self, dtype, tuple(shape), base + begin, needed)

    def read(self, offset: int, buffer: NDArray[Any]) -> None:
        """Fill `buffer` (C-contiguous) with the bytes at `offset`; safe from any thread."""
        view = memoryview(buffer.data).cast("B")
        try:
            with self._lock:
                if self._file is None:
                    self._file = self.path.open("rb", buffering=0)
                self._file.seek(offset)
                done = 0
                while done < len(view):
                    count = self._file.readinto(view[done:])
                    if not count:
                        raise Error(
                            f"{self.path.name}: ended at byte {offset + done} while being read"
                        )
                    done += count
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be read: {error.strerror}") from None

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= DIMENSION_LIMIT for item in value
    )


def _widen_bf16(raw: NDArray[Any], out: NDArray[np.float32]) -> None:
    np.left_shift(raw, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")


def _copy(raw: NDArray[Any], out: NDArray[np.float32]) -> None:
    out[...] = raw


_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_CONVERT: dict[str, Callable[[NDArray[Any], NDArray[np.float32]], None]] = {
    "F32": _copy,
    "F16": _copy,
    "BF16": _widen_bf16,
}


def read_rows(source: Source, first: int, out: NDArray[np.float32]) -> None:
    """Fill `out` (rows, columns) with the source's rows from `first` on, as float32."""
    assert out.shape[1] == source.columns and first + len(out) <= source.rows
    dtype = np.dtype(_STORED[source.dtype])
    raw = np.empty(out.shape, dtype)
    source.shard.read(source.offset + first * source.columns * dtype.itemsize, raw)
    _CONVERT[source.dtype](raw, out)
