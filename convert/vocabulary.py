"""The tokenizer of a checkpoint as `tokenizer.*` metadata, the way llama.cpp's converter writes it.

    tokenizer.model   SentencePiece, BPE or unigram      convert/sentence_piece.py
    tokenizer.json    byte-level BPE (Qwen's kind)       convert/byte_pair.py

Both fill a Vocabulary (convert/tokens.py), which is padded up to the model's vocabulary; special
token ids and the chat template are read here. A `tokenizer.json` is parsed as plain JSON and
checked, never loaded by a tokenizer library: it may come from anybody.
"""

from typing import Any

from convert import byte_pair, header, sentence_piece
from convert.checkpoint import Checkpoint
from convert.header import Value
from convert.json_reader import read_bytes
from convert.tokens import Vocabulary
from quant.errors import Error

TEMPLATE_LIMIT = 1 << 20


def special_ids(
    vocabulary: Vocabulary, settings: dict[str, Any], config: dict[str, Any], where: str
) -> dict[str, int]:
    """Ids of bos, eos, unknown and padding: named in tokenizer_config.json, else in config.json."""
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    result = {}
    for short, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = settings.get(f"{short}_token")
        if isinstance(text, dict):
            text = text.get("content")
        token = ids.get(text) if isinstance(text, str) else None
        if short == "eos" and isinstance(text, str) and token is None:
            raise Error(f"{where}: eos_token {text[:40]!r} is not in the vocabulary")
        if token is None:
            token = config.get(f"{short}_token_id")
            if isinstance(token, list):
                token = token[0] if token else None
        if token is None:
            continue
        if type(token) is not int or not 0 <= token < len(vocabulary.tokens):
            raise Error(
                f"config.json: {short}_token_id is {str(token)[:40]}, "
                f"a token id below {len(vocabulary.tokens)} is needed"
            )
        result[name] = token
    return result


def chat_templates(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Value]:
    """`tokenizer.chat_template`, and the named ones beside it."""
    if path := checkpoint.find("chat_template.jinja"):
        data = read_bytes(path, TEMPLATE_LIMIT)
        try:
            template: Any = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Error(f"{path}: not UTF-8 at byte {error.start}") from None
        where = str(path)
    elif (value := checkpoint.read_json("chat_template.json")) is not None:
        template, where = value.get("chat_template"), "chat_template.json"
    else:
        template, where = settings.get("chat_template"), "tokenizer_config.json: chat_template"
    if template is None:
        return {}
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    result: dict[str, Value] = {}
    others = []
    for item in named:
        name = item.get("name") if isinstance(item, dict) else None
        text = item.get("template") if isinstance(item, dict) else None
        if not isinstance(name, str) or not isinstance(text, str):
            raise Error(f"{where}: a template must be text, or a list of names and templates")
        if len(text) > TEMPLATE_LIMIT:
            raise Error(f"{where}: longer than {TEMPLATE_LIMIT} characters")
        key = "tokenizer.chat_template"
        if name != "default":
            if not (name.isascii() and name.replace("_", "").isalnum()):
                raise Error(f"{where}: {name[:40]!r} cannot name a template")
            others.append(name)
            key += f".{name}"
        result[key] = header.string(text)
    if others:
        result["tokenizer.chat_templates"] = header.strings(others)
    return result


def read_vocabulary(
    checkpoint: Checkpoint, config: dict[str, Any], size: int
) -> tuple[dict[str, Value], int]:
    """All `tokenizer.*` metadata of the checkpoint and the number of tokens before padding."""
    settings = checkpoint.read_json("tokenizer_config.json") or {}
    if path := checkpoint.find("tokenizer.model"):
        vocabulary = sentence_piece.read(path, settings, size)
    elif path := checkpoint.find("tokenizer.json"):
        vocabulary = byte_pair.read(path, settings, size)
    else:
        raise Error(f"{checkpoint.folder}: no tokenizer.json and no tokenizer.model")
    count = len(vocabulary.tokens)
    vocabulary.pad(size, path.name)
    vocabulary.check(path.name)
    vocabulary.specials |= special_ids(vocabulary, settings, config, "tokenizer_config.json")
    return vocabulary.metadata() | chat_templates(checkpoint, settings), count
