"""Experts from a pool: the same bits as from the mapping, and what happens when reads fail."""

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import convert
import ondevice
from ondevice import bench, inspection, planning
from ondevice import disk as disk_module
from ondevice.config import Config
from ondevice.experts import READERS
from ondevice.gguf_file import GGUFFile
from ondevice.kernels import store
from ondevice.model import Model
from ondevice.planning import Options, planned
from ondevice.usage import BY_TRACES, Usage
from quant.errors import Error, ResourceError
from quant.format import Array
from tests.ondevice.gguf_builder import Shape as Built
from tests.ondevice.gguf_builder import encode_f16, tiny_model
from tools.random_checkpoint import Shape, write_checkpoint

pytestmark = pytest.mark.usefixtures("small_batches")

SHAPE = Shape(
    hidden=256, layers=8, experts=64, experts_used=6, expert_width=256, shared_width=256, mtp=False
)
TOKENS = np.random.default_rng(1).integers(0, 384, 700).tolist()
CONTEXT = 1024
Read = Callable[[int, int, int, int], int]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 8 layers with 64 experts each, in two sizes of slabs."""
    folder = tmp_path_factory.mktemp("experts")
    target = folder / "model.gguf"
    convert.convert(write_checkpoint(folder / "checkpoint", SHAPE), target, type="Q4_K_M")
    return target


@pytest.fixture(scope="module")
def mapped(path: Path) -> Iterator[Model]:
    with ondevice.load(path, threads=2, context=CONTEXT) as model:
        assert not model.plan.cached
        model.ends[:] = 0
        yield model


def budget(model: Model, pool: int) -> int:
    """Bytes that leave so many for the pool; too few for the file, with one thread as well."""
    needs = model.plan.needs
    return min(needs.dense + needs.working + pool, needs.mapped - (2 << 20))


def small(model: Model) -> int:
    """The smallest budget."""
    return budget(model, model.plan.needs.least_pool)


@contextlib.contextmanager
def cached(mapped: Model, memory: int, threads: int = 2) -> Iterator[Model]:
    with ondevice.load(mapped.path, threads=threads, context=CONTEXT, memory=memory) as model:
        assert model.plan.cached
        assert model.plan.total <= memory
        model.ends[:] = 0
        yield model


def bits(values: Array) -> list[int]:
    return [int(word) for word in values.view(np.uint32).ravel()]


# ---- the same bits ----


@pytest.fixture(scope="module")
def expected(mapped: Model) -> tuple[list[int], list[int], list[int]]:
    answer = list(mapped.generate(TOKENS[:40], max_tokens=40, temperature=0.0))
    return bits(mapped.logits(TOKENS[:9])), bits(mapped.logits(TOKENS)[-1]), answer


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_pool_of_any_size_gives_the_same_bits(
    share: float, threads: int, mapped: Model, expected: tuple[list[int], list[int], list[int]]
) -> None:
    needs = mapped.plan.needs
    pool = round(needs.least_pool + share * (needs.most_pool - needs.least_pool))
    with cached(mapped, budget(mapped, pool), threads) as model:
        for _ in range(2):  # from an empty pool, and from one that is warm
            assert bits(model.logits(TOKENS[:9])) == expected[0]
            assert bits(model.logits(TOKENS)[-1]) == expected[1]
            assert list(model.generate(TOKENS[:40], max_tokens=40, temperature=0.0)) == expected[2]
        assert model.expert_counts.misses > 0
        assert model.expert_counts.hits > 0


def test_a_chat_says_the_same(mapped: Model) -> None:
    def talk(model: Model) -> list[str]:
        session = model.session(sampling=ondevice.Sampling(temperature=0.7, seed=3))
        answers = []
        for text in ("Hello", "And then?"):
            completion = session.send(text)
            completion.max_tokens = min(completion.max_tokens, 30)
            answers.append("".join(completion))
        return answers

    with cached(mapped, small(mapped)) as model:
        assert talk(model) == talk(mapped)


@pytest.mark.parametrize("fused", [False, True])
def test_other_layouts_and_formats(fused: bool, tmp_path: Path) -> None:
    shape = Built(layers=5, experts=24, experts_used=3, expert_width=64)
    path = tiny_model(tmp_path / "m.gguf", shape=shape, fused=fused, encode=encode_f16)
    ids = list(range(60))
    with ondevice.load(path, threads=2, context=128) as model:
        logits, memory = bits(model.logits(ids)), small(model)
    with ondevice.load(path, threads=2, context=128, memory=memory) as model:
        assert model.plan.cached
        assert bits(model.logits(ids)) == logits


@pytest.mark.parametrize("memory", [0, 1])
def test_a_long_batch_gives_the_same_bits(
    memory: int, mapped: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = bits(mapped.logits(TOKENS))
    room = 1024 * mapped._forward.token_bytes
    budgets = {0: None, 1: small(mapped) + room}
    monkeypatch.setattr(planning, "BATCHES", (1024,))
    with ondevice.load(
        mapped.path, threads=2, context=CONTEXT, memory=budgets[memory], mtp="off"
    ) as model:
        assert (model.batch, model.plan.cached) == (1024, bool(memory))
        assert bits(model.logits(TOKENS)) == wanted
        assert bits(model.logits(TOKENS, batch=600)) == wanted


def test_a_batch_reads_each_expert_once(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        model.logits(TOKENS[:512])
        counts = model.expert_counts
        size = max(shelf.slab_bytes for shelf in model._pool._shelves.values())  # type: ignore[union-attr]
        touched = counts.hits + counts.late + counts.misses
        assert touched <= SHAPE.layers * SHAPE.experts
        assert counts.bytes_read <= (touched + 2 * SHAPE.layers) * size


def test_decoding_uses_what_is_there(mapped: Model) -> None:
    with cached(mapped, budget(mapped, mapped.plan.needs.most_pool)) as model:
        assert model.ahead is not None
        model.ahead.depth.fixed = 0  # guesses touch other experts
        list(model.generate(TOKENS[:600], max_tokens=20, temperature=0.0))
        before = model.expert_counts
        list(model.generate(TOKENS[:40], max_tokens=80, temperature=0.0))
        rate = (model.expert_counts - before).hit_rate
        assert rate > 0.9, rate


# ---- budgets ----


def test_a_budget_below_the_least(mapped: Model) -> None:
    least = mapped.plan.needs.least
    with pytest.raises(ResourceError, match=f"{least - 1:,} bytes is below the {least:,}"):
        ondevice.load(mapped.path, context=CONTEXT, memory=least - 1)
    ondevice.load(mapped.path, context=CONTEXT, memory=least).close()


def test_two_models_with_budgets(mapped: Model) -> None:
    want = list(mapped.generate(TOKENS[:40], max_tokens=20, temperature=0.0))
    with cached(mapped, small(mapped)) as one, cached(mapped, small(mapped) + (1 << 20)) as two:
        pieces = zip(
            one.generate(TOKENS[:40], max_tokens=20, temperature=0.0),
            two.generate(TOKENS[:40], max_tokens=20, temperature=0.0),
            strict=True,
        )
        assert list(pieces) == [(token, token) for token in want]


# ---- a file that changes ----


@pytest.fixture
def copied(path: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    return copy


@contextlib.contextmanager
def answering(copied: Path, mapped: Model) -> Iterator[tuple[Model, Iterator[int]]]:
    """A model with the smallest pool in the middle of an answer."""
    with ondevice.load(copied, threads=2, context=CONTEXT, memory=small(mapped)) as model:
        model.ends[:] = 0
        answer = model.generate(TOKENS[:40], max_tokens=600, temperature=0.0)
        next(answer)
        yield model, answer


def test_a_file_cut_while_it_is_read(copied: Path, mapped: Model) -> None:
    with answering(copied, mapped) as (_, answer):
        size = copied.stat().st_size
        os.truncate(copied, size // 2)
        with pytest.raises(Error, match=rf"had {size:,} bytes and has {size // 2:,}") as caught:
            list(answer)
        assert str(copied) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_overwritten_in_place(copied: Path, mapped: Model) -> None:
    with answering(copied, mapped) as (model, answer):
        with copied.open("r+b") as file:
            file.seek(1 << 20)
            file.write(bytes(100))
        with pytest.raises(Error, match="was written to"):
            list(answer)
        with pytest.raises(Error, match="was written to"):  # and so does every request after it
            model.logits([1])


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_whose_name_is_gone(how: str, copied: Path, mapped: Model, tmp_path: Path) -> None:
    want = list(mapped.generate(TOKENS[:40], max_tokens=100, temperature=0.0))
    with answering(copied, mapped) as (model, _):
        if how == "deleted":
            copied.unlink()
        else:
            other = tmp_path / "other"
            other.write_bytes(bytes(1000))
            other.replace(copied)
        assert list(model.generate(TOKENS[:40], max_tokens=100, temperature=0.0)) == want


# ---- a disk that fails or is slow ----


@contextlib.contextmanager
def disk(model: Model, read: Read) -> Iterator[None]:
    """Has readers call `read` instead of the system."""
    assert model._pool is not None
    words = model._pool._store
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
    )
    callback = kind(read)
    real = int(words[store.READ_AT])
    words[store.READ_AT] = ctypes.cast(callback, ctypes.c_void_p).value or 0
    try:
        yield
    finally:
        time.sleep(0.1)  # reads under way end
        words[store.READ_AT] = real


def really(file: int, address: int, nbytes: int, offset: int) -> int:
    memory = (ctypes.c_char * nbytes).from_address(address)
    return os.preadv(file, [memory], offset)


def test_a_read_error_ends_the_answer_and_nothing_else(mapped: Model) -> None:
    want = list(mapped.generate(TOKENS[:40], max_tokens=20, temperature=0.0))
    with cached(mapped, small(mapped)) as model:
        calls = 0

        def failing(file: int, address: int, nbytes: int, offset: int) -> int:
            nonlocal calls
            calls += 1
            return -1 if calls > 30 else really(file, address, nbytes, offset)

        answer = model.generate(TOKENS[:40], max_tokens=500, temperature=0.0)
        next(answer)
        with disk(model, failing), pytest.raises(Error, match=r"bytes at byte [\d,]+ cannot be"):
            list(answer)
        assert list(model.generate(TOKENS[:40], max_tokens=20, temperature=0.0)) == want


def test_a_session_goes_on_after_a_read_error(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        session, other = model.session(), mapped.session()
        session.sampling = other.sampling = ondevice.Sampling(temperature=0.0)
        first = session.send("Hello")
        first.max_tokens = 30
        assert next(first) is not None
        with disk(model, lambda *_: -1), pytest.raises(Error, match="cannot be read"):
            list(first)
        again, expected = session.regenerate(), other.send("Hello")
        again.max_tokens = expected.max_tokens = 30
        assert "".join(again) == "".join(expected)


def test_a_prefill_that_fails_leaves_the_state(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        with disk(model, lambda *_: -1), pytest.raises(Error, match="cannot be read"):
            model.logits(TOKENS[:100])
        assert bits(model.logits(TOKENS[:9])) == bits(mapped.logits(TOKENS[:9]))


def test_a_slow_disk_only_takes_longer(mapped: Model) -> None:
    want = list(mapped.generate(TOKENS[:9], max_tokens=4, temperature=0.0))
    with cached(mapped, small(mapped)) as model:

        def slow(file: int, address: int, nbytes: int, offset: int) -> int:
            time.sleep(0.002)
            return really(file, address, nbytes, offset)

        with disk(model, slow):
            assert list(model.generate(TOKENS[:9], max_tokens=4, temperature=0.0)) == want
        assert model.expert_counts.waiting > 0


def test_cancelling_during_a_miss(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        held = threading.Event()
        go_on = threading.Event()

        def stuck(file: int, address: int, nbytes: int, offset: int) -> int:
            held.set()
            go_on.wait(20)
            return really(file, address, nbytes, offset)

        session = model.session()
        completion = session.send("Hello " * 30)
        with disk(model, stuck):

            def stop() -> None:
                held.wait(20)
                session.cancel()
                time.sleep(0.2)
                go_on.set()

            thread = threading.Thread(target=stop)
            thread.start()
            started = time.perf_counter()
            assert "".join(completion) == ""
            assert completion.finish_reason == "cancel"
            assert time.perf_counter() - started < 10
            thread.join()
        assert bits(model.logits(TOKENS[:9])) == bits(mapped.logits(TOKENS[:9]))


def handles() -> tuple[int, int]:
    """Open files and threads of this process."""
    gc.collect()
    return sum(1 for _ in Path("/dev/fd").iterdir()), threading.active_count()


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_is_left(closed: bool, mapped: Model) -> None:
    before = handles()
    model = ondevice.load(mapped.path, threads=2, context=CONTEXT, memory=small(mapped))
    list(model.generate(TOKENS[:40], max_tokens=5))
    if closed:
        model.close()
    del model
    assert handles() == before


# ---- memory that comes and goes ----


def test_a_pool_shrinks_and_grows_again(mapped: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    want = list(mapped.generate(TOKENS[:300], max_tokens=30, temperature=0.0))
    with cached(mapped, budget(mapped, mapped.plan.needs.most_pool // 2)) as model:
        pool = model._pool
        assert pool is not None
        least = sum(pool._least(shelf) for shelf in pool._shelves.values())
        monkeypatch.setattr("ondevice.model.LOOK_SECONDS", 0.0)
        before = pool.slabs
        for free in (100 << 20, 300 << 20, 250 << 20, 0, 0, 4 << 30, 100 << 20, 4 << 30):
            monkeypatch.setattr("ondevice.model.available", lambda free=free: free)
            assert list(model.generate(TOKENS[:300], max_tokens=30, temperature=0.0)) == want
            assert least <= pool.slabs <= before
        assert pool.slabs == before
        assert pool.given_bytes == 0


def test_shrinking_gives_the_system_its_memory_back(mapped: Model) -> None:
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    with cached(mapped, budget(mapped, mapped.plan.needs.most_pool)) as model:
        for start in range(0, 600, 100):
            model.logits(TOKENS[start : start + 100])
        pool = model._pool
        assert pool is not None
        full = resident()
        given = pool.shrink(30 << 20)
        assert given >= 25 << 20
        assert full - resident() > given // 2
        assert bits(model.logits(TOKENS[:9])) == bits(mapped.logits(TOKENS[:9]))


def test_the_next_start_is_warm(mapped: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = budget(mapped, mapped.plan.needs.most_pool // 2)
    with cached(mapped, memory) as model:
        list(model.generate(TOKENS[:40], max_tokens=200, temperature=0.0))
    with cached(mapped, memory) as model:
        model._warming.join(30)
        assert not model._warming.is_alive()
        assert model.expert_counts.misses == 0
        want = bits(mapped.logits(TOKENS[:9]))
        assert bits(model.logits(TOKENS[:9])) == want
        warm = model.expert_counts
    monkeypatch.setattr("ondevice.usage.load", lambda name, config: Usage.none(config))
    with cached(mapped, memory) as model:
        model.logits(TOKENS[:9])
        assert warm.bytes_read < 0.85 * model.expert_counts.bytes_read


def test_a_prompt_notes_what_its_tokens_would_one_by_one(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        assert model._pool is not None
        usage = model._pool.usage
        model.logits(TOKENS[:90])
        uses, ended, unknown = usage.uses.copy(), usage.ended.copy(), usage.open.copy()
        assert uses.sum() == ended.sum() + unknown.sum() == 90 * SHAPE.layers * SHAPE.experts_used
    with cached(mapped, small(mapped)) as model:
        assert model._pool is not None
        usage = model._pool.usage
        model.logits(TOKENS[:90], batch=1)
        assert (usage.uses == uses).all()
        assert (usage.ended == ended).all()
        assert (usage.open == unknown).all()


def test_decoding_notes_how_fast_the_disk_is(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        pool = model._pool
        assert pool is not None
        model.logits(TOKENS[:512])
        assert not pool.usage.disk.any()
        before = model.expert_counts
        list(model.generate(TOKENS[:4], max_tokens=20, temperature=0.0))
        counts = model.expert_counts - before
        nbytes, nanoseconds = pool.usage.disk
        assert 0 < nbytes <= counts.bytes_read
        assert nbytes > 0.8 * counts.bytes_read
        assert 0 < nanoseconds * 1e-9 <= counts.reading + 1e-9


def test_decoding_notes_what_computing_takes(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        runner = bench.Runner(model, 4, 64)
        runner.prefill()
        before = model.expert_counts
        seconds = runner.decode()
        waited = (model.expert_counts - before).waiting / 2
        assert model._pool is not None
        noted = model._pool.usage.computing_seconds(2)
        assert noted == pytest.approx((seconds - waited) / 64, rel=0.2)


def test_a_request_ends_the_warming(mapped: Model) -> None:
    with cached(mapped, budget(mapped, mapped.plan.needs.most_pool)) as model:
        model.logits([1])
        model._warming.join(5)
        assert not model._warming.is_alive()


# ---- what is told ----


def test_an_answer_knows_what_came_from_disk(mapped: Model) -> None:
    assert mapped.complete(TOKENS[:40], max_tokens=3).limit.endswith("the whole model is in memory")
    with cached(mapped, small(mapped)) as model:
        completion = model.complete(TOKENS[:40], max_tokens=20)
        assert "".join(completion) is not None
        timings = completion.timings
        assert 0 <= timings["expert_hit_rate"] < 1
        assert timings["disk_bytes"] > 0
        assert timings["disk_wait_seconds"] > 0
        assert "limits the speed" in completion.limit


def test_the_bench_counts_the_disk(mapped: Model) -> None:
    with cached(mapped, small(mapped)) as model:
        found = bench.run(model, prompt=32, generate=8, repeat=1)
    assert 0 < found["expert_hit_rate"] < 1
    assert found["disk_bytes_per_token"] > 0
    assert found["disk_bandwidth"] > 0
    assert 0 < found["disk_wait_fraction"] < 1
    limit = found["disk_bandwidth"] / found["disk_bytes_per_token"]
    assert found["decode_limit_tokens_per_second"] <= limit * 1.001
    assert "from disk" not in bench.report(found)
    assert "of experts were in memory" in bench.report(found)


def test_a_plan_and_a_forecast(mapped: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "READINGS", 4)
    monkeypatch.setattr(disk_module, "WINDOW", 0.02)
    memory = small(mapped)
    found = inspection.predict(mapped.path, memory, context=CONTEXT)
    assert found["experts_from"] == "disk"
    assert found["total"] == sum(found["parts"].values()) <= memory
    assert 0 <= found["expert_hit_rate"] < 1
    assert found["tokens_per_second"] > 0
    assert "in all" in inspection.prediction_table(found)
    whole = inspection.predict(mapped.path, mapped.plan.needs.mapped + (1 << 20), context=CONTEXT)
    assert whole["experts_from"] == "memory"
    assert whole["disk_bytes_per_token"] == 0
    assert whole["tokens_per_second"] > found["tokens_per_second"]
    with pytest.raises(ResourceError, match="below the"):
        inspection.predict(mapped.path, 1 << 20)


def test_a_forecast_of_a_model_that_never_ran_tries_it_out(
    mapped: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inspection, "READINGS", 1)
    monkeypatch.setattr(disk_module, "bandwidth", lambda *_: 2e9)
    monkeypatch.setattr("ondevice.usage.cache_root", lambda: tmp_path)
    monkeypatch.setattr("ondevice.usage.ENOUGH_BYTES", 1)
    told: list[tuple[int, int]] = []
    predict = partial(inspection.predict, mapped.path, small(mapped), context=CONTEXT)
    found = predict(progress=lambda *numbers: told.append(numbers))
    assert told[-1][0] == told[-1][1] >= 48 and told == sorted(told)
    assert found["hit_rate_from"] == "by this model's last runs"
    assert found["disk_bandwidth"] != 2e9  # also what the readers got
    told.clear()
    assert predict(progress=lambda *numbers: told.append(numbers))["tokens_per_second"] > 0
    assert not told
    monkeypatch.setattr("ondevice.usage.cache_root", lambda: tmp_path / "other")
    monkeypatch.setattr("ondevice.budget.available", lambda: 1 << 20)
    assert predict(progress=lambda *numbers: told.append(numbers))["hit_rate_from"] == BY_TRACES
    assert not told


def test_a_forecast_knows_what_earlier_runs_got_from_the_disk(
    mapped: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "READINGS", 1)
    monkeypatch.setattr(disk_module, "bandwidth", lambda *_: 2e9)

    def load(name: str, config: Config) -> Usage:
        known = Usage.none(config)
        known.disk[:] = nbytes, nbytes  # 1 GB/s for each reader
        return known

    monkeypatch.setattr("ondevice.usage.load", load)
    found = {}
    for nbytes in (0, 1 << 40):
        found[nbytes] = inspection.predict(mapped.path, small(mapped), context=CONTEXT)
    assert found[0]["disk_bandwidth"] == pytest.approx(2e9)
    both = (2e9 * READERS * 1e9) ** 0.5
    assert found[1 << 40]["disk_bandwidth"] == pytest.approx(both)
    assert found[1 << 40]["tokens_per_second"] > found[0]["tokens_per_second"]


def test_a_tight_budget_shortens_a_context_that_nobody_asked_for(path: Path) -> None:
    with GGUFFile.open(path) as file:
        found = planned(file, Options(path))
        assert found.context == 8192
        needs = found.plan.needs
        tight = needs.working + needs.dense + needs.least_pool - needs.keys_and_values // 4
        assert planned(file, Options(path, memory=tight)).context == 4096
        with pytest.raises(ResourceError):
            planned(file, Options(path, memory=tight, context=8192))
