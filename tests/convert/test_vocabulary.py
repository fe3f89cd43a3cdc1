"""Tokenizers into GGUF: byte-level BPE and both kinds of SentencePiece, and what is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from convert import convert, plan
from convert.tokens import TokenType
from ondevice.gguf_file import GGUFFile
from ondevice.tokenizer import Tokenizer
from quant.errors import Error
from tools.small_tokenizer import MERGE_TEXT

TEXTS = (
    "the model reads one token",
    " two  spaces and\ttabs\n\nlines",
    "ＦＵＬＬ ｗｉｄｔｈ ﬁ ½ é e\u0301",
    "한국어와 emoji 🦙😊",
    "",
    "<sep>a<sep> b",
    "x" * 200,
)


def converted(folder: Path) -> dict[str, Any]:
    output = folder.parent / "out.gguf"
    convert(folder, output, "BF16", force=True)
    with GGUFFile.open(output) as file:
        return dict(file.metadata)


@pytest.fixture
def change(checkpoint: Path) -> Callable[..., None]:
    """change(function): edit tokenizer.json in place."""

    def apply(function: Callable[[dict[str, Any]], object]) -> None:
        path = checkpoint / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        function(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return apply


def test_padding_and_types(checkpoint: Path, change: Callable[..., None]) -> None:
    def add(data: dict[str, Any]) -> None:
        first = max(token["id"] for token in data["added_tokens"]) + 1
        for token, (text, special) in enumerate(
            [("<tool_call>", False), ("<|fim_prefix|>", False), ("<sep>", True)], first
        ):
            data["added_tokens"].append({"id": token, "content": text, "special": special})

    change(add)
    keys = converted(checkpoint)
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert types["<tool_call>"] == TokenType.USER_DEFINED
    assert types["<|fim_prefix|>"] == types["<sep>"] == types["<|im_end|>"] == TokenType.CONTROL
    assert types["a"] == TokenType.NORMAL
    assert types["[PAD383]"] == TokenType.UNUSED
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD383]"


def test_both_forms_of_merges(checkpoint: Path, change: Callable[..., None]) -> None:
    def pairs(data: dict[str, Any]) -> None:
        merges = data["model"]["merges"]
        data["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]

    def lines(data: dict[str, Any]) -> None:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]

    change(pairs)
    first = plan(checkpoint).metadata["tokenizer.ggml.merges"]
    change(lines)
    assert plan(checkpoint).metadata["tokenizer.ggml.merges"] == first


def test_ids_survive(checkpoint: Path) -> None:
    """The converted vocabulary encodes like the original file does in its own library."""
    from tokenizers import Tokenizer as Library

    original = Library.from_file(str(checkpoint / "tokenizer.json"))
    ours = Tokenizer.from_metadata(converted(checkpoint), "out.gguf")
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text).ids, text


def test_gpt2_pre_tokenizer(checkpoint: Path, change: Callable[..., None]) -> None:
    step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    change(lambda data: data.update(pre_tokenizer=step, normalizer=None))
    assert converted(checkpoint)["tokenizer.ggml.pre"] == "gpt-2"


LONG = "a" * 100_000


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda d: d["model"].update(type="WordPiece"), "model type 'WordPiece' is unknown"),
        (lambda d: d.update(model=None), "model type None is unknown"),
        (lambda d: d.update(pre_tokenizer=None), "byte-level BPE is needed"),
        (lambda d: d.update(pre_tokenizer={"type": "Metaspace"}), "'Metaspace'"),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(.*"}),
            "expression '(.*' is unknown",
        ),
        (
            lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}),
            "steps ['Digits', 'Split', 'ByteLevel'] are unknown",
        ),
        (lambda d: d.update(normalizer=None), "normalizer None with qwen2; NFC is needed"),
        (lambda d: d.update(normalizer={"type": "Precompiled"}), "normalizer Precompiled"),
        (lambda d: d["model"].update(vocab={}), "model.vocab must map"),
        (lambda d: d["model"]["vocab"].update({"ab": -1}), "token 'ab' has id -1"),
        (lambda d: d["model"]["vocab"].update({"ab": 384}), "'ab' has id 384; config.json's"),
        (lambda d: d["model"]["vocab"].update({"ab": True}), "'ab' has id True"),
        (lambda d: d["model"]["vocab"].update({"zq": 3}), "both have id 3"),
        (lambda d: d["model"]["vocab"].update({"z q": 380}), "token 380 'z q' is not spelled"),
        (lambda d: d["model"]["vocab"].update({"\ud800": 380}), "token 380"),
        (lambda d: d["model"]["vocab"].pop("!"), "is not in the vocabulary|no token for byte"),
        (lambda d: d["model"].update(merges={}), "merges must be a list"),
        (lambda d: d["model"]["merges"].append("a b c"), "two tokens are needed"),
        (lambda d: d["model"]["merges"].append(["a", 3]), "two tokens are needed"),
        (lambda d: d["model"]["merges"].append([LONG, "b"]), "(of 100000 letters) is not in"),
        (lambda d: d["model"]["merges"].append(d["model"]["merges"][0]), "a merge is listed twice"),
        (lambda d: d["added_tokens"].append({"id": 0, "content": "<x>"}), "id 0 is"),
        (lambda d: d["added_tokens"].append({"id": 9999, "content": "<x>"}), "has id 9999 of 384"),
        (lambda d: d["added_tokens"].append({"id": "1"}), "needs an id and a content"),
        (lambda d: d["added_tokens"].append(d["added_tokens"][0]), "two added tokens have id"),
        (
            lambda d: d["added_tokens"].append({"id": 380, "content": "<|im_end|>"}),
            "are both '<|im_end|>'",
        ),
    ],
)
def test_refused_tokenizers(
    checkpoint: Path, change: Callable[..., None], function: Callable[..., object], part: str
) -> None:
    change(function)
    with pytest.raises(Error) as caught:
        plan(checkpoint)
    message = str(caught.value)
    assert message.startswith("tokenizer.json")
    assert any(option in message for option in part.split("|")) or part in message
    assert len(message) < 400


def test_no_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(Error, match=r"no tokenizer\.json and no tokenizer\.model"):
        plan(checkpoint)


def test_special_ids(checkpoint: Path, edit: Callable[..., None]) -> None:
    edit(checkpoint / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    edit(checkpoint / "config.json", bos_token_id=5)
    keys = converted(checkpoint)
    tokens = keys["tokenizer.ggml.tokens"]
    assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert keys["tokenizer.ggml.bos_token_id"] == 5
    edit(checkpoint / "tokenizer_config.json", eos_token="<|nothing|>")
    with pytest.raises(Error, match=r"eos_token '<\|nothing\|>' is not in the vocabulary"):
        plan(checkpoint)
    edit(checkpoint / "tokenizer_config.json", eos_token=None)
    edit(checkpoint / "config.json", eos_token_id=10**6)
    with pytest.raises(Error, match="eos_token_id is 1000000, a token id below 384"):
        plan(checkpoint)


def test_templates(checkpoint: Path, edit: Callable[..., None]) -> None:
    settings = checkpoint / "tokenizer_config.json"
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    edit(settings, chat_template=named)
    keys = converted(checkpoint)
    assert keys["tokenizer.chat_template"] == "A"
    assert keys["tokenizer.chat_template.tool_use"] == "B"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    (checkpoint / "chat_template.json").write_text('{"chat_template": "C"}')
    assert converted(checkpoint)["tokenizer.chat_template"] == "C"
    (checkpoint / "chat_template.jinja").write_text("{{ '한' }}", encoding="utf-8")
    assert converted(checkpoint)["tokenizer.chat_template"] == "{{ '한' }}"
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(Error, match="not UTF-8"):
        plan(checkpoint)
    (checkpoint / "chat_template.jinja").write_bytes(bytes(2 << 20))
    with pytest.raises(Error, match="more than the 1048576 accepted"):
        plan(checkpoint)


def train(folder: Path, kind: str, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece model as the checkpoint's tokenizer."""
    words = MERGE_TEXT.split()
    lines = [" ".join(words[i : i + 9]) for i in range(0, len(words), 3)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "한국어 ½"] * 3),
        model_writer=model,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 340, "user_defined_symbols": ["<sep>", "▁▁"], **options},
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False, "normalization_rule_name": "nmt_nfkc_cf"},
    ],
)
def test_sentence_piece_survives(
    checkpoint: Path, edit: Callable[..., None], kind: str, options: dict[str, Any]
) -> None:
    original = train(checkpoint, kind, **options)
    edit(checkpoint / "config.json", eos_token_id=2, bos_token_id=1, pad_token_id=0)
    keys = converted(checkpoint)
    assert keys["tokenizer.ggml.model"] == {"bpe": "llama", "unigram": "t5"}[kind]
    assert len(keys["tokenizer.ggml.tokens"]) == 384
    ours = Tokenizer.from_metadata(keys, "out.gguf")
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text), text


