"""An open model: what it refuses, how many may use it at once, and that nothing is left of it."""

import errno
import functools
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ondevice
from ondevice.model import Model
from ondevice.planning import BATCHES
from ondevice.sampling import Sampling
from ondevice.state import cache_bytes
from quant.errors import Error, ResourceError, UsageError
from tests.gguf_rewrite import Change, Changed, Keys, Tensors, rewrite

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
PROMPT = [5, 80, 200, 31, 7]


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    return list(model.generate(prompt, max_tokens=count, temperature=0.0))


def message_of(call: Callable[[], object], kind: type[Error]) -> str:
    """The message of the error that a call ends with, known to be one line."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def least_of(message: str) -> int:
    """The bytes that a refused budget would have had to be."""
    return int(message.split(" that this model needs")[0].split()[-1].replace(",", ""))


def handles() -> tuple[int, int]:
    """Open file descriptors and threads of this process."""
    gc.collect()
    return sum(1 for _ in Path("/dev/fd").iterdir()), threading.active_count()


# ---- opening ----


def test_demo_opens_by_name(demo: Model) -> None:
    with ondevice.load("demo", threads=1) as again:
        assert isinstance(again, ondevice.Model)
        assert again.path == demo.path
        assert 0 < again.compile_seconds < again.load_seconds


def test_a_path_may_be_text(tiny_path: Path, tiny: Model) -> None:
    with ondevice.load(str(tiny_path), threads=1) as model:
        assert greedy(model, PROMPT, 5) == greedy(tiny, PROMPT, 5)


def test_names_of_the_package() -> None:
    assert {ondevice.Model.__name__, ondevice.Session.__name__, ondevice.Sampling.__name__} == {
        "Model",
        "Session",
        "Sampling",
    }
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        _ = ondevice.Modell


@pytest.mark.parametrize("threads", [0, -1, 65, 1000, 10**30, 2.5, "2"])
def test_threads_out_of_range(threads: Any, tiny_path: Path) -> None:
    with pytest.raises((UsageError, ResourceError), match="thread") as caught:
        ondevice.load(tiny_path, threads=threads).close()
    assert "\n" not in str(caught.value)


def test_threads_are_all_cores_unless_told(tiny_path: Path) -> None:
    with ondevice.load(tiny_path) as model:
        assert 1 <= model.threads <= (os.cpu_count() or 1)
    with ondevice.load(tiny_path, threads=3) as model:
        assert model.threads == 3


@pytest.mark.parametrize("context", [0, -1, 8193, 2.5, "5"])
def test_a_context_out_of_range(context: Any, tiny_path: Path) -> None:
    message = message_of(lambda: ondevice.load(tiny_path, context=context), UsageError)
    assert message == f"the context is {context}; this model takes 1 to 8192 tokens"


def test_the_smallest_context(tiny_path: Path) -> None:
    with ondevice.load(tiny_path, threads=1, context=1) as model:
        assert model.context == 1
        assert model.logits([3]).shape == (1, 384)
        assert len(greedy(model, [3], 9)) <= 1
        assert "2 tokens" in message_of(lambda: model.logits([3, 4]), UsageError)


def test_a_memory_budget(tiny_path: Path) -> None:
    def needed(**options: Any) -> int:
        opened = functools.partial(ondevice.load, tiny_path, threads=1, memory=1, **options)
        message = message_of(opened, ResourceError)
        assert "a memory budget of 1 bytes" in message
        return least_of(message)

    assert needed(context=16) < needed()
    ondevice.load(tiny_path, threads=1, memory=needed()).close()
    with pytest.raises(ResourceError):
        ondevice.load(tiny_path, threads=1, memory=needed() - 1)


def test_a_memory_budget_counts_the_buffers(demo: Model) -> None:
    message = message_of(lambda: ondevice.load(demo.path, memory=1), ResourceError)
    buffers = demo._forward.nbytes(BATCHES[-1])
    assert least_of(message) >= buffers + demo.plan.needs.dense + demo.plan.needs.least_pool


def test_a_memory_budget_is_a_number(tiny_path: Path) -> None:
    options: dict[str, Any] = {"memory": "2G"}
    assert "memory" in message_of(lambda: ondevice.load(tiny_path, **options), Error)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "missing.gguf"
    assert message_of(lambda: ondevice.load(path), Error) == f"{path}: no such file"


def test_a_failed_opening_leaves_nothing(tiny_path: Path) -> None:
    before = handles()
    for options in ({"context": 0}, {"memory": 1}, {"threads": 1000}):
        with pytest.raises(Error):
            ondevice.load(tiny_path, **options)
    assert handles() == before


# ---- damaged files ----


def damaged(name: str, damage: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(tensors: Tensors, keys: Keys) -> Changed:
        for tensor in tensors.values():
            data = damage(tensor.data.copy()) if tensor.name == name else tensor.data
            yield tensor.name, data, tensor.tensor_type

    return change


def with_nan(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[:100] = np.nan
    return values


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "blk.0.ssm_a",
        "blk.0.attn_qkv.weight",
        "blk.0.ffn_down_exps.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
        "blk.1.attn_q.weight",
        "blk.1.attn_k.weight",
        "blk.1.attn_v.weight",
    ],
)
def test_weights_that_are_not_finite(name: str, tiny_path: Path, tmp_path: Path) -> None:
    """Whatever the tensor, no answer comes of it: the error names the file."""
    path = rewrite(tiny_path, tmp_path / "damaged.gguf", damaged(name, with_nan))

    def use() -> None:
        with ondevice.load(path, threads=1) as model:
            greedy(model, list(range(384)), 3)

    message = message_of(use, Error)
    assert message.startswith(f"{path}: ")
    assert "not finite" in message


def test_a_tokenizer_larger_than_the_embedding(tiny_path: Path, tmp_path: Path) -> None:
    change = damaged("token_embd.weight", lambda values: values[:-1])
    path = rewrite(tiny_path, tmp_path / "damaged.gguf", change)
    message = message_of(lambda: ondevice.load(path, threads=1), Error)
    assert message.startswith(f"{path}: ")
    assert "383" in message and "384" in message


# ---- logits ----


@pytest.mark.parametrize("batch", [0, -1, 2049, 2.5])
def test_a_batch_out_of_range(batch: Any, tiny: Model) -> None:
    message = message_of(lambda: tiny.logits(PROMPT, batch=batch), UsageError)
    assert message == f"batch is {batch}; it must be from 1 to {tiny.batch}"


def test_logits_of_nothing_and_of_a_full_context(tiny_path: Path) -> None:
    with ondevice.load(tiny_path, threads=1, context=600) as model:
        assert model.logits([]).shape == (0, 384)
        tokens = np.random.default_rng(3).integers(0, 384, 600).tolist()
        whole = model.logits(tokens)
        assert whole.shape == (600, 384)
        assert np.array_equal(model.logits(tokens[:550]), whole[:550])
        assert "601 tokens" in message_of(lambda: model.logits([*tokens, 1]), UsageError)


def test_text_and_back(demo: Model) -> None:
    text = "It was <|im_end|> a bright day — größer, 你好 🙂"
    plain, special = demo.tokenize(text), demo.tokenize(text, special=True)
    assert demo.detokenize(plain) == text
    assert demo.detokenize(special) == text.replace("<|im_end|>", "")
    assert demo.detokenize([]) == ""


# ---- many at once ----


def test_two_threads_with_two_prompts(demo: Model) -> None:
    prompts = [demo.tokenize("It was a bright day, and"), demo.tokenize("Holmes said that")]
    alone = [greedy(demo, prompt, 60) for prompt in prompts]

    def answer(prompt: list[int]) -> list[list[int]]:
        return [greedy(demo, prompt, 60) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(answer, prompts))
    assert together == [[tokens] * 5 for tokens in alone]


def test_eight_threads_do_all_there_is(demo: Model) -> None:
    def work(number: int) -> tuple[object, ...]:
        prompt = demo.tokenize(f"On day {number} of the case") * (number + 1)
        session = demo.session(sampling=GREEDY)
        answers = ["".join(session.send(f"{text} {number}?")) for text in ("Who is", "Where is")]
        logits = demo.logits(prompt)
        sampled = list(demo.generate(prompt, max_tokens=20, temperature=2.0, seed=number))
        return answers, logits.tobytes(), sampled, demo.detokenize(sampled)

    alone = [work(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == alone


def test_two_models_at_once(demo: Model, tiny: Model, tiny_path: Path) -> None:
    prompt = demo.tokenize("It was a bright day, and")
    of_demo, of_tiny = greedy(demo, prompt, 30), greedy(tiny, PROMPT, 30)
    with ondevice.load(tiny_path, threads=2) as other:
        running = demo.generate(prompt, max_tokens=30, temperature=0.0)
        first = next(running)
        assert greedy(other, PROMPT, 30) == of_tiny
        with ThreadPoolExecutor(2) as pool:
            rest = pool.submit(list, running)
            again = pool.submit(greedy, other, PROMPT, 30)
    assert [first, *rest.result()] == of_demo
    assert again.result() == of_tiny


# ---- closing ----


def test_nothing_is_left_of_thirty_models(tiny_path: Path) -> None:
    before = handles()
    for _ in range(30):
        with ondevice.load(tiny_path, threads=2) as model:
            greedy(model, PROMPT, 2)
            assert model._reading is not None
            model._reading.join()
            assert threading.active_count() == before[1] + 2
    del model
    assert handles() == before


DROPPED = """
import gc, os, sys, threading, time
import ondevice

