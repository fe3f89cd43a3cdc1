"""Dense products cut into tasks: every row once, whatever the chunk and the threads."""

import numpy as np
import pytest

from ondevice.kernels.formats import READERS
from ondevice.kernels.layout import FEW, WORD, word
from ondevice.kernels.linear import linear, rows_of_task
from ondevice.kernels.simd import store_i64
from quant.format import Array
from tests.ondevice.kernels.harness import (
    PRODUCT_ERROR,
    Rows,
    bits,
    gaussian_blocks,
    multiply,
    product_error,
    random_records,
    record,
    run,
    run_record,
    step_record,
    three_integers,
)


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_chunks_and_threads_change_no_bit(name: str) -> None:
    random = np.random.default_rng(1)
    rows, columns, tokens = 45, 256, 5
    raw = gaussian_blocks(name, rows, columns, random)
    records = random_records(READERS[name].activation, tokens, columns, random)
    expected = multiply(name, raw, columns, records)
    assert product_error(name, raw, records, expected) <= PRODUCT_ERROR
    for chunk in (8, 16, 40, 45, 64):
        for threads in (1, 3):
            out = Rows(tokens, rows)
            run(
                linear,
                *(raw, raw.strides[0], rows, columns, READERS[name].multiply.address),
                *(records, records.strides[0], out, chunk),
                tasks=-(-rows // chunk),
                count=tokens,
                threads=threads,
                scratch=READERS[name].scratch_bytes(columns),
            )
            assert bits(out.values) == bits(expected), f"chunks of {chunk}, {threads} threads"


@pytest.mark.parametrize("starts", [[0], [0, 32, 40], [0, 1, 2, 44]])
@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1])
def test_few_tokens_take_runs(starts: list[int], tokens: int) -> None:
    """And more tokens the chunks, though there is a table of runs."""
    random = np.random.default_rng(2)
    rows, columns, chunk, name = 45, 256, 20, "Q4_K"
    raw = gaussian_blocks(name, rows, columns, random)
    records = random_records(READERS[name].activation, tokens, columns, random)
    runs = np.array([len(starts), *starts, rows], np.int32)
    out = Rows(tokens, rows)
    program = record(
        linear,
        *(raw, raw.strides[0], rows, columns, READERS[name].multiply.address),
        *(records, records.strides[0], out, chunk, runs),
        tasks=-(-rows // chunk),
        few=len(starts),
    )
    run_record(program, count=tokens, scratch=READERS[name].scratch_bytes(columns))
    assert bits(out.values) == bits(multiply(name, raw, columns, records))
    out.check()


def test_a_task_is_its_run() -> None:
    runs = np.array([3, 0, 32, 40, 45], np.int32)
    found = [rows_of(task, 45, 20, runs, count=1) for task in range(3)]
    assert found == [(0, 32), (32, 8), (40, 5)]
    assert [rows_of(task, 45, 20, runs, count=FEW + 1) for task in range(3)] == [
        (0, 20), (20, 20), (40, 5)
    ]  # fmt: skip


@three_integers
def look_up(words: int, runs: int, step: int) -> None:
    start, used = rows_of_task(step, word(words, 0), word(words, 1), word(words, 2), runs)
    store_i64(words, start)
    store_i64(words + WORD, used)


def rows_of(task: int, rows: int, chunk: int, runs: Array, count: int) -> tuple[int, int]:
    words, step = np.array([task, rows, chunk]), step_record(count=count)
    look_up(words.ctypes.data, runs.ctypes.data, step.ctypes.data)
    return int(words[0]), int(words[1])
