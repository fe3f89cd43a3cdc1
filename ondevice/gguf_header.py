"""The front of a GGUF file, up to the tensor data: keys with their values, tensors' entries.

    "GGUF" | version u32 | tensor count u64 | key count u64
    per key:     name | type u32 | value         (a string is its length u64 and its bytes)
    per tensor:  name | dimensions u32 | sizes u64 ... | type u32 | offset u64

Layout: github.com/ggml-org/ggml, docs/gguf.md; versions 2 and 3, little endian. Nothing here is
trusted: every count is held against its limit and against the bytes that are left before anything
is allocated, and sizes are multiplied as Python integers, which do not overflow.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.errors import Error
from quant.format import Array, Format
from quant.registry import BY_TYPE, unsupported

HEADER_BYTES = 24
VERSIONS = (2, 3)
STRING_LIMIT = 16 << 20  # bytes of one string
ARRAY_LIMIT = 64 << 20  # elements of one array
STRINGS_LIMIT = 2 << 20  # strings in all arrays together: about a second of reading
METADATA_LIMIT = 256 << 20  # bytes before the tensor data
KEY_LIMIT = 65535  # bytes of a key, the format's own limit
KEYS_LIMIT = 65536
TENSORS_LIMIT = 1 << 18
NAME_LIMIT = 63  # bytes of a tensor's name, as ggml keeps it
DIMENSIONS_LIMIT = 4

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST_KEY = 8 + 1 + 4 + 1  # one-letter name, type, one-byte value
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_LOOKS_LIKE = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
    (b"version https://git-lfs", "a Git-LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page: the download failed"),
    (b"<!doctype", "an HTML page: the download failed"),
    (b"<html", "an HTML page: the download failed"),
    (b"{", "JSON"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"FUGG", "a byte-swapped GGUF"),
    (b"ggjt", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"),
)


@dataclass(frozen=True, slots=True)
class Record:
    """A tensor's entry in the file, checked alone; `start` counts from the data's start."""

    name: str
    shape: tuple[int, ...]
    format: Format
    start: int
    nbytes: int


class Cursor:
    """Reads values from the front of a mapped file, never beyond its end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.map = mapped
        self.size = len(mapped)
        self.position = 0
        self.strings = 0

    def fail(self, text: str) -> Error:
        return Error(f"{self.path}: {text} (at byte {self.position:,})")

    def need(self, nbytes: int, what: str) -> None:
        """Error unless `nbytes` more bytes are there."""
        if nbytes > self.size - self.position:
            raise self.fail(
                f"{what} needs {nbytes:,} bytes and {self.size - self.position:,} of "
                f"{self.size:,} are left: download incomplete?"
            )
        if self.position + nbytes > METADATA_LIMIT:
            raise self.fail(f"{what}: metadata beyond the limit of {METADATA_LIMIT:,} bytes")

    def u32(self, what: str) -> int:
        self.need(4, what)
        (value,) = _U32.unpack_from(self.map, self.position)
        self.position += 4
        return int(value)

    def u64(self, what: str) -> int:
        self.need(8, what)
        (value,) = _U64.unpack_from(self.map, self.position)
        self.position += 8
        return int(value)

    def plausible(self, what: str, count: int, smallest: int, limit: int) -> None:
        """Error unless `count` things of at least `smallest` bytes each can be in what is left."""
        if count > limit:
            raise self.fail(f"claims {count:,} {what}; the limit is {limit:,}")
        left = self.size - self.position
        if count > left // smallest:
            raise self.fail(
                f"claims {count:,} {what}; the {left:,} bytes left hold at most "
                f"{left // smallest:,}: download incomplete?"
            )

    def string(self, what: str, limit: int = STRING_LIMIT) -> bytes:
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise self.fail(f"{what} claims {length:,} bytes; the limit is {limit:,}")
        self.need(length, what)
        start = self.position
        self.position += length
        return self.map[start : self.position]

    def identifier(self, what: str, limit: int) -> str:
        """A key or a tensor's name: not empty, UTF-8, nothing that could garble a message."""
        raw = self.string(what, limit)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what}, {raw[:40]!r}, is not UTF-8") from None
        if not text:
            raise self.fail(f"{what} is empty")
        if not text.isprintable():
            raise self.fail(f"{what}, {raw[:40]!r}, holds control characters")
        return text

    def header(self) -> tuple[int, int]:
        """Magic, version and counts -> (tensors, keys)."""
        magic = self.map[:4]
        if magic != b"GGUF":
            raise _wrong_magic(self.path, self.map[:32])
        if self.size < HEADER_BYTES:
            raise Error(
                f"{self.path}: too short for a GGUF header: {self.size} of {HEADER_BYTES} bytes"
            )
        self.position = 4
        version = self.u32("the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(_U32.pack(version), "big")
            if swapped in VERSIONS:
                raise Error(f"{self.path}: big-endian GGUF is not supported, little-endian is")
            raise Error(f"{self.path}: GGUF version {version}; supported are 2 and 3")
        tensors = self.u64("the number of tensors")
        keys = self.u64("the number of keys")
        self.plausible("tensors", tensors, _SMALLEST_TENSOR, TENSORS_LIMIT)
        self.plausible("metadata keys", keys, _SMALLEST_KEY, KEYS_LIMIT)
        return tensors, keys

    def metadata(self, count: int) -> dict[str, Any]:
        """`count` keys with their values."""
        values: dict[str, Any] = {}
        offsets: dict[str, int] = {}
        for number in range(count):
            offset = self.position
            key = self.identifier(f"the name of metadata key {number}", KEY_LIMIT)
            if key in values:
                raise self.fail(f"duplicate key {key} at bytes {offsets[key]:,} and {offset:,}")
            offsets[key] = offset
            values[key] = self.value(key)
        return values

    def value(self, key: str) -> Any:
        kind = self.u32(f"the type of {key}")
        if kind == _STRING:
            return self.string(key).decode(errors="replace")
        if kind == _ARRAY:
            return self.array(key)
        number = self.numbers(key, kind, 1)[0]
        return number.item()

    def numbers(self, key: str, kind: int, count: int) -> Array:
        """`count` numbers or bools of value type `kind`, copied."""
        if kind not in _NUMBERS:
            raise self.fail(f"{key} has value type {kind}; GGUF defines 0 to 12")
        dtype = _NUMBERS[kind]
        self.need(count * dtype.itemsize, key)
        # a view instead of a copy would keep the mapping open after a failure further on
        values: Array = np.frombuffer(self.map, dtype, count, self.position).copy()
        if kind == _BOOL:
            if values.size and values.max() > 1:
                raise self.fail(f"{key} holds a bool of value {values.max()}; needed 0 or 1")
            values = values.view(np.bool_)
        self.position += count * dtype.itemsize
        return values

    def array(self, key: str) -> Array | list[str]:
        kind = self.u32(f"the element type of {key}")
        if kind == _ARRAY:
            raise self.fail(f"{key} is an array of arrays, which is not supported")
        if kind == _STRING:
            count = self.u64(f"the length of {key}")
            self.plausible(f"strings in {key}", count, 8, ARRAY_LIMIT)
            return self.string_array(key, count)
        smallest = _NUMBERS[kind].itemsize if kind in _NUMBERS else 1
        count = self.u64(f"the length of {key}")
        self.plausible(f"elements in {key}", count, smallest, ARRAY_LIMIT)
        return self.numbers(key, kind, count)

    def string_array(self, key: str, count: int) -> list[str]:
        """`count` strings; bytes that are not UTF-8 become lone surrogates."""
        self.strings += count
        if self.strings > STRINGS_LIMIT:
            raise self.fail(f"{self.strings:,} strings in arrays; the limit is {STRINGS_LIMIT:,}")
        # one tight loop: opening a file with 300,000 tokens and merges spends its time here
        mapped, unpack, position = self.map, _U64.unpack_from, self.position
        last = min(self.size, METADATA_LIMIT)
        strings: list[str] = []
        append = strings.append
        for _ in range(count):
            begin = position + 8
            if begin > last:
                break
            end = begin + unpack(mapped, position)[0]
            if end > last:
                break
            append(mapped[begin:end].decode("utf-8", "surrogateescape"))
            position = end
        self.position = position
        if len(strings) < count:
            self.string(f"string {len(strings):,} of {key}")  # says what is wrong with it
        return strings

    def records(self, count: int, alignment: int) -> list[Record]:
        """`count` tensor entries, each checked alone."""
        records: dict[str, Record] = {}
        for number in range(count):
            name = self.identifier(f"the name of tensor {number}", NAME_LIMIT)
            if name in records:
                raise self.fail(f"duplicate tensor {name}")
            records[name] = self.record(name, alignment)
        return list(records.values())

    def record(self, name: str, alignment: int) -> Record:
        dimensions = self.u32(f"the dimensions of {name}")
        if not 1 <= dimensions <= DIMENSIONS_LIMIT:
            raise self.fail(f"tensor {name} has {dimensions:,} dimensions; needed 1 to 4")
        sizes = [self.u64(f"a dimension of {name}") for _ in range(dimensions)]
        kind = self.u32(f"the type of {name}")
        start = self.u64(f"the offset of {name}")
        if kind not in BY_TYPE:
            raise unsupported(kind, name, self.path)
        found = BY_TYPE[kind]
        weights = 1
        for size in sizes:
            if not 1 <= size < 1 << 63:
                raise self.fail(f"tensor {name} has a dimension of {size:,}")
            weights *= size
        if sizes[0] % found.length:
            raise self.fail(
                f"tensor {name} is {found.name} with rows of {sizes[0]:,} weights; "
                f"needed a multiple of {found.length}"
            )
        if start % alignment:
            raise self.fail(
                f"tensor {name} starts at offset {start:,}; needed a multiple of {alignment}"
            )
        nbytes = weights // found.length * found.block.itemsize
        return Record(name, tuple(reversed(sizes)), found, start, nbytes)


def shown(value: Any) -> str:
    """A metadata value for an error message: short, and on one line."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value):,} values"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return f"{value:,}" if type(value) is int else str(value)


def _wrong_magic(path: Path, start: bytes) -> Error:
    size = path.stat().st_size
    if b"GGUF".startswith(start):
        return Error(f"{path}: too short for a GGUF header: {size} of {HEADER_BYTES} bytes")
    looks = next((what for prefix, what in _LOOKS_LIKE if start.startswith(prefix)), "")
    if not looks and start[8:9] == b"{":
        looks = "a safetensors file; convert it first"
    found = f"this looks like {looks}" if looks else f"it starts with {start[:4]!r}"
    return Error(f"{path}: not a GGUF file: {found}")
