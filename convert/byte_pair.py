"""Byte-level BPE from tokenizer.json: tokens spelled in GPT-2's alphabet of 256 printable letters.

The pre-tokenizer, which cuts text into words before merging, is not stored in GGUF but named:

    qwen2   text brought to NFC, Qwen's regular expression, then byte level
    gpt-2   byte level with its built-in expression

A tokenizer with any other one would be silently wrong, so it is refused.
"""

from pathlib import Path
from typing import Any

from convert import header
from convert.json_reader import read_object
from convert.tokens import TokenType, Vocabulary, added_decoder, read_added
from quant.errors import Error

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _alphabet() -> dict[str, int]:
    """The letter of every byte: itself in printable Latin-1, else the next one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


ALPHABET = _alphabet()
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def pre_tokenizer(data: dict[str, Any], where: str) -> str:
    """The name of the file's pre-tokenizer; Error describing one we do not know."""
    value = data.get("pre_tokenizer")
    steps: list[Any] = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        inner = value.get("pretokenizers")
        steps = inner if isinstance(inner, list) else [inner]
    kinds = [step.get("type") if isinstance(step, dict) else step for step in steps]
    byte_level: dict[str, Any] = steps[-1] if kinds[-1:] == ["ByteLevel"] else {}
    if not byte_level or byte_level.get("add_prefix_space") is True:
        raise Error(
            f"{where}: pre_tokenizer {str(value)[:100]} is unknown; byte-level BPE is needed"
        )
    if kinds == ["ByteLevel"] and byte_level.get("use_regex", True) is True:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and byte_level.get("use_regex") is False:
        pattern = steps[0].get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if regex == QWEN2 and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return "qwen2"
        raise Error(
            f"{where}: the pre-tokenizer's expression {str(regex)[:160]!r} is unknown; "
            "convert knows those of qwen2 and gpt-2"
        )
    raise Error(f"{where}: pre-tokenizer steps {kinds} are unknown; convert knows qwen2 and gpt-2")


def _check_normalizer(pre: str, data: dict[str, Any], where: str) -> None:
    value = data.get("normalizer")
    found = value.get("type") if isinstance(value, dict) else value
    needed = "NFC" if pre == "qwen2" else None
    if found != needed:
        raise Error(f"{where}: normalizer {str(found)[:60]} with {pre}; {needed} is needed")


def _merges(value: Any, ids: dict[str, int], where: str) -> list[str]:
    """Merges as "left right", from either generation of the file format."""
    if not isinstance(value, list):
        raise Error(f"{where}: merges must be a list")
    result = []
    for rank, item in enumerate(value):
        pair = item.split(" ") if isinstance(item, str) else item
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part and " " not in part for part in pair)
        ):
            raise Error(f"{where}: merge {rank} is {str(item)[:60]!r}, two tokens are needed")
        for part in (pair[0], pair[1], pair[0] + pair[1]):
            if part not in ids:
                raise Error(
                    f"{where}: merge {rank}: {part[:40]!r} (of {len(part)} letters) "
                    "is not in the vocabulary"
                )
        result.append(f"{pair[0]} {pair[1]}")
    if len(set(result)) != len(result):
        raise Error(f"{where}: a merge is listed twice")
    return result


def read(path: Path, settings: dict[str, Any], size: int) -> Vocabulary:
    """The vocabulary in tokenizer.json; `settings` is tokenizer_config.json, `size` the limit."""
    data = read_object(path)
    where = path.name
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise Error(f"{where}: model type {kind!r} is unknown; BPE or a tokenizer.model is needed")
    pre = pre_tokenizer(data, where)
    _check_normalizer(pre, data, where)
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not ids:
        raise Error(f"{where}: model.vocab must map tokens to ids")
    texts: dict[int, str] = {}
    for text, token in ids.items():
        if type(token) is not int or not 0 <= token < size:
            raise Error(
                f"{where}: token {text[:40]!r} has id {str(token)[:20]}; "
                f"config.json's vocab_size is {size}"
            )
        if token in texts:
            raise Error(f"{where}: {texts[token][:40]!r} and {text[:40]!r} both have id {token}")
        texts[token] = text
    merges = _merges(model.get("merges"), ids, where)
    types = dict.fromkeys(texts, TokenType.NORMAL)
    added = read_added(data.get("added_tokens") or [], f"{where}: added_tokens", size)
    known = {token.id for token in added}
    added += [
        token
        for token in added_decoder(settings, "tokenizer_config.json", size)
        if token.id not in known
    ]
    for token in added:
        if texts.setdefault(token.id, token.content) != token.content:
            raise Error(
                f"{where}: id {token.id} is {texts[token.id][:40]!r} and added token "
                f"{token.content[:40]!r}"
            )
        types[token.id] = token.type
    letters = frozenset(ALPHABET)
    for identity, text in texts.items():
        if types[identity] is TokenType.NORMAL and not letters.issuperset(text):
            raise Error(f"{where}: token {identity} {text[:40]!r} is not spelled in bytes")
    for letter, byte in ALPHABET.items():
        if letter not in ids and byte not in NEVER_IN_UTF8:
            raise Error(f"{where}: no token for byte 0x{byte:02X}; byte-level BPE needs them all")
    count = max(texts) + 1
    vocabulary = Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=[texts.get(token, f"[PAD{token}]") for token in range(count)],
        types=[types.get(token, TokenType.UNUSED) for token in range(count)],
        merges=merges,
    )
    adds = settings.get("add_bos_token")
    vocabulary.extra["add_bos_token"] = header.boolean(adds is True)
    return vocabulary