def test_sentence_piece_with_added_tokens(checkpoint: Path) -> None:
    count = train(checkpoint, "unigram").get_piece_size()
    added = {
        str(count + 2): {"content": "<|im_end|>", "special": True},
        str(count + 3): {"content": "<think>", "special": False},
        "0": {"content": "<unk>", "special": True},
    }
    settings = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "add_bos_token": True}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    keys = converted(checkpoint)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[count + 2] == "<|im_end|>"
    assert list(types[count : count + 4]) == [
        TokenType.UNUSED,
        TokenType.UNUSED,
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
    ]
    assert types[0] == TokenType.UNKNOWN
    assert keys["tokenizer.ggml.eos_token_id"] == count + 2
    assert keys["tokenizer.ggml.add_bos_token"] is True
    ours = Tokenizer.from_metadata(keys, "out.gguf")
    assert ours.encode("<|im_end|>", special=True) == [count + 2]
    assert count + 3 in ours.encode("a<think>b")


def test_a_damaged_sentence_piece_model(checkpoint: Path) -> None:
    train(checkpoint, "bpe", byte_fallback=True)
    path = checkpoint / "tokenizer.model"
    content = path.read_bytes()
    for damaged, part in (
        (content[:-3], "damaged"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"", "0 pieces"),
        (content * 2, "pieces"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(Error, match=part) as caught:
            plan(checkpoint)
        assert str(caught.value).startswith("tokenizer.model")


def test_kinds_of_sentence_piece_that_gguf_cannot_hold(checkpoint: Path) -> None:
    train(checkpoint, "char")
    with pytest.raises(Error, match="of kind 'char'; BPE or unigram is needed"):
        plan(checkpoint)
