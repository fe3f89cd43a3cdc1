"""A conversation: each turn reads only its own tokens, and whatever stops an answer, it goes on.

After any turn the state must be the one of a model that took the same tokens without a break.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ondevice
from ondevice import generate
from ondevice.generate import Completion
from ondevice.model import Model
from ondevice.sampling import Sampling
from ondevice.session import Session
from ondevice.state import State
from quant.errors import UsageError
from tests.ondevice.meanwhile import interrupt_main, meanwhile

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
WILD = Sampling(temperature=100.0, top_k=0, top_p=1.0, seed=4)
LONG = "x y " * 1000


def rendered(model: Model, *texts: str, system: str | None = None) -> list[int]:
    """The prompt of a conversation that begins with the user and takes turns."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return model.template.encode(messages)


def further(model: Model, text: str) -> list[int]:
    """What one more message appends after an answer."""
    turn = f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return model.tokenize(turn, special=True)


def begin(completion: Completion, count: int = 20) -> list[int]:
    """The first tokens of an answer that is then left where it is."""
    return list(islice(completion.ids(), count))


def greedy(model: Model, tokens: list[int], count: int = 20) -> list[int]:
    return list(model.generate(tokens, count, temperature=0.0, repeat_penalty=1.0))


def assert_took(session: Session, tokens: list[int]) -> None:
    """The session's state is, to the bit, what these tokens make of a new one."""
    state = State(session.model.config, session.model.context)
    list(Completion(session.model, state, tokens, GREEDY, 1).ids())
    assert session.position == len(tokens)
    assert np.array_equal(session._state.memory, state.memory)


# ---- turns ----


def test_a_turn_reads_only_its_own_tokens(demo: Model) -> None:
    session = demo.session(sampling=GREEDY)
    taken: list[int] = []
    for text in ("Hello", "Who are you?", "Tell me about the hound."):
        new = further(demo, text) if taken else rendered(demo, text)
        answer = session.send(text)
        taken += new
        assert answer.prompt_tokens == len(taken)
        assert answer.prefilled_tokens == len(new)
        assert "".join(answer) == demo.detokenize(answer.tokens) != ""
        assert answer.finish_reason == "stop"
        with ondevice.load(demo.path, threads=1) as fresh:
            again = fresh.complete(taken, GREEDY)
            assert "".join(again) == answer.text
            assert (again.tokens, again.finish_reason) == (answer.tokens, "stop")
        taken += answer.tokens
        assert_took(session, taken)


def test_messages_tell_the_conversation(demo: Model) -> None:
    session = demo.session("Be brief.", GREEDY)
    first = "".join(session.send("Hello"))
    second = "".join(session.send("Who are you?"))
    assert session.system == "Be brief."
    assert session.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": second},
    ]
    session.messages[0]["content"] = "changed"
    assert session.messages[0]["content"] == "Hello"


def test_an_answer_counts_by_its_tokens_not_by_its_text(endless: Model) -> None:
    """Random tokens are rarely those that encoding their text would give."""
    session = endless.session(sampling=WILD)
    answer = session.send("Hello")
    begin(answer, 60)
    assert endless.tokenize(endless.detokenize(answer.tokens)) != answer.tokens
    second = session.send("And?")
    new = further(endless, "And?")
    assert second.prefilled_tokens == 1 + len(new)  # the answer's last token was not read yet
    exact = rendered(endless, "Hello") + answer.tokens + new
    assert begin(second, 30) == begin(endless.complete(exact, WILD), 30)


def test_two_conversations_do_not_mix(demo: Model) -> None:
    def talk(name: str) -> list[str]:
        session = demo.session(f"You are {name}.", GREEDY)
        return ["".join(session.send(text)) for text in ("Hello", "Who are you?", f"Go, {name}")]

    names = ["Holmes", "Watson"]
    alone = [talk(name) for name in names]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, names)) == alone


def test_the_system_message_changes(demo: Model) -> None:
    session = demo.session(sampling=GREEDY)
    first = "".join(session.send("Hello"))
    session.system = "You are Dr. Watson."
    answer = session.send("Who are you?")
    exact = rendered(demo, "Hello", first, "Who are you?", system="You are Dr. Watson.")
    assert answer.prefilled_tokens == answer.prompt_tokens == len(exact)
    text = "".join(answer)
    assert text == "".join(demo.complete(exact, GREEDY))
    assert_took(session, exact + answer.tokens)

    session.system = "You are Dr. Holmes."  # as many tokens
    last = session.send("Why?")
    turns = ("Hello", first, "Who are you?", text, "Why?")
    assert last.prompt_tokens == len(rendered(demo, *turns, system="You are Dr. Watson."))
    assert last.prefilled_tokens == last.prompt_tokens


