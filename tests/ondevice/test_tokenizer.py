"""Token ids against tiktoken, transformers and sentencepiece; bad vocabularies; bad text.

tests/data/tokenizer_sample.json holds strings, their ids by tiktoken under Qwen's full vocabulary,
and the part of that vocabulary that occurs in them: every merge that could apply is there, so the
ids do not depend on the rest. `python -m tests.ondevice.test_tokenizer` writes it anew.

The full vocabulary is test-only and not in this repository: set QWEN_TIKTOKEN to qwen.tiktoken,
or install the package dashscope (1.20.14), which carries it.
"""

import base64
import io
import json
import os
import random
import time
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from ondevice import tokenizer as tokenizer_module
from ondevice.tokenizer import TextStream, Tokenizer
from quant.errors import Error, UsageError

SAMPLE = Path(__file__).parents[1] / "data" / "tokenizer_sample.json"
DEMO = Path(__file__).parents[2] / "ondevice" / "demo"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SCRIPTS = """
the of Alice don't I'LL we've it's 'tis 한국어 문장을 나눕니다 값싼 ㅋㅋㅋ 안녕하세요! 中文分词 測試
日本語 です Привет мир Ελληνικά עברית العربية हिन्दी ไทย naïve café Ångström 😀 🇰🇷 ❤️ 👍🏽 12345
3.14 1e-9 0x1F ½ ² Ⅷ ٣ a_b self.x != foo(bar) => {} // /* */ #include <stdio.h> def f(x):
return[x**2] \\n \\t ... --- ''' "" <think> </think> <|im_end|> <|im_
"""
WORDS = [
    *SCRIPTS.split(),
    "e\u0301",
    "\u1112\u1161\u11ab",
    "👩\u200d👩\u200d👧",
    "\ufeff",
    "\u00ad",
]
WORDS += ["\u3000", "\u2028", "\x00", "\x85", "\xa0"]
SPACES = [" ", " ", " ", "", "  ", "\n", "\n\n", "\r\n", "\t", " \n", "\n  ", "     ", " \t \n\n "]


def corpus(seed: int, count: int) -> list[str]:
    """Varied strings: words of many scripts, code and emoji between all kinds of white space."""
    pick = random.Random(seed)
    ranges = [(0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0xFFFF), (0x1F000, 0x1FB00)]

    def word() -> str:
        if pick.random() < 0.8:
            return pick.choice(WORDS)
        if pick.random() < 0.3:
            return pick.choice("Aa7\n \t!한😀\u0301") * pick.randrange(1, 40)
        low, high = pick.choice(ranges)
        return "".join(chr(pick.randrange(low, high)) for _ in range(pick.randrange(1, 8)))

    def text() -> str:
        return "".join(word() + pick.choice(SPACES) for _ in range(pick.randrange(1, 25)))

    return [text() for _ in range(count)]


def bytes_to_text() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        table.setdefault(byte, chr(256 + len(table) - len(plain)))
    return table


TEXT_OF_BYTE = bytes_to_text()


def spelled(piece: bytes) -> str:
    return "".join(TEXT_OF_BYTE[byte] for byte in piece)


def metadata(
    tokens: list[str],
    merges: list[str],
    control: list[str] = CONTROL,
    user_defined: list[str] = USER_DEFINED,
    **keys: Any,
) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a byte-level vocabulary with its special tokens at the end."""
    kinds = [1] * len(tokens) + [3] * len(control) + [4] * len(user_defined)
    everything = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens + control + user_defined,
        "token_type": np.array(kinds, np.int32),
        "merges": merges,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (everything | keys).items()}


def from_ranks(pieces: list[bytes], **keys: Any) -> dict[str, Any]:
    """Metadata of a vocabulary in tiktoken's form: a piece's index is its rank."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    merges = []
    for rank, piece in enumerate(pieces):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:  # merge by lower ranks: what remains are the two that make the piece
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            best = pairs.index(min(pairs))
            assert pairs[best] < rank, piece
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spelled, parts)))
    return metadata([spelled(piece) for piece in pieces], merges, **keys)


def small(extra: list[str] | None = None, merges: list[str] | None = None, **keys: Any) -> Any:
    """Metadata with all 256 bytes (token = byte) and a few more tokens."""
    return metadata(
        [spelled(bytes([byte])) for byte in range(256)] + (extra or []), merges or ["a a"], **keys
    )


