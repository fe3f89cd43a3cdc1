"""The part of a GGUF file before its tensor data, version 3.

    "GGUF" u32 version  u64 tensors  u64 keys
    keys:    string name, u32 type, value        string = u64 length, UTF-8 bytes
             array  = u32 item type, u64 count, items
    tensors: string name, u32 axes, u64 sizes (innermost first), u32 ggml type, u64 offset
    padding to the alignment; offsets count from here

The format's description is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 32
_UINT8, _INT32, _UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 0, 5, 4, 6, 7, 8, 9


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value: its type number and its bytes."""

    type: int
    data: bytes


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _array(kind: int, count: int, data: bytes) -> Value:
    return Value(_ARRAY, struct.pack("<IQ", kind, count) + data)


def uint32(value: int) -> Value:
    """A whole number from 0 to 2^32 - 1."""
    return Value(_UINT32, struct.pack("<I", value))


def int32(value: int) -> Value:
    """A signed 32-bit number."""
    return Value(_INT32, struct.pack("<i", value))


def float32(value: float) -> Value:
    """A number, rounded to single precision."""
    return Value(_FLOAT32, struct.pack("<f", value))


def boolean(value: bool) -> Value:
    """True or false."""
    return Value(_BOOL, struct.pack("<?", value))


def string(value: str) -> Value:
    """Text, stored as UTF-8."""
    return Value(_STRING, _string(value))


def strings(values: Sequence[str]) -> Value:
    """An array of texts."""
    return _array(_STRING, len(values), b"".join(map(_string, values)))


def int32s(values: Sequence[int]) -> Value:
    """An array of signed 32-bit numbers."""
    return _array(_INT32, len(values), struct.pack(f"<{len(values)}i", *values))


def float32s(values: Sequence[float]) -> Value:
    """An array of single-precision numbers."""
    return _array(_FLOAT32, len(values), struct.pack(f"<{len(values)}f", *values))


def booleans(values: Sequence[bool]) -> Value:
    """An array of truth values."""
    return _array(_BOOL, len(values), struct.pack(f"<{len(values)}?", *values))


def uint8s(values: bytes) -> Value:
    """An array of bytes."""
    return _array(_UINT8, len(values), values)


def padding(nbytes: int) -> int:
    """Bytes from `nbytes` to the next multiple of the alignment."""
    return -nbytes % ALIGNMENT


def encode(
    metadata: dict[str, Value], tensors: Iterable[tuple[str, tuple[int, ...], int, int]]
) -> bytes:
    """The header, padded: `tensors` are (name, shape, ggml type, nbytes) in file order."""
    entries, offset = [], 0
    for name, shape, type_id, nbytes in tensors:
        entries.append(
            _string(name)
            + struct.pack("<I", len(shape))
            + struct.pack(f"<{len(shape)}Q", *reversed(shape))
            + struct.pack("<IQ", type_id, offset)
        )
        offset += nbytes + padding(nbytes)
    keys = [
        _string(key) + struct.pack("<I", value.type) + value.data for key, value in metadata.items()
    ]
    data = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys)) + b"".join(keys + entries)
    return data + bytes(padding(len(data)))
