"""A SentencePiece model file rebuilt from a GGUF vocabulary.

GGUF stores a `tokenizer.model` taken apart: pieces, scores, types and the normalizer's settings.
This writes them back as the protocol buffer that the sentencepiece library reads, so the library
itself does the encoding and the ids are those of the original file.

    ModelProto      1 pieces*   2 trainer_spec   3 normalizer_spec
    SentencePiece   1 piece   2 score (float)   3 type
    TrainerSpec     3 model_type (1 unigram, 2 BPE)   35 byte_fallback   45 unk_piece
    NormalizerSpec  2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces

Source: sentencepiece_model.proto of the SentencePiece project. The types have the same numbers in
both formats.
"""

from __future__ import annotations

import struct

from ondevice.vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, Vocabulary
from quant.errors import Error

_VARIABLE, _LENGTH, _FIXED32 = 0, 2, 5  # wire types


def model_proto(vocabulary: Vocabulary) -> bytes:
    """The serialized model; raises Error if no token can stand for unknown text."""
    unknown = _unknown(vocabulary)
    parts = []
    entries = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    for token, (text, score, kind) in enumerate(entries):
        if kind == UNKNOWN and token != unknown:
            kind = CONTROL  # the library knows one unknown piece
        piece = _encodable(text)
        if kind == UNUSED or piece is None:
            kind, piece = UNUSED, f"\U0010ffff{token}".encode()  # never met in text, always unique
        fields = _field(1, piece) + _tag(2, _FIXED32) + struct.pack("<f", score) + _field(3, kind)
        parts.append(_field(1, fields))
    trainer = (
        _field(3, 2 if vocabulary.model == "llama" else 1)
        + _field(35, int(BYTE in vocabulary.types))
        + _field(45, vocabulary.tokens[unknown].encode())
    )
    normalizer = (
        _field(2, vocabulary.charsmap)
        + _field(3, int(vocabulary.add_space_prefix))
        + _field(4, int(vocabulary.remove_extra_whitespaces))
    )
    return b"".join([*parts, _field(2, trainer), _field(3, normalizer)])


def _unknown(vocabulary: Vocabulary) -> int:
    named = vocabulary.special.get("unknown")
    if named is not None and vocabulary.types[named] == UNKNOWN:
        return named
    if UNKNOWN not in vocabulary.types:
        raise Error(f"{vocabulary.path}: no token of type UNKNOWN (2) in tokenizer.ggml.token_type")
    return vocabulary.types.index(UNKNOWN)


def _encodable(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _tag(number, _VARIABLE) + _varint(value)
    return _tag(number, _LENGTH) + _varint(len(value)) + value