def test_clear_keeps_the_system_message(demo: Model) -> None:
    session = demo.session("You are Dr. Watson.", GREEDY)
    first = "".join(session.send("Hello"))
    "".join(session.send("Who are you?"))
    session.clear()
    assert (session.messages, session.position, session.last) == ([], 0, None)
    with pytest.raises(UsageError, match="there is no answer"):
        session.regenerate()
    assert "".join(session.send("Hello")) == first
    assert session.last is not None
    assert session.last.prefilled_tokens == session.last.prompt_tokens


# ---- answering again ----


def test_regenerate_answers_from_the_same_state(demo: Model) -> None:
    session = demo.session(sampling=Sampling(temperature=1.0, seed=11))
    "".join(session.send("Hello"))
    answer = session.send("Who are you?")
    text = "".join(answer)
    messages, position, memory = session.messages, session.position, session._state.memory.copy()
    again = session.regenerate()
    assert again.prefilled_tokens == 1
    assert "".join(again) == text
    assert again.tokens == answer.tokens
    assert (session.messages, session.position) == (messages, position)
    assert np.array_equal(session._state.memory, memory)

    session.sampling = Sampling(temperature=1.0, seed=12)
    other = "".join(session.regenerate())
    assert other != text
    assert session.messages == [*messages[:-1], {"role": "assistant", "content": other}]
    session.sampling = Sampling(temperature=1.0, seed=11)
    assert "".join(session.regenerate()) == text
    assert session.messages == messages


def test_regenerate_after_an_answer_was_left(endless: Model) -> None:
    session = endless.session(sampling=GREEDY)
    answer = session.send("Hello")
    tokens = begin(answer)
    again = session.regenerate()
    assert begin(again) == tokens
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    second = session.send("And?")
    exact = rendered(endless, "Hello") + again.tokens + further(endless, "And?")
    assert begin(second) == greedy(endless, exact)


def test_regenerate_reads_the_prompt_that_was_not_read(demo: Model) -> None:
    session = demo.session("You are Dr. Watson.", GREEDY)
    first = "".join(session.send("Hello"))
    session.system = "You are Dr. Holmes."
    answer = session.send("Who are you?")
    answer.cancel()
    assert not list(answer)
    exact = rendered(demo, "Hello", first, "Who are you?", system="You are Dr. Holmes.")
    assert "".join(session.regenerate()) == "".join(demo.complete(exact, GREEDY))


def test_regenerate_without_an_answer(demo: Model) -> None:
    with pytest.raises(UsageError, match="there is no answer to make again"):
        demo.session().regenerate()


# ---- answers that were stopped ----


def cancel_elsewhere(session: Session, answer: Completion) -> None:
    with meanwhile(lambda: len(answer.tokens) > 20, session.cancel):
        "".join(answer)


def interrupt(session: Session, answer: Completion) -> None:
    with (
        meanwhile(lambda: len(answer.tokens) >= 511, interrupt_main, delay=0.01),
        pytest.raises(KeyboardInterrupt),
    ):
        "".join(answer)


def close(session: Session, answer: Completion) -> None:
    next(answer)
    answer.close()


def leave(session: Session, answer: Completion) -> None:
    next(answer)


def cancel_at_once(session: Session, answer: Completion) -> None:
    session.cancel()
    assert list(answer) == []


def never_begin(session: Session, answer: Completion) -> None:
    assert answer.tokens == []


