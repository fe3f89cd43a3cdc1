"""JSON from files somebody else wrote.

Python's own parser accepts NaN, keeps the last of two equal keys and raises RecursionError on deep
nesting; here each of these is one line naming the file. Sizes are bounded before reading.
"""

import json
from pathlib import Path
from typing import Any

from quant.errors import Error, ResourceError

LIMIT = 256 << 20
"""Bytes; the largest published tokenizer.json is about 35 MB."""


class _Refused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key!r} appears twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON")


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; every defect is an Error that starts with `where`."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise Error(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise Error(f"{where}: JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Error(
            f"{where}: invalid JSON at line {error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except ValueError as error:  # ours, or an integer of thousands of digits
        raise Error(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise Error(f"{where}: a JSON object is needed, found {type(value).__name__}")
    return value


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """The whole file, at most `limit` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise Error(f"{path}: {size} bytes, more than the {limit} accepted")
        return path.read_bytes()
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from None


def read_object(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in the file at `path`."""
    return parse_object(read_bytes(path, limit), str(path))