def handles():
    gc.collect()
    return len(os.listdir("/dev/fd")), threading.active_count()

ondevice.load(sys.argv[1], threads=1).close()
before = handles()
for _ in range(20):
    ondevice.load(sys.argv[1], threads=2)
deadline = time.monotonic() + 5
while handles() != before and time.monotonic() < deadline:
    time.sleep(0.01)
assert handles() == before, (before, handles())
"""


def test_a_model_may_be_dropped_without_closing(tiny_path: Path) -> None:
    """Its workers must neither stay nor wake up in memory that is gone."""
    done = subprocess.run(
        [sys.executable, "-c", DROPPED, str(tiny_path)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_no_pipes_left(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe", refuse)
    assert "open files" in message_of(lambda: ondevice.load(tiny_path, threads=1), ResourceError)


def test_closing_lets_go_of_the_file(tiny_path: Path) -> None:
    before = handles()
    model = ondevice.load(tiny_path, threads=2)
    assert handles() > before
    model.close()
    assert handles() == before


def test_a_closed_model_says_so(tiny_path: Path) -> None:
    model = ondevice.load(tiny_path, threads=1)
    model.ends[:] = 0
    session = model.session()
    running = model.generate(PROMPT, max_tokens=100)
    next(running)
    model.close()
    model.close()
    for call in (
        lambda: model.logits(PROMPT),
        lambda: greedy(model, PROMPT, 1),
        lambda: list(session.send("Hello")),
        lambda: list(running),
    ):
        assert message_of(call, Error) == f"{tiny_path}: the model is closed"


def test_closing_while_another_thread_generates(tiny_path: Path) -> None:
    model = ondevice.load(tiny_path, threads=2)
    model.ends[:] = 0
    begun = threading.Event()

    def tokens() -> Iterator[int]:
        for token in model.generate(PROMPT):
            begun.set()
            yield token

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: list(tokens()))
        assert begun.wait(10)
        model.close()
        assert "the model is closed" in message_of(answer.result, Error)


def test_a_forked_process_must_open_its_own(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    assert "forked; open it again here" in message_of(lambda: tiny.logits(PROMPT), Error)


# ---- kinds of cache ----


def test_an_unknown_kind_of_cache(tiny_path: Path) -> None:
    message = message_of(lambda: ondevice.load(tiny_path, kv="q4_0"), UsageError)
    assert message == "kv is 'q4_0'; it must be one of i12, i16, q8_0"


@pytest.mark.parametrize("kv", ["i16", "q8_0"])
def test_another_kind_of_cache(kv: str, demo: Model) -> None:
    """Close to the usual one, of another size, and whatever the batch and threads the same."""
    ids = demo.tokenize("It was a dark night, and the rain fell in torrents. " * 6)
    with ondevice.load("demo", threads=1, kv=kv) as model:
        logits = model.logits(ids)
        for batch in (1, 7):
            assert (model.logits(ids, batch=batch) == logits).all()
    reference = demo.logits(ids)
    assert 0 < abs(logits - reference).max() < 0.02 * abs(reference).max()


def test_sizes_of_caches(demo: Model) -> None:
    packed, whole, halved = (cache_bytes(demo.config, 1024, kv) for kv in ("i12", "i16", "q8_0"))
    assert 0.75 * whole < packed < 0.77 * whole
    assert halved < 0.55 * whole