def build(**keys: Any) -> Tokenizer:
    extra = keys.pop("extra", ["aa"])
    return Tokenizer.from_metadata(small(extra, **keys), "m.gguf")


def full_vocabulary() -> list[bytes]:
    path = os.environ.get("QWEN_TIKTOKEN")
    if path is None:
        package = find_spec("dashscope")
        if package is None or package.origin is None:
            pytest.skip("neither QWEN_TIKTOKEN nor the package dashscope")
        path = str(Path(package.origin).parent / "resources" / "qwen.tiktoken")
    lines = [line.split() for line in Path(path).read_bytes().splitlines() if line]
    assert [int(rank) for _, rank in lines] == list(range(len(lines)))
    return [base64.b64decode(piece) for piece, _ in lines]


def tiktoken_encoder(pieces: list[bytes], pattern: str = QWEN_PATTERN) -> Callable[[str], Any]:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    special = {text: len(pieces) + i for i, text in enumerate(CONTROL + USER_DEFINED)}
    encoding = tiktoken.Encoding(
        "qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    return lambda text: encoding.encode(  # the original does not normalize
        unicodedata.normalize("NFC", text), allowed_special=set(USER_DEFINED), disallowed_special=()
    )


def sample() -> tuple[list[bytes], list[str], list[list[int]]]:
    data = json.loads(SAMPLE.read_text("utf-8"))
    return [base64.b64decode(piece) for piece in data["pieces"]], data["texts"], data["ids"]


# --- byte-level ids -----------------------------------------------------------------------------


