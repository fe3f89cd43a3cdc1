"""A byte-level BPE tokenizer of any size, in Hugging Face layout.

256 byte symbols, as many merges as fit (learnt from a short text), Qwen's control tokens, its
pre-tokenizer and a ChatML template. Some ids at the end stay unused, as in the published model.
"""

import itertools
from collections import Counter
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The text the merges are learnt from: the tokenizer needs a few real ones, not good ones.
MERGE_TEXT = (
    "the model reads one token after the other and writes the next; what it has read stays in a"
    " small memory that fades, and every fourth layer looks back at all of it. the experts are "
    "many, the router chooses ten of them for each token, and the shared expert always answers."
    " there is nothing here that another machine with the same numbers would not repeat, bit "
    "for bit."
)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte value, (256)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(spare)) for byte in range(256)]


def learn_merges(count: int) -> list[tuple[str, str]]:
    """The first `count` byte-pair merges of MERGE_TEXT, fewer if it has no more."""
    symbols = byte_symbols()
    words = Counter(
        tuple(symbols[byte] for byte in (" " * bool(position) + word).encode())
        for position, word in enumerate(MERGE_TEXT.split())
    )
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            merged[_merge(word, best)] += times
        words = merged
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id of bytes and merges, and the merges; some ids stay unused, as in the original."""
    spare = max(0, min(16, size - 256 - len(SPECIAL_TOKENS)))
    merges = learn_merges(size - 256 - len(SPECIAL_TOKENS) - spare)
    tokens = [*byte_symbols(), *dict.fromkeys(left + right for left, right in merges)]
    return {token: number for number, token in enumerate(tokens)}, merges


def special_ids(size: int) -> range:
    """Where SPECIAL_TOKENS lie: behind the ordinary tokens."""
    first = len(vocabulary(size)[0])
    return range(first, first + len(SPECIAL_TOKENS))


def tokenizer(size: int) -> dict[str, Any]:
    """`tokenizer.json`: byte-level BPE as Qwen writes it."""
    tokens, merges = vocabulary(size)
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **_added_token()}
            for token, number in zip(SPECIAL_TOKENS, special_ids(size), strict=True)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PRE_TOKENIZER},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", **byte_level},
            ],
        },
        "post_processor": {"type": "ByteLevel", **byte_level},
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _added_token() -> dict[str, bool]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {**dict.fromkeys(flags, False), "special": True}


def tokenizer_config(size: int, context_length: int) -> dict[str, Any]:
    """`tokenizer_config.json` with a ChatML template."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {"content": token, **_added_token()}
            for token, number in zip(SPECIAL_TOKENS, special_ids(size), strict=True)
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": context_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
