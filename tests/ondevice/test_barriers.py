"""Threads meet wherever they must: programs run in the worst orders that their barriers allow.

Between two barriers the threads may drift apart as far as they like. The worst cases are played
here without threads: in each stretch one thread goes through all of its operations before the
other starts, with one of the two holding every task of the work queues. A reader that needed a
barrier finds what the last step left behind, always and not once in thousands of steps.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest

import convert
import ondevice
from ondevice.kernels import layout
from ondevice.model import HEAD_ROWS, Model
from ondevice.state import State
from tools.random_checkpoint import Shape, write_checkpoint

THREADS = 2
TAKEN = 1 << 40  # a work cursor beyond all tasks
SHAPE = Shape(hidden=64, layers=2, interval=2, experts=8, experts_used=2, mtp=False)

operation = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


# Who goes ahead, and who has the tasks.
ORDERS = [(ahead, holder) for ahead in range(THREADS) for holder in range(THREADS)]
Order = tuple[int, int]


def run_apart(program: np.ndarray, step: np.ndarray, order: Order) -> None:
    """Run a program (operations, words), in each stretch one thread after the other."""
    ahead, holder = order
    program = program.copy()
    stretches = np.split(program, np.flatnonzero(program[:, layout.MEET]) + 1)
    for stretch in stretches:
        for thread in (ahead, 1 - ahead):
            stretch[:, layout.CURSOR] = 0 if thread == holder else TAKEN
            for record in stretch:
                call = operation(int(record[layout.KERNEL]))
                call(record.ctypes.data, step.ctypes.data, thread)


def logits_apart(model: Model, ids: np.ndarray, batch: int, order: Order) -> np.ndarray:
    """`Model.logits` with the threads as far apart as can be."""
    state = State(model.config, len(ids))
    step = model.step(state)
    rows = []
    for start in range(0, len(ids), batch):
        piece = np.ascontiguousarray(ids[start : start + batch])
        step[[layout.COUNT, layout.POSITION, layout.FIRST]] = len(piece), start, 0
        step[layout.TOKENS] = piece.ctypes.data
        run_apart(model._prefill, step, order)
        for row in range(0, len(piece), HEAD_ROWS):
            count = min(HEAD_ROWS, len(piece) - row)
            step[[layout.COUNT, layout.FIRST]] = count, row
            run_apart(model._head, step, order)
            width = model._logits.row_bytes
            values = model._logits.memory[: count * width].view(np.float32).reshape(count, -1)
            rows.append(values[:, : model.config.vocabulary].copy())
    return np.concatenate(rows)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_threads_meet_wherever_they_must(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert.convert(write_checkpoint(tmp_path / "hf", SHAPE), path, type=kind)
    ids = np.arange(24, dtype=np.int32) * 5 % SHAPE.vocabulary
    with ondevice.load(path, threads=THREADS) as model:
        expected = model.logits(ids.tolist())
        for batch in (1, 5, 24):
            for order in ORDERS:
                logits = logits_apart(model, ids, batch, order)
                wrong = np.flatnonzero((logits != expected).any(axis=1))
                assert not len(wrong), f"pieces of {batch}, (ahead, holder) {order}: {wrong[:1]}"
