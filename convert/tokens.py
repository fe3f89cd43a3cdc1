"""A vocabulary on its way into GGUF: tokens by id with their types, and what was added to them."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from convert import header
from convert.header import Value
from quant.errors import Error

PADDING_SCORE = -10000.0
ADDED_SCORE = -1000.0


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`; SentencePiece numbers its pieces the same."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that was added to a trained vocabulary."""

    id: int
    content: str
    special: bool

    @property
    def type(self) -> TokenType:
        """CONTROL when marked special or shaped like `<|...|>`, as llama.cpp's converter has it."""
        shaped = self.content.startswith("<|") and self.content.endswith("|>")
        return TokenType.CONTROL if self.special or shaped else TokenType.USER_DEFINED


@dataclass
class Vocabulary:
    """Tokens by id; `scores` only for SentencePiece, `merges` only for byte-level BPE."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    specials: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Value] = field(default_factory=dict)

    def pad(self, size: int, where: str) -> None:
        """Fill up to the model's vocabulary with tokens that are never used."""
        if len(self.tokens) > size:
            raise Error(f"{where}: {len(self.tokens)} tokens, config.json's vocab_size is {size}")
        for token in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{token}]")
            self.types.append(TokenType.UNUSED)
            if self.scores is not None:
                self.scores.append(PADDING_SCORE)

    def check(self, where: str) -> None:
        """Every token is text, and no two are the same."""
        seen: dict[str, int] = {}
        for token, text in enumerate(self.tokens):
            if text in seen:
                raise Error(f"{where}: tokens {seen[text]} and {token} are both {text[:40]!r}")
            seen[text] = token
            if not text:
                raise Error(f"{where}: token {token} is empty")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise Error(f"{where}: token {token} is not valid Unicode")

    def metadata(self) -> dict[str, Value]:
        """The `tokenizer.ggml.*` keys."""
        prefix = "tokenizer.ggml."
        result = {
            prefix + "model": header.string(self.model),
            prefix + "pre": header.string(self.pre),
            prefix + "tokens": header.strings(self.tokens),
            prefix + "token_type": header.int32s(self.types),
        }
        if self.scores is not None:
            result[prefix + "scores"] = header.float32s(self.scores)
        if self.merges is not None:
            result[prefix + "merges"] = header.strings(self.merges)
        for name, token in self.specials.items():
            result[f"{prefix}{name}_token_id"] = header.uint32(token)
        return result | {prefix + key: value for key, value in self.extra.items()}


def read_added(value: Any, where: str, limit: int) -> list[AddedToken]:
    """`added_tokens` of tokenizer.json, or added_tokens_decoder turned into the same list."""
    if not isinstance(value, list):
        raise Error(f"{where}: a list of added tokens is needed")
    added: dict[int, AddedToken] = {}
    for item in value:
        identity = item.get("id") if isinstance(item, dict) else None
        content = item.get("content") if isinstance(item, dict) else None
        if type(identity) is not int or not isinstance(content, str) or not content:
            raise Error(
                f"{where}: an added token needs an id and a content, found {str(item)[:50]}"
            )
        if not 0 <= identity < limit:
            raise Error(f"{where}: added token {content[:40]!r} has id {identity} of {limit}")
        if identity in added:
            raise Error(f"{where}: two added tokens have id {identity}")
        added[identity] = AddedToken(identity, content, item.get("special") is True)
    return sorted(added.values(), key=lambda token: token.id)


def added_decoder(settings: dict[str, Any], where: str, limit: int) -> list[AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json."""
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise Error(f"{where}: added_tokens_decoder must be an object")
    items = []
    for key, item in decoder.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and isinstance(item, dict)):
            raise Error(f"{where}: added_tokens_decoder: {key[:40]!r} is not a token id")
        items.append({**item, "id": int(key)})
    return read_added(items, f"{where}: added_tokens_decoder", limit)
