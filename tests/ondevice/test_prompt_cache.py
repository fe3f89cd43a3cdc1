"""What was read once is found again, gives the same bits, and takes no more room than allowed."""

import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import ondevice
from ondevice import prompt_cache
from ondevice.generate import Completion
from ondevice.model import Model
from ondevice.prompt_cache import PromptCache
from ondevice.sampling import Sampling
from ondevice.state import State
from quant.folders import private_folder

GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
DOCUMENT = "A long document, of which much could be said. " * 30


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def answer(model: Model, tokens: list[int], count: int = 12) -> Completion:
    completion = model.complete(tokens, GREEDY, count)
    list(completion.ids())
    return completion


@pytest.fixture
def cached(endless: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The random model with a prompt cache of its own."""
    monkeypatch.setattr(endless, "prompt_cache", PromptCache(endless, tmp_path / "prompts"))
    return endless


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")


def test_a_prompt_is_read_once(cached: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(1000)
    first = answer(cached, tokens)
    second = answer(cached, tokens)
    assert (first.prefilled_tokens, second.prefilled_tokens) == (1000, 1000 - 768)
    assert second.tokens == first.tokens
    assert np.array_equal(second._state.memory, first._state.memory)
    assert answer(cached, tokens[:700] + tokens_of(300, 1)).prefilled_tokens == 1000 - 512
    assert answer(cached, tokens[:500] + tokens_of(500, 1)).prefilled_tokens == 1000
    monkeypatch.setattr(cached, "prompt_cache", None)
    other = tokens[:700] + tokens_of(300, 1)
    fresh = answer(cached, other)
    assert fresh.prefilled_tokens == 1000
    monkeypatch.undo()


@pytest.mark.parametrize("kv", ["i12", "q8_0"])
def test_every_length_gives_the_same_bits(kv: str, tiny_path: Path, tmp_path: Path) -> None:
    with ondevice.load(tiny_path, threads=1, kv=kv) as model:
        model.ends[:] = 0
        cache = PromptCache(model, tmp_path / "prompts")
        tokens = tokens_of(1300)
        for length in (1300, 257, 512, 513, 768, 769, 1025, 1281, 1300):
            model.prompt_cache = None
            fresh = answer(model, tokens[:length])
            model.prompt_cache = cache
            found = answer(model, tokens[:length])
            assert found.tokens == fresh.tokens
            assert np.array_equal(found._state.memory, fresh._state.memory)
        assert found.prefilled_tokens == 1300 - 1280


def test_short_prompts_leave_nothing(cached: Model, tmp_path: Path) -> None:
    answer(cached, tokens_of(256))
    session = cached.session(sampling=GREEDY)
    for _ in range(5):
        list(islice(session.send("A short message. " * 5).ids(), 5))
    assert folder_bytes(tmp_path / "prompts") == 0


def test_sessions_share_a_system_message(cached: Model) -> None:
    first = cached.session(DOCUMENT, GREEDY)
    begun = first.send("Hello")
    list(islice(begun.ids(), 5))
    head = len(cached.tokenize(DOCUMENT))
    for text in ("Hello", "Another question, which is longer. " * 9):
        found = cached.session(DOCUMENT, GREEDY).send(text)
        assert found.prompt_tokens - found.prefilled_tokens >= head - 256 > 256
    assert list(islice(cached.session(DOCUMENT, GREEDY).send("Hello").ids(), 5)) == begun.tokens[:5]


def test_a_message_found_in_the_middle_of_a_conversation(cached: Model) -> None:
    for expected in (False, True):
        session = cached.session(sampling=GREEDY)
        list(islice(session.send("Hello").ids(), 1))
        session.cancel()
        answer = session.send(DOCUMENT)
        assert (answer.prefilled_tokens < 512) == expected
        list(islice(answer.ids(), 5))
        session.cancel()
        assert_fresh(session)


def assert_fresh(session: ondevice.Session) -> None:
    session._settle()
    model = session.model
    state = State(model.config, model.context)
    list(Completion(model, state, session._tokens[: session.position], GREEDY, 1).ids())
    assert np.array_equal(session._state.memory, state.memory)


def test_another_process_and_a_copy_of_the_model(tiny_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_path.read_bytes())
    read = []
    for path, kv in ((tiny_path, "i12"), (copy, "i12"), (tiny_path, "q8_0")):
        with ondevice.load(path, threads=1, kv=kv) as model:
            model.prompt_cache = PromptCache(model, tmp_path / "prompts")
            read.append(answer(model, tokens_of(1000), 1).prefilled_tokens)
    assert read == [1000, 1000 - 768, 1000]


def test_other_kernels_read_for_themselves(
    endless: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, folder = tokens_of(1000), tmp_path / "prompts"
    read = []
    for kernels in ("these", "those", "these"):
        monkeypatch.setattr(prompt_cache, "source_hash", lambda kernels=kernels: kernels)
        monkeypatch.setattr(endless, "prompt_cache", PromptCache(endless, folder))
        read.append(answer(endless, tokens).prefilled_tokens)
    assert read == [1000, 1000, 1000 - 768]


def test_damaged_files_are_not_used(cached: Model, tmp_path: Path) -> None:
    tokens = tokens_of(1000)
    expected = answer(cached, tokens).tokens
    folder = tmp_path / "prompts"
    for path in sorted(folder.iterdir()):
        if path.name == "lock":
            continue
        raw = path.read_bytes()
        for bad in (b"", raw[:20], raw[:-1], raw[:-7] + b"x" + raw[-6:], b"y" + raw[1:]):
            path.write_bytes(bad)
            found = answer(cached, tokens)
            assert found.tokens == expected
            assert answer(cached, tokens).prefilled_tokens <= 1000 - 512
    session = cached.session(sampling=GREEDY)
    list(islice(session.send("Hello").ids(), 5))
    for path in folder.glob("*.keys"):
        path.write_bytes(b"nothing")
    list(islice(session.send(DOCUMENT).ids(), 5))
    assert_fresh(session)


def test_the_budget_holds_and_what_is_used_stays(
    endless: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prompts"
    cache = PromptCache(endless, folder)
    monkeypatch.setattr(endless, "prompt_cache", cache)
    favourite = tokens_of(600)
    answer(endless, favourite, 1)
    cache.budget = 4 * folder_bytes(folder)
    for seed in range(1, 20):
        answer(endless, tokens_of(600, seed), 1)
        assert folder_bytes(folder) <= cache.budget
        assert answer(endless, favourite, 1).prefilled_tokens == 600 - 512
    assert answer(endless, tokens_of(600, 1), 1).prefilled_tokens == 600
    assert answer(endless, tokens_of(600, 19), 1).prefilled_tokens == 600 - 512
    answer(endless, tokens_of(6000), 1)  # too long for the budget
    assert folder_bytes(folder) <= cache.budget
    assert answer(endless, favourite, 1).prefilled_tokens == 600 - 512


def test_never_more_than_a_tenth_of_what_is_free(
    cached: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 50_000

    monkeypatch.setattr(prompt_cache.shutil, "disk_usage", lambda _: Usage)
    answer(cached, tokens_of(600), 1)
    assert folder_bytes(tmp_path / "prompts") == 0


def refuse_folder(_: Path) -> bool:
    return False


def fail_to_write(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["folder", "write", "lock"])
def test_without_room_it_does_nothing(
    trouble: str, endless: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, tuple[str, Callable[..., object]]] = {
        "folder": ("private_folder", refuse_folder),
        "write": ("StateFolder.save", fail_to_write),
        "lock": ("FileLock", fail_to_write),
    }
    name, function = names[trouble]
    monkeypatch.setattr(f"ondevice.prompt_cache.{name}", function)
    cache = PromptCache(endless, tmp_path / "prompts")
    monkeypatch.setattr(endless, "prompt_cache", cache)
    for _ in range(2):
        assert answer(endless, tokens_of(600), 1).prefilled_tokens == 600


def test_it_is_off_unless_asked_for(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "cache_root", lambda: tmp_path / "cache")
    with ondevice.load(tiny_path, threads=1) as model:
        assert model.prompt_cache is None
    with ondevice.load(tiny_path, threads=1, prompt_cache=True) as model:
        answer(model, tokens_of(600), 1)
    assert folder_bytes(tmp_path / "cache" / "prompts") > 0
    assert private_folder(tmp_path / "cache" / "prompts")
