"""A model without weights: it answers with what a test enqueued, one token per character."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from ondevice.sampling import Sampling
from quant.errors import Error, UsageError


class FakeCompletion:
    """The answer `pieces`, with the attributes a real completion has once it is exhausted."""

    def __init__(self, prompt_tokens: int, pieces: list[str], finish_reason: str = "stop") -> None:
        self.pieces = pieces
        self.prompt_tokens = self.prefilled_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = finish_reason
        self.timings = {
            "prompt_seconds": 0.5,
            "prompt_tokens_per_second": prompt_tokens / 0.5,
            "decode_seconds": 2.0,
            "decode_tokens_per_second": sum(map(len, pieces)) / 2.0,
            "expert_hit_rate": 1.0,
            "disk_bytes": 0,
            "disk_wait_seconds": 0.0,
        }
        self.limit = "nothing"

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            self.text += piece
            self.tokens.extend(map(ord, piece))
            yield piece


class FakeTokenizer:
    bos: int | None = None
    add_bos = False

    def encode(self, text: str, special: bool = False) -> list[int]:
        return list(map(ord, text))

    def piece(self, token: int) -> bytes:
        return chr(token).encode()


class FakeTemplate:
    def encode(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        return [ord(letter) for message in messages for letter in f"<{message['content']}>"]


class FakeSession:
    def __init__(self, model: "FakeModel", system: str | None, sampling: Sampling) -> None:
        self.model, self.system, self.sampling = model, system, sampling
        self.messages: list[dict[str, str]] = []
        self.last: FakeCompletion | None = None
        self.cancelled = self.closed = False
        self.saved = ""
        self.journal: SimpleNamespace | None = None

    def send(self, text: str) -> FakeCompletion:
        self.messages.append({"role": "user", "content": text})
        self.last = self.model.next_answer(len(text))
        return self.last

    def edit(self, turn: int, text: str) -> FakeCompletion:
        del self.messages[turn:]
        return self.send(text)

    def regenerate(self, turn: int | None = None) -> FakeCompletion:
        if not self.messages:
            raise UsageError("there is nothing to answer again")
        if turn is not None:
            del self.messages[turn + 1 :]
        self.last = self.model.next_answer(0)
        return self.last

    def clear(self) -> None:
        self.messages = []
        self.last = None

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True

    def undo(self) -> str:
        return self.messages.pop()["content"]

    def trim(self, turns: int | None = None) -> tuple[int, int]:
        del self.messages[: turns or 1]
        return turns or 1, 50

    def save(self, path: str) -> None:
        self.saved = path


class FakeModel:
    """`answers` holds what the next completions say: a list of pieces, or an error to raise."""

    def __init__(self) -> None:
        self.answers: list[list[str] | BaseException] = []
        self.config = SimpleNamespace(name="fake")
        self.sampling = Sampling(temperature=0.5, seed=7)
        self.tokenizer = FakeTokenizer()
        self.template = FakeTemplate()
        self.context = 100
        self.load_seconds, self.compile_seconds = 0.25, 0.125
        self.loaded: tuple[str, dict[str, object]] | None = None
        self.completed: dict[str, Any] = {}
        self.sessions: list[FakeSession] = []
        self.closed = False
        self.table = np.zeros((128, 128), dtype=np.float32)

    def enqueue(self, *pieces: str) -> None:
        self.answers.append(list(pieces))

    def next_answer(self, prompt_tokens: int) -> FakeCompletion:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return FakeCompletion(prompt_tokens, answer)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, special)

    def logits(self, ids: list[int]) -> np.ndarray:
        """(len(ids), 128): row `token` of the table the test filled."""
        if max(ids) >= len(self.table):
            raise Error("token outside the vocabulary")
        return self.table[ids]

    def complete(
        self, ids: list[int], sampling: Sampling, max_tokens: int | None = None
    ) -> FakeCompletion:
        self.completed = {"ids": ids, "sampling": sampling, "max_tokens": max_tokens}
        return self.next_answer(len(ids))

    def session(self, system: str | None = None, sampling: Sampling | None = None) -> FakeSession:
        self.sessions.append(FakeSession(self, system, sampling or self.sampling))
        return self.sessions[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True
