"""Text <-> token ids, from the vocabulary inside a GGUF file.

    text -> [special tokens cut out] -> NFC -> pre-tokenizer regex -> bytes -> BPE merges -> ids

Byte-level BPE (`tokenizer.ggml.model` = gpt2) runs in the `tokenizers` library, SentencePiece
models (llama, t5) in the `sentencepiece` library. Special tokens are cut out of the text here,
leftmost and longest first, as transformers and llama.cpp do it: USER_DEFINED tokens (`<think>`)
always, CONTROL tokens (`<|im_end|>`) only when the caller asks. No library ever learns the CONTROL
tokens of a byte-level vocabulary, so no text can merge into one.

The qwen2 and qwen35 pre-tokenizers normalize to NFC, as the original tokenizers do (llama.cpp does
not). A beginning-of-sequence token is never added here; `add_bos` tells whether the model wants it.

Long text: both libraries take time linear in the length, at most 2.5 s for 1 MB of one character
class. Byte-level text is handed over in pieces of about 64 Ki characters, cut where every
pre-tokenizer below cuts as well (after a single newline, between words), so no id changes and
memory stays bounded; text with no such place in 4 Mi characters is refused.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ondevice.sentencepiece_model import model_proto
from ondevice.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from quant.errors import Error, UsageError

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
# Each name: the regexes applied one after another, and whether the text is brought to NFC first.
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "qwen2": ((_QWEN2,), True),
    "qwen35": ((_QWEN35,), True),
    "gpt-2": ((_GPT2,), False),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}
END_OF_GENERATION = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<|end|>", "<end_of_turn>", "</s>"),
)
_CHUNK = 1 << 16
_LONGEST_CHUNK = 1 << 22
_CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")
_SPACE = "\u2581"  # SentencePiece's visible space
_UNKNOWN_SURFACE = " \u2047 ".encode()  # what SentencePiece prints for an unknown piece


class _Library(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def piece(self, token: int) -> bytes: ...


class Matcher:
    """Finds whole tokens in text by a walk down a trie of their characters."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self._root: dict[str, Any] = {}
        for text, token in tokens.items():
            node = self._root
            for character in text:
                node = node.setdefault(character, {})
            node[""] = token
        first = "".join(map(re.escape, self._root))
        self._first = re.compile(f"[{first}]" if first else r"(?!)")

    def spans(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, token) of each match, leftmost, longest, not overlapping."""
        end = 0
        for candidate in self._first.finditer(text):
            start = candidate.start()
            if start >= end:
                found = self._longest(text, start)
                if found is not None:
                    end = found[0]
                    yield start, *found

    def starts(self, text: str) -> list[int]:
        """Every position where some token begins, overlapping ones included."""
        positions = (candidate.start() for candidate in self._first.finditer(text))
        return [start for start in positions if self._longest(text, start) is not None]

    def _longest(self, text: str, start: int) -> tuple[int, int] | None:
        node: Any = self._root
        found = None
        for position in range(start, len(text)):
            node = node.get(text[position])
            if node is None:
                break
            if "" in node:
                found = position + 1, node[""]
        return found


class Tokenizer:
    """A vocabulary ready for use; safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        control = vocabulary.of_type(CONTROL, UNKNOWN)
        user_defined = vocabulary.of_type(USER_DEFINED)
        byte_level = vocabulary.model == "gpt2"
        self.path = vocabulary.path
        self.vocabulary = len(vocabulary.tokens)
        self.bos = vocabulary.special.get("bos")
        self.add_bos = vocabulary.add_bos and self.bos is not None
        self.eos_ids = frozenset(
            [
                vocabulary.special[name]
                for name in ("eos", "eot", "eom")
                if name in vocabulary.special
            ]
            + [token for text, token in control.items() if text in END_OF_GENERATION]
        )
        self.control_tokens = control
        self.control = Matcher(control)
        if not byte_level:  # the library finds user-defined pieces itself, but for added ones
            user_defined = {text: token for text, token in user_defined.items() if " " in text}
        self._user_defined = Matcher(user_defined)
        self._special = Matcher(control | user_defined)
        self._special_ids = vocabulary.special
        self._strip = vocabulary.add_space_prefix and not byte_level
        self._texts = vocabulary.tokens
        self._types = vocabulary.types
        self._library: _Library = (_ByteLevel if byte_level else _SentencePiece)(vocabulary)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], path: object) -> Tokenizer:
        """Build from the `tokenizer.ggml.*` keys of the file at `path`; Error if they are wrong."""
        return cls(Vocabulary.from_metadata(metadata, path))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; CONTROL tokens in it are parsed only with `special`."""
        text = _valid(text)
        matcher = self._special if special else self._user_defined
        ids: list[int] = []
        position = 0
        for start, end, token in matcher.spans(text):
            ids += self._library.encode(text[position:start])
            ids.append(token)
            position = end
        return ids + self._library.encode(text[position:])

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of `ids`; CONTROL tokens show only with `special`, broken UTF-8 becomes U+FFFD."""
        pieces = []
        for token in ids:
            piece = self.piece(token)
            if special and self._types[token] in (CONTROL, UNKNOWN):
                piece = self._texts[token].encode(errors="replace")
            pieces.append(piece)
        text = b"".join(pieces).decode(errors="replace")
        return text.removeprefix(" ") if self._strip else text

    def piece(self, token: int) -> bytes:
        """Bytes of one token: empty for control and unused tokens, cut UTF-8 allowed."""
        if not 0 <= token < self.vocabulary:
            raise UsageError(f"token id {token} is outside the vocabulary of {self.vocabulary}")
        return self._library.piece(token)

    def special_texts(self) -> dict[str, str]:
        """Texts of the tokens that chat templates know by name, such as `bos_token`."""
        names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
        ids = self._special_ids
        return {
            f"{short}_token": self.decode([ids[name]], special=True)
            for name, short in names.items()
            if name in ids
        }


