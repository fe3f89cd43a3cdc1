"""Training data of the demo model: books, tokenizer, dialogues and batches.

A corpus is a folder of plain-text books, one blank line between paragraphs. Conversations are taken
from runs of paragraphs that each open with a double quote: what one speaker says is the user's
turn, the answer the assistant's. Token stream: documents separated by `<|endoftext|>`,
conversations in ChatML.

The tokenizer is byte-level BPE with Qwen's pre-tokenizer and Qwen's added tokens at the end of the
vocabulary; all 256 byte symbols are in it, so any text can be encoded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CONTROL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a character in an English novel. Answer in one or two sentences.",
    "You are Sherlock Holmes, the detective of Baker Street.",
    "You are a polite companion who likes to talk.",
)
WINDOW = 512
LONGEST_TURN = 420
LONGEST_CONVERSATION = 8


def read_book(path: Path) -> str:
    """Text of one book: paragraphs on one line each, one blank line between them."""
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def read_books(corpus: Path, held_out: str) -> tuple[dict[str, str], str]:
    """Training books by file name and the text of the held-out one."""
    books = {path.name: read_book(path) for path in sorted(corpus.glob("*.txt"))}
    if held_out not in books:
        raise SystemExit(f"{corpus}: no book named {held_out}")
    text = books.pop(held_out)
    return books, text


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of `vocabulary` ids, the added tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = len(CONTROL_TOKENS) + len(MARKUP_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS]
    )
    if tokenizer.get_vocab_size() != vocabulary:
        raise SystemExit(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {vocabulary}")
    return tokenizer


def speech(paragraph: str) -> str | None:
    """What is said in a paragraph that opens with a double quote, without the narration."""
    if not paragraph.startswith('"') or paragraph.count('"') % 2:
        return None
    said = [part.strip() for part in paragraph.split('"')[1::2]]
    text = re.sub(r", (?=(?!I\b)[A-Z])", ". ", " ".join(part for part in said if part))
    text = re.sub(r"[,;:-]+$", ".", text)
    if not 2 <= len(text) <= LONGEST_TURN or not text[0].isalpha() or text[-1] not in ".!?":
        return None
    return text[0].upper() + text[1:]


def dialogues(text: str) -> list[list[str]]:
    """Runs of two or more quoted paragraphs that answer each other."""
    runs: list[list[str]] = []
    run: list[str] = []
    for paragraph in [*text.split("\n\n"), ""]:
        said = speech(paragraph)
        if said is None:
            if len(run) > 1:
                runs.append(run)
            run = []
        else:
            run.append(said)
    return runs


def chatml(turns: list[str], system: str | None) -> str:
    """ChatML of alternating user and assistant turns."""
    parts = [] if system is None else [f"{TURN_START}system\n{system}{TURN_END}\n"]
    for index, turn in enumerate(turns):
        role = "assistant" if index % 2 else "user"
        parts.append(f"{TURN_START}{role}\n{turn}{TURN_END}\n")
    return "".join(parts)


def conversations(runs: list[list[str]], source: random.Random) -> list[str]:
    """One pass over the dialogues as ChatML, cut at random places, always ending with a reply."""
    made = []
    for run in runs:
        position = source.randint(0, 1) if len(run) > 2 else 0
        while position + 1 < len(run):
            length = 2 * source.randint(1, LONGEST_CONVERSATION // 2)
            turns = run[position : position + length]
            turns = turns[: len(turns) // 2 * 2]
            system = source.choice(SYSTEM_LINES) if source.random() < 0.25 else None
            made.append(chatml(turns, system))
            position += len(turns)
    source.shuffle(made)
    return made


class Batches:
    """Endless seeded batches of (rows, length + 2) token ids from books and conversations."""

    def __init__(
        self, books: dict[str, str], tokenizer: Tokenizer, chat_share: float, seed: int
    ) -> None:
        self.random = random.Random(seed)
        self.tokenizer = tokenizer
        self.chat_share = chat_share
        self.end = tokenizer.token_to_id(END_OF_TEXT)
        stream: list[int] = []
        for text in books.values():
            stream += [*tokenizer.encode(text).ids, self.end]
        self.text = np.asarray(stream, dtype=np.int64)
        self.runs = [run for text in books.values() for run in dialogues(text)]
        self.starts: Iterator[int] = iter(())
        self.chat: list[int] = []
        self.waiting: list[str] = []

    def text_row(self, length: int) -> np.ndarray:
        """A window of running text; every pass over the books uses each window once."""
        start = next(self.starts, None)
        if start is None:
            first = self.random.randrange(WINDOW)
            order = list(range(first, len(self.text) - WINDOW - 2, WINDOW))
            self.random.shuffle(order)
            self.starts = iter(order)
            start = next(self.starts)
        start = min(start, len(self.text) - length - 2)
        return self.text[start : start + length + 2]

    def chat_row(self, length: int) -> np.ndarray:
        """Whole conversations one after another, the last one cut."""
        ids: list[int] = []
        while len(ids) < length + 2:
            if not self.waiting:
                self.waiting = conversations(self.runs, self.random)
            ids += [*self.tokenizer.encode(self.waiting.pop()).ids, self.end]
        return np.asarray(ids[: length + 2], dtype=np.int64)

    def batch(self, rows: int, length: int) -> np.ndarray:
        """(rows, length + 2) ids; each row is a conversation row with probability `chat_share`."""
        chosen = [self.random.random() < self.chat_share for _ in range(rows)]
        return np.stack([self.chat_row(length) if c else self.text_row(length) for c in chosen])
