"""Runs a plan: read rows, transform, encode, write, a few pieces at a time.

A tensor is cut into pieces of at most PIECE weights (whole rows). A small window of pieces is in
flight: worker threads read and encode them, this thread writes them in order, so memory stays at a
few pieces per thread whatever the size of a tensor, and the bytes do not depend on the number of
threads. Encoders and NumPy release the GIL.
"""

import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from convert.header import padding
from convert.partial import check_space, partial_file
from convert.plan import Plan, PlannedTensor
from convert.shard import Source, read_rows
from quant.errors import Error, Interrupted

PIECE = 1 << 20
"""Weights per piece, 4 MiB as float32: bounds memory, and still means tens of ms of encoding."""
PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: bytes of the checkpoint, bytes per second, seconds left."""

    done_bytes: int
    total_bytes: int
    tensor: str
    rate: float
    eta: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did; peak_memory is the process's largest resident size, 0 if unknown."""

    output: Path
    bytes: int
    tensors: int
    bits_per_weight: float
    seconds: float
    peak_memory: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows first to last of one tensor, and the encoded bytes once they exist."""

    tensor: PlannedTensor
    starts: list[int]
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    data: bytes
    source_bytes: int
    zero: bool


def _pieces(tensor: PlannedTensor) -> Iterator[_Piece]:
    step = max(1, PIECE // tensor.shape[-1])
    starts = [0, *accumulate(segment.rows.count for segment in tensor.output.segments)]
    for first in range(0, tensor.rows, step):
        yield _Piece(tensor, starts, first, min(first + step, tensor.rows))


def _gather(piece: _Piece) -> tuple[NDArray[np.float32], int]:
    """The piece's rows (rows, columns) as they are in the checkpoint, and the bytes read."""
    tensor = piece.tensor
    out = np.empty((piece.last - piece.first, tensor.shape[-1]), np.float32)
    row, nbytes = piece.first, 0
    while row < piece.last:
        index = bisect_right(piece.starts, row) - 1
        segment, source = tensor.output.segments[index], tensor.sources[index]
        stop = min(piece.last, piece.starts[index + 1])
        part = out[row - piece.first : stop - piece.first]
        begin = segment.rows.first + row - piece.starts[index]
        read_rows(source, begin, part)
        if not np.isfinite(part).all():
            raise _not_finite(source)
        nbytes += source.nbytes // source.rows * len(part)
        row = stop
    return out, nbytes


def _not_finite(source: Source) -> Error:
    """The message about NaN or Inf in `source`: where the first one is and how many there are."""
    step = max(1, PIECE // source.columns)
    first, count = -1, 0
    for row in range(0, source.rows, step):
        part = np.empty((min(step, source.rows - row), source.columns), np.float32)
        read_rows(source, row, part)
        bad = np.flatnonzero(~np.isfinite(part))
        if len(bad) and first < 0:
            first = row * source.columns + int(bad[0])
        count += len(bad)
    index = tuple(int(axis) for axis in np.unravel_index(first, source.shape))
    return Error(
        f"{source.shard.path.name}: tensor {source.name} holds {count} values that are NaN or "
        f"infinite, the first at {list(index)}"
    )


def _encode(piece: _Piece) -> _Encoded:
    values, nbytes = _gather(piece)
    values = piece.tensor.output.transform(values)
    encoder = piece.tensor.format.quantize
    assert encoder is not None, "every format of a recipe can be written"
    return _Encoded(encoder(values).tobytes(), nbytes, not values.any())


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _in_order(
    plan: Plan, pool: ThreadPoolExecutor, window: int
) -> Iterator[tuple[_Piece, _Encoded]]:
    """Every piece of the plan, encoded, in file order; at most `window` of them in memory."""
    pending: deque[tuple[_Piece, Future[_Encoded]]] = deque()
    for tensor in plan.tensors:
        for piece in _pieces(tensor):
            pending.append((piece, pool.submit(_encode, piece)))
            if len(pending) >= window:
                ready, future = pending.popleft()
                yield ready, future.result()
    while pending:
        ready, future = pending.popleft()
        yield ready, future.result()


class _Meter:
    """Calls the progress callback a few times a second."""

    def __init__(self, total: int, callback: Callable[[Progress], None] | None) -> None:
        self.total, self.callback = total, callback
        self.done = 0
        self.started = time.monotonic()
        self.shown = 0.0

    def add(self, nbytes: int, tensor: str) -> None:
        self.done += nbytes
        now = time.monotonic()
        if self.callback is None or (
            now - self.shown < PROGRESS_SECONDS and self.done < self.total
        ):
            return
        self.shown = now
        rate = self.done / max(now - self.started, 1e-9)
        eta = (self.total - self.done) / max(rate, 1e-9)
        self.callback(Progress(self.done, self.total, tensor, rate, eta))


def _write(plan: Plan, file: IO[bytes], threads: int, meter: _Meter) -> list[str]:
    """Write everything; the names of matrices that are all zero are returned."""
    file.write(plan.header)
    zeros: list[str] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="convert")
    try:
        zero = True
        for piece, encoded in _in_order(plan, pool, 2 * threads + 1):
            file.write(encoded.data)
            zero = zero and encoded.zero
            if piece.last == piece.tensor.rows:
                file.write(bytes(padding(piece.tensor.nbytes)))
                if zero and len(piece.tensor.shape) > 1:
                    zeros.append(piece.tensor.name)
                zero = True
            meter.add(encoded.source_bytes, piece.tensor.name)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return zeros


def write_plan(
    plan: Plan,
    output: Path,
    threads: int,
    progress: Callable[[Progress], None] | None = None,
    compiling: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the planned file; it appears under its name only when it is complete."""
    from quant.compiling import Compilation
    from quant.encoders import encoders_of

    started = time.monotonic()
    check_space(output, plan.nbytes)
    try:
        with Compilation(encoders_of(tensor.format for tensor in plan.tensors), compiling):
            pass
        with partial_file(output, plan.nbytes) as file:
            zeros = _write(plan, file, threads, _Meter(plan.source_bytes, progress))
            assert file.tell() == plan.nbytes
    except KeyboardInterrupt:
        raise Interrupted(f"{output}: stopped, nothing was written; run it again") from None
    notes = plan.notes
    if zeros:
        notes += (f"only zeros, perhaps a failed download: {', '.join(zeros[:8])}",)
    return Report(
        output=output,
        bytes=plan.nbytes,
        tensors=len(plan.tensors),
        bits_per_weight=plan.bits_per_weight,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        notes=notes,
    )