STOPS = [cancel_elsewhere, interrupt, close, leave, cancel_at_once, never_begin]


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_answer_stands_and_the_conversation_goes_on(
    stop: Callable[[Session, Completion], None], endless: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one burst long enough that the stop falls into it
    monkeypatch.setattr(generate, "LONGEST_BURST", sys.maxsize)
    monkeypatch.setattr(generate, "BURST_SECONDS", 1e9)
    assert endless.ahead is not None
    monkeypatch.setattr(endless.ahead.depth, "fixed", 0)  # or the answer ends before the stop
    session = endless.session(sampling=GREEDY)
    answer = session.send("Hello")
    stop(session, answer)
    assert len(answer.tokens) < answer.max_tokens
    prompt = rendered(endless, "Hello")
    if answer.tokens:
        assert answer.tokens == greedy(endless, prompt, len(answer.tokens))
        assert_took(session, prompt + answer.tokens[:-1])
    assert session.messages[1]["content"] == endless.detokenize(answer.tokens)
    assert answer.finish_reason == "cancel"

    second = session.send("And?")
    exact = prompt + answer.tokens + further(endless, "And?")
    assert second.prompt_tokens == len(exact)
    assert begin(second) == greedy(endless, exact)


@pytest.mark.parametrize("way", ["cancel", "interrupt"])
@pytest.mark.parametrize("then", ["send", "regenerate"])
def test_stopped_while_it_reads_the_prompt(way: str, then: str, endless: Model) -> None:
    session = endless.session(sampling=GREEDY)
    answer = session.send(LONG)
    prompt = rendered(endless, LONG)
    if way == "cancel":
        with meanwhile(lambda: session.position >= 512, session.cancel, delay=0.02):
            assert list(answer) == []
    else:
        with (
            meanwhile(lambda: session.position >= 512, interrupt_main, delay=0.02),
            pytest.raises(KeyboardInterrupt),
        ):
            list(answer)
    assert 512 <= session.position < len(prompt) - 1
    assert answer.tokens == []
    assert_took(session, prompt[: session.position])

    if then == "regenerate":
        second, exact = session.regenerate(), prompt
    else:
        second, exact = session.send("And?"), prompt + further(endless, "And?")
    assert second.prefilled_tokens == len(exact) - session.position
    assert begin(second) == greedy(endless, exact)
    assert answer.finish_reason == "cancel"


def test_an_abandoned_iterator_of_ids_runs_nothing(demo: Model) -> None:
    session = demo.session(sampling=GREEDY)
    abandoned = session.send("Hello").ids()
    answer = "".join(session.send("Who are you?"))
    assert list(abandoned) == []
    assert "".join(session.regenerate()) == answer


INTERRUPTED = """
import faulthandler, os, signal, sys, threading, time
import ondevice
from ondevice.kernels import team

model = ondevice.load(sys.argv[1], threads=2)
model.ends[:] = 0
prompt = list(range(300))
expected = model.logits(prompt)
session = model.session()
answer = session.send("Hello")
next(answer)

def from_a_thread():
    while len(answer.tokens) < 20:
        time.sleep(0.001)
    signal.raise_signal(signal.SIGINT)

def right_after(module, name):
    function = getattr(module, name)

    def interrupted(*arguments):
        result = function(*arguments)
        setattr(module, name, function)
        signal.raise_signal(signal.SIGINT)
        return result

    setattr(module, name, interrupted)

faulthandler.dump_traceback_later(5, exit=True)  # instead of hanging
if sys.argv[2] == "thread":
    threading.Thread(target=from_a_thread).start()
else:
    right_after(os if sys.argv[2] == "read" else team, sys.argv[2])
try:
    for _ in answer:
        pass
except KeyboardInterrupt:
    pass
else:
    sys.exit("not interrupted")
for _ in range(5):
    assert (model.logits(prompt) == expected).all()
assert len(session.messages[1]["content"]) > 0
next(session.send("And?"))
model.close()
"""


@pytest.mark.parametrize("moment", ["thread", "read", "begin"])
def test_an_interrupt_at_any_moment(moment: str, tiny_path: Path) -> None:
    """One that another thread gets is seen only after the wait; one may come just as it ends."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny_path), moment],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# ---- what is refused ----


@pytest.mark.parametrize("earlier", [[], ["Hello"]])
def test_too_long_a_message_changes_nothing(earlier: list[str], demo: Model) -> None:
    with ondevice.load(demo.path, threads=1, context=150) as model:
        session, other = model.session(sampling=GREEDY), model.session(sampling=GREEDY)
        for text in earlier:
            assert "".join(session.send(text)) == "".join(other.send(text))
        position, messages = session.position, session.messages
        with pytest.raises(UsageError, match="tokens and the context only 150; shorten it"):
            session.send("word " * 200)
        assert (session.position, session.messages) == (position, messages)
        if earlier:
            assert "".join(session.regenerate()) == messages[-1]["content"]
        assert "".join(session.send("Who are you?")) == "".join(other.send("Who are you?"))
        assert session.position == other.position


def test_a_full_context_ends_the_answer(tiny_path: Path) -> None:
    with ondevice.load(tiny_path, threads=1, context=100) as model:
        model.ends[:] = 0
        session = model.session(sampling=GREEDY)
        answer = session.send("Hello")
        "".join(answer)
        assert answer.finish_reason == "length"
        assert session.position == 100
        with pytest.raises(UsageError, match="the context only 100"):
            session.send("And?")
        session.clear()
        assert begin(session.send("Hello")) == answer.tokens[:20]


@pytest.mark.parametrize("text", [None, 5, b"Hello"])
def test_a_message_is_text(text: Any, demo: Model) -> None:
    session = demo.session(sampling=GREEDY)
    with pytest.raises(UsageError, match="text is needed"):
        session.send(text)
    assert session.messages == []
    assert "".join(session.send("Hello")) == "".join(demo.session(sampling=GREEDY).send("Hello"))
