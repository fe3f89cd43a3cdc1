"""A SentencePiece `tokenizer.model` -> everything the sentencepiece library needs to rebuild it.

The file is a protocol buffer (https://github.com/google/sentencepiece, sentencepiece_model.proto);
the few fields that matter are read here, with every length checked, so that no generated code and
no unchecked parser touches a downloaded file:

    1 piece*       {1 text, 2 score, 3 type}
    2 trainer      {3 model_type 1 unigram / 2 BPE, 24 treat_whitespace_as_suffix,
                    40-43 ids of unk, bos, eos, pad}
    3 normalizer   {2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
                    5 escape_whitespaces, 6 rules as TSV}

GGUF calls the BPE model `llama` and the unigram model `t5`. Pieces are stored as they are; a token
that tokenizer_config.json adds has plain spaces for U+2581, as llama.cpp's converter writes it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert import header
from convert.json_reader import read_bytes
from convert.tokens import ADDED_SCORE, PADDING_SCORE, TokenType, Vocabulary, added_decoder
from quant.errors import Error

LIMIT = 64 << 20
SPACE = "\u2581"
_MODELS = {1: "t5", 2: "llama"}
_OTHER_MODELS = {3: "word", 4: "char"}


class _Damaged(ValueError):
    pass


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _Damaged
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, position
    raise _Damaged


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: whole numbers as int, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Damaged
        if length > len(data) - position:
            raise _Damaged
        yield number, data[position : position + length]
        position += length


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = b"", 0.0, int(TokenType.NORMAL)
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return text.decode("utf-8"), score, kind


def _scalars(data: bytes) -> dict[int, int | bytes]:
    return dict(_fields(data))


def read(path: Path, settings: dict[str, Any], size: int) -> Vocabulary:
    """The vocabulary in tokenizer.model; `settings` is tokenizer_config.json, `size` the limit."""
    where = path.name
    data = read_bytes(path, LIMIT)
    if data.startswith(b"version https://git-lfs"):
        raise Error(f"{where}: a Git-LFS pointer, not the tokenizer; run git lfs pull")
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer |= _scalars(value)
            elif number == 3 and isinstance(value, bytes):
                normalizer |= _scalars(value)
    except (_Damaged, UnicodeDecodeError):
        raise Error(f"{where}: not a SentencePiece model, or a damaged one") from None
    kind = trainer.get(3, 1)
    if kind not in _MODELS:
        name = _OTHER_MODELS.get(kind, kind) if isinstance(kind, int) else kind
        raise Error(f"{where}: a SentencePiece model of kind {name!r}; BPE or unigram is needed")
    if trainer.get(24, 0):
        raise Error(f"{where}: treat_whitespace_as_suffix cannot be stored in GGUF")
    if not normalizer.get(5, 1):
        raise Error(f"{where}: escape_whitespaces = false cannot be stored in GGUF")
    if not pieces or len(pieces) > size:
        raise Error(f"{where}: {len(pieces)} pieces, config.json's vocab_size is {size}")
    vocabulary = _vocabulary(_MODELS[kind], pieces, where)
    _add(vocabulary, settings, size)
    for name, number, default in (("bos", 41, 1), ("eos", 42, 2), ("padding", 43, -1)):
        token = _signed(trainer.get(number, default))
        if 0 <= token < len(pieces):
            vocabulary.specials[name] = token
    vocabulary.specials["unknown"] = vocabulary.types.index(TokenType.UNKNOWN)
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:  # what the class of that name does when nothing is said
        adds_bos = str(settings.get("tokenizer_class")).startswith("LlamaTokenizer")
    vocabulary.extra |= {
        "add_bos_token": header.boolean(adds_bos is True),
        "add_eos_token": header.boolean(settings.get("add_eos_token") is True),
        "add_space_prefix": header.boolean(bool(normalizer.get(3, 1))),
        "remove_extra_whitespaces": header.boolean(bool(normalizer.get(4, 1))),
    }
    charsmap = normalizer.get(2, b"")
    if isinstance(charsmap, bytes) and charsmap:
        vocabulary.extra["precompiled_charsmap"] = header.uint8s(charsmap)
    return vocabulary


def _signed(value: int | bytes) -> int:
    """A negative number is stored as its 64-bit two's complement."""
    if not isinstance(value, int):
        return -1
    return value - (1 << 64) if value >= 1 << 63 else value


def _vocabulary(model: str, pieces: list[tuple[str, float, int]], where: str) -> Vocabulary:
    tokens, types, scores = [], [], []
    for token, (text, score, kind) in enumerate(pieces):
        if kind not in TokenType.__members__.values():
            raise Error(f"{where}: piece {token} has type {kind}, 1 to 6 is needed")
        if not -1e30 < score < 1e30:
            raise Error(f"{where}: piece {token} has score {score}")
        tokens.append(text)
        types.append(kind)
        scores.append(score)
    if types.count(TokenType.UNKNOWN) != 1:
        raise Error(f"{where}: one piece for unknown text is needed")
    return Vocabulary(model=model, pre="default", tokens=tokens, types=types, scores=scores)


def _add(vocabulary: Vocabulary, settings: dict[str, Any], size: int) -> None:
    """Put in the tokens that tokenizer_config.json adds to, or renames in, the trained model."""
    assert vocabulary.scores is not None
    for token in added_decoder(settings, "tokenizer_config.json", size):
        while len(vocabulary.tokens) <= token.id:
            vocabulary.tokens.append(f"[PAD{len(vocabulary.tokens)}]")
            vocabulary.types.append(TokenType.UNUSED)
            vocabulary.scores.append(PADDING_SCORE)
        if vocabulary.types[token.id] == TokenType.UNKNOWN:
            continue
        kind = token.type
        user_defined = kind is TokenType.USER_DEFINED
        vocabulary.tokens[token.id] = (
            token.content.replace(SPACE, " ") if user_defined else token.content
        )
        vocabulary.types[token.id] = kind
        vocabulary.scores[token.id] = ADDED_SCORE
