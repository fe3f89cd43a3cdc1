"""Conversations <-> token ids: the model file's chat template, or ChatML where it has none.

    messages -> template -> text -> cut at control tokens -> ids

What a template writes around the messages may hold control tokens (`<|im_start|>`); what a message
holds may not, or anyone whose text reaches the model could end a turn and begin another. So the
contents are rendered in disguise:

1. In every content, the first character of each control token is replaced by a stand-in, a
   private-use character that occurs in no message and not in the template.
2. The text is rendered and cut at the control tokens that are left, the template's own.
3. Stand-ins become their characters again, and the pieces are encoded as plain text.

A template could still build a control token from the pieces of a content (by removing, joining or
changing the case of text), so everything is rendered a second time with every character of the
contents that occurs in any control token disguised. If the two renderings do not hold the same
control tokens, the second is used.

Roles are no free text: they are one of ROLES.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ondevice.tokenizer import Tokenizer
from quant.errors import Error, UsageError

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, str]
_CANARY: list[Message] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids the two begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


class Template:
    """How one model wants conversations written; safe to share between threads."""

    def __init__(self, source: str | None, tokenizer: Tokenizer, path: object) -> None:
        """Without `source`, ChatML; raises Error naming the file and line of a bad template."""
        if source is not None and not isinstance(source, str):
            raise Error(f"{path}: tokenizer.chat_template is not a string")
        self._tokenizer = tokenizer
        self._source = source or ""
        self._alphabet = sorted(set("".join(tokenizer.control_tokens)) - set(" \t\r\n"))
        self._encoded: dict[str, list[int]] = {}  # pieces of the last conversation
        self._write: Callable[[list[Message], bool], str] = _chatml
        if self._source.strip():
            self._write = _JinjaTemplate(self._source, tokenizer, str(path))
            try:
                self._write(_CANARY, True)
            except UsageError as error:
                raise Error(str(error)) from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, to look at: encoding it would trust the messages."""
        return self._write(_checked(messages), add_generation_prompt)

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of the conversation; every control token among them is the template's own."""
        checked = _checked(messages)
        matcher = self._tokenizer.control
        disguise, reveal = self._stand_ins(checked)

        def mark(text: str) -> str:
            characters = list(text)
            for start in matcher.starts(text):
                characters[start] = disguise.get(ord(text[start]), text[start])
            return "".join(characters)

        def cover(text: str) -> str:
            return text.translate(disguise)

        def write(change: Callable[[str], str]) -> tuple[str, list[tuple[int, int, int]]]:
            changed = [_with_contents(message, change) for message in checked]
            text = self._write(changed, add_generation_prompt)
            return text, list(matcher.spans(text))

        text, spans = write(mark)
        covered_text, covered_spans = write(cover)
        if [token for _, _, token in spans] != [token for _, _, token in covered_spans]:
            text, spans = covered_text, covered_spans
        ids: list[int] = []
        encoded: dict[str, list[int]] = {}
        position = 0
        for start, end, token in spans:
            ids += self._encode(text[position:start].translate(reveal), encoded)
            ids.append(token)
            position = end
        ids += self._encode(text[position:].translate(reveal), encoded)
        self._encoded = encoded
        bos = self._tokenizer.bos
        if self._tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def _encode(self, piece: str, encoded: dict[str, list[int]]) -> list[int]:
        """Ids of plain text, kept so that the next turn need not encode the history again."""
        ids = self._encoded.get(piece)
        encoded[piece] = self._tokenizer.encode(piece) if ids is None else ids
        return encoded[piece]

    def _stand_ins(self, messages: list[Message]) -> tuple[dict[int, str], dict[int, str]]:
        """Tables for str.translate: characters of control tokens -> stand-ins, and back."""
        texts = (text for message in messages for text in message.values())
        taken = set(self._source).union(*texts)
        free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in taken)
        pairs = list(zip(self._alphabet, free, strict=False))
        return {ord(a): b for a, b in pairs}, {ord(b): a for a, b in pairs}


class _JinjaTemplate:
    """A template from the model file, run by the sandbox."""

    def __init__(self, source: str, tokenizer: Tokenizer, path: str) -> None:
        from ondevice import sandbox  # brings in Jinja, 0.1 s

        if len(source) > sandbox.SOURCE_LIMIT:
            most = f"at most {sandbox.SOURCE_LIMIT} are allowed"
            raise Error(f"{path}: the chat template has {len(source)} characters; {most}")
        self._path = path
        self._names = tokenizer.special_texts()
        self._lock = threading.Lock()  # the meter belongs to one rendering
        self._new_meter = sandbox.Meter
        self._refusal = sandbox.TemplateRefusal
        self._environment = sandbox.MeteredEnvironment()
        with self._reported():
            self._template = self._environment.load(source)

    def __call__(self, messages: list[Message], add_generation_prompt: bool) -> str:
        characters = sum(len(text) for message in messages for text in message.values())
        with self._lock, self._reported():
            self._environment.meter = self._new_meter(characters)
            parts = self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
            return "".join(parts)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Whatever a template raises, as one line that names the file and the template's line."""
        try:
            yield
        except self._refusal as error:
            reason = _one_line(error)
            raise UsageError(f"{self._path}: the chat template refuses this: {reason}") from None
        except Exception as error:
            line = _line_of(error)
            where = "chat template" if line is None else f"chat template, line {line}"
            raise Error(f"{self._path}: {where}: {_one_line(error)}") from None


def _line_of(error: Exception) -> int | None:
    """Line of the template that an exception comes from; Jinja puts it into the traceback."""
    line: int | None = getattr(error, "lineno", None)  # of a syntax error
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return line


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(getattr(error, "message", error)).split())[:200]
    return text or type(error).__name__


def _chatml(messages: list[Message], add_generation_prompt: bool) -> str:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def _checked(messages: Sequence[Message]) -> list[Message]:
    """The messages, each known to have a role of ROLES and text in everything else."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages is of type {type(messages).__name__}; a list is needed")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UsageError(f"{where} is of type {type(message).__name__}; a dict is needed")
        for key in ("role", "content"):
            if key not in message:
                raise UsageError(f"{where}.{key} is missing")
        for key, text in message.items():
            if not isinstance(text, str):
                raise UsageError(f"{where}.{key} is of type {type(text).__name__}; text is needed")
        if message["role"] not in ROLES:
            needed = f"one of {', '.join(ROLES)} is needed"
            raise UsageError(f"{where}.role is {message['role'][:40]!r}; {needed}")
    return list(messages)


def _with_contents(message: Message, change: Callable[[str], str]) -> Message:
    return {key: text if key == "role" else change(text) for key, text in message.items()}
