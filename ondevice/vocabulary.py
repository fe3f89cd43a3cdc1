"""What a GGUF file says about its tokenizer, checked before any library sees it.

Keys (`tokenizer.ggml.`): `model` (gpt2 = byte-level BPE, llama = SentencePiece BPE, t5 =
SentencePiece unigram), `pre`, `tokens`, `token_type`, `scores`, `merges`,
`{bos,eos,eot,eom,padding,unknown}_token_id`, `add_bos_token`, `add_space_prefix`,
`remove_extra_whitespaces`, `precompiled_charsmap`.

A text may be empty or repeated only where the token is UNUSED (it pads the embedding matrix): the
encoding of a text that two tokens stand for is not defined.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant.errors import Error

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODELS = ("gpt2", "llama", "t5")
PREFIX = "tokenizer.ggml."
SPECIAL_IDS = ("bos", "eos", "eot", "eom", "padding", "unknown")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The checked tokenizer metadata of one file; an id indexes `tokens`, `types` and `scores`."""

    path: str
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]  # SentencePiece only
    merges: list[tuple[str, str]]  # byte-level BPE only
    special: dict[str, int]  # those of SPECIAL_IDS that the file names
    add_bos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], path: object) -> Vocabulary:
        """Read and check every tokenizer key; Error names the file, the key and the entry."""
        keys = _Keys(metadata, str(path))
        model = keys.text("model")
        if model not in MODELS:
            raise keys.error("model", f"is {model!r}; this runtime reads {', '.join(MODELS)}")
        sentencepiece = model != "gpt2"
        tokens = keys.strings("tokens")
        types = _types(keys, len(tokens), required=sentencepiece)
        known = _unique(keys, tokens, types)
        return cls(
            path=str(path),
            model=model,
            pre=keys.text("pre", "default"),
            tokens=tokens,
            types=types,
            scores=_scores(keys, len(tokens)) if sentencepiece else [],
            merges=[] if sentencepiece else _merges(keys, known),
            special=_special_ids(keys, len(tokens)),
            add_bos=keys.flag("add_bos_token", model == "llama"),
            add_space_prefix=keys.flag("add_space_prefix", sentencepiece),
            remove_extra_whitespaces=keys.flag("remove_extra_whitespaces", False),
            charsmap=_charsmap(keys) if sentencepiece else b"",
        )

    def of_type(self, *types: int) -> dict[str, int]:
        """Text -> id of the tokens of these types."""
        wanted = np.flatnonzero(np.isin(self.types, types)).tolist()
        return {text: token for token in wanted if (text := self.tokens[token])}


class _Keys:
    """Typed access to the metadata, so that every complaint names the file and the key."""

    def __init__(self, metadata: dict[str, Any], path: str) -> None:
        self._metadata = metadata
        self._path = path

    def error(self, key: str, problem: str) -> Error:
        return Error(f"{self._path}: {PREFIX}{key} {problem}")

    def get(self, key: str) -> Any:
        return self._metadata.get(PREFIX + key)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            found = "is missing" if value is None else f"is of type {type(value).__name__}"
            raise self.error(key, f"{found}; a string is needed")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"is {str(value)[:40]!r}; true or false is needed")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, list | np.ndarray) or not all(isinstance(x, str) for x in value):
            raise self.error(key, "is not an array of strings")
        if len(value) == 0:
            raise self.error(key, "is empty")
        return list(value)

    def numbers(self, key: str, kinds: str, count: int) -> np.ndarray:
        """(count,) array of the number kinds (NumPy's letters) asked for."""
        value = np.asarray(self.get(key))
        if value.ndim != 1 or value.dtype.kind not in kinds:
            raise self.error(key, "is not an array of numbers of the right kind")
        if len(value) != count:
            raise self.error(key, f"has {len(value)} entries for {count} tokens")
        return value


def _types(keys: _Keys, count: int, required: bool) -> list[int]:
    if keys.get("token_type") is None:
        if required:
            raise keys.error("token_type", "is missing")
        return [NORMAL] * count
    types = keys.numbers("token_type", "iu", count)
    wrong = np.flatnonzero((types < NORMAL) | (types > BYTE))
    if wrong.size:
        token = int(wrong[0])
        raise keys.error("token_type", f"of token {token} is {types[token]}; 1 to 6 is needed")
    return [int(kind) for kind in types]


def _scores(keys: _Keys, count: int) -> list[float]:
    if keys.get("scores") is None:
        raise keys.error("scores", "is missing")
    scores = keys.numbers("scores", "fiu", count).astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(scores))
    if wrong.size:
        raise keys.error("scores", f"of token {wrong[0]} is not finite")
    return [float(score) for score in scores]


def _unique(keys: _Keys, tokens: list[str], types: list[int]) -> dict[str, int]:
    """Text -> id of every token that is in use."""
    known: dict[str, int] = {}
    for token, text in enumerate(tokens):
        if types[token] == UNUSED:
            continue
        if not text:
            raise keys.error("tokens", f"holds an empty text at token {token}")
        first = known.setdefault(text, token)
        if first != token:
            raise keys.error("tokens", f"gives tokens {first} and {token} one text, {text[:40]!a}")
    return known


def _merges(keys: _Keys, known: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for index, merge in enumerate(keys.strings("merges")):
        left, _, right = merge.partition(" ")
        if left not in known or right not in known or left + right not in known:
            problem = f"entry {index}, {merge[:40]!a}, is not two known tokens that make a third"
            raise keys.error("merges", problem)
        merges.append((left, right))
    return merges


def _special_ids(keys: _Keys, count: int) -> dict[str, int]:
    ids = {}
    for name in SPECIAL_IDS:
        key = f"{name}_token_id"
        value = keys.get(key)
        if value is None:
            continue
        try:
            token = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
        except TypeError:
            token = -1
        if not 0 <= token < count:
            raise keys.error(
                key, f"is {str(value)[:40]!r}; the vocabulary has ids 0 to {count - 1}"
            )
        ids[name] = token
    return ids


def _charsmap(keys: _Keys) -> bytes:
    """Normalization table of SentencePiece: trie size, a double-array trie, replacement texts.

    The library follows the trie's offsets unchecked, so every one must stay inside: unit i leads
    to the 256 units around i ^ offset(i); a leaf (bit 31) holds an index into the texts.
    """
    value = keys.get("precompiled_charsmap")
    if value is None:
        return b""
    table = np.asarray(value)
    if table.ndim != 1 or table.dtype.kind not in "iu" or table.dtype.itemsize != 1:
        raise keys.error("precompiled_charsmap", "is not an array of bytes")
    raw = table.tobytes()
    if not raw:
        return b""
    size = int.from_bytes(raw[:4], "little")
    texts = raw[4 + size :]
    if len(raw) < 4 or size == 0 or size % 1024 or size > len(raw) - 4 or texts[-1:] != b"\0":
        raise keys.error("precompiled_charsmap", "is cut off or has a wrong trie size")
    units = np.frombuffer(raw, "<u4", size // 4, 4).astype(np.int64)
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    leaf = (units >> 31) == 1
    reach = (np.arange(len(units)) ^ offsets) | 0xFF
    if np.any(reach[~leaf] >= len(units)) or np.any((units[leaf] & 0x7FFFFFFF) >= len(texts)):
        raise keys.error("precompiled_charsmap", "points outside itself")
    return raw
