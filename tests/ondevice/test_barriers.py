"""Nothing begins before what it needs: programs run in the worst orders that their groups allow.

Until a barrier, tasks may be done in any order, but for those of a chain. The worst orders are
played here without threads. A reader that needed a barrier finds what the last step left behind,
always and not once in thousands of steps.
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

SHAPE = Shape(hidden=64, layers=2, interval=2, experts=8, experts_used=2, mtp=False)
ORDERS = ("forwards", "backwards", "last operation first", "shuffled")

operation = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


def task_count(record: np.ndarray, step: np.ndarray) -> int:
    few = record[layout.FEW_TASKS] and step[layout.COUNT] <= layout.FEW
    tasks = int(record[layout.FEW_TASKS if few else layout.TASKS])
    if record[layout.PER_TOKEN]:
        tasks *= int(step[layout.COUNT])
    if record[layout.TIMES]:
        tasks *= ctypes.c_int64.from_address(int(record[layout.TIMES])).value
    return tasks


def run_apart(program: np.ndarray, step: np.ndarray, order: str) -> None:
    """Run a program (operations, words), the tasks of each group in the given order."""
    scratch = int(step[layout.SCRATCH])
    for group in np.split(program, np.flatnonzero(program[:, layout.THEN] == layout.BARRIER) + 1):
        if not len(group):
            continue
        chains = np.split(group, np.flatnonzero(group[:-1, layout.THEN] == layout.BESIDE) + 1)
        tasks = []
        for chain in chains:
            counts = {task_count(record, step) for record in chain}
            assert len(counts) == 1, "the operations of a chain have as many tasks"
            tasks.append([(chain, task) for task in range(counts.pop())])
        if order == "last operation first":
            tasks.reverse()
        flat = [pair for pairs in tasks for pair in pairs]
        if order == "backwards":
            flat.reverse()
        elif order == "shuffled":
            np.random.default_rng(len(flat)).shuffle(flat)  # type: ignore[arg-type]
        for chain, task in flat:
            for record in chain:
                call = operation(int(record[layout.KERNEL]))
                call(record.ctypes.data, step.ctypes.data, task, scratch)


def logits_apart(model: Model, ids: np.ndarray, batch: int, order: str) -> np.ndarray:
    """`Model.logits` with the tasks of each group in the given order."""
    state = State(model.config, len(ids), model.kv)
    step = model.step(state)
    rows = []
    for start in range(0, len(ids), batch):
        piece = np.ascontiguousarray(ids[start : start + batch])
        step[[layout.COUNT, layout.POSITION, layout.FIRST]] = len(piece), start, 0
        step[layout.TOKENS] = piece.ctypes.data
        run_apart(model._forward.prefill.records, step, order)
        for row in range(0, len(piece), HEAD_ROWS):
            count = min(HEAD_ROWS, len(piece) - row)
            step[[layout.COUNT, layout.FIRST]] = count, row
            run_apart(model._forward.head.records, step, order)
            logits = model._forward.logits
            width = logits.row_bytes
            values = logits.memory[: count * width].view(np.float32).reshape(count, -1)
            rows.append(values[:, : model.config.vocabulary].copy())
    return np.concatenate(rows)


@pytest.mark.parametrize(("kind", "kv"), [("F32", "i12"), ("Q8_0", "q8_0")])
def test_nothing_begins_before_what_it_needs(kind: str, kv: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert.convert(write_checkpoint(tmp_path / "hf", SHAPE), path, type=kind)
    ids = np.arange(24, dtype=np.int32) * 5 % SHAPE.vocabulary
    with ondevice.load(path, threads=2, kv=kv) as model:
        expected = model.logits(ids.tolist())
        for batch in (1, 5, 24):
            for order in ORDERS:
                logits = logits_apart(model, ids, batch, order)
                wrong = np.flatnonzero((logits != expected).any(axis=1))
                assert not len(wrong), f"pieces of {batch}, {order}: {wrong[:1]}"