class TextStream:
    """Tokens in, text out: holds back a character until its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes, often all of its own, sometimes none."""
        return self._decoder.decode(self._tokenizer.piece(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class _ByteLevel:
    """GPT-2's byte-level BPE: each byte is a printable character, merges join characters."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        if vocabulary.pre not in PRE_TOKENIZERS:
            raise Error(
                f"{vocabulary.path}: tokenizer.ggml.pre is {vocabulary.pre!r};"
                f" this runtime knows {', '.join(PRE_TOKENIZERS)}"
            )
        patterns, normalize = PRE_TOKENIZERS[vocabulary.pre]
        known = _encodable(vocabulary.of_type(NORMAL, USER_DEFINED))
        _check_alphabet(vocabulary, known)
        merges = vocabulary.merges
        if len(known) < len(vocabulary.tokens):
            merges = [(a, b) for a, b in merges if a in known and b in known and a + b in known]
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        steps = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        with _border(vocabulary.path, "the vocabulary cannot be used"):
            self._tokenizer = Tokenizer(models.BPE(known, merges))
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
            if normalize:
                self._tokenizer.normalizer = normalizers.NFC()
        self._path = vocabulary.path
        self._texts = vocabulary.tokens
        self._types = vocabulary.types

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(text):
            cut = _CUT.search(text, start + _CHUNK)
            end = cut.start() if cut else len(text)
            if end - start > _LONGEST_CHUNK:
                raise UsageError(f"{end - start} characters of text without a space or line break")
            with _border(self._path, "the text cannot be encoded"):
                ids += self._tokenizer.encode(text[start:end], add_special_tokens=False).ids
            start = end
        return ids

    def piece(self, token: int) -> bytes:
        kind, text = self._types[token], self._texts[token]
        if kind == USER_DEFINED:
            return text.encode(errors="surrogateescape")
        if kind != NORMAL:
            return b""
        try:
            return bytes(map(_CHARACTER_TO_BYTE.__getitem__, text))
        except KeyError:
            return text.encode(errors="surrogateescape")


class _SentencePiece:
    """The sentencepiece library on a model rebuilt from the file."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import sentencepiece

        with _border(vocabulary.path, "the SentencePiece vocabulary cannot be used"):
            proto = model_proto(vocabulary)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._path = vocabulary.path
        self._texts = vocabulary.tokens
        self._types = vocabulary.types

    def encode(self, text: str) -> list[int]:
        with _border(self._path, "the text cannot be encoded"):
            return list(self._processor.encode(text))

    def piece(self, token: int) -> bytes:
        kind, text = self._types[token], self._texts[token]
        if kind in (NORMAL, USER_DEFINED):
            return text.replace(_SPACE, " ").encode(errors="surrogateescape")
        if kind == BYTE:
            return bytes([int(text[3:5], 16)])
        return _UNKNOWN_SURFACE if kind == UNKNOWN else b""


def _byte_characters() -> list[str]:
    """Character of each byte: itself where printable in Latin-1, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
_CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(_BYTE_CHARACTERS)}
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def _check_alphabet(vocabulary: Vocabulary, known: dict[str, int]) -> None:
    for byte, character in enumerate(_BYTE_CHARACTERS):
        if character not in known and byte not in _NEVER_IN_UTF8:
            problem = f"tokenizer.ggml.tokens has no token for byte 0x{byte:02X}"
            raise Error(f"{vocabulary.path}: {problem}; byte-level BPE needs every byte")


def _encodable(known: dict[str, int]) -> dict[str, int]:
    """Without the tokens that are not UTF-8: no text leads to them, and the library takes none."""
    try:
        "".join(known).encode()
    except UnicodeEncodeError:
        return {text: token for text, token in known.items() if _is_utf8(text)}
    return known


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _valid(text: str) -> str:
    """Text without lone surrogates: pairs are joined, what stands alone becomes U+FFFD."""
    if not isinstance(text, str):
        raise UsageError(f"text to encode is {type(text).__name__}; a string is needed")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@contextmanager
def _border(path: str, problem: str) -> Iterator[None]:
    """Turn a library's failure into Error; a Rust panic is a BaseException, known by its name."""
    try:
        yield
    except Error:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())[:200]
            raise Error(f"{path}: {problem}: {reason}") from None
        raise