def test_stored_ids() -> None:
    pieces, texts, ids = sample()
    tokenizer = Tokenizer.from_metadata(from_ranks(pieces), "m.gguf")
    for text, expected in zip(texts, ids, strict=True):
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("pre", ["qwen2", "qwen35", "gpt-2", "default"])
def test_pieces_of_a_long_text_change_no_id(pre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, texts, _ = sample()
    tokenizer = Tokenizer.from_metadata(from_ranks(pieces, pre=pre), "m.gguf")
    whole = [tokenizer.encode(text) for text in texts]
    for chunk in (1, 7):
        monkeypatch.setattr(tokenizer_module, "_CHUNK", chunk)
        assert [tokenizer.encode(text) for text in texts] == whole


def test_pre_tokenizers_differ_where_they_should() -> None:
    extra = [
        "12",
        "123",
        "1234",
        spelled("x\u0332".encode()[:2]),
        spelled("x\u0332".encode()),
        "!x",
    ]
    merges = ["1 2", "12 3", "123 4", " ".join(extra[3]), f"{extra[3]} {extra[4][-1]}", "! x"]

    def pieces(pre: str, text: str) -> list[str]:
        tokenizer = build(extra=extra, merges=merges, pre=pre)
        return [tokenizer.piece(token).decode(errors="replace") for token in tokenizer.encode(text)]

    assert pieces("qwen2", "1234") == ["1", "2", "3", "4"]
    assert pieces("gpt-2", "1234") == ["1234"]
    assert pieces("default", "1234") == ["123", "4"]
    assert pieces("qwen2", "x\u0332") != ["x\u0332"] == pieces("qwen35", "x\u0332")
    assert pieces("qwen2", "!x") == ["!x"] != pieces("gpt-2", "!x")


def test_qwen_normalizes_and_gpt2_does_not() -> None:
    assert build(pre="qwen2").decode(build(pre="qwen2").encode("e\u0301")) == "\u00e9"
    assert build(pre="gpt-2").decode(build(pre="gpt-2").encode("e\u0301")) == "e\u0301"


@pytest.mark.reference
def test_equals_tiktoken_on_the_full_vocabulary() -> None:
    pieces = full_vocabulary()
    data = from_ranks(pieces)
    start = time.process_time()
    tokenizer = Tokenizer.from_metadata(data, "m.gguf")
    assert time.process_time() - start < 1.0  # seconds; 0.6 measured
    reference = tiktoken_encoder(pieces)
    texts = corpus(1, 10_000)
    for text in texts:
        assert tokenizer.encode(text) == reference(text), ascii(text)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("pre", "pattern"),
    [
        ("gpt-2", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
        (
            "qwen35",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ],
)
def test_other_pre_tokenizers_equal_tiktoken(pre: str, pattern: str) -> None:
    pieces, texts, _ = sample()
    tokenizer = Tokenizer.from_metadata(from_ranks(pieces, pre=pre), "m.gguf")
    reference = tiktoken_encoder(pieces, pattern)
    for text in texts + corpus(2, 1000):
        composed = unicodedata.normalize("NFC", text)
        assert tokenizer.encode(composed) == reference(composed), ascii(text)


@pytest.mark.reference
def test_equals_transformers_on_the_demo() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(DEMO)
    data = json.loads((DEMO / "tokenizer.json").read_text("utf-8"))
    added = sorted(data["added_tokens"], key=lambda token: int(token["id"]))
    vocabulary = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    tokens = vocabulary[: added[0]["id"]] + [token["content"] for token in added]
    kinds = [1] * added[0]["id"] + [3 if token["special"] else 4 for token in added]
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    tokenizer = Tokenizer.from_metadata(
        metadata(tokens, merges, [], [], token_type=np.array(kinds)), "m.gguf"
    )
    for text in corpus(3, 10_000):
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, special=True) == ids, ascii(text)
        assert tokenizer.decode(ids, special=True) == reference.decode(
            ids, clean_up_tokenization_spaces=False
        )


# --- special tokens -----------------------------------------------------------------------------


def test_control_tokens_only_when_asked() -> None:
    tokenizer = build()
    end = tokenizer.vocabulary - 5
    text = "a<|im_end|>b<think>"
    assert tokenizer.encode(text, special=True) == [97, end, 98, end + 3]
    plain = tokenizer.encode(text)
    assert end not in plain and plain[-1] == end + 3
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode([97, end, 98]) == "ab"
    assert tokenizer.decode([97, end, 98], special=True) == "a<|im_end|>b"
    assert tokenizer.piece(end) == b"" and tokenizer.piece(end + 3) == b"<think>"


def test_longest_special_token_wins() -> None:
    tokenizer = build(control=["<a>", "<a><b>", "<a><b><c>"], user_defined=["<b>"])
    first = tokenizer.vocabulary - 4
    assert tokenizer.encode("<a><b><a><b><c><b>", special=True) == [first + 1, first + 2, first + 3]


def test_no_text_merges_into_a_control_token() -> None:
    # "aaa" is CONTROL and "Z" too, a byte's own character; merges that lead to "aaa" are there.
    data = small(["aa"], ["a a", "aa a"], control=["aaa"], user_defined=[])
    control = data["tokenizer.ggml.tokens"].index("aaa")
    tokenizer = Tokenizer.from_metadata(data, "m.gguf")
    for length in range(1, 20):
        assert control not in tokenizer.encode("a" * length)
    for text in [*corpus(4, 200), *CONTROL, *(mark * 3 for mark in CONTROL)]:
        assert not set(range(258, 261)) & set(build().encode(text))


def test_unused_tokens_decode_to_nothing_and_never_come_out() -> None:
    data = small(["aa", "[PAD257]", "[PAD257]", ""])
    data["tokenizer.ggml.token_type"][257:260] = 5
    tokenizer = Tokenizer.from_metadata(data, "m.gguf")
    assert not {257, 258, 259} & set(tokenizer.encode("[PAD257]", special=True))
    assert tokenizer.decode([257, 258, 259, 97], special=True) == "a"


def test_end_of_generation_ids() -> None:
    tokens = 257
    assert build().eos_ids == {tokens, tokens + 2}  # <|endoftext|> and <|im_end|>
    tokenizer = build(eos_token_id=5, eot_token_id=np.uint32(6), eom_token_id=7, control=["</s>"])
    assert tokenizer.eos_ids == {5, 6, 7, tokens}
    assert build(user_defined=["<|im_end|>"], control=[]).eos_ids == frozenset()
    assert (build().bos, build().add_bos) == (None, False)
    tokenizer = build(bos_token_id=3, add_bos_token=True)
    assert (tokenizer.bos, tokenizer.add_bos) == (3, True)
    assert tokenizer.special_texts() == {"bos_token": tokenizer.decode([3])}


# --- text that is not well-formed ---------------------------------------------------------------


def test_lone_surrogates_are_replaced() -> None:
    tokenizer = build()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00 \udc00")) == "😀 \ufffd"
    assert tokenizer.decode(tokenizer.encode("\0\0")) == "\0\0"
    assert tokenizer.encode("") == []
    with pytest.raises(UsageError, match="bytes; a string"):
        tokenizer.encode(b"x")  # type: ignore[arg-type]


def test_decode_replaces_broken_bytes_and_checks_ids() -> None:
    tokenizer = build()
    assert tokenizer.decode([0xED, 0x95, 97, 0xC0, 0x80]) == "\ufffda\ufffd\ufffd"
    for token in (-1, tokenizer.vocabulary):
        with pytest.raises(UsageError, match=f"token id {token} is outside the vocabulary"):
            tokenizer.decode([token])


@pytest.mark.parametrize("text", ["한국어 😀!", "👩\u200d👩\u200d👧\u00e9\u0800x", "plain"])
def test_stream_gives_each_character_once_it_is_whole(text: str) -> None:
    tokenizer = build()
    stream = TextStream(tokenizer)
    pieces = [stream.feed(byte) for byte in text.encode()]
    assert "".join(pieces) == text and stream.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    position = 0
    for character in text:
        position += len(character.encode())
        assert pieces[position - 1].endswith(character)


def test_stream_ends_with_replacement_and_equals_decode() -> None:
    tokenizer = build()
    stream = TextStream(tokenizer)
    assert [stream.feed(byte) for byte in "한".encode()[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    pick = random.Random(5)
    for _ in range(300):
        ids = [pick.randrange(tokenizer.vocabulary) for _ in range(pick.randrange(12))]
        stream = TextStream(tokenizer)
        assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


# --- long text ----------------------------------------------------------------------------------

CLASSES = [
    "A",
    "7",
    "\n",
    " ",
    "\t",
    "\u0301",
    "e\u0301",
    "!",
    "안",
    "\u1100\u1161",
    "😀",
    "\0",
    "<",
]


@pytest.mark.parametrize("unit", CLASSES, ids=ascii)
def test_time_is_linear_in_one_class(unit: str) -> None:
    pieces, _, _ = sample()
    tokenizer = Tokenizer.from_metadata(from_ranks(pieces), "m.gguf")
    seconds = []
    for length in (20_000, 160_000):
        text = (unit * length)[:length]
        start = time.process_time()
        ids = tokenizer.encode(text)
        seconds.append(time.process_time() - start)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert seconds[1] < 32 * seconds[0] + 0.1  # linear 8, quadratic 64


def test_a_run_that_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_CHUNK", 10)
    monkeypatch.setattr(tokenizer_module, "_LONGEST_CHUNK", 100)
    assert len(build().encode("word " * 1000)) == 5000
    with pytest.raises(UsageError, match="105 characters of text without a space or line break"):
        build().encode("7" * 105)


# --- bad vocabularies ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is missing; a string is needed"),
        ({"model": 3}, "model is of type int; a string is needed"),
        ({"model": "bert"}, "model is 'bert'; this runtime reads gpt2, llama, t5"),
        ({"pre": "falcon"}, "pre is 'falcon'; this runtime knows qwen2, qwen35, gpt-2, default"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": np.arange(3)}, "tokens is not an array of strings"),
        ({"token_type": np.ones(9, np.int32)}, "token_type has 9 entries for 264 tokens"),
        ({"token_type": np.ones(264, np.float32)}, "token_type is not an array of numbers"),
        ({"token_type": np.full(264, 999)}, "token_type of token 0 is 999; 1 to 6 is needed"),
        ({"extra": ["b"]}, "tokens gives tokens 98 and 256 one text, 'b'"),
        ({"extra": [""]}, "tokens holds an empty text at token 256"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a a", "aa"]}, "merges entry 1, 'aa', is not two known tokens"),
        ({"merges": ["a a", "a b"]}, "merges entry 1, 'a b', is not two known tokens"),
        ({"merges": ["a  a"]}, "merges entry 0, 'a  a', is not two known tokens"),
        ({"eos_token_id": 1000000}, "eos_token_id is '1000000'; the vocabulary has ids 0 to 263"),
        ({"bos_token_id": -1}, "bos_token_id is '-1'; the vocabulary"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'; the vocabulary"),
        ({"eos_token_id": True}, "eos_token_id is 'True'; the vocabulary"),
        ({"add_bos_token": 1}, "add_bos_token is '1'; true or false is needed"),
    ],
)
def test_bad_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    extra = changes.pop("extra", ["aa"])
    merges = [] if extra != ["aa"] else ["a a"]
    data = small(extra, merges) | {f"tokenizer.ggml.{key}": v for key, v in changes.items()}
    with pytest.raises(Error) as caught:
        Tokenizer.from_metadata(data, "dir/m.gguf")
    assert str(caught.value).startswith(f"dir/m.gguf: tokenizer.ggml.{message}")
    assert "\n" not in str(caught.value)


def test_every_byte_needs_a_token() -> None:
    data = small()
    data["tokenizer.ggml.tokens"][0x41] = "aa"
    with pytest.raises(Error, match=r"m\.gguf: .*no token for byte 0x41"):
        Tokenizer.from_metadata(data, "m.gguf")


def test_tokens_that_are_not_utf8_are_kept_apart() -> None:
    tokenizer = build(extra=["aa", "\udcff\udc80", "b\ud800"])
    assert tokenizer.encode("aab") == [256, 98]
    assert tokenizer.piece(257) == b"\xff\x80"


def test_a_panic_of_the_library_becomes_an_error() -> None:
    PanicException = type("PanicException", (BaseException,), {})  # as Rust bindings raise it

    class Broken:
        def __init__(self, error: BaseException) -> None:
            self._error = error

        def encode(self, *_: Any, **__: Any) -> Any:
            raise self._error

    tokenizer = build()
    tokenizer._library._tokenizer = Broken(PanicException("index\nout of range"))
    with pytest.raises(Error, match=r"^m\.gguf: the text cannot be encoded: index out of range$"):
        tokenizer.encode("x")
    tokenizer._library._tokenizer = Broken(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("x")


# --- SentencePiece ------------------------------------------------------------------------------


def fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Fields of a protocol buffer message, the little of it that a trained model needs."""
    found: list[tuple[int, int | bytes]] = []
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        if key & 7 == 0:
            found.append((key >> 3, varint()))
        else:
            length = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
            found.append((key >> 3, data[position : position + length]))
            position += length
    return found


def train(kind: str, **options: Any) -> bytes:
    """A small SentencePiece model of the words above and of some lines of Korean and English."""
    pick = random.Random(6)
    plain = [word for word in WORDS if word.isprintable() and "<" not in word]
    syllables = [pick.choice("bdfklmnprst") + pick.choice("aeiou") for _ in range(30)]
    syllables += [chr(pick.randrange(0xAC00, 0xD7A4)) for _ in range(60)]
    plain += ["".join(pick.choices(syllables, k=pick.randrange(2, 5))) for _ in range(300)]
    lines = [" ".join(pick.choices(plain, k=12)) for _ in range(800)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=options.pop("vocab_size", 600),
        model_type=kind,
        user_defined_symbols=["<think>"],
        control_symbols=["<|im_end|>"],
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def piece_metadata(model: bytes) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a SentencePiece model, taken apart as the converter does."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    top = fields(model)
    trainer = dict(fields(next(value for key, value in top if key == 2)))  # type: ignore[arg-type]
    normal = dict(fields(next(value for key, value in top if key == 3)))  # type: ignore[arg-type]
    pieces = [dict(fields(value)) for key, value in top if key == 1]  # type: ignore[arg-type]
    ids = range(processor.get_piece_size())
    keys = {
        "model": {1: "t5", 2: "llama"}[trainer[3]],
        "tokens": [processor.id_to_piece(token) for token in ids],
        "scores": np.array([processor.get_score(token) for token in ids], np.float32),
        "token_type": np.array([piece.get(3, 1) for piece in pieces], np.int32),
        "unknown_token_id": processor.unk_id(),
        "eos_token_id": processor.eos_id(),
        "add_space_prefix": bool(normal.get(3, 1)),
        "remove_extra_whitespaces": bool(normal.get(4, 1)),
        "precompiled_charsmap": np.frombuffer(normal.get(2, b""), np.uint8),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


PIECE_MODELS = [
    ("bpe", {"byte_fallback": True}),
    ("bpe", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
    ("unigram", {"byte_fallback": True, "add_dummy_prefix": False}),
    ("unigram", {"vocab_size": 400}),
]


@pytest.mark.parametrize(("kind", "options"), PIECE_MODELS)
def test_sentencepiece_ids_are_those_of_the_original(kind: str, options: dict[str, Any]) -> None:
    model = train(kind, **options)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.from_metadata(piece_metadata(model), "m.gguf")
    assert tokenizer.vocabulary == original.get_piece_size()
    produced = set()
    for text in [*corpus(7, 1500), "", " ", "  a  b ", "x<think> y"]:
        ids = original.encode(text)
        assert tokenizer.encode(text) == ids, ascii(text)
        assert tokenizer.decode(ids) == original.decode(ids), ascii(text)
        produced.update(ids)
    assert len(produced) > tokenizer.vocabulary // 3
    assert original.piece_to_id("<|im_end|>") not in produced


def test_sentencepiece_control_tokens_and_stream() -> None:
    tokenizer = Tokenizer.from_metadata(piece_metadata(train("bpe", byte_fallback=True)), "m.gguf")
    end = next(iter(tokenizer.eos_ids - {2}))
    assert tokenizer.eos_ids == {2, end} and tokenizer.add_bos is False
    ids = tokenizer.encode("a<|im_end|>", special=True)
    assert ids[-1] == end not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode(ids, special=True) == "a<|im_end|>"
    stream = TextStream(tokenizer)
    text = "쀍뷁 🦜 hello"  # rare: comes as single bytes
    ids = tokenizer.encode(text)
    assert len(ids) > 12
    assert "".join(map(stream.feed, ids)) + stream.flush() == " " + text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": np.ones(3, np.float32)}, "tokenizer.ggml.scores has 3 entries"),
        ({"scores": np.full(600, np.nan)}, "tokenizer.ggml.scores of token 0 is not finite"),
        ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
        ({"token_type": np.ones(600, np.int32)}, "no token of type UNKNOWN"),
        ({"precompiled_charsmap": np.zeros(99, np.uint8)}, "tokenizer.ggml.precompiled_charsmap"),
        ({"precompiled_charsmap": np.ones(9)}, "tokenizer.ggml.precompiled_charsmap is not an arr"),
    ],
)
def test_bad_sentencepiece_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    data = piece_metadata(train("bpe"))
    with pytest.raises(Error) as caught:
        Tokenizer.from_metadata(
            data | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, "m.gguf"
        )
    assert str(caught.value).startswith(f"m.gguf: {message}")


def test_missing_byte_pieces_are_an_error() -> None:
    data = piece_metadata(train("bpe", byte_fallback=True))
    data["tokenizer.ggml.token_type"][10] = 1
    with pytest.raises(Error, match=r"m\.gguf: the SentencePiece vocabulary cannot be used"):
        Tokenizer.from_metadata(data, "m.gguf")


def test_a_damaged_charsmap_never_crashes() -> None:
    data = piece_metadata(train("unigram", vocab_size=400))
    intact = data["tokenizer.ggml.precompiled_charsmap"]
    pick = np.random.default_rng(8)
    refused = 0
    for _ in range(40):
        damaged = intact.copy()
        places = pick.integers(0, len(damaged), 20)
        damaged[places] = pick.integers(0, 256, 20)
        data["tokenizer.ggml.precompiled_charsmap"] = damaged
        try:
            tokenizer = Tokenizer.from_metadata(data, "m.gguf")
        except Error:
            refused += 1
        else:
            for text in corpus(9, 20):
                tokenizer.encode(text)
    assert refused > 10


def write_sample() -> None:
    """Make tests/data/tokenizer_sample.json from the full vocabulary and tiktoken."""
    pieces = full_vocabulary()
    encode = tiktoken_encoder(pieces)
    texts = corpus(0, 300)
    normalized = "\0\0".join(unicodedata.normalize("NFC", text) for text in texts).encode()
    used = [rank for rank, piece in enumerate(pieces) if len(piece) == 1 or piece in normalized]
    renumbered = {rank: index for index, rank in enumerate(used)}
    renumbered |= {len(pieces) + i: len(used) + i for i in range(len(CONTROL + USER_DEFINED))}
    ids = [[renumbered[token] for token in encode(text)] for text in texts]
    encoded = [base64.b64encode(pieces[rank]).decode() for rank in used]
    data = {"pieces": encoded, "texts": texts, "ids": ids}
    SAMPLE.write_text(json.dumps(data, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    write_sample()
